"""Feedback alignment."""

from __future__ import annotations

import dataclasses

from fa_bench.config.options import option
from fa_bench.config.registries import ALGORITHMS
from fa_bench.draws import INITIALISERS
from fa_bench.mechanisms.carriers import Carrier, Fixed
from fa_bench.mechanisms.edge import EdgeRule, Site


@ALGORITHMS.register("fa")
@dataclasses.dataclass(eq=False)
class FA(EdgeRule):
    """Feedback alignment: fixed random feedback.

    Lillicrap et al. 2016; eq 3 of Akrout et al. 2019; section 2 of Li and Benna 2024.

    e_in = g B, with B random, fixed and independent of W, one for each weighted layer, shortcuts' projections included.
    Gradients of W and b are those of backpropagation with this error. B has no gradient and does not decay.

    Choices: B is Xavier-uniform as in Li and Benna's runs; the first layer's B carries no error and is kept for its angle.
    ``b_init=copy_w`` starts with B(0) = W(0), as the code behind Woo et al. 2021 does in convolutions; ``linear_b_init`` gives
    fully connected layers another initialiser, there that of [-1, 1). ``density`` below 1 puts a mask, drawn once, on B.
    """

    b_init: str = option("xavier_uniform", "initialiser of B", choices=[*INITIALISERS, "copy_w"])
    linear_b_init: str | None = option(None, "initialiser of B in fully connected layers; null: b_init",
                                       choices=[*INITIALISERS, "copy_w"])
    density: float = option(1.0, "fraction of B that is not zero (mask drawn once)", above=0, maximum=1)

    def carrier(self, site: Site) -> Carrier:
        linear = site.layer.weight.dim() == 2 and self.linear_b_init is not None
        site.put("B", self.linear_b_init if linear else self.b_init, self.density)
        return Fixed()
