"""Product feedback alignment."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from fa_bench.config.options import option
from fa_bench.config.registries import ALGORITHMS
from fa_bench.draws import INITIALISERS, draw
from fa_bench.lazy import torch
from fa_bench.mechanisms.carriers import Carrier, learning
from fa_bench.mechanisms.carry import Carry
from fa_bench.mechanisms.edge import EdgeRule, Site
from fa_bench.mechanisms.product import multiplied_out

if TYPE_CHECKING:
    from torch import Tensor


class Product(Carrier):
    """The error goes through B, fixed, and then through R, learned.

    Shapes: see `fa_bench.mechanisms.product`.
    """

    learned = ("R",)
    always = True
    tensors = "B and R"

    def carry(self, layer: Any, x: Tensor) -> Carry:
        first, second = layer._buffers["feedback_B"], layer._parameters["feedback_R"]
        if second.dim() == 2:
            return Carry(first, second=second, learn=learning(layer, "R"))
        # In a convolution the product is made once, not at every pixel: ten times less work at a ratio of ten.
        return self.carry_effective(layer, x, learning(layer, "R", hop=first))

    def effective(self, layer: Any) -> Tensor:
        groups, transposed = getattr(layer, "groups", 1), getattr(layer, "transposed", False)
        return multiplied_out(layer.feedback_B, layer.feedback_R.detach(), groups, transposed)

    def after_step(self, layer: Any) -> None:
        if (mask := layer._buffers["feedback_mask"]) is not None:
            layer.feedback_R.detach().mul_(mask)


@dataclasses.dataclass(eq=False)
class ProductRule(EdgeRule):
    """What PFA and PFA-o share; subclasses draw B in `first`."""

    ratio: float = option(10.0, "expansion ratio: units of the population in between, over units of the layer's output", above=0)
    r_init: str = option("xavier_uniform", "initialiser of R", choices=list(INITIALISERS))

    def first(self, outputs: int, between: int, seed: int) -> Tensor:
        """B of one group, (outputs, between), float32 on the CPU."""
        raise NotImplementedError

    def r_density(self) -> float:
        """Fraction of R that is not zero."""
        return 1.0

    def put_path(self, site: Site) -> None:
        """Draw B, R and the mask of R."""
        layer: Any = site.layer
        weight, groups = layer.weight, getattr(layer, "groups", 1)
        transposed = getattr(layer, "transposed", False)
        outputs = weight.shape[1] if transposed else len(weight) // groups
        between = max(round(self.ratio * outputs), 1)
        seed = site.tensor_seed("B")
        first = torch.cat([self.first(outputs, between, seed + group) for group in range(groups)])
        site.keep("B", first.to(weight))
        shape = [len(weight), between, *weight.shape[2:]] if transposed else [groups * between, *weight.shape[1:]]
        site.put("R", self.r_init, self.r_density(), shape=shape)
        site.put_mask(self.r_density(), seeded_by="R", shape=shape)

    def carrier(self, site: Site) -> Carrier:
        self.put_path(site)
        return Product()


@ALGORITHMS.register("pfa")
@dataclasses.dataclass(eq=False)
class PFA(ProductRule):
    """Product feedback alignment: the error in two hops, a fixed random one and a learned one.

    Eqs 4-6 of Li and Benna 2024.

    ē = g B and e_in = ē R: the error reaches the layer's input by way of a population of M = ``ratio`` x O units. B (O, M) is
    fixed and random with E[B Bᵀ] = I: uniform with variance 1/M. R (M, I, K...; ``r_init``) learns with W's optimizer, learning
    rate, momentum and decay by its own local gradient ēᵀ x (for convolutions the weight gradient of x and ē). Since that is Bᵀ
    times the gradient of W, W approaches B R as the initial values decay: a weight decay that is large in the first epoch alone
    (``optimizer.first_epoch_weight_decay``) brings that about. The angle between W and B R then is arctan √(1/ratio) and their
    norm ratio √(1 + 1/ratio). ``density`` d below 1 puts masks, drawn once, on B (whose variance becomes 1/(M d)) and on R
    (whose variance is not compensated); the angle then is arctan √(1/(ratio d)).

    Choices: the paper's gain of B lost a square root; R's mask is applied again after every update, to R and not to its
    momentum, as in the code behind the paper.
    """

    density: float = option(1.0, "fraction of B and of R that is not zero (masks drawn once)", above=0, maximum=1)

    def first(self, outputs: int, between: int, seed: int) -> Tensor:
        return draw((outputs, between), "lecun_uniform", seed, self.density).div_(self.density**0.5)

    def r_density(self) -> float:
        return self.density
