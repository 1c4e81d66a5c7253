"""The figures of a report: the overview, curves, quantities by layer, and accuracy against density."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from fa_bench.config.labels import short_key
from fa_bench.errors import truncate
from fa_bench.metrics.alignment.base import declared
from fa_bench.report.files import register
from fa_bench.report.groups import CONTROL, Groups, finished_by_seed, group_labels, group_runs, tasks
from fa_bench.report.numbers import known, mean, number, std
from fa_bench.report.plot import MAX_LEGEND, Panel, Part, add_legend, line_style, new_figure, save, style_axes, write_parts
from fa_bench.report.runs import Run, metrics_of
from fa_bench.utils.text import escape_mathtext

DENSITY = "algorithm.density"
COLUMNS = 4  # panels per row if there is one for each layer


def _metric(key: str, scale: float = 1) -> Callable[[Run, Mapping[str, Any]], float]:
    return lambda run, line: scale * number(line.get(key))


def _layer_mean(quantity: str) -> Callable[[Run, Mapping[str, Any]], float]:
    return lambda run, line: run.layer_mean(quantity, line.get("angles"))


def _layer(quantity: str, layer: str) -> Callable[[Run, Mapping[str, Any]], float]:
    return lambda run, line: number(((line.get("angles") or {}).get(quantity) or {}).get(layer))


def overview_panels(runs: Sequence[Run]) -> tuple[Panel, ...]:
    """Test accuracy, and the mean over layers of every angle that has a column in tables."""
    angles = [Panel(metric.title.capitalize(), f"{metric.title} (degrees)", _layer_mean(name), angle=True)
              for name, metric in metrics_of(runs).items() if metric.column and metric.unit == "°"]
    return (Panel("Test accuracy", "test accuracy (%)", _metric("test_accuracy", 100)), *angles)


CURVES = (
    Panel("Test accuracy", "test accuracy (%)", _metric("test_accuracy", 100)),
    Panel("Training accuracy", "training accuracy (%)", _metric("train_accuracy", 100)),
    Panel("Test loss", "test loss", _metric("test_loss")),
    Panel("Training loss", "training loss", _metric("train_loss")),
)


def write_figures(runs: Sequence[Run], out_dir: Path, name: str) -> list[Path]:
    """Write every figure that the runs have data for, the overview `name`.png first; returns their paths.

    The overview has all tasks (`groups.tasks`). Each task has its own figures of curves and layers; if there are several tasks,
    the names of these files include the task.
    """
    by_task = tasks(group_runs(runs))
    overview = register(out_dir / f"{name}.png")
    panels = overview_panels(runs)
    write_parts([Part(title, groups, panels) for title, groups in by_task.items()], overview, len(panels))
    written = [overview]
    slugs: dict[str, str] = {}
    for title in by_task:  # titles that differ only in punctuation must not share a file
        slugs[title] = slug if (slug := _slug(title)) not in slugs.values() else f"{slug[:91]}-{_digest(title)}"
    for title, groups in by_task.items():
        end = f"-{slugs[title]}" if len(by_task) > 1 else ""
        by_layer = {name: layer_panels(groups, name) for name, metric in metrics_of(runs).items() if metric.plot}
        for kind, panels in {"curves": CURVES, **by_layer}.items():
            if panels:
                written.append(register(out_dir / f"{name}_{kind}{end}.png"))
                write_parts([Part(title, groups, panels)], written[-1], 2 if kind == "curves" else min(COLUMNS, len(panels)))
    series = {title: lines for title, groups in by_task.items() if (lines := density_series(groups))}
    if series:
        written.append(register(out_dir / f"{name}_density.png"))
        _write_density({title: by_task[title] for title in series}, series, written[-1])
    return written


def _slug(title: str) -> str:
    """A title as part of a file name, with at most 100 characters."""
    words = re.sub(r"[^A-Za-z0-9.]+", "-", title).strip("-")
    return words if len(words) <= 100 else f"{words[:91]}-{_digest(title)}"


def _digest(title: str) -> str:
    return hashlib.sha256(title.encode(errors="backslashreplace")).hexdigest()[:8]


def layer_panels(groups: Groups, quantity: str) -> list[Panel]:
    """One panel for every layer for which some run has values of the quantity, in the order of execution."""
    metric = declared([quantity])[quantity]
    axis = f"{metric.title} ({metric.unit})" if metric.unit else metric.title
    runs = [run for members in groups.values() for run in members]
    layers: dict[str, list[float]] = {}
    for run in runs:
        for line in run.metrics:
            for layer, value in ((line.get("angles") or {}).get(quantity) or {}).items():
                layers.setdefault(layer, []).extend(known([value]))
    order = max((list(run.layers(quantity)) for run in runs), key=len, default=[])
    ordered = sorted((layer for layer, values in layers.items() if values),
                     key=lambda layer: order.index(layer) if layer in order else len(order))
    return [Panel(layer, axis, _layer(quantity, layer), metric.unit == "°") for layer in ordered]


def density_series(groups: Groups) -> dict[str, list[tuple[float, float, float]]]:
    """{rule: [(density of the feedback, mean and std of the test accuracy in %)]} for rules with several densities."""
    labels = group_labels(groups)
    series: dict[str, list[tuple[float, float, float]]] = {}
    for group, members in groups.items():
        accuracies = _accuracies(members)
        density = members[0].config.get(DENSITY)
        if isinstance(density, (int, float)) and density > 0 and accuracies:
            key = short_key(DENSITY, members[0].config)
            name = " ".join(word for word in labels[group].split(" ") if not word.startswith(f"{key}="))
            series.setdefault(name, []).append((density, mean(accuracies), std(accuracies)))
    return {name: sorted(points) for name, points in series.items() if len({point[0] for point in points}) > 1}


def _accuracies(members: Sequence[Run]) -> list[float]:
    return [100 * value for value in known(run.result.get("test_accuracy") for run in finished_by_seed(members).values())]


def _write_density(by_task: Mapping[str, Groups], series: Mapping[str, Any], path: Path) -> None:
    """Accuracy against density, one panel per task; the control has no density and is a horizontal line."""
    figure = new_figure(4.0)
    names = [CONTROL, *dict.fromkeys(name for lines in series.values() for name in lines)]
    for axes, (title, groups) in zip(figure.subplots(1, len(by_task), squeeze=False).flat, by_task.items(), strict=True):
        style_axes(axes)
        axes.set(title=escape_mathtext(title), xlabel="density of the feedback", ylabel="test accuracy (%)", xscale="log")
        for members in groups.values():
            if members[0].result["algorithm"] == CONTROL and (accuracies := _accuracies(members)):
                centre, spread = mean(accuracies), std(accuracies)
                axes.axhline(centre, linewidth=1.6, **line_style(0))
                axes.axhspan(centre - spread, centre + spread, color=line_style(0)["color"], alpha=0.1, linewidth=0)
        for name, points in series[title].items():
            x, means, stds = zip(*points, strict=True)
            style = line_style(names.index(name))
            axes.errorbar(x, means, yerr=stds, linewidth=1.6, marker="o", markersize=3, capsize=2, **style)
        axes.xaxis.set_major_locator(FixedLocator(sorted({point[0] for points in series[title].values() for point in points})))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    add_legend(figure, [truncate(escape_mathtext(name), MAX_LEGEND) for name in names])
    save(figure, path)
