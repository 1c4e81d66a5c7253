"""What every schedule is: the learning rate as a function of the epochs, or steps, that have been trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fa_bench.errors import OptionError, names, nearest
from fa_bench.registry.options import Options, as_plain, option, option_fields
from fa_bench.registry.registries import SCHEDULES

S = TypeVar("S", bound="Schedule")


@dataclasses.dataclass(eq=False)
class Schedule(Options):
    """Base of the schedules, registered in `fa_bench.registry.registries.SCHEDULES`.

    A schedule is a function of what has been trained, so that a resumed run needs no state of it.
    """

    kinds = SCHEDULES
    per: str = option("epoch", "unit that the schedule and its warm-up count in", choices=["epoch", "step"])
    warmup: int = option(0, "epochs (or steps, as `per` says) during which the learning rate rises linearly to what the "
                            "schedule gives", minimum=0)

    def rate(self, lr: float, done: int, total: int) -> float:
        """The learning rate without warm-up; implemented by each schedule.

        Args:
            lr: the optimizer's learning rate.
            done: epochs (or steps) that have been trained, from 0.
            total: epochs (or steps) of the whole run.
        """
        raise NotImplementedError

    def at(self, lr: float, done: int, total: int) -> float:
        """The learning rate, warm-up included: during a warm-up of w units, (done + 1)/(w + 1) of what `rate` gives."""
        rate = self.rate(lr, done, total)
        return rate * (done + 1) / (self.warmup + 1) if done < self.warmup else rate

    def check_rate(self, lr: float) -> None:
        """Override to check the options against the optimizer's learning rate; raise OptionError."""

    def shortened(self: S, length: Callable[[int], int]) -> S:
        """The schedule of a shorter trial; `length` gives what remains of a number of epochs or steps."""
        return dataclasses.replace(self, warmup=length(self.warmup) if self.warmup else 0)

    def schema(self) -> dict[str, Any]:
        """This schedule's name, and the options of all schedules: null, which is the default of the one that is chosen."""
        everything = {field.name: None for cls in SCHEDULES.values() for field in option_fields(cls)}
        defaults = {field.name: field.default for field in option_fields(type(self))}
        return {"name": self.name, **everything, **{k: v for k, v in as_plain(self).items() if v != defaults[k]}}

    @classmethod
    def from_mapping(cls: type[S], values: Mapping[str, Any]) -> S:
        """Build the schedule that ``values['name']`` chooses; options that are null have their defaults.

        Raises:
            OptionError: for an unknown schedule, an unknown option, one of another schedule, or a bad value.
        """
        if cls.name:
            return super().from_mapping(values)
        given = {key: value for key, value in values.items() if value is not None and key != "name"}
        name = values.get("name", "constant")
        if name not in SCHEDULES:
            raise OptionError("name", f"={name} is not one of {names(SCHEDULES)}{nearest(str(name), SCHEDULES)}")
        chosen: Any = SCHEDULES[name]
        own = [field.name for field in option_fields(chosen)]
        for key in given:
            known = ["name", *(field.name for schedule in SCHEDULES.values() for field in option_fields(schedule))]
            if key not in known:
                raise OptionError(str(key), f"unknown option of a schedule{nearest(str(key), known)} "
                                            f"(options: {names(dict.fromkeys(known))})")
            owners = [other for other, schedule in SCHEDULES.items() if key in (f.name for f in option_fields(schedule))]
            if key not in own and owners:
                raise OptionError(key, f"is not an option of schedule.name={name}, but of {names(owners)}")
        return chosen.from_mapping(given)
