"""Tests of the forward_alignment_theorem analysis: convergence if a condition of the theorem is violated, and what training
conserves."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from fa_bench.analyses.forward_alignment_theorem import ForwardAlignmentTheorem, trajectory
from fa_bench.errors import OptionError


def test_each_case_violates_only_its_condition() -> None:
    analysis = ForwardAlignmentTheorem(condition=50.0)
    nets = {case: analysis.net(case, seed=3) for case in analysis.cases}
    k = {case: net.a @ net.c.T - net.w.T @ net.w / 2 for case, net in nets.items()}
    for case, net in nets.items():
        eigenvalues = np.linalg.eigvalsh(net.covariance)
        assert eigenvalues.mean() == pytest.approx(1)
        assert eigenvalues[-1] / eigenvalues[0] == pytest.approx(50 if case == "coloured" else 1)
        assert np.linalg.matrix_rank(net.c) == {"rank_enough": 4, "rank_small": 3}.get(case, 6)
        assert (np.linalg.norm(k[case]) > 1) == case.startswith("k_")
        assert np.array_equal(net.teacher, nets["theorem"].teacher)
    assert np.linalg.eigvalsh(k["k_negative"]).max() < 1e-9


def test_convergence_depends_on_rank_not_on_k() -> None:
    analysis = ForwardAlignmentTheorem(
        seeds=1, time=40.0, lr=0.02, records=40, cases=["theorem", "k_negative", "rank_small", "coloured"]
    )
    table = analysis.table()
    shown = analysis.summary(table).set_index("case")
    assert shown.loc[["theorem", "k_negative"], "error_largest"].max() < 1e-6
    assert shown.loc["rank_small", "error_smallest"] > 0.05
    assert 1e-6 < shown.loc["coloured", "error_smallest"] < 0.5
    # The Lyapunov function V decreases if k = 0, but increases at first if k is negative.
    assert shown.loc["theorem", "lyapunov_max"] == 1 and shown.loc["k_negative", "lyapunov_max"] > 1.5


def test_only_symmetric_part_of_k_is_conserved() -> None:
    """The symmetric part drifts only because the step size is finite. The drift is proportional to the step size, so a tenth of
    the step size gives about a tenth of the drift."""
    analysis = ForwardAlignmentTheorem(start=0.5)
    net, drift = analysis.net("theorem", seed=0), []
    for lr in (1e-2, 1e-3):
        w, a = next(islice(trajectory(net, lr), round(2 / lr), None))
        k = a @ net.c.T - w.T @ w / 2
        drift.append(np.linalg.norm(k + k.T) / 2)
        assert np.linalg.norm(k - k.T) / 2 > 20 * drift[-1] * lr / 1e-2
    assert 0.05 < drift[1] / drift[0] < 0.2


def test_rejects_sizes_excluded_by_theorem() -> None:
    with pytest.raises(OptionError, match=r"inputs=6 must be above outputs=4 and at most hidden=5"):
        ForwardAlignmentTheorem(hidden=5)
