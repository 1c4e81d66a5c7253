"""Gradient-aligned projected error."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from fa_bench.errors import OptionError
from fa_bench.mechanisms.cut.jacobian import JacobianRule
from fa_bench.mechanisms.cut.rule import CapturedActivation
from fa_bench.mechanisms.feedback_options import init_option, positions_option, within_option
from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fa_bench.mechanisms.coverage import Coverage

#: Norms below this value are replaced by it before a division.
_TINY = 1e-30


@ALGORITHMS.register("grape")
@dataclasses.dataclass(eq=False)
class GrAPE(JacobianRule):
    """Gradient-aligned projected error: direct feedback is rotated towards the Jacobian, with occasional updates by
    backpropagation.

    The rule is due to Caillon, Fagnou, Delattre and Allauzen, ICLR 2026, "Scaling Direct Feedback Learning with Jacobian
    Alignment Guarantees". We found no published code, so our implementation follows the paper's description.

    The error at a cut is δ B, as in direct feedback alignment, with δ = ∂L/∂z (N, C) and B (C, features of the cut). As in
    `fdfa`, there is noise p at every cut, and a forward pass with forward-mode differentiation gives the derivative of the logits
    along this noise, d (N, C). An estimate of the Jacobian ∂z/∂a is then Ĵ = mean over n of d_n ⊗ p_n. B minimises 1 - cos(B, Ĵ):

        gradient of B = -(Ĵ / (‖B‖ ‖Ĵ‖) - cos(B, Ĵ) B / ‖B‖²).

    This gradient is orthogonal to B, so B rotates, and its norm grows only to second order in the step size. In every
    `anchor_period`-th update, counted by ``rule.step()``, W learns by exact backpropagation instead. These anchor updates use
    weight transport, which coverage reports; the record of a run contains their number (``rule_counts``). With
    ``anchor_period=0``, there are no anchor updates; with ``anchor_period=1``, W learns as with `bp`. The output layer learns
    from its true gradient.

    In an earlier version of the paper (a submission of 2024, as described in a review), B is multiplied by 1 - η (1 - cos), which
    shrinks B but never rotates it. This class implements the version of 2026, which is a different rule.

    We did not check the following against the paper: the period of the anchor updates, the initial values of B, its learning
    rate, and whether the cosine is computed from the mean over the batch, as here, or for every sample. Our choices: B is
    initially normal with variance 1 / C (``b_init``) and also learns in anchor updates. B is trained either by the optimizer of
    W, with `b_lr_scale` times the learning rate of W, or by a separate optimizer. The options `tangents`, `within` and
    `positions`, the scale of the gradient of B, and the noise of the samples are as in `fdfa`.
    """

    equations = (
        r"e_a &= \delta B",
        r"\hat{J} &= \operatorname{mean}_n (d_n \otimes p_n),\quad d_n = \sum_{\text{cuts}} \frac{\partial "
        r"z_n}{\partial a_n} p_n,\quad p_n \sim \mathcal{N}(0, I)",
        r"\nabla_B &= -\left(\frac{\hat{J}}{\lVert B \rVert \lVert \hat{J} \rVert} - \cos(B, \hat{J}) \frac{B}{\lVert "
        r"B \rVert^2}\right)",
    )

    search_space = {"b_lr_scale": "tag(log,interval(1e-2,100))"}

    b_init: str = init_option("B", "normal_fan_out")
    b_lr_scale: float = option(1.0, "learning rate of B relative to that of W, unless B has its own optimizer", minimum=0)
    anchor_period: int = option(100, "number of updates from one exact backpropagation update to the next; 0: none", minimum=0)
    within: str = within_option()
    positions: str = positions_option()

    def wire(self, sample_input: Any) -> Coverage:
        self._steps = self._anchors = 0
        coverage = super().wire(sample_input)
        if not self.anchor_period:
            return coverage
        which = "every update" if self.anchor_period == 1 else f"one of {self.anchor_period} updates, by exact backpropagation"
        return dataclasses.replace(coverage, transport=(*coverage.transport, f"in {which}"))

    def check(self) -> None:
        super().check()
        if self.b_init == "zeros":
            raise OptionError("b_init", "=zeros: B cannot be turned towards the Jacobian; use another initialiser")

    def make_feedback(self, features: dict[str, tuple[int, ...]], classes: int) -> None:
        self.put_learned(features, classes, self.b_init)

    def gradient_of(self, feedback: Tensor, estimate: Tensor) -> Tensor:
        norm, length = feedback.norm().clamp_min(_TINY), estimate.norm().clamp_min(_TINY)
        unit, direction = feedback / norm, estimate / length
        return ((unit * direction).sum() * unit - direction) / norm

    # -------------------------------------------------------------------------------------------- anchors
    @property
    def crosses(self) -> bool:
        """Whether this pass belongs to an update by exact backpropagation."""
        return self._is_anchor(self._steps) and not self.mode.freeze_random

    def _is_anchor(self, step: int) -> bool:
        return self.anchor_period > 0 and (step + 1) % self.anchor_period == 0

    def begin_forward(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        super().begin_forward(model, args, kwargs)
        if self.first_pass is not None and self.first_pass.note is None:  # not in a repetition of the pass
            self.first_pass.note = self.crosses

    def signal(self, cut: str, captured: CapturedActivation, broadcast: Tensor, target: Tensor | None) -> Tensor:
        error = super().signal(cut, captured, broadcast, target)
        # In an anchor update, the error of backpropagation crosses the cut, and nothing is added to it.
        return torch.zeros_like(error) if self.first_pass is not None and self.first_pass.note else error

    @property
    def needs_step(self) -> bool:
        return True

    def step(self) -> None:
        super().step()
        self._anchors += self._is_anchor(self._steps)
        self._steps += 1

    def counts(self) -> dict[str, int]:
        return {"updates_by_backpropagation": self._anchors}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "steps": self._steps, "anchors": self._anchors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._steps, self._anchors = int(state["steps"]), int(state["anchors"])
