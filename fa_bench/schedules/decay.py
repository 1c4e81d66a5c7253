"""Learning rates that decay smoothly until the end of training."""

from __future__ import annotations

import dataclasses
import math

from fa_bench.errors import OptionError, missing_method
from fa_bench.registry.options import option
from fa_bench.registry.registries import SCHEDULES
from fa_bench.schedules.base import Schedule


@dataclasses.dataclass(eq=False)
class _Decay(Schedule):
    min_lr: float = option(0.0, "learning rate that the schedule would reach after the last epoch (or step)", minimum=0)

    def check_rate(self, lr: float) -> None:
        if self.min_lr > lr:
            raise OptionError("min_lr", f"={self.min_lr} is above lr={lr}")

    def fraction(self, part: float) -> float:
        """The fraction of lr - min_lr that is left after the fraction `part` of the run: 1 at the start and 0 at the end."""
        raise missing_method(self, "fraction")

    def rate(self, lr: float, done: int, total: int) -> float:
        return self.min_lr + (lr - self.min_lr) * self.fraction(done / total)


@SCHEDULES.register("cosine")
@dataclasses.dataclass(eq=False)
class Cosine(_Decay):
    """Lowers the learning rate from lr to `min_lr` along half a cosine (Loshchilov and Hutter 2017, eq 5, without restarts)."""

    def fraction(self, part: float) -> float:
        return (1 + math.cos(math.pi * part)) / 2


@SCHEDULES.register("linear")
@dataclasses.dataclass(eq=False)
class Linear(_Decay):
    """Lowers the learning rate linearly from lr to `min_lr`, after keeping it constant for the fraction `flat` of the
    run."""

    flat: float = option(0.0, "fraction of the run before the learning rate begins to fall", minimum=0, below=1)

    def fraction(self, part: float) -> float:
        return min(1.0, (1 - part) / (1 - self.flat))
