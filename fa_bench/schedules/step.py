"""Learning rates that are reduced in steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from fa_bench.errors import OptionError, missing_method
from fa_bench.registry.options import option
from fa_bench.registry.registries import SCHEDULES
from fa_bench.schedules.base import Schedule


@dataclasses.dataclass(eq=False)
class _StepDecay(Schedule):
    gamma: float = option(0.1, "factor of each reduction", above=0, maximum=1)

    def reductions(self, done: int) -> int:
        """The number of reductions so far."""
        raise missing_method(self, "reductions")

    def rate(self, lr: float, done: int, total: int) -> float:
        for _ in range(self.reductions(done)):  # one factor at a time, so that rounding is as in torch's schedulers
            lr *= self.gamma
        return lr


@SCHEDULES.register("step")
@dataclasses.dataclass(eq=False)
class Step(_StepDecay):
    """Multiplies the learning rate by `gamma` every `step_size` epochs (or steps)."""

    step_size: int | None = option(None, "epochs (or steps) between reductions; required", minimum=1)

    def check(self) -> None:
        if self.step_size is None:
            raise OptionError("step_size", "is required for schedule.name=step", "=30")

    def reductions(self, done: int) -> int:
        assert self.step_size is not None
        return done // self.step_size

    def shortened(self, length: Callable[[int], int]) -> Step:
        return dataclasses.replace(super().shortened(length), step_size=length(self.step_size or 1))


@SCHEDULES.register("multistep")
@dataclasses.dataclass(eq=False)
class MultiStep(_StepDecay):
    """Multiplies the learning rate by `gamma` at each of the `milestones`."""

    milestones: list[int] | None = option(None, "epochs (or steps) after which the rate is reduced; required", minimum=1)

    def check(self) -> None:
        if self.milestones is None:
            raise OptionError("milestones", "are required for schedule.name=multistep, such as milestones=[60,80]")

    def reductions(self, done: int) -> int:
        return sum(milestone <= done for milestone in self.milestones or ())

    def shortened(self, length: Callable[[int], int]) -> MultiStep:
        return dataclasses.replace(super().shortened(length), milestones=[length(m) for m in self.milestones or ()])
