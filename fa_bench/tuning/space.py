"""The search space, whose dimensions are written like Hydra's sweeps on the command line."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, QuotedString, RangeSweep

from fa_bench.config.labels import is_number
from fa_bench.errors import ConfigError, format_value, truncate
from fa_bench.registry.options import option_fields
from fa_bench.tuning.options import parse_override
from fa_bench.utils.shell import hydra_quote, shell_quote

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

    from fa_bench.config.job import Job

LOG = "log"
#: A value counts as being at the edge if its distance from one end of the range is at most this fraction of the range.
EDGE = 0.05


@dataclasses.dataclass(frozen=True)
class Dimension:
    """One key and its possible values, which are `choices` or the numbers from `low` to `high`.

    Attributes:
        key: the key as on the command line.
        choices: the allowed values; empty for a range.
        low, high: the ends of a range, both included; whole numbers for a range of whole numbers.
        step: the step between the numbers of a range; None: all numbers.
        log: whether the range is searched logarithmically.
        source: where the dimension was declared, for messages.
    """

    key: str
    choices: tuple[Any, ...] = ()
    low: float = 0
    high: float = 0
    step: float | None = None
    log: bool = False
    source: str = ""

    @property
    def text(self) -> str:
        """The values as typed on the command line. Search spaces are compared by this text."""
        if self.choices:
            listed = ",".join(map(as_typed, self.choices))  # functions such as choice(...) do not accept null
            return listed if len(self.choices) > 1 else f"choice({listed})"
        if self.step is not None:
            return self._tagged(f"range({self.low!r},{self.high + self.step!r},{self.step!r})")
        text = f"interval({self.low!r},{self.high!r})"
        return self._tagged(f"int({text})" if isinstance(self.low, int) else text)

    def _tagged(self, text: str) -> str:
        return f"tag(log,{text})" if self.log else text

    @property
    def distribution(self) -> BaseDistribution:
        """The dimension as an optuna distribution."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices:
            return CategoricalDistribution(self.choices)
        if isinstance(self.low, int) and isinstance(self.high, int):
            return IntDistribution(self.low, self.high, log=self.log, step=int(self.step or 1))
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)

    def position(self, value: Any) -> float | None:
        """The position of a value in the range or among numeric choices, from 0 to 1; None if the value has no such position."""
        if not is_number(value):
            return None
        if self.choices:
            ordered = sorted(choice for choice in self.choices if is_number(choice))
            if len(ordered) < max(len(self.choices), 2) or value not in ordered:
                return None
            return ordered.index(value) / (len(ordered) - 1)
        if not self.low <= value <= self.high:
            return None
        scale = math.log if self.log else float
        return (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low)) if self.high > self.low else None

    def at(self, u: float) -> Any:
        """The value at the position `u` (0 <= u < 1) of the range or of the choices.

        If `u` is uniformly distributed, so is the value or, for a logarithmic range, its logarithm.
        """
        if self.choices:
            return self.choices[int(u * len(self.choices))]
        is_whole = isinstance(self.low, int) and isinstance(self.high, int)
        if self.log:
            margin = 0.5 if is_whole else 0.0  # a whole number stands for the interval of width 1 around it, as in optuna
            low, high = math.log(self.low - margin), math.log(self.high + margin)
            value = math.exp(low + u * (high - low))
            return min(max(round(value) if is_whole else value, self.low), self.high)
        step = self.step or (1 if is_whole else None)
        if step is None:
            return self.low + u * (self.high - self.low)
        return self.low + step * int(u * (math.floor((self.high - self.low) / step + 1e-9) + 1))

    def contains(self, value: Any) -> bool:
        """Whether a search over this dimension can propose the value."""
        if self.choices:
            return any(choice == value and is_number(choice) == is_number(value) for choice in self.choices)
        if not is_number(value) or not self.low <= value <= self.high:
            return False
        steps = (value - self.low) / self.step if self.step else 0.0
        is_whole = isinstance(self.low, float) or isinstance(self.high, float) or float(value).is_integer()
        return is_whole and abs(steps - round(steps)) < 1e-9

    def extremes(self) -> list[Any]:
        """The values to check before a study starts, which are all choices or both ends of the range."""
        return list(self.choices) or [self.low, self.high]

    def edge(self, value: Any, allowed: Mapping[str, float]) -> tuple[str, str] | None:
        """The edge of the range at which a value lies (``upper`` or ``lower``), and an override that widens the range at this
        edge.

        Args:
            value: the value of a trial.
            allowed: the option's limits, as `fa_bench.registry.options.option` names them.

        Returns:
            None if the value is not at an edge, or if the option allows no wider range.
        """
        position = self.position(value)
        if position is None or EDGE < position < 1 - EDGE:
            return None
        upper = position > 0.5
        wider = self._wider(upper, allowed)
        return None if wider is None else ("upper" if upper else "lower", shell_quote(f"{self.key}={wider.text}"))

    def _wider(self, upper: bool, allowed: Mapping[str, float]) -> Dimension | None:
        ordered = sorted(self.choices)
        low, high = (ordered[0], ordered[-1]) if ordered else (self.low, self.high)
        is_log = self.log or (bool(ordered) and high >= 10 * min((choice for choice in ordered if choice > 0), default=high))
        if upper:
            end = high * 10 if is_log else high + (high - low)
        elif is_log:
            end = low / 10 if low > 0 else low
        else:
            end = low - (high - low)
        end = min(max(end, allowed.get("minimum", -math.inf)), allowed.get("maximum", math.inf))
        if end <= allowed.get("above", -math.inf):
            end = (low + allowed["above"]) / 2
        if end >= allowed.get("below", math.inf):
            end = (high + allowed["below"]) / 2
        whole = all(isinstance(number, int) for number in (ordered or (low, high)))
        end = round(end) if whole else float(f"{end:.6g}")
        if end in (low, high):
            return None
        if ordered:
            return dataclasses.replace(self, choices=(*self.choices, end) if upper else (end, *self.choices))
        if self.step is not None:  # the end must be on the grid of steps
            steps = math.floor(abs(end - (high if upper else low)) / self.step + 1e-9)
            end = high + steps * self.step if upper else low - steps * self.step
            if not steps:
                return None
        return dataclasses.replace(self, **{"high" if upper else "low": end})


