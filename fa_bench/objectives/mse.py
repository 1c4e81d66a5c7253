"""Squared error."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fa_bench.objectives.base import Objective, one_hot, reduce
from fa_bench.registry.kinds import CLASSES, VALUES
from fa_bench.registry.registries import OBJECTIVES

if TYPE_CHECKING:
    from torch import Tensor


@OBJECTIVES.register("mse")
@dataclasses.dataclass(eq=False)
class MSE(Objective):
    """Half the squared error, L = ½ Σ_k (z_k - t_k)², where t is the real-valued target or the one-hot row of the label.

    Because of the sum over outputs and the factor ½, the gradient of L at the outputs is z - t, just as that of the cross-entropy
    is softmax(z) - t. The scores for real-valued targets are R² and RMSE (see `Objective.scored`), and the score for labels is
    the accuracy.
    """

    targets = (CLASSES, VALUES)

    def loss(self, outputs: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        return reduce((outputs - one_hot(target, outputs)).square().sum(1) / 2, reduction)
