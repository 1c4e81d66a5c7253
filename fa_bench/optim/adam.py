"""Adam, and Adam with decoupled decay."""

from __future__ import annotations

import dataclasses
from typing import Any

from fa_bench.optim.base import OptimizerOptions, fusible
from fa_bench.registry.options import option
from fa_bench.registry.registries import OPTIMIZERS
from fa_bench.utils.lazy import torch


@OPTIMIZERS.register("adam")
@dataclasses.dataclass(eq=False)
class Adam(OptimizerOptions):
    """Adam; decay is coupled, which breaks the convergence of Kolen-Pollack's W - B: use adamw there."""

    lr: float = option(1e-3, "learning rate", above=0)
    beta1: float = option(0.9, "decay rate of the first moment", minimum=0, below=1)
    beta2: float = option(0.999, "decay rate of the second moment", minimum=0, below=1)
    eps: float = option(1e-8, "added to the root of the second moment", above=0)

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return self._torch_class()(groups, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps,
                                   weight_decay=self.weight_decay, fused=fusible(groups))

    def _torch_class(self) -> Any:
        return torch.optim.Adam


@OPTIMIZERS.register("adamw")
@dataclasses.dataclass(eq=False)
class AdamW(Adam):
    """Adam with decoupled decay: each step shrinks a tensor by lr times weight_decay, whatever its gradient."""

    def _torch_class(self) -> Any:
        return torch.optim.AdamW
