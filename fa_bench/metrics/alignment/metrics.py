"""The alignment metrics. Most of them compare a rule's feedback with the weights, or its errors with those of
backpropagation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fa_bench.metrics.alarm import Alarm
from fa_bench.metrics.alignment.base import FEEDBACK, HIDDEN, Metric
from fa_bench.metrics.angles import mean_sample_angle, norm_ratio, weight_angle
from fa_bench.registry.registries import METRICS

if TYPE_CHECKING:
    from torch import Tensor

    from fa_bench.metrics.meter import Passes, Point

#: The norm of a gradient below which angles to the gradient are meaningless (the faeval protocol, spring 2026).
GRADIENT_FLOOR = 1e-7


@METRICS.register("weight_angle")
@dataclasses.dataclass(eq=False)
class WeightAngle(Metric):
    """Angle in degrees between the effective feedback and the weight (metric 1 of Li and Benna 2024, Fig. 2)."""

    title, unit, layers, order = "weight angle", "°", FEEDBACK, 1

    def measure(self, passes: Passes) -> dict[str, float]:
        return {layer: weight_angle(*pair) for layer, pair in passes.weight_pairs.items()}


@METRICS.register("delta_angle")
@dataclasses.dataclass(eq=False)
class DeltaAngle(Metric):
    """Angle in degrees between the rule's error at a layer's activation and that of backpropagation, averaged over the batch.

    The reference is the error of a full exact backward pass on the same batch and weights.
    """

    title, unit, layers, order = "delta angle", "°", HIDDEN, 2

    def measure(self, passes: Passes) -> dict[str, float]:
        return _delta_angles(passes, passes.exact.errors)


@METRICS.register("norm_ratio")
@dataclasses.dataclass(eq=False)
class NormRatio(Metric):
    """Frobenius norm of the effective feedback, divided by that of the weight."""

    title, layers, order = "norm ratio", FEEDBACK, 3

    def measure(self, passes: Passes) -> dict[str, float]:
        return {layer: norm_ratio(*pair) for layer, pair in passes.weight_pairs.items()}


@METRICS.register("delta_angle_one_step")
@dataclasses.dataclass(eq=False)
class OneStepDeltaAngle(Metric):
    """Angle in degrees between the rule's error and the error obtained by exact backpropagation of the rule's errors from one
    layer above."""

    title, unit, layers, column, plot, order = "delta angle, one step", "°", HIDDEN, False, False, 4

    def measure(self, passes: Passes) -> dict[str, float]:
        return _delta_angles(passes, passes.one_step)


def _delta_angles(passes: Passes, reference: Mapping[Point, Tensor]) -> dict[str, float]:
    """The angle of each layer in degrees, which is 0 by definition at the output layers."""
    angles = {layer: 0.0 for layer in passes.trace.outputs}
    for layer, point in passes.points.items():
        if point in passes.delivered.errors and point in passes.exact.errors:
            angles[layer] = mean_sample_angle(passes.delivered.errors[point], reference[point])
    return angles


@METRICS.register("true_gradient_norm")
@dataclasses.dataclass(eq=False)
class TrueGradientNorm(Metric):
    """Frobenius norm of the exact gradient of the weight. If this norm is near 0, the delta angle at the layer is meaningless."""

    title, column, plot, order = "true gradient norm", False, False, 5
    alarms = {
        "true_gradient_norm": Alarm(
            GRADIENT_FLOOR, False, "Backpropagation's gradient is only rounding noise, so the layer's delta angle is meaningless."
        )
    }

    def measure(self, passes: Passes) -> dict[str, float]:
        return {
            layer: math.nan if gradient is None else gradient.double().norm().item()
            for layer, gradient in passes.exact_gradients.items()
        }


@METRICS.register("output_angle")
@dataclasses.dataclass(eq=False)
class OutputAngle(Metric):
    """Angle in degrees between the logits and ``a Bᵀ``, where ``a`` is the activation at a cut and B (C, features) is the direct
    feedback at that cut.

    The angle is the one shown in Fig. 2 of the paper on direct Kolen-Pollack learning. Only rules with direct feedback have an
    output angle.
    """

    title, unit, column, plot, order = "output angle", "°", False, False, 6

    def measure(self, passes: Passes) -> dict[str, float]:
        readouts, logits, angles = passes.rule.readouts(), passes.logits, {}
        for layer, point in passes.points.items():
            if point[0] in readouts and point in passes.delivered.tensors:
                rows, outputs = passes.rule.readout_rows(point[0], passes.delivered.tensors[point].detach(), logits)
                angles[layer] = mean_sample_angle(rows.to(logits.dtype) @ readouts[point[0]].t(), outputs)
        return angles
