"""Tests of the contents of a report's figures."""

from __future__ import annotations

import json
import re
import warnings

import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from fa_bench.errors import DataError
from fa_bench.metrics.alignment.base import declared
from fa_bench.objectives.scores import R2, RMSE
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.report import figures, plot, settings
from fa_bench.report.groups import group_runs, in_order, tasks
from fa_bench.report.quantities import Point, Selection, best, curve, scalar
from fa_bench.report.runs import metrics_of

from .by_hand import ANGLES, blank, epoch_record, runs_in, write_group, write_run


def groups_in(root):
    return group_runs(in_order(runs_in(root)))


def overview(root):
    return figures.overview(tasks(groups_in(root)), None, metrics_of(runs_in(root)), "epoch")


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def write_setting(root, rule, accuracies, status="finished", validation=None, **options):
    """Write the runs of one setting, one per seed, with a config that has `options`, such as ``optimizer={"lr": 0.1}``."""
    name = "-".join([rule, *(f"{key}{value}" for part in options.values() for key, value in part.items())])
    for seed, accuracy in enumerate(accuracies):
        shown = accuracy if validation is None else validation
        run = write_run(
            root,
            rule,
            seed,
            accuracy,
            group=name,
            status=status,
            val_accuracy=shown,
            metrics=[epoch_record(1, accuracy, None) | {"val_accuracy": shown}],
        )
        (run / "config.yaml").write_text(
            json.dumps(
                {
                    "seed": seed,
                    **{
                        group: {"name": rule if group == "algorithm" else "x", **options.get(group, {})}
                        for group in ("algorithm", "optimizer")
                    },
                }
            )
        )


# Looks.


def test_shipped_rules_have_distinct_stable_styles():
    looks = {rule: tuple(plot.rule_style(rule).values()) for rule in ALGORITHMS}
    assert len(set(looks.values())) == len(looks)
    assert not any(style in (":", "-.") for _, style, _ in looks.values())  # these styles are reserved for plugins' rules
    assert len({look[:2] for look in looks.values()}) == len(looks) and len({look[0] for look in looks.values()}) == 13
    assert plot.rule_style("kp") == {"color": "#009E73", "linestyle": "-", "marker": "D"}


def test_plugin_rule_style_is_deterministic():
    assert plot.rule_style("my_rule") == {"color": "#004D40", "linestyle": ":", "marker": "v"}
    assert plot.rule_style("my_rule") != plot.rule_style("other_rule")


def test_settings_are_shades_of_the_rules_colour():
    shades = [to_rgb(plot.setting_style("fa", index, 5)["color"]) for index in range(5)]
    assert shades == sorted(shades, reverse=True) and shades[-1] == to_rgb(plot.rule_style("fa")["color"])


# Curves.


def test_curve_is_mean_and_std_over_finished_seeds(tmp_path):
    write_run(tmp_path, "fa", 0, 0.9, metrics=[epoch_record(1, 0.2, None), epoch_record(2, 0.6, ANGLES)])
    write_run(tmp_path, "fa", 1, 0.9, metrics=[epoch_record(1, 0.4, None), epoch_record(2, None, None)])
    write_run(tmp_path, "fa", 2, 0.9, metrics=[epoch_record(1, 0.9, None)], status="diverged")
    quantities = figures.overview_quantities(metrics_of(runs_in(tmp_path)))
    accuracy, weight, delta = (curve(runs_in(tmp_path), each) for each in quantities)
    assert accuracy[0] == pytest.approx((1, 30, 10 * 2**0.5))
    assert accuracy[1][:2] == pytest.approx((2, 60)) and blank(accuracy[1][2])
    assert [point[:2] for point in weight] == [(2, 70)] and [point[:2] for point in delta] == [(2, 40)]
    unfinished = [run for run in runs_in(tmp_path) if not run.finished]
    assert curve(unfinished, quantities[0])[0][:2] == pytest.approx((1, 90))


