"""What carries the error: one small class for each way to obtain a layer's effective feedback.

Every tensor here is in the weight's own layout: (O, I) for linear layers, (O, I/groups, K...) for convolutions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fa_bench.lazy import torch
from fa_bench.mechanisms.backward_context import BackwardContext, FeedbackGradient, recomputing, refuse_reentrant
from fa_bench.sampling import resample_magnitudes, seed_for

if TYPE_CHECKING:
    from torch import Tensor


class FeedbackPathway:
    """How one layer obtains its effective feedback. Holds plain values; the tensors are the layer's: fixed ones its buffers,
    learned ones its parameters.

    Attributes:
        learned: names of the tensors that an optimizer trains.
        follows: the one of them whose gradient is that of the weight, the same numbers; None for none.
        always: whether the layer needs `carry` even where nobody asks for the error at its input.
    """

    learned: tuple[str, ...] = ()
    follows: str | None = None
    always_needed = False
    #: What carries the error, in words.
    description = "tensors of its own"

    def describe(self) -> str:
        """What carries the error and which of it learns, in a few words for the table of `fa_bench.mechanisms.coverage`."""
        if self.learned == (self.description,):
            return f"learned {self.description}"
        return self.description + (f" ({', '.join(self.learned)} learned)" if self.learned else "")

    def effective(self, layer: Any) -> Tensor:
        """What carries the error now, in the weight's layout, detached."""
        raise NotImplementedError

    def context(self, layer: Any, x: Tensor) -> BackwardContext:
        """What the layer's backward pass needs; `x` is the layer's input."""
        return BackwardContext(self.effective(layer))

    def effective_context(self, layer: Any, x: Tensor, gradients: tuple[FeedbackGradient, ...]) -> BackwardContext:
        """`effective`, where an error is carried: where learning alone asks for the pass, making it would be in vain."""
        return BackwardContext(self.effective(layer) if x.requires_grad else layer.weight.detach(), gradients=gradients)

    def before_forward(self, layer: Any) -> None:
        """Called at the start of every training forward."""

    def observe(self, layer: Any, x: Tensor) -> None:
        """Called in a training forward of the model for a layer that runs without gradients, for it is not trained."""

    def materialize(self, layer: Any) -> None:
        """Bring the layer's tensors up to date; called before anybody reads them."""

    def after_step(self, layer: Any) -> None:
        """Called for a layer with learned tensors after every update."""

    def shown(self, layer: Any) -> dict[str, Tensor]:
        """Tensors that are derived, not stored, and still belong into ``rule.feedback`` (reading only)."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs beside the tensors; plain values."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""


class FixedFeedback(FeedbackPathway):
    """e_in = g B with B drawn once."""

    description = "fixed B"

    def effective(self, layer: Any) -> Tensor:
        # Straight from the dictionary: a module's attribute look-up takes as long as a small matrix product's launch.
        return layer._buffers["feedback_B"]


class LearnedFeedback(FixedFeedback):
    """e_in = g B, and the gradient of B is the gradient of W, the same numbers."""

    description = "B"
    learned = ("B",)
    follows = "B"
    always_needed = True

    def effective(self, layer: Any) -> Tensor:
        return layer._parameters["feedback_B"].detach()

    def context(self, layer: Any, x: Tensor) -> BackwardContext:
        return BackwardContext(layer._parameters["feedback_B"], gradients=feedback_gradient(layer, "B"))


def feedback_gradient(
    layer: Any, name: str, activation: Callable[[], Tensor] | None = None, hop: Tensor | None = None
) -> tuple[FeedbackGradient, ...]:
    """How the gradient of the learned feedback tensor `name` is computed; empty while a probe runs."""
    if layer.mode.freeze_random:
        return ()
    learned = layer.learned[name]
    if learned._rests and layer.weight.requires_grad:
        learned.require_awake()
    return (FeedbackGradient(learned, activation, hop),)


class TransposeFeedback(FeedbackPathway):
    """The true weight: backpropagation through this layer."""

    description = "the weight"

    def effective(self, layer: Any) -> Tensor:
        return layer.weight.detach()


class WeightDerivedFeedback(FeedbackPathway):
    """B is made of the weight, in the backward pass itself: there it goes from the cache into the product.

    The weight of the forward pass is meant; autograd refuses one that was changed in between, as for backpropagation.
    """

    def context(self, layer: Any, x: Tensor) -> BackwardContext:
        return BackwardContext(from_weight=functools.partial(self.made, layer))

    def effective(self, layer: Any) -> Tensor:
        return self.made(layer, layer.weight.detach())

    def made(self, layer: Any, weight: Tensor) -> Tensor:
        """B of this weight, masked where the layer has a mask."""
        feedback, mask = self.full(layer, torch.sign(weight)), layer._buffers["feedback_mask"]
        return feedback if mask is None else feedback.mul_(mask)

    def full(self, layer: Any, signs: Tensor) -> Tensor:
        """B before the mask, of the weight's signs, which may be overwritten."""
        raise NotImplementedError


