"""Tests of figures for notebooks."""

from __future__ import annotations

import json
import subprocess
import sys

import pandas as pd
import pytest
from matplotlib.figure import Figure

import fa_bench
from fa_bench.errors import DataError
from fa_bench.report import figures

from .by_hand import ANGLES, epoch_record, runs_in, write_run


@pytest.fixture
def sweep(tmp_path):
    for rule in ("bp", "kp"):
        for lr in (0.1, 0.2):
            run = write_run(
                tmp_path,
                rule,
                0,
                0.9,
                group=f"{rule}-{lr}",
                metrics=[epoch_record(1, lr, None) | {"step": 10}, epoch_record(2, 0.9, ANGLES) | {"step": 20}],
            )
            (run / "config.yaml").write_text(json.dumps({"algorithm": {"name": rule}, "optimizer": {"name": "sgd", "lr": lr}}))
            (run / "angles.jsonl").write_text(
                "".join(
                    json.dumps(
                        {"step": step, "epoch": step / 10, "angles": {"weight_angle": {"fc2": 90.0 - step, "fc3": 90.0 - step}}}
                    )
                    + "\n"
                    for step in (0, 5, 20)
                )
            )
    return tmp_path


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_directories_and_runs_give_the_same_figures(sweep):
    for source in ([sweep], [str(sweep)], [runs_in(sweep)], runs_in(sweep), [sorted(sweep.iterdir())]):
        figure = fa_bench.plot_curves(*source)
        assert isinstance(figure, Figure) and legend(figure) == ["bp lr=0.1", "bp lr=0.2", "kp lr=0.1", "kp lr=0.2"]
        assert [axes.get_title() for axes in figure.axes] == ["Test accuracy"]


def test_rules_accept_string(sweep):
    for rules in ("kp", ["kp"]):
        assert legend(fa_bench.plot_curves(sweep, rules=rules)) == ["kp lr=0.1", "kp lr=0.2"]
    assert legend(fa_bench.plot_curves(sweep, rules="bp, kp")) == legend(fa_bench.plot_curves(sweep))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda root: 3, "^int is neither a directory nor a run, nor a list of these$"),
        (lambda root: [root, None], "^NoneType, an item of a list, is neither"),
        (lambda root: fa_bench.load_results(root), r"^DataFrame is neither .*; pass its column, frame\['directory'\]$"),
    ],
)
def test_invalid_run_source_raises_type_error(sweep, source, message):
    for function in (fa_bench.plot_curves, fa_bench.load_results):
        with pytest.raises(TypeError, match=message):
            function(source(sweep))


def test_results_of_runs_and_directory_are_equal(sweep):
    for options in ({}, {"curves": True}, {"angles": True}):
        frame = fa_bench.load_results(sweep, **options)
        for source in ([runs_in(sweep)], runs_in(sweep), [str(sweep), sweep]):
            pd.testing.assert_frame_equal(fa_bench.load_results(*source, **options), frame)


def test_results_without_runs_have_columns_and_missing_source_raises(tmp_path):
    assert fa_bench.load_results(tmp_path).groupby("algorithm")["test_accuracy"].mean().empty
    assert list(fa_bench.load_results(tmp_path, curves=True)) == ["directory", "label", "seed", "epoch"]
    with pytest.raises(ValueError, match="pass a directory"):
        fa_bench.load_results()


def test_angles_are_plotted_at_every_measurement_including_step_zero(sweep):
    figure = fa_bench.plot_layers(sweep, x="step", rules=["kp"])
    assert [axes.get_title() for axes in figure.axes] == ["fc2", "fc3"] and legend(figure) == ["kp lr=0.1", "kp lr=0.2"]
    line = figure.axes[0].lines[0]
    assert list(line.get_xdata()) == [0, 5, 20] and list(line.get_ydata()) == [90, 85, 70]
    (axes,) = fa_bench.plot_curves(sweep, metric="weight_angle").axes
    assert list(axes.lines[0].get_xdata()) == [0, 0.5, 2]


def test_runs_without_measurements_use_epoch_angles(sweep):
    for path in sweep.glob("*/angles.jsonl"):
        path.unlink()
    (axes,) = fa_bench.plot_curves(sweep, metric="weight_angle").axes
    assert list(axes.lines[0].get_xdata()) == [2] and list(axes.lines[0].get_ydata()) == [70]


def test_setting_is_inferred_if_only_one_is_swept(sweep):
    for figure in (fa_bench.plot_setting(sweep), fa_bench.plot_setting(sweep, x="optimizer.lr", metric="weight_angle")):
        assert figure.axes[0].get_xlabel() == "learning rate (optimizer.lr)"
    assert figure.axes[0].get_ylabel() == "weight angle (degrees)"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda root: fa_bench.plot_curves(root, x="optimizer.lr"),
            r"x='optimizer.lr' is not available \(allowed: epoch, step, s",
        ),
        (lambda root: fa_bench.plot_curves(root, rules=["kb"]), r"rules='kb' is not available \(allowed: bp, kp\)"),
        (lambda root: fa_bench.plot_curves(root, metric="val_acuracy"), "did you mean 'val_accuracy'"),
        (lambda root: fa_bench.plot_curves([]), "nothing to plot"),
        (lambda root: fa_bench.plot_curves(root / "nowhere"), "no such directory"),
        (lambda root: fa_bench.plot_setting(root, x="optimizer.l"), r"'optimizer.l' is not swept .* did you mean 'optimizer.lr'"),
        (lambda root: fa_bench.plot_setting(root / "kp-0.1-0"), r"no setting is swept \(swept within a rule: none\)"),
        (lambda root: fa_bench.plot_layers(root, metric="test_accuracy"), r"no values by layer \(measured: weight_angle"),
    ],
)
def test_unavailable_choices_are_rejected(sweep, call, message):
    with pytest.raises(DataError, match=message):
        call(sweep)


def test_notebooks_show_figures_without_pyplot(sweep):
    assert fa_bench.plot_curves(sweep)._repr_png_().startswith(b"\x89PNG")
    script = "import sys, fa_bench; fa_bench.plot_curves(sys.argv[1]); assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", script, str(sweep)], check=True)


def test_damaged_measurements_exclude_run(sweep, monkeypatch):
    from fa_bench.report import write_report

    monkeypatch.setattr(figures, "metrics_of", lambda runs: {})
    (sweep / "kp-0.1-0" / "angles.jsonl").write_text("{}\n")
    write_report(sorted(sweep.iterdir()), sweep / "out")
    assert "angles.jsonl: line 1 is not a measurement" in (sweep / "out" / "report.html").read_text()
