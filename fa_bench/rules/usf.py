"""Uniform sign-concordant feedback."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from fa_bench.mechanisms.edge.pathways import FeedbackPathway, SignFeedback
from fa_bench.mechanisms.edge.rule import EdgeRule, LayerContext
from fa_bench.mechanisms.feedback_options import density_option
from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS

#: Name -> function that computes s from fan_in and fan_out, which count kernel positions, and whether the layer is a convolution.
SCALES: dict[str, Callable[[int, int, bool], float]] = {
    "xavier": lambda fan_in, fan_out, conv: math.sqrt(2 / (fan_in + fan_out)),
    "pytorch": lambda fan_in, fan_out, conv: 1 / math.sqrt(3 * fan_in),
    "xiao": lambda fan_in, fan_out, conv: math.sqrt(2 / fan_out) if conv else 1 / math.sqrt(fan_in),
    "none": lambda fan_in, fan_out, conv: 1.0,
}


@ALGORITHMS.register("usf")
@dataclasses.dataclass(eq=False)
class USF(EdgeRule):
    """Uniform sign-concordant feedback ("sign symmetry"): the sign of the weight, scaled.

    Liao et al. 2016; Xiao et al. 2018; SF of Li and Benna 2024.

    e_in = g B with B = s sign(W) of the current W, sign(0) = 0. `scale` chooses s: √(2/(fan_in + fan_out)) for xavier, 1/√(3
    fan_in) for pytorch, and 1 for none; for xiao, √(2/fan_out) in convolutions and 1/√fan_in in linear layers. Fans count kernel
    positions. B is computed from the weight of the forward pass that is differentiated.

    Deviation: Li and Benna write B = sign(W) without s, which makes training diverge; their figures were computed with s =
    xavier. ``density`` below 1 masks B with one fixed mask. With ``plain_last`` the output layer uses its true weight, as in Xiao
    et al.
    """

    equations = (
        r"e_{\text{in}} &= g B,\quad B = s \operatorname{sign}(W)",
        r"\nabla_W &= g^\top x",
    )

    search_space = {"scale": "choice(xavier,pytorch,xiao)"}

    scale: str = option("xavier", "the scale s of the feedback", choices=list(SCALES))
    density: float = density_option()

    def pathway(self, layer: LayerContext) -> FeedbackPathway:
        layer.put_mask(self.density)
        return SignFeedback(SCALES[self.scale](*layer.fans, not layer.is_linear))
