"""The base class of schedules, which compute the learning rate as a function of the completed epochs or steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fa_bench.errors import OptionError, missing_method, names, nearest
from fa_bench.registry.options import Options, as_plain, option, option_fields
from fa_bench.registry.registries import SCHEDULES

S = TypeVar("S", bound="Schedule")


@dataclasses.dataclass(eq=False)
class Schedule(Options):
    """Base class of schedules, registered in `fa_bench.registry.registries.SCHEDULES`.

    A schedule has no state, so there is nothing to restore when a run is resumed.

    Examples:
        >>> import dataclasses, fa_bench
        >>> @dataclasses.dataclass(eq=False)
        ... class Inverse(fa_bench.Schedule):
        ...     slope: float = fa_bench.option(1.0, "slope", minimum=0)
        ...
        ...     def rate(self, lr, done, total):
        ...         return lr / (1 + self.slope * done)
        >>> [Inverse(slope=1, warmup=1).at(0.6, epoch, total=3) for epoch in range(3)]
        [0.3, 0.3, 0.19999999999999998]
    """

    kinds = SCHEDULES
    per: str = option("epoch", "unit of the schedule and its warm-up", choices=["epoch", "step"])
    warmup: int = option(0, "length of the linear warm-up, in epochs or steps (see `per`)", minimum=0)

    def rate(self, lr: float, done: int, total: int) -> float:
        """The learning rate without warm-up; each schedule must implement this method.

        Args:
            lr: the optimizer's learning rate.
            done: the number of finished epochs (or steps).
            total: the number of epochs (or steps) of the whole run.
        """
        raise missing_method(self, "rate")

    def at(self, lr: float, done: int, total: int) -> float:
        """The learning rate with warm-up. During a warm-up of w epochs (or steps), the learning rate is (done + 1)/(w + 1) times
        `rate`."""
        rate = self.rate(lr, done, total)
        return rate * (done + 1) / (self.warmup + 1) if done < self.warmup else rate

    def check_rate(self, lr: float) -> None:
        """Override this method to raise an OptionError if the options do not fit the optimizer's learning rate."""

    def shortened(self: S, length: Callable[[int], int]) -> S:
        """The schedule for a shortened run; `length` maps numbers of epochs or steps of the full run to those of the shortened
        run."""
        return dataclasses.replace(self, warmup=length(self.warmup) if self.warmup else 0)

    def schema(self) -> dict[str, Any]:
        """The name of this schedule and the options of all schedules; null stands for the default of the selected schedule."""
        options = {field.name: None for cls in SCHEDULES.values() for field in option_fields(cls)}
        defaults = {field.name: field.default for field in option_fields(type(self))}
        return {"name": self.name, **options, **{k: v for k, v in as_plain(self).items() if v != defaults[k]}}

    @classmethod
    def from_mapping(cls: type[S], values: Mapping[str, Any]) -> S:
        """Create the schedule that ``values['name']`` selects; options that are null get their default values.

        Raises:
            OptionError: for an unknown schedule, an unknown option, an option of another schedule, or an invalid value.
        """
        if cls.name:
            return super().from_mapping(values)
        given = {key: value for key, value in values.items() if value is not None and key != "name"}
        name = values.get("name", "constant")
        if name not in SCHEDULES:
            raise OptionError("name", f"={name} is not one of {names(SCHEDULES)}{nearest(str(name), SCHEDULES)}")
        options = {kind: [field.name for field in option_fields(schedule)] for kind, schedule in SCHEDULES.items()}
        known = list(dict.fromkeys(["name", *(key for keys in options.values() for key in keys)]))
        for key in given:
            if key not in known:
                raise OptionError(str(key), f"unknown option of a schedule{nearest(str(key), known)} (options: {names(known)})")
            if key not in options[name]:
                owners = [kind for kind, keys in options.items() if key in keys]
                raise OptionError(key, f"is not an option of schedule.name={name}, but of {names(owners)}")
        selected: Any = SCHEDULES[name]
        return selected.from_mapping(given)
