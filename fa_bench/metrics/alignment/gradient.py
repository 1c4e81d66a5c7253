"""The gradient that backpropagation has for the weights."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from fa_bench.metrics.alignment.base import Metric
from fa_bench.registry.registries import METRICS

if TYPE_CHECKING:
    from fa_bench.metrics.meter import Passes


@METRICS.register("true_gradient_norm")
@dataclasses.dataclass(eq=False)
class TrueGradientNorm(Metric):
    """Frobenius norm of the exact gradient of the weight: near 0, the angles to it mean nothing."""

    title, column, plot, order = "true gradient norm", False, False, 5

    def measure(self, passes: Passes) -> dict[str, float]:
        return {layer: math.nan if gradient is None else gradient.double().norm().item()
                for layer, gradient in passes.exact_gradients.items()}
