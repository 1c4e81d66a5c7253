"""Statistics over the known values. A statistic is NaN if there are too few values.

Paired comparisons use the differences between two rows at the same seeds. Aggregates over tasks follow Agarwal et al. 2021, "Deep
Reinforcement Learning at the Edge of the Statistical Precipice" (rliable).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

CONFIDENCE = 0.95
#: The minimum number of values for a t interval and a t test. With two values, the 95 % interval would extend 12.7 standard
#: errors on either side.
FEWEST = 3
#: The number of resamples of a bootstrap interval, and their seed.
RESAMPLES, BOOTSTRAP_SEED = 10_000, 0
#: Differences count as equal if their standard deviation is at most this fraction of the largest value, because they then differ
#: only by rounding errors.
ROUNDING = 1e-12

Key = TypeVar("Key", bound=Hashable)


def number(value: Any) -> float:
    """A recorded value as a float; NaN if it is null or not finite."""
    return float(value) if value is not None and math.isfinite(value) else math.nan


def known(values: Iterable[Any]) -> list[float]:
    """The recorded values that are finite numbers, as floats."""
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
    """Half the width of the 95 % Student t interval of the mean, in the values' unit; NaN for fewer than three values."""
    from scipy.special import stdtrit  # slow to import, and not needed to read runs

    present = known(values)
    if len(present) < FEWEST:
        return math.nan
    return float(stdtrit(len(present) - 1, (1 + CONFIDENCE) / 2)) * std(present) / math.sqrt(len(present))


def value_range(values: Iterable[Any]) -> tuple[float, float]:
    """The smallest and the largest of the known values; NaN for fewer than two."""
    present = known(values)
    return (min(present), max(present)) if len(present) > 1 else (math.nan, math.nan)


class Paired(NamedTuple):
    """Statistics of differences that are paired by seed.

    `p` is the two-sided p value of the paired t test. `effect` is Cohen's d_z, the mean of the differences divided by their
    standard deviation. `p` and `effect` are NaN for fewer than three pairs, and if all differences are equal.
    """

    mean: float
    half_width: float
    low: float
    high: float
    n: int
    effect: float
    p: float


def paired(ours: Mapping[Key, float], theirs: Mapping[Key, float]) -> Paired:
    """Statistics of the differences ours - theirs, in the values' unit, for the keys (seeds) that both maps have."""
    from scipy.special import stdtr

    differences = [value - theirs[key] for key, value in ours.items() if key in theirs]
    n, centre, spread = len(differences), mean(differences), std(differences)
    effect = p = math.nan
    size = max((abs(value) for values in (ours, theirs) for value in values.values()), default=0.0)
    if n >= FEWEST and spread > ROUNDING * size:
        effect = centre / spread
        p = float(2 * stdtr(n - 1, -abs(effect) * math.sqrt(n)))
    return Paired(centre, half_width(differences), *value_range(differences), n, effect, p)


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """Correct p values with Holm's method, counting only the known ones as tests; NaN stays NaN.

    The k-th smallest of m p values (k = 0, 1, ...) is multiplied by m - k. No result is smaller than the previous one or larger
    than 1.
    """
    ordered = sorted((p, index, key) for index, (key, p) in enumerate(p_values.items()) if not math.isnan(p))
    corrected, largest = dict(p_values), 0.0
    for rank, (p, _, key) in enumerate(ordered):
        largest = max(largest, min((len(ordered) - rank) * p, 1.0))
        corrected[key] = largest
    return corrected


def interquartile_mean(values: Iterable[Any]) -> float:
    """The mean of the known values without the lowest and the highest quarter (their size is rounded down); NaN if there are no
    values."""
    present = sorted(known(values))
    cut = len(present) // 4
    return mean(present[cut : len(present) - cut])


def bootstrap_interval(strata: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the interquartile mean, with values resampled within each stratum (task).

    The seed is fixed. The bounds are NaN if no stratum has two values, because resampling would then change nothing.
    """
    import numpy as np

    if not any(len(values) > 1 for values in strata):
        return math.nan, math.nan
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    samples = np.concatenate(
        [
            np.asarray(values, dtype=float)[generator.integers(len(values), size=(RESAMPLES, len(values)))]
            for values in strata
            if len(values)
        ],
        axis=1,
    )
    samples.sort(axis=1)
    cut = samples.shape[1] // 4
    means = samples[:, cut : samples.shape[1] - cut].mean(axis=1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
