"""Tests of reports on unusual sweeps, with settings that are null, zero or negative, and runs without an accuracy."""

from __future__ import annotations

import matplotlib.figure
import numpy as np
import pytest

import fa_bench
from fa_bench.errors import DataError, RunDirectoryError, truncate
from fa_bench.report import write_report
from fa_bench.report.cli import main
from fa_bench.report.export import escape_latex
from fa_bench.report.files import check_folder
from fa_bench.report.groups import group_runs
from fa_bench.report.quantities import scalar
from fa_bench.report.runs import find_runs, read_run
from fa_bench.report.settings import series_by_panel
from fa_bench.report.table import summarise
from fa_bench.runs.checked_json import RecordError
from tests.report.by_hand import runs_in, write_set

RATES = (0.1, 0.01)


def swept(root, values, key="clip_norm", rules=("bp", "fa")):
    """Write one run per rule and value of a key outside the optimizer; the first value is the best."""
    for rule in rules:
        for index, value in enumerate(values):
            write_set(root, rule, 0, 0.9 - 0.1 * index, 0.9 - 0.1 * index, config={key: value})


def axes_of(figure: matplotlib.figure.Figure):
    return figure.axes[0]


def ticks(axes):
    return [text.get_text() for text in axes.get_xticklabels()]


def test_null_setting_is_category_with_ring_and_rank(tmp_path):
    swept(tmp_path, (None, 1.0, 5.0))
    figure = fa_bench.plot_setting(str(tmp_path))
    axes = axes_of(figure)
    assert ticks(axes) == ["1", "5", "null"]
    rings = [line for line in axes.lines if line.get_markersize() == 11]
    assert [np.asarray(line.get_xdata()).tolist() for line in rings] == [[2.0], [2.0]]  # null is at the last of three positions
    legend = [text.get_text() for text in figure.legends[-1].texts]
    assert legend[-2:] == ["bp: 90.00 at null", "fa: 90.00 at null"]


def test_rule_without_swept_setting_is_level_line(tmp_path):
    swept(tmp_path, (None, 1.0), "algorithm.extra", rules=("fa",))
    write_set(tmp_path, "bp", 0, 0.9)
    panels = series_by_panel(group_runs(runs_in(tmp_path)), "algorithm.extra", scalar("test_accuracy"))
    assert {series.rule: [point.x for point in series.points] for series in panels[""]} == {"bp": [None], "fa": [1.0, "null"]}


@pytest.mark.parametrize(
    ("values", "places"),
    [
        ((0.0, 1e-6, 1e-5, 1e-3), [0, 1, 2, 3]),  # on a linear axis, the first three would coincide
        ((0.0, 0.5, 1.0), [0.0, 0.5, 1.0]),
        ((0.0, 0.1, 1.0), [0.0, 0.1, 1.0]),  # 0 and 0.1 are a tenth of the axis apart
    ],
)
def test_values_including_zero_do_not_overlap(tmp_path, values, places):
    swept(tmp_path, values, "noise")
    axes = axes_of(fa_bench.plot_setting(str(tmp_path)))
    assert (axes.get_xscale(), list(axes.get_xticks())) == ("linear", pytest.approx(places))
    assert ticks(axes) == [f"{value:g}" for value in values]


def test_negative_values_are_sorted(tmp_path):
    swept(tmp_path, (1.0, -2.0, 0.5, -1.0), "noise", rules=("fa",))
    panels = series_by_panel(group_runs(runs_in(tmp_path)), "noise", scalar("test_accuracy"))
    assert [point.x for series in panels[""] for point in series.points] == [-2.0, -1.0, 0.5, 1.0]


