"""Mixed synapses."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from fa_bench.config.options import option
from fa_bench.config.registries import ALGORITHMS
from fa_bench.draws import INITIALISERS, draw
from fa_bench.errors import CoverageError, OptionError
from fa_bench.lazy import torch
from fa_bench.mechanisms.carriers import Carrier, learning
from fa_bench.mechanisms.carry import Carry
from fa_bench.mechanisms.edge import Site
from fa_bench.rules.pfa import Product, ProductRule

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("pfa", "fa", "kp")


class Mix(Carrier):
    """The error goes through a tensor whose entries come from B R, from F and from K, as the masks say.

    Args:
        kinds: those of KINDS that the layer has; only their tensors exist.
    """

    def __init__(self, kinds: tuple[str, ...]) -> None:
        self.kinds = kinds
        self.learned = tuple(name for kind, name in (("pfa", "R"), ("kp", "K")) if kind in kinds)
        self.follows = "K" if "kp" in kinds else None
        self.always = bool(self.learned)
        self.tensors = " and ".join({"pfa": "B R", "fa": "F", "kp": "K"}[kind] for kind in kinds) + ", each where its mask is"
        self._product = Product()

    def carry(self, layer: Any, x: Tensor) -> Carry:
        learn = ()
        if "pfa" in self.kinds:
            learn += learning(layer, "R", hop=layer._buffers["feedback_B"])
        if "kp" in self.kinds:
            learn += learning(layer, "K")
        return self.carry_effective(layer, x, learn)

    def effective(self, layer: Any) -> Tensor:
        return self.summed(layer, self.kinds)

    def summed(self, layer: Any, kinds: tuple[str, ...]) -> Tensor:
        """What the synapses of these kinds carry; zero where a synapse is of another."""
        buffers, total = layer._buffers, torch.zeros_like(layer.weight, requires_grad=False)
        for kind in kinds:
            carried = self._product.effective(layer) if kind == "pfa" else layer.feedback_F if kind == "fa" else layer.feedback_K
            total.addcmul_(buffers[f"feedback_mask_{kind}"], carried.detach())
        return total


@ALGORITHMS.register("mixed")
@dataclasses.dataclass(eq=False)
class Mixed(ProductRule):
    """Synapses by PFA, FA and KP mixed, so that the weight angle is that of the brain.

    The discussion and appendix B of Li and Benna 2024.

    e_in = g E with E = m_pfa (B R) + m_fa F + m_kp K, entry by entry in the weight's layout. Each entry is of one kind, drawn
    once with the probabilities p = ``pfa``, f = ``fa``, k = ``kp``; the masks m say which. B, fixed, and R, learned by ēᵀ x with
    ē = g B, are those of `pfa` (M = ``ratio`` x O); F is fixed; K learns by the gradient of W; ``f_init``, ``k_init`` and
    ``r_init`` draw them.

    Neither learned gradient is masked: R's is PFA's own, and K's is that of W, of which only the entries under K's mask ever
    carry an error. So with decay B R and K approach W everywhere, as in `pfa` and `kp`. Then, with λ = 1/ratio, and r the norm
    ratio and ρ the cosine of F to W over FA's entries (0 unless W aligns itself to F there, as in FA), the angle of E to W is

        cos = (p + k + f ρ r) / √(p (1 + λ) + k + f r²)

    and that of the direct synapses alone, m_fa F + m_kp K, which is what one finds between the neurons that W connects, is

        cos = (k + f ρ r) / √(k + f r²)

    since a synapse of PFA's kind goes by way of the other population; `direct_feedback` gives those of a layer. Strictly p, f
    and k in it are each kind's share of ‖W‖², which departs from its fraction where W comes to prefer the true kinds.

    Choices: the paper gives no fractions. These are those of its appendix B, for r = 1 and ρ = 0: 31 % of connected pairs are
    connected both ways, and over those the correlation is k / (k + f) = 0.36; over all pairs it is 0.2, an angle of 78 degrees.
    A kind with the fraction 0 has no tensors; with the fraction 1 the rule is `pfa`, `fa` or `kp`. Masks are drawn entry by
    entry, so that a layer has each kind in about its fraction.
    """

    pfa: float = option(0.69, "fraction of the synapses that are PFA's", minimum=0, maximum=1)
    fa: float = option(0.2, "fraction of the synapses that are FA's", minimum=0, maximum=1)
    kp: float = option(0.11, "fraction of the synapses that are KP's", minimum=0, maximum=1)
    f_init: str = option("xavier_uniform", "initialiser of F", choices=[*INITIALISERS, "copy_w"])
    k_init: str = option("xavier_uniform", "initialiser of K", choices=[*INITIALISERS, "copy_w"])

    def check(self) -> None:
        if abs(self.pfa + self.fa + self.kp - 1) > 1e-6:
            raise OptionError("pfa", f"={self.pfa:g}, fa={self.fa:g}, kp={self.kp:g} sum to {self.pfa + self.fa + self.kp:g}; "
                                     "the fractions must sum to 1")

    def first(self, outputs: int, between: int, seed: int) -> Tensor:
        return draw((outputs, between), "lecun_uniform", seed)

    def carrier(self, site: Site) -> Carrier:
        fractions = torch.tensor([getattr(self, kind) for kind in KINDS], dtype=torch.float64)
        kinds = tuple(kind for kind in KINDS if getattr(self, kind))
        if "pfa" in kinds:
            self.put_path(site)
        if "fa" in kinds:
            site.put("F", self.f_init)
        if "kp" in kinds:
            site.put("K", self.k_init)
        weight: Tensor = site.layer.weight
        generator = torch.Generator().manual_seed(site.tensor_seed("kinds"))
        drawn = torch.multinomial(fractions, weight.numel(), replacement=True, generator=generator).view(weight.shape)
        for kind in kinds:
            site.keep(f"mask_{kind}", (drawn == KINDS.index(kind)).to(weight))
        return Mix(kinds)

    def direct_feedback(self, layer: str) -> Tensor:
        """m_fa F + m_kp K of a layer, in the weight's layout, detached: the synapses that answer a weight one to one."""
        self.effective_feedback(layer)
        found = self._layers[layer]
        if not isinstance(found.carrier, Mix):
            raise CoverageError(f"rule '{self.name}' puts no feedback into layer '{layer}' (excluded, or the last one)")
        return found.carrier.summed(found, tuple(kind for kind in found.carrier.kinds if kind != "pfa"))
