"""Activation sharing in the feedback path."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fa_bench.config.registries import ALGORITHMS
from fa_bench.errors import OptionError
from fa_bench.mechanisms.carriers import learning
from fa_bench.mechanisms.carry import Carry
from fa_bench.mechanisms.sharing import Sharing, SharingRule

if TYPE_CHECKING:
    from torch import Tensor


class FeedbackSharing(Sharing):
    """The shared activation enters the gradient of B alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source is not None:
            self.follows = None

    def shared(self, layer: Any, carry: Carry, activation: Callable[[], Tensor]) -> Carry:
        return carry._replace(learn=learning(layer, "B", activation))


@ALGORITHMS.register("asfp")
@dataclasses.dataclass(eq=False)
class ASFP(SharingRule):
    """Activation sharing in the feedback path: an earlier activation enters the gradient of B alone.

    Eqs 39-42 of Woo et al. 2021.

    e_in = g B; gradient of W = gᵀ x with the true input; gradient of B = gᵀ h̃ with the shared activation h̃ of `asap`, so that B
    follows W only as far as the activations agree. What is shared, how it is matched, the frozen stem and the fully connected
    layers are as for `asap`, and so are the options `k`, `match`, `linear`, `b_init` and `linear_b_init`.

    Choice: ``transport`` makes no sense here, for there is no B to learn, and is refused.
    """

    sharing = FeedbackSharing

    def check(self) -> None:
        if self.transport:
            raise OptionError("transport", "=True leaves asfp no feedback to share in; use algorithm=asap or bp")
