"""Cross-entropy of a softmax."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fa_bench.objectives.base import Objective
from fa_bench.registry.options import option
from fa_bench.registry.registries import OBJECTIVES
from fa_bench.utils.lazy import nn

if TYPE_CHECKING:
    from torch import Tensor

#: An index that no label has. PyTorch's default, -100, would silently skip samples with this label.
_IGNORE_NOTHING = -(2**31)


@OBJECTIVES.register("cross_entropy")
@dataclasses.dataclass(eq=False)
class CrossEntropy(Objective):
    """Cross-entropy of the softmax of the outputs: L = -Σ_k q_k log softmax(z)_k, where q is the one-hot row of the label.

    If `label_smoothing` is s, q is (1 - s) times the one-hot row plus s/C for each of the C classes (Szegedy et al. 2016).
    """

    label_smoothing: float = option(0.0, "weight of the uniform distribution in the targets", minimum=0, maximum=1)

    @property
    def is_cross_entropy(self) -> bool:
        return self.label_smoothing == 0

    def loss(self, outputs: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        return nn.functional.cross_entropy(
            outputs, target, reduction=reduction, ignore_index=_IGNORE_NOTHING, label_smoothing=self.label_smoothing
        )
