"""What a layer's forward pass hands to its backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from fa_bench.errors import CoverageError
from fa_bench.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from fa_bench.mechanisms.updates import LearnedTensor


class FeedbackGradient(NamedTuple):
    """How the gradient of learned feedback is made: it equals the weight's, unless `activation` or `hop` (never both) is given.

    Attributes:
        learned: the learned tensor. It is an input of the layer's Function, so that autograd accumulates its gradient and hooks,
            gradient scalers and DistributedDataParallel see it. Where the weight is frozen, a tensor that follows it gets none.
        activation: returns what enters the gradient in place of the layer's input, in its shape; None for the input itself.
        hop: B, the first of a product's two hops, where R, the second, learns: ē = g B enters the gradient in place of g. See
            `fa_bench.mechanisms.product` for its layout.
    """

    learned: LearnedTensor
    activation: Callable[[], Tensor] | None = None
    hop: Tensor | None = None


class BackwardContext(NamedTuple):
    """What one forward pass hands to a layer's backward pass.

    Attributes:
        feedback: carries the error, in the weight's layout; with `second` only the first of a linear layer's two hops.
        make: makes it of the weight, in the backward pass, in place of `feedback`.
        second: carries the error on from where `feedback` left it.
        activation: returns what enters the weight gradient in place of the layer's input.
        learn: for each learned tensor, what makes its gradient and takes it.
    """

    feedback: Tensor | None = None
    from_weight: Callable[[Tensor], Tensor] | None = None
    second: Tensor | None = None
    activation: Callable[[], Tensor] | None = None
    gradients: tuple[FeedbackGradient, ...] = ()


def recomputing() -> bool:
    """Whether this forward pass repeats an earlier one within a backward pass, as activation checkpointing does."""
    return torch._C._current_graph_task_id() != -1


def refuse_reentrant(rule: str) -> Callable[..., Tensor]:
    """What stands in the `BackwardContext` of a repeated forward pass for that which the first one alone has.

    It is called where the repeated pass is itself differentiated, as by reentrant checkpointing of the whole model; the first
    pass has no gradients there, and looks like an evaluation.
    """
    def refuse(*_: Any) -> Tensor:
        raise CoverageError(f"rule '{rule}' cannot train by a forward pass that runs within a backward pass: activation "
                            f"checkpointing needs use_reentrant=False")

    return refuse
