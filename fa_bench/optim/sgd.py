"""Stochastic gradient descent."""

from __future__ import annotations

import dataclasses
from typing import Any

from fa_bench.errors import OptionError
from fa_bench.optim.base import OptimizerOptions, fusible
from fa_bench.registry.options import option
from fa_bench.registry.registries import OPTIMIZERS
from fa_bench.utils.lazy import torch


@OPTIMIZERS.register("sgd")
@dataclasses.dataclass(eq=False)
class SGD(OptimizerOptions):
    """Stochastic gradient descent with coupled weight decay, which is added to the gradient before the momentum is applied."""

    momentum: float = option(0.9, "momentum", minimum=0, below=1)
    nesterov: bool = option(False, "Nesterov momentum")

    def check(self) -> None:
        super().check()
        if self.nesterov and self.momentum == 0:
            raise OptionError("nesterov", "=true requires momentum above 0")

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            groups,
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            fused=fusible(groups),
        )
