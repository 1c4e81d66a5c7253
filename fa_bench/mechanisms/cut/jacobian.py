"""Cut rules whose feedback learns from estimates of the Jacobian of the logits with respect to the activation at each cut."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from fa_bench.errors import missing_method
from fa_bench.mechanisms.cut.learned import LearnedCutRule
from fa_bench.mechanisms.cut.noise import NoisyCutRule
from fa_bench.mechanisms.cut.positions import positions_of
from fa_bench.mechanisms.cut.rule import CapturedActivation
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclasses.dataclass(eq=False)
class JacobianRule(NoisyCutRule, LearnedCutRule):
    """A rule whose B learns from rank-one estimates of the Jacobian; subclasses implement `gradient_of`.

    With the noise p at a cut and the tangent d at the logits, the estimate is the mean of d ⊗ p over samples, (C, features). Its
    expectation is the mean Jacobian of the logits. Positions count as samples, so the mean is taken over all pairs of
    corresponding positions of the output and the cut.
    """

    # The gradient of B does not come from the loss, but it must be scaled like the loss in micro-batches and under a gradient
    # scaler.
    scales = True

    def gradient_of(self, feedback: Tensor, estimate: Tensor) -> Tensor:
        """The gradient of B (C, F) for an estimate of the Jacobian (C, F)."""
        raise missing_method(self, "gradient_of")

    def feedback_gradients(
        self, cut: str, captured: CapturedActivation, delta: Tensor, target: Tensor | None
    ) -> list[Tensor | None]:
        if not any(learned.tensor.requires_grad for learned in self.learned_feedback()):
            return [None]
        feedback = self.tensor(cut, "B")
        gradient = self.gradient_of(feedback, self.estimate(cut).to(feedback.dtype))
        return [gradient if self.loss_factor == 1 else gradient * self.loss_factor]

    def estimate(self, cut: str) -> Tensor:
        """The mean of d ⊗ p at one cut, (C, F)."""
        noise, tangent = self.noise_and_tangent()
        p, d, dtype = noise[cut], tangent, torch.promote_types(tangent.dtype, torch.float32)
        if not self._layouts:
            return d.to(dtype).t().mm(p.flatten(1).to(dtype)) / max(len(d), 1)
        layout = self._layouts[cut]
        given, own = d.shape[1:-1], positions_of(tuple(p.shape), layout.axis)
        pairs = len(d) * math.prod(max(sizes) for sizes in zip(given or own, own or given, strict=True))
        errors, rows = layout.pairs(d.to(dtype), p.to(dtype))
        return errors.t().mm(rows) / max(pairs, 1)
