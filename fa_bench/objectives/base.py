"""The base class of objectives, which define the loss and the accuracy of a network's outputs.

Shapes: N batch, C classes, O outputs.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from fa_bench.registry.kinds import CLASSES
from fa_bench.registry.options import Options

if TYPE_CHECKING:
    from torch import Tensor

@dataclasses.dataclass(eq=False)
class Objective(Options):
    """Base of the objectives, registered in `fa_bench.registry.registries.OBJECTIVES`."""

    #: The kinds of targets (`fa_bench.registry.kinds`) that `loss` accepts.
    targets: ClassVar[tuple[str, ...]] = (CLASSES,)

    def loss(self, outputs: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        """The loss of a batch; implemented by each objective.

        Args:
            outputs: of the network, (N, C) or (N, O).
            target: class indices (N,) or numbers (N, O), depending on `targets`.
            reduction: ``mean`` or ``sum`` over the samples, for a scalar; ``none`` for the loss of each sample, (N,).
        """
        raise NotImplementedError

    def correct(self, outputs: Tensor, target: Tensor) -> Tensor | None:
        """Which samples are classified correctly, bool (N,); None if the targets are numbers."""
        return None if target.is_floating_point() else outputs.argmax(1) == target


def reduce(losses: Tensor, reduction: str) -> Tensor:
    """The losses of the samples, (N,), reduced as in `Objective.loss`."""
    return losses.mean() if reduction == "mean" else losses.sum() if reduction == "sum" else losses


def one_hot(target: Tensor, like: Tensor) -> Tensor:
    """Targets with the shape and dtype of the outputs `like`, (N, C): class indices as one-hot rows, numbers unchanged."""
    if target.is_floating_point():
        return target.to(like.dtype)
    return like.new_zeros(like.shape).scatter_(1, target.unsqueeze(1), 1)