def test_curves_support_steps_and_seconds_as_x(tmp_path):
    for seed, second in enumerate((10.0, 20.0)):
        write_run(
            tmp_path,
            "fa",
            seed,
            0.9,
            metrics=[
                epoch_record(1, 0.5, None) | {"step": 30, "seconds": second},
                epoch_record(2, 0.7, None) | {"step": 60, "seconds": 2 * second},
            ],
        )
    runs = runs_in(tmp_path)
    assert [point[:2] for point in curve(runs, scalar("test_accuracy"), "step")] == [(30, 50), (60, 70)]
    assert [point[:2] for point in curve(runs, scalar("test_accuracy"), "seconds")] == [(15, 50), (30, 70)]


def test_figure_shows_each_group_and_marks_missing_data(tmp_path):
    write_group(tmp_path, "bp", [0.97, 0.98], metrics=[epoch_record(1, 0.5, {"weight_angle": {"fc2": 120.0}})])
    write_group(tmp_path, "kp", [None], metrics=[], status="failed", label=f"kp {'a=1 ' * 11}".strip())
    figure = overview(tmp_path)
    accuracy, weight, delta = figure.axes
    assert legend(figure) == ["bp", f"kp {'a=1 ' * 9}".strip() + "\na=1 a=1\n(1 failed)"]
    assert len(accuracy.lines) == 1 and weight.get_ylim()[0] <= 0 and weight.get_ylim()[1] > 120
    assert [text.get_text() for text in delta.texts] == ["no data"] and not weight.texts
    plot.save(figure, tmp_path / "figure.png")
    assert imread(tmp_path / "figure.png").shape[:2] == (480, 1560)


def test_overview_has_subfigure_and_legend_per_task(tmp_path):
    write_group(tmp_path, "bp", [0.97])
    write_group(tmp_path, "fa", [0.97], dataset="mnist")
    figure = overview(tmp_path)
    assert [part.get_suptitle() for part in figure.subfigs] == ["digits, mlp", "mnist, mlp"]
    assert [legend(part) for part in figure.subfigs] == [["bp"], ["fa"]]
    assert [axes.get_title() for axes in figure.subfigs[1].axes] == ["Test accuracy", "Weight angle", "Delta angle"]


def test_layer_panels_follow_execution_order(tmp_path):
    write_run(tmp_path, "dfa", 0, 0.9, metrics=[epoch_record(1, 0.9, {"weight_angle": {"fc3": 50.0, "fc1": None}})])
    write_run(tmp_path, "fa", 0, 0.9, metrics=[epoch_record(1, 0.9, {"weight_angle": {"fc3": 60.0, "fc2": 70.0}})])
    groups = groups_in(tmp_path)
    layers = figures.layer_quantities(groups, "weight_angle")
    assert [layer.title for layer in layers] == ["fc2", "fc3"] and {layer.kind for layer in layers} == {"angle"}
    assert [[point[:2] for point in curve(runs, layers[0])] for runs in groups.values()] == [[], [(1, 70)]]
    assert figures.layers_parts("a", groups, "norm_ratio", "epoch") == []


def test_many_settings_get_panel_per_rule(tmp_path):
    for rule in ("bp", "frozen", "fa", "kp"):
        for lr in (0.1, 0.2, 0.3):
            write_setting(tmp_path, rule, [lr], optimizer={"lr": lr})
    groups = groups_in(tmp_path)
    few = figures.lines_part("a", groups, [scalar("test_accuracy")], "epoch", 1)
    styles = [line.style for line in few.panels[0].lines if line.members[0].result["algorithm"] == "kp"]
    assert {style["color"] for style in styles} == {plot.rule_style("kp")["color"]}
    assert [style["linestyle"] for style in styles] == ["-", "--", ":"] and not figures.is_large(groups)
    write_setting(tmp_path, "dfa", [0.9], optimizer={"lr": 0.2})
    groups = groups_in(tmp_path)
    assert figures.is_large(groups)
    many = figures.rules_part("a", groups, scalar("test_accuracy"), "epoch")
    assert [panel.title for panel in many.panels] == ["bp", "frozen", "dfa", "fa", "kp"]
    assert [line.label for line in many.panels[4].lines] == [
        "bp (best setting)",
        "frozen (best setting)",
        *(f"lr={lr}" for lr in (0.1, 0.2, 0.3)),
    ]
    assert [label for label, _ in many.legend] == [line.label for line in many.panels[4].lines]
    (shade,) = [line.style["color"] for line in many.panels[2].lines if line.label == "lr=0.2"]
    assert shade == plot.setting_style("dfa", 1, 3)["color"]
    limits = {axes.get_ylim() for axes in plot.curves_figure([many]).axes if axes.get_title()}
    assert len(limits) == 1  # the same limits, so panels can be compared by eye