def test_finished_runs_without_accuracy_are_noted(tmp_path):
    for seed, (test, val) in enumerate(((0.9, 0.9), (None, 0.8), (0.7, float("nan")), (0.8, 0.7))):
        write_set(tmp_path, "fa", seed, test, val)
    row = summarise(runs_in(tmp_path)).iloc[0]
    assert row["n"] == 4 and row["test_accuracy"] == pytest.approx(80)
    assert row["note"] == ("3 of 4 finished runs have a test accuracy; 3 of 4 finished runs have a validation accuracy")


def test_no_note_if_all_or_no_runs_have_accuracy(tmp_path):
    for seed in range(3):
        write_set(tmp_path, "fa", seed, 0.9, None)
    assert summarise(runs_in(tmp_path))["note"].tolist() == [""]


def test_foreign_file_is_rejected_before_figures_are_written(tmp_path):
    swept(tmp_path / "runs", (1.0,))
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    (out_dir / "report.csv").write_text("mine")
    with pytest.raises(RunDirectoryError, match=r"report\.csv: not written by a report"):
        write_report(find_runs([tmp_path / "runs"]), out_dir)
    assert not list(out_dir.glob("*.png")) and (out_dir / "report.csv").read_text() == "mine"


@pytest.mark.parametrize("name", ["runs.csv", "report.tex", "report_alarms.csv", "report_aggregate.csv"])
def test_folder_check_rejects_foreign_table(tmp_path, name):
    check_folder(tmp_path)
    (tmp_path / name).write_text("mine")
    with pytest.raises(RunDirectoryError, match=rf"{name}: not written by a report"):
        check_folder(tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--x", "lr"], "did you mean 'optimizer.lr'?"),
        (["--rules", ","], "--rules: no rule given; an example is --rules bp,kp"),
        (["--rules", ""], "--rules: no rule given; an example is --rules bp,kp"),
    ],
)
def test_unmatched_flags_are_rejected(tmp_path, capsys, flags, message):
    for rate in RATES:
        write_set(tmp_path / "runs", "fa", 0, 0.9, lr=rate)
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_plots_accept_rule_as_string_and_suggest_full_key(tmp_path):
    for rule in ("bp", "fa"):
        for rate in RATES:
            write_set(tmp_path, rule, 0, 0.9, lr=rate)
    legend = fa_bench.plot_setting(str(tmp_path), rules="fa").legends[0]
    assert [text.get_text() for text in legend.texts][-1].startswith("fa: ")
    assert not any(text.get_text().startswith("bp") for text in legend.texts)
    with pytest.raises(DataError, match=r"x='lr' is not swept .*; did you mean 'optimizer\.lr'"):
        fa_bench.plot_setting(str(tmp_path), x="lr")


def test_long_rule_names_and_values_are_shortened(tmp_path):
    rule = "a_rule_with_a_long_name"
    swept(tmp_path, ("x" * 30, "y" * 30), rules=(rule, "fa"))
    axes = axes_of(fa_bench.plot_setting(str(tmp_path)))
    assert ticks(axes) == [f"{'x' * 12} [...] x", f"{'y' * 12} [...] y"]
    assert "a_rule_wit [...] e" in [text.get_text() for text in axes.texts]


@pytest.mark.parametrize("limit", [9, 18, 20, 21, 22, 40])
def test_truncate_returns_exact_length(limit):
    text = "".join(map(str, range(40)))
    assert len(truncate(text, limit)) == limit and truncate(text, limit).endswith(text[-1])


def test_contradictory_accuracies_in_records_are_rejected(tmp_path):
    lines = [{"epoch": 1, "test_accuracy": 0.5}, {"epoch": 2, "test_accuracy": 0.7}]
    directory = write_set(tmp_path, "fa", 0, 0.9, metrics=lines, epoch=2)
    with pytest.raises(RecordError, match=r"test_accuracy=0\.7 in the last epoch, but test_accuracy=0\.9 in result\.json"):
        read_run(directory)


def test_latex_prints_backticks_and_hyphens_literally():
    assert escape_latex("`a`---b-c") == r"\textasciigrave{}a\textasciigrave{}-{}-{}-b-c"
