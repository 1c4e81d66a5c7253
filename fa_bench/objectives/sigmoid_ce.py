"""Binary cross-entropy with one sigmoid per class."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fa_bench.objectives.base import Objective, one_hot, reduce
from fa_bench.registry.kinds import CLASSES, VALUES
from fa_bench.registry.registries import OBJECTIVES
from fa_bench.utils.lazy import nn

if TYPE_CHECKING:
    from torch import Tensor


@OBJECTIVES.register("sigmoid_ce")
@dataclasses.dataclass(eq=False)
class SigmoidCE(Objective):
    """Binary cross-entropy with one sigmoid per class (one-vs-all): L = -Σ_k [t_k log σ(z_k) + (1 - t_k) log(1 - σ(z_k))].

    The target t is the one-hot row of the label, or real values in [0, 1]. The gradient at the outputs is σ(z) - t.
    """

    targets = (CLASSES, VALUES)
    value_range = (0.0, 1.0)

    def loss(self, outputs: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        losses = nn.functional.binary_cross_entropy_with_logits(outputs, one_hot(target, outputs), reduction="none")
        return reduce(losses.sum(1), reduction)

    def predicted(self, outputs: Tensor) -> Tensor:
        return outputs.sigmoid()