def test_the_legend_omits_finished_groups_without_data(tmp_path):
    angles = [epoch_record(1, 0.9, {"delta_angle": {"fc1": 60.0}})]
    for lr in (0.1, 0.2):
        for rule, metrics in (("fa", angles), ("frozen", [epoch_record(1, lr, {})])):
            write_run(tmp_path, rule, 0, lr, metrics, group=f"{rule}-{lr}", label=f"{rule} lr={lr}", val_accuracy=lr)
    write_run(tmp_path, "kp", 0, None, metrics=[], status="failed")
    groups = groups_in(tmp_path)

    def labels(part) -> list[str]:
        return [label for label, _ in part.legend]

    (layers,) = figures.layers_parts("a", groups, "delta_angle", "epoch")
    assert labels(layers) == ["fa lr=0.1", "fa lr=0.2", "kp\n(1 failed)"]
    scores = figures.lines_part("a", groups, [scalar("test_accuracy")], "epoch", 1)
    assert labels(scores) == ["frozen lr=0.1", "frozen lr=0.2", *labels(layers)]
    (fc1,) = figures.layer_quantities(groups, "delta_angle")
    assert "frozen (best setting)" in labels(figures.rules_part("a", groups, scalar("test_accuracy"), "epoch"))
    assert "frozen (best setting)" not in labels(figures.rules_part("a", groups, fc1, "epoch"))


def test_overview_of_many_settings_shows_best_by_validation(tmp_path):
    for lr, test, validation in ((0.1, 0.9, 0.5), (0.2, 0.8, 0.6), (0.3, 0.7, 0.4), (0.4, 0.6, 0.3), (0.5, 0.5, 0.2)):
        write_setting(tmp_path, "kp", [test], validation=validation, optimizer={"lr": lr})
    figure = overview(tmp_path)
    assert legend(figure) == ["kp lr=0.2"] and figure._supxlabel.get_text() == figures.BEST


def test_the_best_group_needs_validation_accuracies(tmp_path):
    for number in range(2):
        write_run(tmp_path, "kp", 0, 0.9, group=f"kp-{number}")
    groups = groups_in(tmp_path)
    assert best(groups) is None and best(dict(list(groups.items())[:1])) == next(iter(groups))


# Axes.


def test_outlier_accuracies_are_clipped_and_labelled(tmp_path):
    for rule, accuracy in (("bp", 0.98), ("fa", 0.95), ("kp", 0.97), ("wm", 0.96), ("drtp", 0.1)):
        write_group(tmp_path, rule, [accuracy], metrics=[epoch_record(1, accuracy, None), epoch_record(2, accuracy, None)])
    accuracy = overview(tmp_path).axes[0]
    assert accuracy.get_ylim()[0] == pytest.approx(94.85)  # 95 less a twentieth of the range
    assert [text.get_text() for text in accuracy.texts] == ["▼ below the axis: drtp (10)"]


@pytest.mark.parametrize(
    ("lines", "kind", "low", "high", "log"),
    [
        ([[10.0], [97.0], [98.0]], "accuracy", 5.6, 102, False),  # with so few lines, none is left out
        ([[10.0], [40.0], [97.0], [98.0]], "accuracy", 5.6, 102, False),  # nor are lines that differ this much
        ([[0.1], [0.2], [0.3], [0.4]], "loss", 0.085, 0.415, False),
        ([[1.0, 0.1], [1.0, 0.2], [1.0, 0.3], [1.0, 0.1], [1e22, 1e22]], "loss", 0.1 / 1.3, 1.3, True),
        ([[1.0, 0.01], [1.0, 0.2]], "loss", 0.01 / 1.3, 1.3, True),
        ([[5.0]], "", 4.75, 5.25, False),
        ([[0.0]], "", -1, 1, False),
    ],
)
def test_axis_range(lines, kind, low, high, log):
    limits = plot.readable_range(lines, list(map(plot.typical, lines)), kind)
    assert (limits.low, limits.high, limits.log) == (pytest.approx(low), pytest.approx(high), log)


