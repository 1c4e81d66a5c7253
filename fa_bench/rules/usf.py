"""Uniform sign-concordant feedback."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from fa_bench.config.options import option
from fa_bench.config.registries import ALGORITHMS
from fa_bench.mechanisms.carriers import Carrier, Sign
from fa_bench.mechanisms.edge import EdgeRule, Site

#: name -> s from (fan_in, fan_out) with kernel positions, and whether the layer is a convolution
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

    e_in = g B with B = s sign(W) of the current W, sign(0) = 0. `scale` chooses s:
    xavier √(2/(fan_in + fan_out)); pytorch 1/√(3 fan_in); xiao √(2/fan_out) for convolutions and 1/√fan_in for linear
    layers; none 1. Fans include the kernel positions. B is made of the weight of the forward pass that is differentiated.

    Deviation: Li and Benna write B = sign(W) without s, which explodes; the runs behind their figures used s = xavier.
    ``density`` below 1 puts a mask, drawn once, on B. With ``plain_last`` the output layer carries its error by its true
    weight, as in Xiao et al.
    """

    scale: str = option("xavier", "the scale s of the feedback", choices=list(SCALES))
    density: float = option(1.0, "fraction of B that is not zero (mask drawn once)", above=0, maximum=1)

    def carrier(self, site: Site) -> Carrier:
        site.put_mask(self.density)
        return Sign(SCALES[self.scale](*site.fans, site.layer.weight.dim() > 2))
