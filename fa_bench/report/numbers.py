"""Statistics over the known values; NaN if there are too few."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

CONFIDENCE = 0.95


def number(value: Any) -> float:
    """A recorded value as a float; NaN if it is null or not finite."""
    return float(value) if value is not None and math.isfinite(value) else math.nan


def known(values: Iterable[Any]) -> list[float]:
    """The recorded values without null and non-finite ones."""
    return [value for value in map(number, values) if not math.isnan(value)]


def mean(values: Iterable[Any]) -> float:
    """Mean of the known values; NaN if there are none."""
    present = known(values)
    return statistics.fmean(present) if present else math.nan


def std(values: Iterable[Any]) -> float:
    """Sample standard deviation (ddof=1) of the known values; NaN for fewer than two."""
    present = known(values)
    return statistics.stdev(present) if len(present) > 1 else math.nan


def half_width(values: Iterable[Any]) -> float:
    """Half the width of the 95 % Student t interval of the mean, in the values' unit; NaN for fewer than two values."""
    from scipy.special import stdtrit  # slow to import, and not needed to read runs

    present = known(values)
    if len(present) < 2:
        return math.nan
    return float(stdtrit(len(present) - 1, (1 + CONFIDENCE) / 2)) * std(present) / math.sqrt(len(present))
