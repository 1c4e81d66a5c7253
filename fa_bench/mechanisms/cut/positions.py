"""Outputs with positions (tokens of a sequence or pixels of a map), which act as further batch axes, and how their errors reach a
cut.

The error δ at an output is handled as rows, with the class axis last: (N, C) or (N, P..., C). Shapes: N batch, C classes (or
    features of the module in ``error_at``), F features of a cut, P... positions (one axis for sequences, two or three for maps).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fa_bench.errors import CoverageError
from fa_bench.registry.kinds import POSITIONS

if TYPE_CHECKING:
    from torch import Tensor

    from fa_bench.mechanisms.trace import Trace
    from fa_bench.mechanisms.weighted_layers import WeightedLayer
    from fa_bench.objectives.base import Objective

Shape = tuple[int, ...]
#: The label of positions that are excluded from the loss; this is torch's default.
IGNORED = -100


def class_axis(shape: Shape) -> int:
    """The class axis of an output (N, C), a sequence (N, T, C), or a map (N, C, H, W) or (N, C, D, H, W)."""
    return 2 if len(shape) == 3 else 1


def ignored_label(objective: Objective) -> int:
    """The label that marks positions to be ignored."""
    return getattr(objective, "ignore_index", IGNORED)


def require_labels(rule: str, target: Tensor, shape: Shape, objective: Objective) -> None:
    """Raise an error if the labels do not fit outputs of this shape; called after code that uses the labels has failed.

    Args:
        rule: the rule's name, for the error message.
        target: the labels (N,) or (N, P...), or numbers in the shape of the outputs.
        shape: the shape of the outputs, (N, C), (N, T, C), (N, C, H, W) or (N, C, D, H, W).
        objective: the objective.

    Raises:
        ValueError: for labels of another shape, or outside [0, C). The range is checked only on the CPU, because an accelerator
            no longer responds after it has used an out-of-range label.
    """
    axis = class_axis(shape)
    classes, wanted = shape[axis], (*shape[:axis], *shape[axis + 1 :])
    if target.is_floating_point() and target.shape == shape:
        return
    if target.is_floating_point() or target.shape != wanted:
        kind = "numbers" if target.is_floating_point() else "class indices"
        raise ValueError(
            f"rule '{rule}': labels are {kind} of shape {tuple(target.shape)}; this output, {tuple(shape)}, needs class "
            f"indices of shape {wanted}, or numbers of its own shape"
        )
    if target.device.type != "cpu":
        return
    if target.dim() > 1:
        target = target[target != ignored_label(objective)]
    low, high = (int(bound) for bound in target.aminmax()) if target.numel() else (0, 0)
    if target.numel() and (low < 0 or high >= classes):
        raise ValueError(
            f"rule '{rule}': label {low if low < 0 else high} is out of range: this model has {classes} classes, numbered from 0 "
            f"to {classes - 1}; remove unlabelled samples from the batch"
        )


def positions_of(shape: Shape, axis: int) -> Shape:
    """The sizes of all axes except the batch and `axis`."""
    return shape[1:axis] + shape[axis + 1 :]


def mean_loss(objective: Objective, outputs: Tensor, target: Tensor) -> Tensor:
    """The objective's mean loss. If the objective expects one class per sample, every position with a label counts as a sample.

    Args:
        objective: the objective.
        outputs: (N, C), (N, T, C), (N, C, H, W) or (N, C, D, H, W).
        target: the labels, (N,) or (N, P...), or numbers in the shape of the outputs.
    """
    outputs = _classes_last(outputs, target)
    if _is_position_a_sample(objective, outputs, target):
        outputs, target = outputs.flatten(0, -2), target.flatten()
        labelled = target != ignored_label(objective)
        if not labelled.all():
            outputs, target = outputs[labelled], target[labelled]
    return objective.loss(outputs, target)


def sample_losses(objective: Objective, outputs: Tensor, target: Tensor) -> Tensor:
    """The objective's loss for each sample, (N,). The mean of these losses is `mean_loss`, which has the same arguments."""
    outputs = _classes_last(outputs, target)
    if not _is_position_a_sample(objective, outputs, target):
        losses = objective.loss(outputs, target, "none")
        return losses if losses.dim() == 1 else losses.flatten(1).mean(1)  # numbers at several positions
    rows, labels = outputs.flatten(0, -2), target.flatten()
    labelled = labels != ignored_label(objective)
    losses = rows.new_zeros(len(labels))
    losses[labelled] = objective.loss(rows[labelled], labels[labelled], "none")
    return losses.view(target.shape).flatten(1).sum(1) * len(target) / labelled.sum().clamp(min=1)


