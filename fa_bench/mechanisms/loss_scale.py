"""The factor by which the loss was scaled, for rules whose errors or gradients do not scale with the loss by themselves.

Gradient accumulation divides the loss of a micro-batch, and a gradient scaler multiplies it. An error that is linear in δ, the
gradient at the logits, scales with the loss; one computed from the labels must be multiplied by the same factor.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from fa_bench.errors import StateError
from fa_bench.objectives.cross_entropy import CrossEntropy
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from fa_bench.objectives.base import Objective

#: The names of autograd nodes of torch's losses, other than those of its NLL loss. A loss whose graph ends in one of these nodes
#: was not scaled.
_LOSSES = {
    "CrossEntropyLoss",
    "MseLoss",
    "BinaryCrossEntropy",
    "BinaryCrossEntropyWithLogits",
    "L1Loss",
    "SmoothL1Loss",
    "HuberLoss",
    "KlDiv",
    "SoftMarginLoss",
    "MultiMarginLoss",
    "MultilabelMarginLoss",
}
_MEAN = 1


def is_unscaled(loss: Tensor, target: Tensor | None, objective: Objective | None = None) -> bool:
    """Whether `loss` is the unscaled mean of one of torch's losses over all samples, judging by its autograd graph.

    The result is False if the objective is not the plain cross-entropy, because torch's losses may differ from other objectives
    by a factor.

    Args:
        loss: the loss.
        target: the labels (N,) or (N, P...); a loss that covers fewer labels, or ignores or weights classes, is not their mean.
        objective: the objective of the training; None: the cross-entropy.
    """
    if objective is not None and not objective.is_cross_entropy:
        return False
    # This function runs at every step, so the usual case is handled first.
    node: Any = loss.grad_fn
    name = type(node).__name__
    if name not in ("NllLossBackward0", "NllLoss2DBackward0"):
        return name.rstrip("0123456789").removesuffix("Backward") in _LOSSES and getattr(node, "_saved_reduction", _MEAN) == _MEAN
    if node._saved_reduction != _MEAN or node._saved_weight is not None:
        return False
    if target is None:
        return True
    if node._saved_target is not target and node._saved_target.numel() != target.numel():
        return False
    ignored = node._saved_ignore_index
    return not 0 <= ignored < 1 << 62 or not bool((target == ignored).any())


#: Remedies in error messages: the first for rules that need the scale of the loss, the second for rules that learn only from the
#: objective.
PASS_SCALE = "Pass the scale: rule.backward(loss, logits, target, loss_scale=1.0), or loss_scale=1 / 4 for loss / 4"
PASS_OBJECTIVE = (
    "It learns only from the objective, regardless of the loss; attach it with the objective that you train with, objective=..."
)


class PassOutput:
    """The output of one training pass, from which the loss is computed.

    The output shares its memory with the tensor that the user receives, so an in-place change, such as ``logits[:, 3:] = -1e9``,
    affects both.

    Args:
        rule: the rule's name, for error messages.
        logits: (N, C), or with positions, as in `measured_scale`.

    Attributes:
        logits: the current values, detached.
    """

    def __init__(self, rule: str, logits: Tensor) -> None:
        self.rule, self.logits, self._version = rule, logits.detach(), logits._version

    @property
    def is_changed(self) -> bool:
        """Whether the output has been changed in place since the forward pass."""
        return self.logits._version != self._version

    def unchanged(self) -> Tensor:
        """The logits, provided that they were not changed in place; otherwise, a StateError is raised."""
        if self.is_changed:
            raise StateError(
                f"rule '{self.rule}' learns from the model's output as the forward pass returned it, but it has been "
                "changed in place since; make the change within the model or in an objective of your own (objective=...)"
            )
        return self.logits

    def scale(
        self, delta: Tensor, target: Tensor | None, last: float, objective: Objective | None, mend: str = PASS_SCALE
    ) -> float:
        """The result of `measured_scale` for these logits; a StateError is raised if they were changed in place."""
        if self.is_changed:
            raise StateError(
                f"rule '{self.rule}' needs the scale of the loss and cannot infer it: the model's output was changed in place "
                f"after the forward pass. {mend}"
            )
        return measured_scale(self.rule, delta, self.logits, target, last, objective, mend)


def measured_scale(
    rule: str,
    delta: Tensor,
    logits: Tensor,
    target: Tensor | None,
    last: float = 1.0,
    objective: Objective | None = None,
    mend: str = PASS_SCALE,
) -> float:
    """The factor c such that δ is c times the gradient of the objective's mean loss.

    Args:
        rule: the rule's name, for the error message.
        delta: δ, the gradient of the loss at the logits, in their shape.
        logits: (N, C), or with positions (N, T, C), (N, C, H, W) or (N, C, D, H, W).
        target: the labels (N,) or (N, P...); None: for each sample or position, the class with the lowest δ. For a cross-entropy,
            only the δ of the label is negative.
        last: the previous result, returned if the gradient of the objective is zero, as when every label has probability 1.
        objective: the objective of the training; None: the mean cross-entropy.
        mend: a remedy, for the error message if δ is not a multiple of the gradient.

    Raises:
        ValueError: if δ is not a multiple of the objective's gradient, or if the labels do not fit the logits.
    """
    objective, given = objective or CrossEntropy(), delta.double()
    try:
        unit, tolerance = _unit(delta, logits, target, objective), _tolerance(delta)
    except (IndexError, RuntimeError, ValueError):
        from fa_bench.mechanisms.cut.positions import require_labels

        if target is not None:
            require_labels(rule, target, logits.shape, objective)
        raise
    size = unit.square().sum().item()
    scale = (given * unit).sum().item() / size if size else last
    if not math.isfinite(scale):
        return scale  # a gradient scaler will skip this update
    if (given - scale * unit).norm().item() > tolerance * given.norm().item() + abs(scale) * _rounding(delta):
        raise ValueError(f"rule '{rule}' needs the scale of the loss and cannot infer it: {not_a_multiple(objective)}. {mend}")
    # Scales are usually powers of two, so a result that is close to a power of two is rounded to it.
    power = 2.0 ** round(math.log2(scale)) if scale > 0 else 0.0
    return power if power and abs(scale / power - 1) < tolerance else scale


def is_other_loss(delta: Tensor, logits: Tensor, target: Tensor, objective: Objective) -> Tensor:
    """Whether δ is not a multiple of the gradient of the objective's mean loss, as a scalar tensor on the device; False if δ is
    not finite.

    The arguments are as for `measured_scale`.
    """
    unit, given = _unit(delta, logits, target, objective), delta.double()
    scale = (given * unit).sum() / unit.square().sum()
    return (given - scale * unit).norm() > _tolerance(delta) * given.norm() + scale.abs() * _rounding(delta)


def not_a_multiple(objective: Objective) -> str:
    """A clause for error messages, which states that δ is not a multiple of the gradient of the objective's mean loss."""
    return f"the gradient at the logits is not a multiple of that of the mean {objective.name.replace('_', '-')}"


def _unit(delta: Tensor, logits: Tensor, target: Tensor | None, objective: Objective) -> Tensor:
    """The gradient of the objective's mean loss at the logits, in double precision."""
    from fa_bench.mechanisms.cut.positions import class_axis, mean_loss

    with torch.enable_grad():
        leaf = logits.to(torch.promote_types(logits.dtype, torch.float32)).requires_grad_(True)
        labels = delta.argmin(class_axis(logits.shape)) if target is None else target
        return torch.autograd.grad(mean_loss(objective, leaf, labels), leaf)[0].double()


def _tolerance(delta: Tensor) -> float:
    return 1e-3 if delta.dtype in (torch.float32, torch.float64) else 5e-2


def _rounding(delta: Tensor) -> float:
    """An estimate of the norm of the rounding error of δ for a loss of scale 1, if the entries of δ were rounded before the
    division by the number of samples."""
    from fa_bench.mechanisms.cut.positions import class_axis

    samples = max(delta.numel() // delta.shape[class_axis(delta.shape)], 1)
    return 4 * torch.finfo(delta.dtype).eps * delta.numel() ** 0.5 / samples
