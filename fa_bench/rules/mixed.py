"""Mixed synapses."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from fa_bench.errors import CoverageError, OptionError
from fa_bench.mechanisms.edge.pathways import BackwardContext, FeedbackPathway, feedback_gradient
from fa_bench.mechanisms.edge.rule import LayerContext
from fa_bench.mechanisms.feedback_options import init_option
from fa_bench.mechanisms.feedback_tensors import feedback_tensor
from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.rules.pfa import ExpandingRule, ProductFeedback
from fa_bench.utils.lazy import torch
from fa_bench.utils.sampling import sample

if TYPE_CHECKING:
    from torch import Tensor

#: Kind of synapse -> the tensor with its feedback; for PFA, this is a product.
TENSORS = {"pfa": "B R", "fa": "F", "kp": "K"}
KINDS = tuple(TENSORS)


class MixedFeedback(FeedbackPathway):
    """Feedback e_in = g E, where masks determine which entries of E come from B R, from F and from K.

    Args:
        kinds: the kinds of synapses in the layer, from `KINDS`; only their tensors exist.
    """

    def __init__(self, kinds: tuple[str, ...]) -> None:
        self.kinds = kinds
        self.learned = tuple(name for kind, name in (("pfa", "R"), ("kp", "K")) if kind in kinds)
        self.follows = "K" if "kp" in kinds else None
        self.always_needed = bool(self.learned)
        self.description = " and ".join(TENSORS[kind] for kind in kinds) + ", each restricted to its mask"
        self._product = ProductFeedback()

    def context(self, layer: Any, x: Tensor) -> BackwardContext:
        gradients = ()
        if "pfa" in self.kinds:
            gradients += feedback_gradient(layer, "R", first_hop=feedback_tensor(layer, "B"))
        if "kp" in self.kinds:
            gradients += feedback_gradient(layer, "K")
        return self.effective_context(layer, x, gradients)

    def effective(self, layer: Any) -> Tensor:
        return self.masked_sum(layer, self.kinds)

    def masked_sum(self, layer: Any, kinds: tuple[str, ...]) -> Tensor:
        """The feedback E restricted to the synapses of the given kinds; all other entries are zero."""
        total = torch.zeros_like(layer.weight, requires_grad=False)
        for kind in kinds:
            tensor = self._product.effective(layer) if kind == "pfa" else feedback_tensor(layer, TENSORS[kind])
            total.addcmul_(feedback_tensor(layer, f"mask_{kind}"), tensor)
        return total


@ALGORITHMS.register("mixed")
@dataclasses.dataclass(eq=False)
class Mixed(ExpandingRule):
    """A mixture of PFA, FA and KP synapses. With the default proportions, the angle between the direct synapses and W matches
    that in the brain.

    The rule comes from the discussion and appendix B of Li and Benna 2024.

    The rule computes e_in = g E with E = m_pfa (B R) + m_fa F + m_kp K, entry by entry in the weight's layout. Each entry is of
    one kind, which is sampled once with the probabilities p = ``pfa``, f = ``fa``, k = ``kp`` and encoded in the masks m. The
    fixed B and the learned R, with gradient ēᵀ x and ē = g B, are those of `pfa` (M = ``ratio`` x O). F is fixed, and K has the
    gradient of W. The initialisers of F, K and R are ``f_init``, ``k_init`` and ``r_init``.

    The gradients of R and K are not masked: R has the gradient of PFA, and K has the gradient of W, although only the entries
    under K's mask propagate an error. With decay, B R therefore approaches B Bᵀ W and K approaches W in all entries, as in `pfa`
    and `kp`. Let λ = 1/ratio, and let r be the ratio of the norms of F and W over the entries of FA, and ρ the cosine between F
    and W over these entries. ρ is 0 unless W aligns with F in these entries, as it does in FA. The following equation then gives
    the angle between E and W:

        cos = (p + k + f ρ r) / √(p (1 + λ) + k + f r²)

    The direct synapses, m_fa F + m_kp K, connect the same neurons as W, whereas PFA connects them through the intermediate
    population. The following equation gives the angle between the direct synapses and W:

        cos = (k + f ρ r) / √(k + f r²)

    The method `direct_feedback` returns the direct synapses of a layer. Strictly speaking, p, f and k in these formulas are each
    kind's share of ‖W‖². These shares deviate from the fractions of entries if W becomes larger where the feedback is accurate.

    The paper gives no fractions. The defaults follow from appendix B of the paper, for r = 1 and ρ = 0. According to this
    appendix, 31 % of connected pairs are connected in both directions, with a correlation of k / (k + f) = 0.36. The correlation
    over all pairs is 0.2, which corresponds to an angle of 78 degrees. A kind with fraction 0 has no tensors; if one kind has
    fraction 1, the rule is `pfa`, `fa` or `kp`. Masks are sampled entry by entry, so a layer has these fractions only
    approximately.
    """

    equations = (
        r"e_{\text{in}} &= g E,\quad E = m_{\text{pfa}} \odot (B R) + m_{\text{fa}} \odot F + m_{\text{kp}} \odot K",
        r"\nabla_R &= \bar{e}^\top x,\quad \bar{e} = g B",
        r"\nabla_K = \nabla_W &= g^\top x",
    )

    pfa: float = option(0.69, "fraction of the synapses that learn as in PFA", minimum=0, maximum=1)
    fa: float = option(0.2, "fraction of the synapses that are fixed as in FA", minimum=0, maximum=1)
    kp: float = option(0.11, "fraction of the synapses that learn as in KP", minimum=0, maximum=1)
    f_init: str = init_option("F", can_copy=True)
    k_init: str = init_option("K", can_copy=True)

    def check(self) -> None:
        if abs(self.pfa + self.fa + self.kp - 1) > 1e-6:
            raise OptionError(
                "pfa",
                f"={self.pfa:g}, fa={self.fa:g}, kp={self.kp:g} sum to {self.pfa + self.fa + self.kp:g}; "
                "the fractions must sum to 1",
            )

    def first(self, outputs: int, between: int, seed: int) -> Tensor:
        return sample((outputs, between), "lecun_uniform", seed)

    def pathway(self, layer: LayerContext) -> FeedbackPathway:
        fractions = torch.tensor([getattr(self, kind) for kind in KINDS], dtype=torch.float64)
        kinds = tuple(kind for kind in KINDS if getattr(self, kind))
        if "pfa" in kinds:
            self.put_product(layer)
        if "fa" in kinds:
            layer.put("F", self.f_init)
        if "kp" in kinds:
            layer.put("K", self.k_init)
        weight: Tensor = layer.module.weight
        generator = torch.Generator().manual_seed(layer.tensor_seed("kinds"))
        sampled = torch.multinomial(fractions, weight.numel(), replacement=True, generator=generator).view(weight.shape)
        for kind in kinds:
            layer.put(f"mask_{kind}", sampled == KINDS.index(kind))
        return MixedFeedback(kinds)

    def direct_feedback(self, layer: str) -> Tensor:
        """The direct synapses m_fa F + m_kp K of a layer, in the weight's layout and detached."""
        self.effective_feedback(layer)
        module = self._layers[layer]
        if not isinstance(module.pathway, MixedFeedback):
            raise CoverageError(f"layer '{layer}' has no feedback of rule '{self.name}' (excluded, or the last one)")
        return module.pathway.masked_sum(module, tuple(kind for kind in module.pathway.kinds if kind != "pfa"))
