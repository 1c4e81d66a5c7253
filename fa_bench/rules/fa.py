"""Feedback alignment."""

from __future__ import annotations

import dataclasses

from fa_bench.mechanisms.edge.pathways import FeedbackPathway, FixedFeedback
from fa_bench.mechanisms.edge.rule import LayerContext, RandomFeedbackRule
from fa_bench.mechanisms.feedback_options import density_option
from fa_bench.registry.registries import ALGORITHMS


@ALGORITHMS.register("fa")
@dataclasses.dataclass(eq=False)
class FA(RandomFeedbackRule):
    """Feedback alignment: fixed random feedback.

    Lillicrap et al. 2016; eq 3 of Akrout et al. 2019; section 2 of Li and Benna 2024.

    e_in = g B. B is random, fixed and independent of W; each weighted layer has one, including projection shortcuts. Gradients of
    W and b are those of backpropagation with this error. B has no gradient and does not decay.

    Choices: B is Xavier-uniform as in Li and Benna's runs; the first layer's B propagates no error and exists only so that its
    angle can be measured. ``b_init=copy_w`` starts with B(0) = W(0), as the code of Woo et al. 2021 does in convolutions;
    ``linear_b_init`` gives fully connected layers another initialiser, which is uniform in [-1, 1) in that code. ``density``
    below 1 masks B with one fixed mask.
    """

    equations = (
        r"e_{\text{in}} &= g B,\quad B \text{ fixed}",
        r"\nabla_W &= g^\top x",
    )

    search_space = {"b_init": "choice(xavier_uniform,kaiming_uniform,pytorch)"}

    density: float = density_option()

    def pathway(self, layer: LayerContext) -> FeedbackPathway:
        self.put_feedback(layer, self.density)
        return FixedFeedback()