class SignFeedback(WeightDerivedFeedback):
    """B = s sign(W) of the current weight; sign(0) is 0.

    Args:
        scale: s, a positive number.
    """

    description = "the signs of the weight"

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def full(self, layer: Any, signs: Tensor) -> Tensor:
        return signs.mul_(self.scale)

    def shown(self, layer: Any) -> dict[str, Tensor]:
        return {"B": self.effective(layer)}


class SignedMagnitudeFeedback(WeightDerivedFeedback):
    """B = |M| sign(W) of the current weight.

    Args:
        resample: initialiser that draws M anew at every training forward, or None to keep it.
        seed: the layer's seed for redrawing; each draw is a pure function of it and of the draw's number.
    """

    description = "the signs of the weight with magnitudes M"

    def __init__(self, resample: str | None = None, seed: int = 0) -> None:
        self.resample, self.seed, self.draws = resample, seed, 0
        # The draw waits until somebody reads it: the first layer's magnitudes carry no error.
        self._due = False
        self._positive: tuple[int, int] | None = None

    def before_forward(self, layer: Any) -> None:
        if self.resample is not None and not recomputing():
            self.draws += 1
            self._due = True

    def materialize(self, layer: Any) -> None:
        if self._due:
            self._due = False
            assert self.resample is not None
            resample_magnitudes(layer.feedback_M, self.resample, seed_for(self.seed, self.draws))
            self._positive = _moment(layer.feedback_M)

    def context(self, layer: Any, x: Tensor) -> BackwardContext:
        if self.resample is None:
            return super().context(layer, x)
        if recomputing():
            return BackwardContext(from_weight=refuse_reentrant("brsf"))
        # By the backward pass another forward may have drawn M again. Handed over as it is: a tensor that autograd saves is
        # computed again under activation checkpointing, by then of another M.
        feedback = self.effective(layer)
        return BackwardContext(from_weight=lambda weight: feedback)

    def full(self, layer: Any, signs: Tensor) -> Tensor:
        self.materialize(layer)
        return signs.mul_(self._magnitude(layer._buffers["feedback_M"]))

    def _magnitude(self, drawn: Tensor) -> Tensor:
        """|M|; the absolute value is taken only where somebody has written a negative number into M."""
        if self._positive != _moment(drawn):
            self._positive = None if bool((drawn < 0).any()) else _moment(drawn)
        return drawn.abs() if self._positive is None else drawn

    def state(self) -> dict[str, Any]:
        return {"seed": self.seed, "draws": self.draws}

    def load_state(self, state: dict[str, Any]) -> None:
        self.seed, self.draws, self._due = int(state["seed"]), int(state["draws"]), False


def _moment(tensor: Tensor) -> tuple[int, int]:
    """Tells whether a tensor was written since; by every way that autograd counts."""
    return tensor.data_ptr(), tensor._version
