"""How well feedback agrees with the weights that backpropagation would carry the error through."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fa_bench.metrics.alignment.base import FEEDBACK, Metric
from fa_bench.metrics.angles import norm_ratio, weight_angle
from fa_bench.registry.registries import METRICS

if TYPE_CHECKING:
    from fa_bench.metrics.meter import Passes


@METRICS.register("weight_angle")
@dataclasses.dataclass(eq=False)
class WeightAngle(Metric):
    """Angle between the effective feedback and the weight (metric 1 of Li and Benna 2024, Fig. 2), in degrees."""

    title, unit, layers, order = "weight angle", "°", FEEDBACK, 1

    def measure(self, passes: Passes) -> dict[str, float]:
        return {layer: weight_angle(*pair) for layer, pair in passes.weight_pairs.items()}


@METRICS.register("norm_ratio")
@dataclasses.dataclass(eq=False)
class NormRatio(Metric):
    """Frobenius norm of the effective feedback over that of the weight."""

    title, layers, order = "norm ratio", FEEDBACK, 3

    def measure(self, passes: Passes) -> dict[str, float]:
        return {layer: norm_ratio(*pair) for layer, pair in passes.weight_pairs.items()}
