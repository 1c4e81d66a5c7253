"""The one-cycle schedule."""

from __future__ import annotations

import dataclasses
import math

from fa_bench.errors import OptionError
from fa_bench.registry.options import option
from fa_bench.registry.registries import SCHEDULES
from fa_bench.schedules.base import Schedule


@SCHEDULES.register("one_cycle")
@dataclasses.dataclass(eq=False)
class OneCycle(Schedule):
    """One-cycle schedule (Smith and Topin 2018): the learning rate rises from lr/`start` to lr along half a cosine and then falls
    to lr/(`start` `end`) along another.

    The learning rates are those of PyTorch's OneCycleLR with cosine annealing, but the momentum is constant.
    """

    per: str = option("step", "unit of the schedule and its warm-up", choices=["epoch", "step"])
    rise: float = option(0.3, "fraction of the run during which the learning rate rises", above=0, below=1)
    start: float = option(25.0, "ratio of lr to the initial learning rate", minimum=1)
    end: float = option(1e4, "ratio of the initial learning rate to the final one", minimum=1)

    def check(self) -> None:
        if self.warmup:
            raise OptionError("warmup", f"={self.warmup}: one_cycle has its own warm-up, see schedule.rise")

    def rate(self, lr: float, done: int, total: int) -> float:
        low, last, top = lr / self.start, total - 1, self.rise * total - 1
        if done <= top:
            return _between(low, lr, done / top if top > 0 else 1.0)
        return _between(lr, low / self.end, (done - top) / (last - top) if last > top else 1.0)


def _between(first: float, last: float, part: float) -> float:
    """The value at the fraction `part` of half a cosine from `first` to `last`."""
    return last + (first - last) * (1 + math.cos(math.pi * part)) / 2
