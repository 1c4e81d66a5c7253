"""Statistics agree with numbers worked out by hand and with SciPy."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from fa_bench.report.numbers import (
    bootstrap_interval,
    half_width,
    holm,
    interquartile_mean,
    paired,
    std,
    value_range,
)

from .by_hand import T_2, blank

#: The differences, ours minus theirs, are 1, 2, 6, with mean 3 and deviations -2, -1, 3, so the variance is (4 + 1 + 9) / 2 = 7.
OURS, THEIRS = {0: 91.0, 1: 94.0, 2: 96.0, 7: 1.0}, {2: 90.0, 1: 92.0, 0: 90.0, 5: 2.0}


def test_paired_differences_effect_size_and_p_value():
    found = paired(OURS, THEIRS)
    assert found[:5] == pytest.approx((3, T_2 * math.sqrt(7 / 3), 1, 6, 3))
    # d_z is 3 / sqrt 7, and t = d_z sqrt 3 = 1.9640 with 2 degrees of freedom, for which p = 1 - t / sqrt(2 + t^2). Since t^2 =
    # 27 / 7, p = 1 - sqrt((27 / 7) / (41 / 7)) = 1 - sqrt(27 / 41).
    assert found.effect == pytest.approx(3 / math.sqrt(7))
    assert found.p == pytest.approx(1 - math.sqrt(27 / 41)) == pytest.approx(0.188497, abs=1e-6)
    assert found.p == pytest.approx(stats.ttest_rel([91, 94, 96], [90, 92, 90]).pvalue)
    assert paired(THEIRS, OURS).p == pytest.approx(found.p) and paired(THEIRS, OURS).effect == pytest.approx(-found.effect)


def test_two_pairs_have_range_but_no_interval_or_test():
    found = paired({0: 91.0, 1: 94.0}, {0: 90.0, 1: 92.0})
    assert (found.mean, found.low, found.high, found.n) == (1.5, 1, 2, 2)
    assert blank(found.half_width) and blank(found.p) and blank(found.effect)
    one, none = paired({0: 1.0}, {0: 3.0, 1: 4.0}), paired({0: 1.0}, {1: 1.0})
    assert (one.mean, one.n) == (-2, 1) and blank(one.low) and none.n == 0 and blank(none.mean)


def test_differences_equal_up_to_rounding_have_no_test():
    ours = {seed: 100 * value for seed, value in enumerate([0.55, 0.57, 0.97])}
    theirs = {seed: 100 * value for seed, value in enumerate([0.57, 0.59, 0.99])}
    differences = [ours[seed] - theirs[seed] for seed in ours]
    assert 0 < std(differences) < 1e-10  # -2 except for rounding
    assert blank(paired(ours, theirs).p) and blank(paired(ours, theirs).effect) and paired(ours, ours).mean == 0


def test_holm():
    # The sorted values give 0.01 * 4, 0.02 * 3 = 0.06, 0.03 * 2 = 0.06 and 0.04 * 1, which is raised to the value before it,
    # 0.06.
    assert holm({"a": 0.04, "b": 0.01, "c": 0.03, "d": 0.02}) == pytest.approx({"a": 0.06, "b": 0.04, "c": 0.06, "d": 0.06})
    # Missing values do not count, so the results are 0.3 * 2 and 0.9. In the last example, 0.7 * 2 is limited to 1.
    corrected = holm({"a": 0.3, "b": math.nan, "c": 0.9})
    assert corrected["a"] == pytest.approx(0.6) and corrected["c"] == pytest.approx(0.9) and blank(corrected["b"])
    assert holm({"a": 0.7, "b": 0.8}) == {"a": 1.0, "b": 1.0} and holm({}) == {}


def test_intervals_need_three_values():
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(T_2 / math.sqrt(3))
    assert blank(half_width([1.0, 3.0])) and value_range([3.0, 1.0, None]) == (1, 3)
    assert blank(value_range([1.0])[0]) and blank(value_range([])[1])


def test_interquartile_mean():
    # Of 8 values, two are cut at each end, which leaves (3 + 4 + 5 + 6) / 4. Of 5 values, one is cut at each end, which leaves (2
    # + 3 + 4) / 3. Of 3 values, none is cut.
    assert interquartile_mean([100, 1, 3, 4, 2, 5, 6, 50]) == 4.5 == stats.trim_mean([1, 2, 3, 4, 5, 6, 50, 100], 0.25)
    assert interquartile_mean([9, 2, 3, 4, 0]) == 3 and interquartile_mean([1, 2, 6, None]) == 3 and blank(interquartile_mean([]))


def test_bootstrap_resamples_within_each_task():
    # There are two tasks of two seeds, so a resample has two of (0, 1) and two of (10, 11). Without the lowest and the highest
    # value, the resample has the larger of the first pair, which is 1 with probability 3/4 and 0 with 1/4, and the smaller of the
    # second, which is 10 (3/4) or 11 (1/4). The mean of these two values is 5 with probability 3/16, 5.5 with 9/16 + 1/16, and 6
    # with 3/16, so the 2.5 % and 97.5 % quantiles are 5 and 6. Without strata, a resample would have at least three zeros with a
    # probability of 13/256, which is more than 2.5 %, so the interval would be from 0 to 11.
    assert bootstrap_interval([[0.0, 1.0], [10.0, 11.0]]) == (5, 6)
    assert bootstrap_interval([[1.0, 5.0, 7.0]]) == bootstrap_interval([[1.0, 5.0, 7.0], []])  # the seed is fixed
    assert all(map(blank, bootstrap_interval([[1.0], [2.0]])))
