"""Batchwise random magnitude sign-concordant feedback."""

from __future__ import annotations

import dataclasses

from fa_bench.config.options import option
from fa_bench.config.registries import ALGORITHMS
from fa_bench.draws import INITIALISERS
from fa_bench.mechanisms.carriers import Carrier, SignedMagnitude
from fa_bench.mechanisms.edge import EdgeRule, Site


@ALGORITHMS.register("brsf")
@dataclasses.dataclass(eq=False)
class BRSF(EdgeRule):
    """Sign-concordant feedback with random magnitudes, new ones for every batch.

    Liao et al. 2016.

    e_in = g B with B = |M| sign(W) of the current W, sign(0) = 0; M is drawn anew at every training forward by the
    initialiser of the weights. ``rule.feedback`` holds the last draw; an evaluation forward draws nothing.

    Choice: M is Xavier-uniform (``m_init``); ``density`` below 1 puts a mask, drawn once, on B. The draw number k of a layer is
    a function of (seed, layer, k) alone, so that it disturbs no other random numbers and a resumed run draws the same.
    """

    m_init: str = option("xavier_uniform", "initialiser of the magnitudes M", choices=list(INITIALISERS))
    density: float = option(1.0, "fraction of B that is not zero (mask drawn once)", above=0, maximum=1)

    def notes(self) -> tuple[str, ...]:
        return ("M is drawn for every training forward pass: parts of a batch have draws of their own.",)

    def carrier(self, site: Site) -> Carrier:
        site.put("M", self.m_init, magnitude=True)
        site.put_mask(self.density)
        return SignedMagnitude(redraw=self.m_init, seed=site.tensor_seed("M"))
