"""Activation sharing in the feedback path."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fa_bench.errors import OptionError
from fa_bench.mechanisms.edge.pathways import BackwardContext, feedback_gradient
from fa_bench.mechanisms.edge.sharing import SharedActivationFeedback, SharingRule
from fa_bench.registry.registries import ALGORITHMS

if TYPE_CHECKING:
    from torch import Tensor


class FeedbackPathSharing(SharedActivationFeedback):
    """Feedback pathway in which the shared activation enters only the gradient of B."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source is not None:
            self.follows = None

    def shared(self, layer: Any, context: BackwardContext, activation: Callable[[], Tensor]) -> BackwardContext:
        return context._replace(gradients=feedback_gradient(layer, "B", activation))


@ALGORITHMS.register("asfp")
@dataclasses.dataclass(eq=False)
class ASFP(SharingRule):
    """Activation sharing in the feedback path (ASFP): an earlier activation replaces a layer's input, but only in the gradient of
    B.

    The rule is given by eqs 39-42 of Woo et al. 2021.

    The rule computes e_in = g B; gradient of W = gᵀ x with the true input; gradient of B = gᵀ h̃ with the shared activation h̃ of
    `asap`. B therefore follows W only to the extent that h̃ and x agree. Sharing, matching, the frozen stem and the treatment of
    fully connected layers are as in `asap`, with the same options `k`, `match`, `linear`, `b_init` and `linear_b_init`.

    Our choice: ``transport`` is rejected, because there would be no B to learn.
    """

    equations = (
        r"e_{\text{in}} &= g B",
        r"\nabla_W &= g^\top x",
        r"\nabla_B &= g^\top \tilde{h}",
    )

    sharing = FeedbackPathSharing

    def check(self) -> None:
        if self.transport:
            raise OptionError("transport", "=True leaves no learned feedback that could use shared activations; use asap or bp")
