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

#: Name -> a function that computes s. The arguments of this function are fan_in and fan_out, which include kernel positions, and
#: whether the layer is a convolution.
SCALES: dict[str, Callable[[int, int, bool], float]] = {
    "xavier": lambda fan_in, fan_out, conv: math.sqrt(2 / (fan_in + fan_out)),
    "pytorch": lambda fan_in, fan_out, conv: 1 / math.sqrt(3 * fan_in),
    "xiao": lambda fan_in, fan_out, conv: math.sqrt(2 / fan_out) if conv else 1 / math.sqrt(fan_in),
    "none": lambda fan_in, fan_out, conv: 1.0,
}


@ALGORITHMS.register("usf")
@dataclasses.dataclass(eq=False)
class USF(EdgeRule):
    """Uniform sign-concordant feedback ("sign symmetry"): the feedback is the sign of the weight, times a scale.

    The rule is due to Liao et al. 2016 and Xiao et al. 2018; it is SF in Li and Benna 2024.

    The rule computes e_in = g B with B = s sign(W), where sign(0) = 0. The option `scale` selects s: √(2/(fan_in + fan_out)) for
    xavier, 1/√(3 fan_in) for pytorch, and 1 for none. For xiao, s is √(2/fan_out) in convolutions and 1/√fan_in in linear layers.
    Both fans include kernel positions. B is computed from the weight used in the forward pass that is differentiated.

    Li and Benna write B = sign(W) without s, which makes training diverge; their figures were computed with the scale xavier. If
    ``density`` is below 1, a fixed mask sets entries of B to zero. With ``plain_last``, the output layer uses its true weight, as
    in Xiao et al. 2018.
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
