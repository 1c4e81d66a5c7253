"""Cut rules that learn from the derivative of the output along noise at the cuts."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from fa_bench.mechanisms.cut.rule import CutRule
from fa_bench.mechanisms.drawing import DrawingRule
from fa_bench.mechanisms.feedback_options import tangents_option

if TYPE_CHECKING:
    from torch import Tensor

    from fa_bench.mechanisms.coverage import Coverage


@dataclasses.dataclass(eq=False)
class NoisyCutRule(DrawingRule, CutRule):
    """A cut rule that computes the tangent d at the logits along noise p at the cuts, in additional forward passes.

    All cuts are perturbed at once. The noise is standard normal, new for every sample and backward pass, and different
    on data-parallel ranks.

    Attributes:
        tangents: how d is computed; see `fa_bench.mechanisms.tangents`.
    """

    repeats = True
    tangents: str = tangents_option()

    def wire(self, sample_input: Any) -> Coverage:
        self._sample = sample_input
        self._pass: tuple[dict[str, Tensor], Tensor] | None = None
        return super().wire(sample_input)

    def hook_model(self) -> None:
        from fa_bench.mechanisms.tangents import check_tangents

        # The tangents are not checked earlier, because an error about uncovered weights should come first.
        check_tangents(self, self.tangents, self._cut_modules, self._sample)
        self._sample = None
        super().hook_model()

    def broadcast(self, delta: Tensor, target: Tensor | None) -> Tensor:
        self._pass = None
        return delta

    def noise_and_tangent(self) -> tuple[dict[str, Tensor], Tensor]:
        """The noise p at each cut, in the shape of its activation, and the tangent d, with the class axis last, for this backward
        pass."""
        from fa_bench.mechanisms.tangents import output_tangent

        if self._pass is None:
            assert self.first_pass is not None
            self.next_draws()
            noise: dict[str, Tensor] = {}

            def sample(cut: str) -> Any:
                return lambda x: noise.setdefault(cut, self._draws.normal(cut, x))

            tangent = output_tangent(self, self.first_pass, self.tangents, {cut: sample(cut) for cut in self._cut_modules})
            self._pass = noise, tangent if tangent.dim() == 2 else tangent.movedim(self.error_axis, -1)
        return self._pass
