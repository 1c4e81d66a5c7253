"""Sign-concordant feedback with fixed random magnitudes."""

from __future__ import annotations

import dataclasses

from fa_bench.mechanisms.edge.pathways import FeedbackPathway, SignedMagnitudeFeedback
from fa_bench.mechanisms.edge.rule import EdgeRule, LayerContext
from fa_bench.mechanisms.feedback_options import density_option, init_option
from fa_bench.registry.registries import ALGORITHMS


@ALGORITHMS.register("frsf")
@dataclasses.dataclass(eq=False)
class FRSF(EdgeRule):
    """Sign-concordant feedback with fixed random magnitudes.

    The rule is due to Liao et al. 2016.

    The rule computes e_in = g B with B = |M| sign(W), where W is the current weight and sign(0) = 0. M is sampled once.

    Our choices: M is Xavier-uniform (``m_init``), and if ``density`` is below 1, a fixed mask sets entries of B to zero. Metrics
    compare W with B, because the angle between |M| and W is about 90 degrees.
    """

    equations = (
        r"e_{\text{in}} &= g B,\quad B = \lvert M \rvert \odot \operatorname{sign}(W),\quad M \text{ fixed}",
        r"\nabla_W &= g^\top x",
    )

    m_init: str = init_option("the magnitudes M", continuous=True)
    density: float = density_option()

    def pathway(self, layer: LayerContext) -> FeedbackPathway:
        layer.put("M", self.m_init, magnitude=True)
        layer.put_mask(self.density)
        return SignedMagnitudeFeedback()
