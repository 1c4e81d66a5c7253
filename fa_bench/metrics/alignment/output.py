"""What direct feedback reads out of an activation."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fa_bench.metrics.alignment.base import Metric
from fa_bench.metrics.angles import mean_sample_angle
from fa_bench.registry.registries import METRICS

if TYPE_CHECKING:
    from fa_bench.metrics.meter import Passes


@METRICS.register("output_angle")
@dataclasses.dataclass(eq=False)
class OutputAngle(Metric):
    """Angle between the logits and a Bᵀ, with a the activation at a cut and B (C, features) its direct feedback, in degrees.

    Fig. 2 of the paper on direct Kolen-Pollack learning; for rules that have such feedback.
    """

    title, unit, column, plot, order = "output angle", "°", False, False, 6

    def measure(self, passes: Passes) -> dict[str, float]:
        readouts, logits = passes.rule.readouts(), passes.logits
        found = {}
        for layer, point in passes.points.items():
            if point[0] in readouts and point in passes.delivered.tensors:
                activation = passes.delivered.tensors[point].detach().flatten(1).to(logits.dtype)
                found[layer] = mean_sample_angle(activation @ readouts[point[0]].t(), logits)
        return found
