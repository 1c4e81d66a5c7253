"""Rules that compute the gradients of all parameters in further forward passes, without a backward pass through the model."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from fa_bench.mechanisms.cut.rule import CutRule

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fa_bench.mechanisms.trace import Trace


@dataclasses.dataclass(eq=False)
class PassRule(CutRule):
    """A rule that learns in passes of its own, which `fa_bench.mechanisms.second_pass.again` runs; subclasses implement
    `gradients`.

    The first pass, from which the loss is computed, is not differentiated: ``loss.backward()`` reaches the logits only, and the
    gradients that `gradients` returns are accumulated there, as those of a backward pass are.
    """

    repeats = True
    scales = True
    learns_in_passes = True
    #: Whether what follows the last cut learns by the gradient of the loss of the first pass; `gradients` returns None there.
    output_learns_by_delta = False

    @property
    def needs_target(self) -> bool:
        return True

    def gradients(
        self, parameters: list[nn.Parameter], activations: dict[str, Tensor], delta: Tensor, logits: Tensor,
        target: Tensor | None,
    ) -> list[Tensor | None]:
        """The gradients of the parameters; called with gradients enabled and the `first_pass`.

        Args:
            parameters: all of the model that are trained, learned feedback included.
            activations: cut -> its activation (N, ...) in the first pass.
            delta: the gradient of the loss at the logits, in their shape; it contains `loss_factor` and the mean's 1/N.
            logits: those of the first pass.
            target: the labels, (N,) or (N, P...).
        """
        raise NotImplementedError

    def error_points(self, trace: Trace) -> dict[str, tuple[str, str]]:
        """None: no error is delivered to an activation of the first pass."""
        return {}

    def readouts(self) -> dict[str, Tensor]:
        return {}

    def weight_pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """None: no error passes through a layer."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}