def _classes_last(outputs: Tensor, target: Tensor) -> Tensor:
    """Outputs with positions and class labels as (N, P..., C), the layout that objectives expect; other outputs unchanged."""
    has_positions = outputs.dim() > 2 and not target.is_floating_point()
    return outputs.movedim(class_axis(outputs.shape), -1) if has_positions else outputs


def _is_position_a_sample(objective: Objective, outputs: Tensor, target: Tensor) -> bool:
    """Whether the outputs have positions and the objective expects one class per sample."""
    return outputs.dim() > 2 and POSITIONS not in objective.targets and not target.is_floating_point()


@dataclasses.dataclass(frozen=True)
class Layout:
    """The axes of a cut's activation (N, ...) if one matrix B (C, F) is used at all of its positions.

    The positions of the cut need not be those of the error, but along each axis, one size must be a multiple of the other. If the
    cut has fewer positions, each of them gets the sum of the errors at the positions that it covers; if it has more, errors are
    copied. A cut without positions gets the sum of the errors at all positions, and an error without positions is copied to all
    positions of the cut.

    Attributes:
        cut: the cut's path, for error messages.
        axis: the axis of the features.
    """

    cut: str
    axis: int

    def rows(self, activation: Tensor) -> Tensor:
        """The activation with its feature axis last, (N, P..., F)."""
        return activation.movedim(self.axis, -1)

    def restored(self, rows: Tensor, shape: Shape) -> Tensor:
        """An error (N, P..., F) in the shape of the activation, with copies where the cut has more positions."""
        wanted = positions_of(shape, self.axis)
        for axis, (given, size) in enumerate(zip(rows.shape[1:-1], wanted, strict=True), 1):
            if given == 1 != size:
                rows = rows.expand(*rows.shape[:axis], size, *rows.shape[axis + 1 :])
            elif given < size:
                rows = rows.repeat_interleave(size // given, axis)
        return rows.movedim(-1, self.axis)

    def matched(self, errors: Tensor, shape: Shape) -> Tensor:
        """Errors (N, P..., C) summed to the positions of an activation of this shape. If the activation has more positions, the
        errors are copied to them later, by `restored`.

        Raises:
            CoverageError: if the batch sizes or the numbers of positions do not match.
        """
        given, wanted = tuple(errors.shape[1:-1]), positions_of(shape, self.axis)
        if given == wanted and errors.shape[0] == shape[0]:
            return errors
        if not matches(given, wanted) or errors.shape[0] != shape[0]:
            raise CoverageError(mismatch(self.cut, shape, given))
        if not given:
            return errors.view(errors.shape[0], *[1] * len(wanted), errors.shape[-1])
        return summed(errors, wanted)

    def pairs(self, errors: Tensor, activation: Tensor) -> tuple[Tensor, Tensor]:
        """Errors δ (M, C) and activations a (M, F) whose product δᵀ a is the sum of outer products over samples and positions.

        Activations at positions that share an error are summed first.
        """
        errors = self.matched(errors, tuple(activation.shape))
        rows = summed(self.rows(activation), tuple(errors.shape[1:-1]))
        return errors.flatten(0, -2), rows.flatten(0, -2)


def summed(x: Tensor, sizes: Shape) -> Tensor:
    """Sum a tensor (N, P..., X) over groups of neighbouring positions. Every axis of positions that is longer than its entry in
    `sizes` is reduced to this length. If `sizes` is empty, sum over all positions."""
    if not sizes:
        return x.flatten(1, -2).sum(1) if x.dim() > 2 else x
    for axis, size in enumerate(sizes, 1):
        if x.shape[axis] > size:
            x = x.unflatten(axis, (size, x.shape[axis] // size)).sum(axis + 1)
    return x


def matches(given: Shape, wanted: Shape) -> bool:
    """Whether errors at the positions `given` can be converted to the positions `wanted`."""
    if not given or not wanted:
        return True
    return len(given) == len(wanted) and all(
        a > 0 and b > 0 and max(a, b) % min(a, b) == 0 for a, b in zip(given, wanted, strict=True)
    )


def mismatch(cut: str, shape: Shape, positions: Shape) -> str:
    """The reason why the errors of an output with these positions cannot be converted to the positions of a cut."""
    return (
        f"cut '{cut}' has activations of shape {tuple(shape)}, which do not fit errors at {positions} positions: the batch "
        f"must come first, and along each axis of positions one size must be a multiple of the other; name another module"
    )


def feature_axis(shape: Shape, positions: Shape, last: tuple[WeightedLayer, Shape] | None) -> int:
    """The feature axis of an activation (N, P..., F) or (N, F, P...).

    The candidates are axis 1 and the last axis. There are two criteria: the feature axis has the width of the preceding layer,
    and removing it leaves the positions of the output. A criterion that neither candidate meets is ignored. If the criteria do
    not decide, the result is 1 if the preceding layer is a convolution whose output has the same number of axes as the
    activation, and the last axis otherwise.

    Args:
        shape: the shape of the activation.
        positions: the positions of the output.
        last: the last weighted layer before the activation, and the shape of its output.
    """
    if len(shape) == 2:
        return 1
    ends = {1, len(shape) - 1}
    fitting = {axis for axis in ends if positions and positions_of(shape, axis) == positions} or ends
    if last is None:
        return max(fitting)
    layer, layer_shape = last
    channels = getattr(layer, "out_channels", None)
    width = layer_shape[-1] if channels is None else channels
    wide = {axis for axis in ends if shape[axis] == width} or ends
    usual = 1 if channels is not None and len(layer_shape) == len(shape) else len(shape) - 1
    return usual if usual in (fitting & wide) or not fitting & wide else max(fitting & wide)


def layout_of(path: str, shape: Shape, positions: Shape, trace: Trace, layers: dict[str, WeightedLayer]) -> Layout:
    """The layout of a watched module's output, which has this shape, for errors at these positions; `trace` and `layers` are as
    for `layouts_of`."""
    before = trace.feeds.get(path)
    last = (layers[before[-1]], trace.output_shapes[before[-1]]) if before else None
    return Layout(path, feature_axis(shape, positions, last))


def layouts_of(
    cuts: dict[str, Shape], errors: Shape, axis: int, shared: bool, same: bool, trace: Trace, layers: dict[str, WeightedLayer]
) -> dict[str, Layout]:
    """A mapping from each cut to its layout, by which one B (C, F) serves all positions. If the errors have no positions and
    `shared` is false, the mapping is empty, and B has a column for each entry of a sample's activation.

    Args:
        cuts: cut -> shape of its activation.
        errors: shape of the tensor from which the error comes.
        axis: the class axis of that tensor.
        shared: whether the positions of a cut share B if the errors have no positions.
        same: whether cuts must have the positions of the errors.
        trace: the model's structure, traced with the cuts as watched modules.
        layers: the model's weighted layers.

    Raises:
        CoverageError: if the errors cannot be converted to the positions of a cut, or if `same` is set and a cut has other
            positions than the errors.
    """
    positions, layouts = positions_of(errors, axis), {}
    if not positions and not shared:
        return {}
    for cut, shape in cuts.items():
        layout = layouts[cut] = layout_of(cut, shape, positions, trace, layers)
        own = positions_of(shape, layout.axis)
        if shape[0] != errors[0] or not matches(positions, own):
            raise CoverageError(mismatch(cut, shape, positions))
        if same and own != positions:
            raise CoverageError(
                f"cut '{cut}' has activations of shape {shape}, and the output has labels at {positions} "
                f"positions: a local loss needs the same positions at both; name another module"
            )
    return layouts
