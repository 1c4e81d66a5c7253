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
    """Kolen-Pollack: feedback that is updated with the gradient of the weight.

    Kolen and Pollack 1994; eqs 16-18 of Akrout et al. 2019.

    e_in = g B. The gradient of B is exactly that of W, and B is trained with W's optimizer, learning rate, momentum and decay.
    The gradients cancel in W - B, so with decay λ, momentum m and rate lr, SGD shrinks the difference: ‖W - B‖ ≈ ‖W(0) - B(0)‖
    exp(-Σ lr λ/(1-m)). AdamW shrinks it by the factor 1 - lr λ in each step. Adam with coupled decay divides the decay, too, by
    the root of the second moment, so the difference shrinks at a rate that depends on the gradients and is often faster.

    Choices: B is sampled as in FA (``b_init``, and ``linear_b_init`` for fully connected layers). The first layer's B propagates
    no error but is trained anyway. Optional deviation: with ``b_lr_scale`` other than 1, B has its own learning rate, and the
    difference no longer vanishes exactly.
    """

    equations = (
        r"e_{\text{in}} &= g B",
        r"\nabla_B = \nabla_W &= g^\top x",
    )

    b_lr_scale: float = option(1.0, "learning rate of B relative to that of W", minimum=0)

    def pathway(self, layer: LayerContext) -> FeedbackPathway:
        self.put_feedback(layer)
        return LearnedFeedback()
