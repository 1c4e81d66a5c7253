"""Linear direct difference target propagation."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

from fa_bench.mechanisms.checkpointing import refuse_reentrant
from fa_bench.mechanisms.cut.rule import CapturedActivation
from fa_bench.mechanisms.drawing import DrawingRule
from fa_bench.mechanisms.feedback_options import init_option
from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.rules.dkp import DKP

if TYPE_CHECKING:
    from torch import Tensor


@ALGORITHMS.register("ddtp_linear")
@dataclasses.dataclass(eq=False)
class DDTPLinear(DrawingRule, DKP):
    """Linear direct difference target propagation: direct feedback learns from noise to invert the layers above each cut.

    The rule is DDTP-linear with the difference reconstruction loss (Meulemans et al. 2020, arXiv 2006.14331).

    The target of the logits z is z - η δ, with δ = ∂L/∂z (N, C). The target of the activation h at a cut is h plus Q times the
    change -η δ in z, so the gradient of half the squared distance to the target is η δ Qᵀ. The error at a cut is therefore δ B
    with B = Qᵀ, of shape (C, features of the cut), as in `dkp`. The factor η is omitted, because it scales the errors of all
    hidden layers equally.

    B minimises the loss ‖Δz B - σ ε‖² / σ², averaged over the samples. Here σ ε is Gaussian noise added to h in an additional
    forward pass, in which nothing else changes, and Δz is the resulting change in the logits:

        gradient of B = 2 / (N σ²) Δzᵀ (Δz B - σ ε)

    Let J be ∂z/∂h, and λ the weight decay. If J is the same for all samples and σ (``sigma``) is small, B converges to the
    transpose of Jᵀ (J Jᵀ + λ/2 I)⁻¹, the damped pseudo-inverse of J. The update of h is then a Gauss-Newton update, so its angle
    to the update of backpropagation is not zero in general. The probe ``gauss_newton_angle`` measures the angle of the rule's
    errors to those of the Gauss-Newton method, and the same angle for backpropagation.

    The paper's code trains networks with five hidden layers of 256 tanh units on MNIST, using Adam with a learning rate of 2e-5,
    and σ = 0.09. For the feedback, it uses Adam with a learning rate of 1.6e-4 and a decay of 5.8e-7; here,
    ``optimizer@feedback_optimizer=adam`` gives B an optimizer of its own.

    Deviations from the code: B learns in every step, whereas the code trains B for six epochs before training and for one epoch
    after every epoch. The output layer learns from its true gradient, whereas the code includes the softmax in the last layer and
    trains that layer with its target.

    Every cut costs one additional forward pass through the whole model. The options `b_init`, `density`, `within`, `error_at` and
    `positions` work as in `dkp`; ``b_lr_scale`` is the learning rate of B relative to that of W. We derived the equations from
    the code and have not reproduced any result of the paper.
    """

    equations = (
        r"e_h &= \delta B",
        r"\mathcal{L}_B &= \frac{1}{\sigma^2} \operatorname{mean} \lVert \Delta z B - \sigma \varepsilon \rVert^2",
        r"\nabla_B &= \frac{2}{N \sigma^2} \Delta z^\top (\Delta z B - \sigma \varepsilon)",
    )

    search_space = {"b_lr_scale": "tag(log,interval(0.1,10))", "sigma": "choice(0.01,0.1)"}

    b_init: str = init_option("B", "xavier_normal")
    b_lr_scale: float = option(1.0, "learning rate of B relative to that of W, unless B has its own optimizer", minimum=0)
    sigma: float = option(0.1, "standard deviation σ of the noise at each cut", above=0)

    repeats = True
    scales = True
    reads_values = False

    def broadcast(self, delta: Tensor, target: Tensor | None) -> Tensor:
        self.next_draws()
        return super().broadcast(delta, target)

    def feedback_gradients(
        self, cut: str, captured: CapturedActivation, delta: Tensor, target: Tensor | None
    ) -> list[Tensor | None]:
        learned = self._learned[cut][0].tensor
        if not learned.requires_grad:
            return [None]
        change, noise = self._responses(cut)
        change = change.to(learned.dtype)
        missing = copy.copy(captured)
        missing.tensor = self.project(cut, change, captured) - noise.to(learned.dtype)
        [gradient] = super().feedback_gradients(cut, missing, change, target)
        assert gradient is not None
        return [gradient * (2 * self.loss_factor / (max(len(change), 1) * self.sigma**2))]

    def _responses(self, cut: str) -> tuple[Tensor, Tensor]:
        """The change of the output from which errors come, (N, C) or (N, P..., C), and the noise at the cut that causes this
        change."""
        from fa_bench.mechanisms.second_pass import again, value_of

        first = self.first_pass
        seen: dict[str, Tensor] = {}
        if first is None or first.output is None:
            refuse_reentrant(self.name)()
        assert first is not None and first.output is not None

        def disturb(activation: Tensor) -> Tensor:
            seen["noise"] = self.sigma * self._draws.normal(cut, activation.detach())
            disturbed = activation + seen["noise"]
            if cut == self.error_at:
                record(disturbed)
            return disturbed

        def record(output: Tensor) -> None:
            seen["output"] = value_of(output)

        changes: dict[str, Any] = ({} if self.error_at is None else {self.error_at: record}) | {cut: disturb}
        result = again(self.model, self.mode, first, outputs=changes)
        output = self.logits_of(result) if self.error_at is None else seen["output"]
        change = output - first.output
        return change.movedim(self.error_axis, -1), seen["noise"]

    def readouts(self) -> dict[str, Tensor]:
        """Returns no readouts, because B inverts the layers above the cut instead of estimating the logits."""
        return {}

    def weight_pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns no pairs, because B has no corresponding weight."""
        return {}
