"""A constant learning rate."""

from __future__ import annotations

import dataclasses

from fa_bench.registry.registries import SCHEDULES
from fa_bench.schedules.base import Schedule


@SCHEDULES.register("constant")
@dataclasses.dataclass(eq=False)
class Constant(Schedule):
    """Keeps the optimizer's learning rate constant."""

    def rate(self, lr: float, done: int, total: int) -> float:
        return lr
