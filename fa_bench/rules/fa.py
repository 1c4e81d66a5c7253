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
    """Feedback alignment: errors pass through fixed random feedback instead of the weights.

    The rule is due to Lillicrap et al. 2016; see also eq 3 of Akrout et al. 2019 and section 2 of Li and Benna 2024.

    The rule computes e_in = g B. Every layer with weights, including projection shortcuts, has its own B, which is random, fixed
    and independent of W. The gradients of W and b are those of backpropagation with this error. B has no gradient and does not
    decay.

    Our choices: B is Xavier-uniform, as in Li and Benna's runs. The B of the first layer propagates no error and exists only so
    that its angle can be measured. ``b_init=copy_w`` sets B to the initial W, as the code of Woo et al. 2021 does in
    convolutions. ``linear_b_init`` selects a different initialiser for fully connected layers; in that code, their B is uniform
    in [-1, 1). If ``density`` is below 1, a fixed mask sets entries of B to zero.
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
