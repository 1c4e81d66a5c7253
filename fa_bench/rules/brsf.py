"""Batchwise random magnitude sign-concordant feedback."""

from __future__ import annotations

import dataclasses

from fa_bench.mechanisms.edge.pathways import FeedbackPathway, SignedMagnitudeFeedback
from fa_bench.mechanisms.edge.rule import LayerContext
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.rules.frsf import FRSF


@ALGORITHMS.register("brsf")
@dataclasses.dataclass(eq=False)
class BRSF(FRSF):
    """Sign-concordant feedback with random magnitudes that are resampled for every batch.

    Liao et al. 2016.

    e_in = g B with B = |M| sign(W) of the current W, sign(0) = 0; a new M is sampled at every training forward pass.
    ``rule.feedback`` has the latest M; nothing is sampled during evaluation.

    Choices: M is Xavier-uniform (``m_init``); ``density`` below 1 masks B with one fixed mask. Sample k for a layer depends only
    on (seed, layer, k), so no other random numbers are affected, and a resumed run draws the same M.
    """

    equations = (
        r"e_{\text{in}} &= g B,\quad B = \lvert M_t \rvert \odot \operatorname{sign}(W),\quad M_t \text{ sampled for "
        r"every batch } t",
        r"\nabla_W &= g^\top x",
    )

    def notes(self) -> tuple[str, ...]:
        return ("M is sampled at every training forward pass: each micro-batch has its own M.",)

    def pathway(self, layer: LayerContext) -> FeedbackPathway:
        super().pathway(layer)
        return SignedMagnitudeFeedback(resample=self.m_init, seed=layer.tensor_seed("M"))