def test_divergence_is_marked_at_lower_edge(tmp_path):
    write_group(tmp_path, "bp", [0.9])
    write_run(tmp_path, "fa", 0, None, status="diverged", metrics=[epoch_record(3, 0.1, None)])
    (mark,) = overview(tmp_path).axes[0].texts
    assert mark.get_text() == "✕" and mark.xy == (3, 0) and mark.get_color() == plot.rule_style("fa")["color"]


# Figures of final values against a setting.


def setting_axes(root, key, metric="test_accuracy"):
    figure = settings.setting_figure(tasks(groups_in(root)), key, scalar(metric))
    assert figure is not None
    return figure, [axes for axes in figure.axes if axes.get_visible() and axes.axison]


def test_density_figure_shows_swept_rules_and_bp_level(tmp_path):
    for density, accuracies in ((1.0, [0.9, 0.92]), (0.05, [0.5, 0.6]), (0.5, [0.8, 0.8])):
        write_setting(tmp_path, "fa", accuracies, algorithm={"density": density})
    write_group(tmp_path, "bp", [0.97, 0.99], metrics=[])
    series = settings.series_by_panel(groups_in(tmp_path), "algorithm.density", scalar("test_accuracy"))
    bp, fa = series[""]
    assert (bp.rule, [point[:2] for point in bp.points]) == ("bp", [(None, pytest.approx(98))])
    for point, want in zip(fa.points, [(0.05, 55, 50**0.5), (0.5, 80, 0), (1.0, 91, 2**0.5)], strict=True):
        assert point[:3] == pytest.approx(want)
    written = figures.write_figures(in_order(runs_in(tmp_path)), tmp_path, "report")
    assert (tmp_path / "report_density.png").is_file() and "report_density.png" in [picture.paths[0].name for picture in written]
    figure, (axes,) = setting_axes(tmp_path, "algorithm.density")
    assert list(axes.lines[0].get_ydata()) == pytest.approx([98, 98])  # a horizontal line for bp
    assert list(axes.lines[1].get_xdata()) == [0.05, 0.5, 1.0] and axes.get_xscale() == "log"
    assert legend(figure) == ["bp", "fa: 91.00 ± 1.41 at 1"]


