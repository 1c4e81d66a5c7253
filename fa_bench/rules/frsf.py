"""Fixed random magnitude sign-concordant feedback."""

from __future__ import annotations

import dataclasses

from fa_bench.config.options import option
from fa_bench.config.registries import ALGORITHMS
from fa_bench.draws import INITIALISERS
from fa_bench.mechanisms.carriers import Carrier, SignedMagnitude
from fa_bench.mechanisms.edge import EdgeRule, Site


@ALGORITHMS.register("frsf")
@dataclasses.dataclass(eq=False)
class FRSF(EdgeRule):
    """Sign-concordant feedback with fixed random magnitudes.

    Liao et al. 2016.

    e_in = g B with B = |M| sign(W) of the current W, sign(0) = 0; M is drawn once by the initialiser of the weights.

    Choice: M is Xavier-uniform (``m_init``); ``density`` below 1 puts a mask, drawn once, on B. Metrics are taken on |M| sign(W);
    on |M| alone the angle would read 90 degrees.
    """

    m_init: str = option("xavier_uniform", "initialiser of the magnitudes M", choices=list(INITIALISERS))
    density: float = option(1.0, "fraction of B that is not zero (mask drawn once)", above=0, maximum=1)

    def carrier(self, site: Site) -> Carrier:
        site.put("M", self.m_init, magnitude=True)
        site.put_mask(self.density)
        return SignedMagnitude()
