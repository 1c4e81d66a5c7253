"""What every objective is: the loss of a network's outputs, and whether they are right.

Shapes: N batch, C classes, O outputs.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from fa_bench.registry.options import Options

if TYPE_CHECKING:
    from torch import Tensor

#: Kinds of targets: class indices, int64 (N,), and real numbers, float32 (N, O).
CLASSES, VALUES = "classes", "values"


@dataclasses.dataclass(eq=False)
class Objective(Options):
    """Base of the objectives, registered in `fa_bench.registry.registries.OBJECTIVES`."""

    #: The kinds of targets that `loss` accepts.
    targets: ClassVar[tuple[str, ...]] = (CLASSES,)

    def loss(self, outputs: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        """The loss of a batch; implemented by each objective.

        Args:
            outputs: of the network, (N, C) or (N, O).
            target: class indices (N,), or numbers (N, O), as `targets` says.
            reduction: ``mean`` or ``sum`` over the samples, a scalar; ``none``: the loss of every sample, (N,).
        """
        raise NotImplementedError

    def correct(self, outputs: Tensor, target: Tensor) -> Tensor | None:
        """Which samples are classified correctly, bool (N,); None where the targets are numbers and there is no accuracy."""
        return None if target.is_floating_point() else outputs.argmax(1) == target


def reduce(losses: Tensor, reduction: str) -> Tensor:
    """The losses of the samples, (N,), reduced as `Objective.loss` says."""
    return losses.mean() if reduction == "mean" else losses.sum() if reduction == "sum" else losses


def one_hot(target: Tensor, like: Tensor) -> Tensor:
    """Targets in the shape and precision of the outputs `like`, (N, C): class indices as one-hot rows, numbers as they are."""
    if target.is_floating_point():
        return target.to(like.dtype)
    return like.new_zeros(like.shape).scatter_(1, target.unsqueeze(1), 1)
