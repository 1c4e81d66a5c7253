"""Tests of the brain_correlation analysis: predicted correlations and angles, and those of sampled matrices."""

from __future__ import annotations

import numpy as np
import pytest

from fa_bench.analyses.brain_correlation import BrainCorrelation, sample_pair


def test_brain_and_mixed_angles_are_78_degrees() -> None:
    table = BrainCorrelation(neurons=100, draws=5, fractions=[1.0], correlations=[1.0]).table().set_index("point")
    brain, mixed, grid = (table.loc[kind] for kind in ("brain", "mixed", "grid"))
    assert brain["overall"] == pytest.approx(0.36 * 0.31**0.5) and brain["angle"] == pytest.approx(78.44, abs=0.01)
    # With 10,000 pairs, a correlation has a standard deviation of 0.01. The mean of five correlations has a standard deviation of
    # 0.0045, which corresponds to a quarter of a degree.
    assert brain["overall_drawn"] == pytest.approx(0.2004, abs=0.015)
    assert brain["angle_drawn"] == pytest.approx(78.4, abs=0.9)
    assert mixed["reciprocal"] == pytest.approx(0.31) and mixed["angle"] == pytest.approx(78.6, abs=0.05)
    assert mixed["angle_drawn"] == pytest.approx(78.6, abs=0.9)
    assert grid["angle_drawn"] == pytest.approx(0, abs=1e-6)


def test_sampled_pairs_match_fraction_and_correlation() -> None:
    forward, feedback = sample_pair(40_000, 0.3, 0.5, seed=1)
    both = feedback != 0
    assert both.mean() == pytest.approx(0.3, abs=0.01)
    assert np.corrcoef(forward[both], feedback[both])[0, 1] == pytest.approx(0.5, abs=0.03)
    assert feedback[both].std() == pytest.approx(1, abs=0.03)