def dimension(key: str, override: Override, source: str) -> Dimension:
    """The dimension that a sweep override describes.

    Raises:
        ConfigError: for values that cannot be searched.
    """
    value, typed = override.value(), truncate(override.input_line or "", 200)
    if isinstance(value, IntervalSweep):
        low, high = value.start, value.end
        if low is None or high is None or not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ConfigError(f"{typed}: an interval needs two finite numbers, the smaller one first")
        return _logged(Dimension(key, low=low, high=high, source=source), value.tags, typed)
    if isinstance(value, RangeSweep):
        numbers: list[Any] = list(override.sweep_iterator())
        if len(numbers) < 2:
            raise ConfigError(f"{typed}: the range contains only one value; write that value to fix the key")
        low, high = min(numbers), max(numbers)
        return _logged(Dimension(key, low=low, high=high, step=abs(value.step), source=source), value.tags, typed)
    if not isinstance(value, ChoiceSweep):
        raise ConfigError(f"{typed}: name the values, or write choice(...), interval(...) or range(...)")
    choices = tuple(item.text if isinstance(item, QuotedString) else item for item in value.list)
    if any(not isinstance(choice, (str, int, float, bool)) and choice is not None for choice in choices):
        raise ConfigError(f"{typed}: choices must be numbers, names, true, false or null")
    if any(choice in choices[:index] for index, choice in enumerate(choices)):
        raise ConfigError(f"{typed}: lists a value twice")
    if LOG in value.tags:
        raise ConfigError(f"{typed}: a list has no scale; write tag(log,interval(LOW,HIGH)) for a logarithmic range")
    return Dimension(key, choices, source=source)


def _logged(result: Dimension, tags: set[str], typed: str) -> Dimension:
    if unknown := tags - {LOG}:
        raise ConfigError(f"{typed}: unknown tag {truncate(sorted(unknown)[0], 50)} (allowed: {LOG})")
    if LOG not in tags:
        return result
    if result.low <= 0:
        raise ConfigError(f"{typed}: a logarithmic range needs numbers above 0")
    # A logarithmic range has no steps, except that optuna supports a step of 1 for whole numbers.
    if result.step not in (None, 1) or (result.step is not None and not isinstance(result.low, int)):
        raise ConfigError(
            f"{typed}: a logarithmic range has no steps; write {result.key}=tag(log,interval({result.low},{result.high}))"
        )
    return dataclasses.replace(result, log=True)


def declared(prefix: str, space: Mapping[str, str], source: str) -> dict[str, Dimension]:
    """The dimensions that a component declares in its `search_space`, by key."""
    return {
        key: dimension(key, parse_override(f"{key}={text}"), source)
        for key, text in ((f"{prefix}.{name}", text) for name, text in space.items())
    }


def as_typed(value: Any) -> str:
    """A value as typed on the command line, quoted for Hydra if necessary."""
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(as_typed, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{as_typed(item)}' for key, item in value.items())}}}"
    return hydra_quote(value) if isinstance(value, str) else format_value(value)


def shown(value: Any) -> str:
    """A value as shown in tables; floating-point numbers are rounded to three significant digits."""
    return f"{value:.3g}" if isinstance(value, float) else format_value(value)


def value_at(job: Job, key: str) -> Any:
    """The value of a key in a checked config. Raises KeyError or TypeError if the config does not have the key."""
    return functools.reduce(lambda node, part: node[part], key.split("."), job.plain())


def limits_at(job: Job, key: str) -> dict[str, float]:
    """The limits of the option with this key."""
    *path, name = key.split(".")
    node: Any = job if path else job.run
    for part in path:
        node = getattr(node, part)
    return next((field.metadata["limits"] for field in option_fields(type(node)) if field.name == name), {})
