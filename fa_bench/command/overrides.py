"""Parse and expand overrides before Hydra does, and suggest a correction for those that cannot be parsed."""

from __future__ import annotations

import functools
import itertools
import math
import re

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException

from fa_bench.errors import ConfigError, first_line, truncate
from fa_bench.utils.shell import PLAIN, expansion_problem, hydra_quote, shell_quote

#: Maximum number of jobs in a sweep and maximum number of characters in an override, both far above anything in practical use.
MOST_JOBS, MOST_TEXT = 10_000, 20_000


def values_of(override: Override) -> list[str]:
    """The values of an override, as text."""
    return [str(value) for value in (override.sweep_iterator() if override.is_sweep_override() else [override.value()])]


def key_of(override: Override) -> str:
    """The key of an override. A choice for another package keeps the package, as in ``optimizer@feedback_optimizer``, because it
    is not a choice of the group itself."""
    return f"{override.key_or_group}@{override.package}" if override.package else override.key_or_group


@functools.lru_cache(maxsize=4096)  # the jobs of a sweep share most of their overrides
def parse_override(text: str) -> Override:
    """An override as parsed by Hydra. The result is cached, so callers must not modify it. Hydra's errors are not caught."""
    return OverridesParser.create().parse_override(text)


def parse(text: str) -> Override:
    """Parse one override.

    Raises:
        ConfigError: if it cannot be parsed, is too long, or has too many values or none; where possible, the message says what to
            type instead.
    """
    short = truncate(text, 100)
    if len(text) > MOST_TEXT:
        raise ConfigError(f"cannot read '{short}': longer than {MOST_TEXT} characters")
    try:
        override = parse_override(text)
    except RecursionError:
        raise ConfigError(f"cannot read '{short}': nested too deeply") from None
    except (HydraException, ValueError) as error:
        raise ConfigError(_quoting_hint(text) or f"cannot read '{short}': write key=value ({first_line(error)})") from None
    if not override.key_or_group:
        raise ConfigError(f"cannot read '{short}': write key=value")
    if (values := count_values(override)) > MOST_JOBS:
        raise ConfigError(f"{short}: more than {MOST_JOBS} values")
    if values == 0:
        raise ConfigError(f"{short}: no values")
    return override


def count_values(override: Override) -> float:
    """The number of values of an override, computed without expanding it. Raises ConfigError for an interval or a pattern."""
    value = override.value()
    if isinstance(value, RangeSweep):
        start, stop, step = value.start or 0, value.stop or 0, value.step
        if not all(map(math.isfinite, (start, stop, step))) or step == 0:
            return math.inf
        return max(0.0, math.ceil((stop - start) / step))
    if isinstance(value, (IntervalSweep, Glob)):
        raise ConfigError(f"{truncate(override.input_line or '', 100)}: name the values, or write range(start,stop,step)")
    return len(value.list) if isinstance(value, ChoiceSweep) else 1


def expand(overrides: list[Override]) -> list[list[str]]:
    """The overrides of every job of a sweep."""
    if (jobs := math.prod(map(count_values, overrides))) > MOST_JOBS:
        swept = " ".join(o.input_line or "" for o in overrides if o.is_sweep_override())
        raise ConfigError(f"{truncate(swept, 200)}: a sweep of {jobs:.0f} jobs (allowed: up to {MOST_JOBS})")
    values = {
        override.get_key_element(): list(override.sweep_string_iterator())
        if override.is_sweep_override()
        else [override.get_value_element_as_str()]
        for override in overrides
    }
    return [[f"{key}={value}" for key, value in zip(values, job, strict=True)] for job in itertools.product(*values.values())]


def _quoting_hint(text: str) -> str:
    """The message for an override whose value begins with ``~`` or needs quotes; empty if the problem is another one."""
    key, found, value = text.partition("=")
    if not found or not re.fullmatch(r"\+{0,2}[\w./@-]+", key) or not value.isprintable():
        return ""
    if items := re.fullmatch(r"\[([^\[\]{}()'\"]+)\]", value):
        # In a list such as [csv,early:patience=3,min=1], options belong to the component before them.
        parts = [part.strip() for part in re.split(r",(?![\w.]+=)", items[1])]
        return _corrected(text, "an item of the list", f"{key}=[{','.join(map(_quoted_if_needed, parts))}]")
    if re.match(r"\s*[\[{'\"]", value):
        return ""
    if value.startswith("~"):
        return f"{key}{expansion_problem(key, value)}"
    for parts in ([value] if "${" in value else value.split(","), [value]):
        if hint := _corrected(text, "the value", f"{key}={','.join(map(_quoted_if_needed, parts))}"):
            return hint
    return ""


def _quoted_if_needed(value: str) -> str:
    """A value with quotes if Hydra cannot read it without them. Numbers remain numbers."""
    return value if PLAIN.fullmatch(value) else hydra_quote(value)


def _corrected(text: str, quoted: str, meant: str) -> str:
    """The message that suggests an override with quotes; empty if Hydra cannot read that one either."""
    try:
        parse_override(meant)
    except (HydraException, ValueError, RecursionError):
        return ""
    return f"cannot read '{truncate(text, 100)}': {quoted} needs quotes; write {truncate(shell_quote(meant), 500)}"
