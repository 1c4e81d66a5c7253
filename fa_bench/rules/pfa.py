"""Product feedback alignment."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from fa_bench.errors import missing_method
from fa_bench.mechanisms.edge.pathways import BackwardContext, FeedbackPathway, feedback_gradient
from fa_bench.mechanisms.edge.product import effective_product
from fa_bench.mechanisms.edge.rule import EdgeRule, LayerContext
from fa_bench.mechanisms.feedback_options import density_option, init_option
from fa_bench.mechanisms.feedback_tensors import feedback_tensor
from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.utils.lazy import torch
from fa_bench.utils.memory_limits import require_option_memory
from fa_bench.utils.sampling import sample

if TYPE_CHECKING:
    from torch import Tensor


class ProductFeedback(FeedbackPathway):
    """Feedback e_in = g B R with a fixed B and a learned R.

    Shapes: see `fa_bench.mechanisms.edge.product`.
    """

    learned = ("R",)
    always_needed = True
    description = "B and R"

    def context(self, layer: Any, x: Tensor) -> BackwardContext:
        first, second = feedback_tensor(layer, "B"), layer.learned["R"].tensor
        if second.dim() == 2:
            return BackwardContext(first, second_hop=second, gradients=feedback_gradient(layer, "R"))
        # In a convolution, the product is computed once instead of for every pixel; at a ratio of ten, this is ten times less
        # work.
        return self.effective_context(layer, x, feedback_gradient(layer, "R", first_hop=first))

    def effective(self, layer: Any) -> Tensor:
        groups, transposed = getattr(layer, "groups", 1), getattr(layer, "transposed", False)
        return effective_product(feedback_tensor(layer, "B"), feedback_tensor(layer, "R"), groups, transposed)

    def needs_step(self, layer: Any) -> bool:
        return feedback_tensor(layer, "mask") is not None

    def after_step(self, layer: Any) -> None:
        if (mask := feedback_tensor(layer, "mask")) is not None:
            feedback_tensor(layer, "R").mul_(mask)


@dataclasses.dataclass(eq=False)
class ProductRule(EdgeRule):
    """Base class of rules with product feedback. Subclasses define the number of intermediate units with `between` and sample B
    with `first`."""

    r_init: str = init_option("R")

    def between(self, outputs: int) -> int:
        """The number M of units in the intermediate population for the given number of outputs."""
        raise missing_method(self, "between")

    def check_size(self, layer: LayerContext, entries: int) -> None:
        """Check the size of a layer's feedback before B and R are created. Subclasses may raise an OptionError.

        Args:
            layer: the layer.
            entries: the number of entries of B and R together.
        """

    def first(self, outputs: int, between: int, seed: int) -> Tensor:
        """A sample of B for one group, (outputs, between), in float32 on the CPU."""
        raise missing_method(self, "first")

    def r_density(self) -> float:
        """The fraction of the entries of R that are not zero."""
        return 1.0

    def put_product(self, layer: LayerContext) -> None:
        """Store B, R and the mask of R in the layer."""
        module: Any = layer.module
        weight, groups = module.weight, getattr(module, "groups", 1)
        transposed = getattr(module, "transposed", False)
        outputs = weight.shape[1] if transposed else len(weight) // groups
        between = self.between(outputs)
        self.check_size(layer, groups * between * (outputs + weight.numel() // (groups * outputs)))
        seed = layer.tensor_seed("B")
        first = torch.cat([self.first(outputs, between, seed + group) for group in range(groups)])
        layer.put("B", first)
        shape = [len(weight), between, *weight.shape[2:]] if transposed else [groups * between, *weight.shape[1:]]
        layer.put("R", self.r_init, self.r_density(), shape=shape)
        layer.put_mask(self.r_density(), seeded_by="R", shape=shape)

    def pathway(self, layer: LayerContext) -> FeedbackPathway:
        self.put_product(layer)
        return ProductFeedback()


@dataclasses.dataclass(eq=False)
class ExpandingRule(ProductRule):
    """Base class of the rules in which the size of the intermediate population is proportional to the number of the layer's
    outputs."""

    ratio: float = option(10.0, "expansion ratio: units of the intermediate population per unit of the layer's output", above=0)

    def between(self, outputs: int) -> int:
        return max(round(self.ratio * outputs), 1)

    def check_size(self, layer: LayerContext, entries: int) -> None:
        require_option_memory("ratio", self.ratio, entries, f"the feedback of layer '{layer.path}'")  # it is sampled on the CPU


@dataclasses.dataclass(eq=False)
class SemiOrthogonalRule(ProductRule):
    """Base class of the rules in which B has orthonormal rows or, if B has more rows than columns, orthonormal columns."""

    def first(self, outputs: int, between: int, seed: int) -> Tensor:
        gaussian = sample((max(outputs, between), min(outputs, between)), "normal_fan_out", seed)
        q, r = torch.linalg.qr(gaussian.double())
        columns = (q * r.diagonal().sign()).to(gaussian.dtype)
        return columns if between < outputs else columns.t()


@ALGORITHMS.register("pfa")
@dataclasses.dataclass(eq=False)
class PFA(ExpandingRule):
    """Product feedback alignment: the error passes through a fixed random matrix and then through a learned one.

    The rule is given by eqs 4-6 of Li and Benna 2024.

    With ē = g B and e_in = ē R, the error reaches the layer's input through a population of M = ``ratio`` x O units. B (O, M) is
    fixed, random and uniform with variance 1/M, so that E[B Bᵀ] = I. R (M, I, K...; ``r_init``) learns with the optimizer,
    learning rate, momentum and decay of W from its own local gradient ēᵀ x (for convolutions, the weight gradient for the input x
    and the error ē). This gradient is Bᵀ times the gradient of W, so with SGD, B R approaches B Bᵀ W as the initial values decay,
    for example because of a large weight decay in the first epoch (``optimizer.first_epoch_weight_decay``). The angle between W
    and B R is then arctan √(1/ratio), and the norm of B R is √(1 + 1/ratio) times that of W. If ``density`` d is below 1, fixed
    masks set entries of B and R to zero. The remaining entries of B then have the variance 1/(M d), whereas those of R are not
    rescaled, and the angle is arctan √(1/(ratio d)).

    Our choices: the paper's formula for the gain of B lacks a square root, which we add. As in the paper's code, the mask of R is
    reapplied after every update, to R but not to its momentum.
    """

    equations = (
        r"\bar{e} &= g B,\quad e_{\text{in}} = \bar{e} R,\quad \mathbb{E}[B B^\top] = I",
        r"\nabla_W &= g^\top x",
        r"\nabla_R &= \bar{e}^\top x",
    )

    density: float = density_option("B and of R", "masks")

    def first(self, outputs: int, between: int, seed: int) -> Tensor:
        return sample((outputs, between), "lecun_uniform", seed, self.density).div_(self.density**0.5)

    def r_density(self) -> float:
        return self.density
