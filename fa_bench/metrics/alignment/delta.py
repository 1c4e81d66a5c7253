"""How well the errors that a rule delivers agree with those of backpropagation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fa_bench.metrics.alignment.base import HIDDEN, Metric
from fa_bench.metrics.angles import mean_sample_angle
from fa_bench.registry.registries import METRICS

if TYPE_CHECKING:
    from torch import Tensor

    from fa_bench.metrics.meter import Passes, Point


@METRICS.register("delta_angle")
@dataclasses.dataclass(eq=False)
class DeltaAngle(Metric):
    """Angle between the rule's error at a layer's activation and that of backpropagation, mean over the batch, in degrees.

    The reference is the error of a full exact backward pass on the same batch and weights.
    """

    title, unit, layers, order = "delta angle", "°", HIDDEN, 2

    def measure(self, passes: Passes) -> dict[str, float]:
        return _angles(passes, passes.exact.errors)


@METRICS.register("delta_angle_one_step")
@dataclasses.dataclass(eq=False)
class OneStepDeltaAngle(Metric):
    """Angle between the rule's error and what exact derivatives make of the rule's own errors one layer above, in degrees."""

    title, unit, layers, column, plot, order = "delta angle, one step", "°", HIDDEN, False, False, 4

    def measure(self, passes: Passes) -> dict[str, float]:
        return _angles(passes, passes.one_step)


def _angles(passes: Passes, reference: Mapping[Point, Tensor]) -> dict[str, float]:
    """{layer: degrees}: 0 at the output layers, where every rule has the exact error."""
    found = {layer: 0.0 for layer in passes.trace.outputs}
    for layer, point in passes.points.items():
        if point in passes.delivered.errors and point in passes.exact.errors:
            # An angle to a gradient that is only rounding noise would be noise too: it is NaN.
            found[layer] = mean_sample_angle(passes.delivered.errors[point], reference[point])
    return found
