"""What the figures of a report show."""

from __future__ import annotations

import json

import pytest
from matplotlib.image import imread

from fa_bench.report import figures, plot
from fa_bench.report.groups import group_runs, in_order, tasks

from .by_hand import ANGLES, blank, epoch_record, runs_in, write_group, write_run


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are written, in order."""
    found = []
    savefig = plot.Figure.savefig
    monkeypatch.setattr(plot.Figure, "savefig", lambda self, *a, **k: found.append(self) or savefig(self, *a, **k))
    return found


def overview(root, path):
    groups = group_runs(in_order(runs_in(root)))
    panels = figures.overview_panels(runs_in(root))
    plot.write_parts([plot.Part(title, part, panels) for title, part in tasks(groups).items()], path, 3)


def test_curve_is_mean_and_std_over_the_finished_seeds(tmp_path):
    write_run(tmp_path, "fa", 0, 0.9, metrics=[epoch_record(1, 0.2, None), epoch_record(2, 0.6, ANGLES)])
    write_run(tmp_path, "fa", 1, 0.9, metrics=[epoch_record(1, 0.4, None), epoch_record(2, None, None)])
    write_run(tmp_path, "fa", 2, 0.9, metrics=[epoch_record(1, 0.9, None)], status="diverged")
    accuracy, weight, delta = (plot.curve(runs_in(tmp_path), panel.value) for panel in figures.overview_panels(runs_in(tmp_path)))
    assert accuracy[0] == pytest.approx((1, 30, 10 * 2**0.5))
    assert accuracy[1][:2] == pytest.approx((2, 60)) and blank(accuracy[1][2])
    assert [point[:2] for point in weight] == [(2, 70)] and [point[:2] for point in delta] == [(2, 40)]
    unfinished = [run for run in runs_in(tmp_path) if not run.finished]
    assert plot.curve(unfinished, figures.overview_panels(unfinished)[0].value)[0][:2] == pytest.approx((1, 90))


def test_twelve_rules_look_different():
    looks = [plot.line_style(index) for index in range(12)]
    assert len({look["color"] for look in looks}) == 12
    assert len({tuple(plot.line_style(index).values()) for index in range(24)}) == 24


def test_figure_shows_each_group_and_says_where_there_is_no_data(tmp_path, drawn):
    write_group(tmp_path, "bp", [0.97, 0.98], metrics=[epoch_record(1, 0.5, {"weight_angle": {"fc2": 120.0}})])
    write_group(tmp_path, "kp", [None], metrics=[], status="failed", label=f"kp {'a=1 ' * 11}".strip())
    overview(tmp_path, tmp_path / "figure.png")
    accuracy, weight, delta = drawn[0].axes
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == [
        "bp", f"kp {'a=1 ' * 9}".strip() + "\na=1 a=1\n(1 failed)"]
    assert len(accuracy.lines) == 1 and weight.get_ylim()[0] <= 0 and weight.get_ylim()[1] > 120
    assert [text.get_text() for text in delta.texts] == ["no data"] and not weight.texts
    assert imread(tmp_path / "figure.png").shape[:2] == (480, 1560)
    assert b"Software" not in (tmp_path / "figure.png").read_bytes()


def test_overview_has_a_part_for_each_task_with_a_legend_of_its_own(tmp_path, drawn):
    write_group(tmp_path, "bp", [0.97])
    write_group(tmp_path, "fa", [0.97], dataset="mnist")
    overview(tmp_path, tmp_path / "figure.png")
    assert [part.get_suptitle() for part in drawn[0].subfigs] == ["digits, mlp", "mnist, mlp"]
    assert [[text.get_text() for text in part.legends[0].get_texts()] for part in drawn[0].subfigs] == [["bp"], ["fa"]]
    assert [axes.get_title() for axes in drawn[0].subfigs[1].axes] == ["Test accuracy", "Weight angle", "Delta angle"]


def test_each_layer_has_a_panel_in_the_order_of_execution(tmp_path):
    write_run(tmp_path, "dfa", 0, 0.9, metrics=[epoch_record(1, 0.9, {"weight_angle": {"fc3": 50.0, "fc1": None}})])
    write_run(tmp_path, "fa", 0, 0.9, metrics=[epoch_record(1, 0.9, {"weight_angle": {"fc3": 60.0, "fc2": 70.0}})])
    groups = group_runs(in_order(runs_in(tmp_path)))
    panels = figures.layer_panels(groups, "weight_angle")
    assert [panel.title for panel in panels] == ["fc2", "fc3"] and all(panel.angle for panel in panels)
    assert [[point[:2] for point in plot.curve(runs, panels[0].value)] for runs in groups.values()] == [[], [(1, 70)]]
    assert figures.layer_panels(groups, "norm_ratio") == []


def write_at_density(root, rule, density, accuracies):
    for seed, accuracy in enumerate(accuracies):
        run = write_run(root, rule, seed, accuracy, group=f"{rule}-{density}", metrics=[])
        (run / "config.yaml").write_text(json.dumps({"seed": seed, "algorithm": {"name": rule, "density": density}}))


def test_accuracy_against_density_for_rules_that_ran_at_several(tmp_path, drawn):
    for density, accuracies in ((1.0, [0.9, 0.92]), (0.05, [0.5, 0.6]), (0.5, [0.8, 0.8])):
        write_at_density(tmp_path, "fa", density, accuracies)
    write_at_density(tmp_path, "dfa", 1.0, [0.9])
    write_group(tmp_path, "bp", [0.97, 0.99], metrics=[])
    series = figures.density_series(group_runs(in_order(runs_in(tmp_path))))
    assert list(series) == ["fa"]
    for point, want in zip(series["fa"], [(0.05, 55, 50**0.5), (0.5, 80, 0), (1.0, 91, 2**0.5)], strict=True):
        assert point == pytest.approx(want)
    written = figures.write_figures(in_order(runs_in(tmp_path)), tmp_path, "report")
    assert written[-1].name == "report_density.png" and written[-1].is_file()
    (axes,) = drawn[-1].axes
    assert list(axes.lines[0].get_ydata()) == pytest.approx([98, 98])  # bp, across
    assert list(axes.lines[1].get_xdata()) == [0.05, 0.5, 1.0]
    assert [text.get_text() for text in drawn[-1].legends[0].get_texts()] == ["bp", "fa"]


def test_tasks_have_figures_of_their_own(tmp_path):
    line = epoch_record(1, 0.5, {"norm_ratio": {"fc2": 1.0}})
    write_group(tmp_path, "bp", [0.97], metrics=[line])
    write_group(tmp_path, "fa", [0.97], metrics=[line], dataset="mnist")
    names = [path.name for path in figures.write_figures(in_order(runs_in(tmp_path)), tmp_path, "report")]
    assert names == ["report.png", "report_curves-digits-mlp.png", "report_norm_ratio-digits-mlp.png",
                     "report_curves-mnist-mlp.png", "report_norm_ratio-mnist-mlp.png"]


def test_file_names_of_long_titles_stay_short_and_apart():
    names = [figures._slug(f"image_folder, mlp data_dir=/{'long/' * 60}{name}") for name in ("cats", "dogs")]
    assert len(set(names)) == 2 and {len(name) for name in names} == {100}
    assert figures._slug("digits, mlp") == "digits-mlp"