@pytest.mark.parametrize(
    ("of", "text"),
    [
        (scalar("test_r2", [R2]), "fa: 0.9871 ± 0.0021 at 0.1"),
        (scalar("test_rmse", [RMSE]), "fa: 0.9871 ± 0.0021 at 0.1"),
        (scalar("val_loss"), "fa: 0.987 ± 0.00211 at 0.1"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_legend_formats_mean_and_spread_like_score(of, text):
    """A spread below 0.005 used to be shown as 0.00, as if the seeds agreed."""
    series = settings.Series("fa", [Point(0.1, 0.98712, 0.00211, 0.9, 3, 0)])
    assert settings._summary(series, of) == text


def test_best_by_validation_is_ringed_and_values_are_ranked(tmp_path):
    for lr, fa, kp in ((0.1, 0.9, 0.8), (0.2, 0.7, 0.85)):
        write_setting(tmp_path, "fa", [fa], validation=1 - fa, optimizer={"lr": lr})
        write_setting(tmp_path, "kp", [kp], optimizer={"lr": lr})
    figure, (axes,) = setting_axes(tmp_path, "optimizer.lr")
    rings = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_markersize() == 11]
    assert rings == [(0.2, pytest.approx(70)), (0.2, pytest.approx(85))] and axes.get_xscale() == "linear"
    assert legend(figure) == ["fa: 70.00 at 0.2", "kp: 85.00 at 0.2"]
    ranks = [(text.xy[0], text.get_text()) for text in axes.texts if text.xy[0] in (0.1, 0.2)]
    assert ranks == [(0.1, "fa"), (0.1, "kp"), (0.2, "kp"), (0.2, "fa")]
    # A point with n = 1 has no error bar.
    assert not any(segment.size and not blank(segment[0, 1]) for bars in axes.collections for segment in bars.get_segments())


def test_diverged_settings_are_crosses_and_categories_are_ordered(tmp_path):
    for method, accuracy in (("10", 0.8), ("9", 0.9)):
        write_setting(tmp_path, "kp", [accuracy], algorithm={"b_init": method})
    write_setting(tmp_path, "kp", [None], status="diverged", algorithm={"b_init": "zeros"})
    _, (axes,) = setting_axes(tmp_path, "algorithm.b_init")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["9", "10", "zeros"]
    assert [text.xy for text in axes.texts if text.get_text() == "✕"] == [(2.0, 0)]


def test_divergence_before_first_point_is_marked_inside_axes(tmp_path):
    """A marker outside the axes once broke the layout, so that panels overlapped the legend."""
    metrics = [epoch_record(epoch, 0.9, ANGLES if epoch == 5 else None) for epoch in range(1, 6)]
    write_run(tmp_path, "fa", 0, 0.9, metrics=metrics, epochs=5)
    write_run(tmp_path, "kp", 0, None, status="diverged", metrics=metrics[:1], epochs=5)
    part = figures.lines_part("", groups_in(tmp_path), figures.overview_quantities(metrics_of(runs_in(tmp_path))), "epoch", 3)
    figure = plot.curves_figure([part])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot.fix_layout(figure)
    crosses = [(axes, text.xy[0]) for axes in figure.axes for text in axes.texts if text.get_text() == "✕"]
    assert len(crosses) == 3
    for axes, x in crosses:
        low, high = axes.get_xlim()
        assert x == 1 and low < 1 and high > 5


def test_many_settings_without_finished_run_are_drawn(tmp_path):
    for number in range(6):
        write_setting(tmp_path, "fa", [None], status="diverged", optimizer={"lr": float(number)})
        write_setting(tmp_path, "bp", [0.9], optimizer={"lr": float(number)})
    part = figures.lines_part("", groups_in(tmp_path), [scalar("test_accuracy")], "epoch", 1)
    styles = [(line.style["linestyle"], line.style["fillstyle"]) for line in part.panels[0].lines]
    assert len(styles) == 12 and len(set(styles)) == 4
    overview(tmp_path)


def test_other_settings_become_panels_or_best_by_validation(tmp_path):
    for lr in (0.1, 0.2):
        for density in (0.5, 1.0):
            write_setting(tmp_path, "fa", [lr + density / 10], optimizer={"lr": lr}, algorithm={"density": density})
        write_setting(tmp_path, "bp", [0.9], optimizer={"lr": lr})
    series = settings.series_by_panel(groups_in(tmp_path), "optimizer.lr", scalar("test_accuracy"))
    assert {title: [line.rule for line in lines] for title, lines in series.items()} == {
        "density=0.5": ["bp", "fa"],
        "density=1.0": ["bp", "fa"],
    }
    assert [point.mean for point in series["density=1.0"][1].points] == pytest.approx([20, 30])
    for density in range(2, 9):
        write_setting(tmp_path, "fa", [0.1], validation=density / 10, optimizer={"lr": 0.1}, algorithm={"density": density})
    (lines,) = settings.series_by_panel(groups_in(tmp_path), "optimizer.lr", scalar("test_accuracy")).values()
    assert [point[:2] for point in lines[1].points] == [(0.1, pytest.approx(10)), (0.2, pytest.approx(30))]


def test_rates_differing_only_between_rules_are_not_swept(tmp_path):
    write_setting(tmp_path, "fa", [0.9], optimizer={"lr": 0.1})
    write_setting(tmp_path, "bp", [0.9], optimizer={"lr": 0.2})
    assert settings.setting_figure(tasks(groups_in(tmp_path)), "optimizer.lr", scalar("test_accuracy")) is None


def test_more_than_twelve_rules_get_separate_panels(tmp_path):
    for rule in list(ALGORITHMS)[:13]:
        for lr in (0.1, 0.2):
            write_setting(tmp_path, rule, [0.5 + lr], optimizer={"lr": lr})
    _, axes = setting_axes(tmp_path, "optimizer.lr")
    assert len(axes) == 13 and axes[0].get_title() == f"{groups_rules(tmp_path)[0]}: 70.00 at 0.2"


def groups_rules(root):
    return list(dict.fromkeys(run.result["algorithm"] for run in in_order(runs_in(root))))


# Files.


def test_tasks_have_separate_figures(tmp_path):
    line = epoch_record(1, 0.5, {"norm_ratio": {"fc2": 1.0}})
    write_group(tmp_path, "bp", [0.97], metrics=[line])
    write_group(tmp_path, "fa", [0.97], metrics=[line], dataset="mnist")
    pictures = figures.write_figures(in_order(runs_in(tmp_path)), tmp_path, "report")
    assert [path.name for picture in pictures for path in picture.paths] == [
        "report.png",
        "report_curves-digits-mlp.png",
        "report_norm_ratio-digits-mlp.png",
        "report_curves-mnist-mlp.png",
        "report_norm_ratio-mnist-mlp.png",
    ]


def test_file_names_of_long_titles_are_short_and_distinct():
    names = [figures._slug(f"image_folder, mlp data_dir=/{'long/' * 60}{name}") for name in ("cats", "dogs")]
    assert len(set(names)) == 2 and {len(name) for name in names} == {100}
    assert figures._slug("digits, mlp") == "digits-mlp" and figures._slug("optimizer.lr_x") == "optimizer.lr_x"


def test_figure_bytes_are_reproducible_in_every_format(tmp_path):
    write_group(tmp_path / "runs", "bp", [0.97, 0.9])
    runs = in_order(runs_in(tmp_path / "runs"))
    contents = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        figures.write_figures(runs, tmp_path / folder, "report", Selection(("png", "svg", "pdf"), metric="test_accuracy"))
        contents.append({path.name: path.read_bytes() for path in (tmp_path / folder).glob("report.*")})
    assert contents[0] == contents[1] and set(contents[0]) == {"report.png", "report.svg", "report.pdf"}
    for name, start in (("report.png", b"\x89PNG"), ("report.svg", b"<?xml"), ("report.pdf", b"%PDF")):
        assert contents[0][name].startswith(start)
        assert not any(word in contents[0][name] for word in (b"Software", b"CreationDate", b"dc:date", b"Matplotlib v"))


def test_inline_svg_keeps_text_and_only_referenced_ids(tmp_path):
    write_group(tmp_path, "bp", [0.97], label="bp <script>alert(1)</script>")
    texts = [plot.inline_svg(overview(tmp_path), name) for name in ("one", "two")]
    ids = [set(re.findall(r' id="([^"]+)"', text)) for text in texts]
    assert ids[0] and not ids[0] & ids[1] and all(f"#{name}" in texts[0] for name in ids[0])
    assert "<script" not in texts[0] and ">bp &lt;script&gt;" in texts[0] and "<metadata" not in texts[0]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"rules": ("pb",)}, r"rules='pb' is not available \(allowed: bp, kp\)"),
        ({"rules": ("bpp",)}, "did you mean 'bp'"),
        ({"metric": "val_acuracy"}, "did you mean 'val_accuracy'"),
        ({"metric": "delta_angle"}, "metric='delta_angle' is not available"),
        ({"x": "optimizer.lr"}, "x='optimizer.lr'"),
        ({"formats": ("pgn",)}, "did you mean 'png'"),
    ],
)
def test_selection_rejects_unknown_names(tmp_path, selection, message):
    for rule in ("bp", "kp"):
        write_group(
            tmp_path,
            rule,
            [0.9],
            metrics=[epoch_record(1, 0.5, {"weight_angle": {"fc1": 1.0}})],
            angles={"weight_angle": {"fc1": 1.0}},
        )
    with pytest.raises(DataError, match=message):
        Selection(**selection).checked(runs_in(tmp_path))


def test_selection_determines_figures(tmp_path):
    for rule in ("bp", "fa", "kp"):
        for lr in (0.1, 0.2):
            write_setting(tmp_path, rule, [0.9], optimizer={"lr": lr})
    selection = Selection(rules=("kp",), metric="weight_angle", x="optimizer.lr")
    runs = selection.checked(runs_in(tmp_path))
    names = [(name, title) for name, title, _ in figures.report_figures(runs, selection, runs)]
    assert names == [("", "Overview"), ("optimizer.lr", "Weight angle against optimizer.lr")]
    assert declared(["weight_angle"])["weight_angle"].title == "weight angle"
