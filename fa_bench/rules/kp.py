"""Kolen-Pollack."""

from __future__ import annotations

import dataclasses

from fa_bench.mechanisms.edge.pathways import FeedbackPathway, LearnedFeedback
from fa_bench.mechanisms.edge.rule import LayerContext, RandomFeedbackRule
from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS


@ALGORITHMS.register("kp")
@dataclasses.dataclass(eq=False)
class KP(RandomFeedbackRule):
    """Kolen-Pollack: the feedback is updated with the gradient of the weight.

    The rule is due to Kolen and Pollack 1994; see also eqs 16-18 of Akrout et al. 2019.

    The rule computes e_in = g B. The gradient of B is exactly that of W, and B is trained with the optimizer, learning rate,
    momentum and decay of W. The gradients cancel in the difference W - B. SGD with decay λ, momentum m and learning rate lr
    therefore gives ‖W - B‖ ≈ ‖W(0) - B(0)‖ exp(-Σ lr λ/(1-m)). AdamW multiplies the difference by 1 - lr λ in each step. Adam
    with coupled decay also divides the decay by the root of the second moment, so the rate at which the difference shrinks
    depends on the gradients and is often higher.

    Our choices: B is sampled as in `fa` (``b_init``, and ``linear_b_init`` for fully connected layers). The B of the first layer
    propagates no error but is trained anyway. If ``b_lr_scale`` is not 1, B has its own learning rate, and the difference no
    longer decays to zero.
    """

    equations = (
        r"e_{\text{in}} &= g B",
        r"\nabla_B = \nabla_W &= g^\top x",
    )

    b_lr_scale: float = option(1.0, "learning rate of B relative to that of W", minimum=0)

    def pathway(self, layer: LayerContext) -> FeedbackPathway:
        self.put_feedback(layer)
        return LearnedFeedback()
