"""Sign-concordant feedback with random magnitudes that are resampled for every batch."""

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

    The rule is due to Liao et al. 2016.

    The rule computes e_in = g B with B = |M| sign(W), where W is the current weight and sign(0) = 0. A new M is sampled in every
    training forward pass, and none during evaluation; ``rule.feedback`` contains the latest M.

    Our choices: M is Xavier-uniform (``m_init``), and if ``density`` is below 1, a fixed mask sets entries of B to zero. The k-th
    sample of M for a layer depends only on (seed, layer, k). Sampling M therefore affects no other random numbers, and a resumed
    run uses the same M as an uninterrupted one.
    """

    equations = (
        r"e_{\text{in}} &= g B,\quad B = \lvert M_t \rvert \odot \operatorname{sign}(W),\quad M_t \text{ sampled for "
        r"every batch } t",
        r"\nabla_W &= g^\top x",
    )

    def notes(self) -> tuple[str, ...]:
        return ("M is sampled in every training forward pass, so each micro-batch has its own M.",)

    def pathway(self, layer: LayerContext) -> FeedbackPathway:
        super().pathway(layer)
        return SignedMagnitudeFeedback(resample=self.m_init, seed=layer.tensor_seed("M"))
