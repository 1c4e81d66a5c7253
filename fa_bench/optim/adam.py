"""Adam and AdamW."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from fa_bench.optim.base import OptimizerOptions, fusible
from fa_bench.registry.options import option
from fa_bench.registry.registries import OPTIMIZERS
from fa_bench.utils.lazy import torch


@OPTIMIZERS.register("adam")
@dataclasses.dataclass(eq=False)
class Adam(OptimizerOptions):
    """Adam with coupled weight decay, which is added to the gradient and therefore affects both moments."""

    torch_class: ClassVar[str] = "Adam"
    search_space = {**OptimizerOptions.search_space, "lr": "tag(log,interval(1e-5,1e-1))"}

    lr: float = option(1e-3, "learning rate", above=0)
    beta1: float = option(0.9, "decay rate of the first moment", minimum=0, below=1)
    beta2: float = option(0.999, "decay rate of the second moment", minimum=0, below=1)
    eps: float = option(1e-8, "added to the square root of the second moment", above=0)

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return getattr(torch.optim, self.torch_class)(
            groups,
            lr=self.lr,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=fusible(groups),
        )


@OPTIMIZERS.register("adamw")
@dataclasses.dataclass(eq=False)
class AdamW(Adam):
    """Adam with decoupled weight decay: each step multiplies the weights by 1 - lr × weight_decay."""

    torch_class = "AdamW"
