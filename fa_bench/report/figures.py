"""The figures of a report: the overview, the curves, what happens in each layer, and accuracy against density."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from fa_bench.errors import truncate
from fa_bench.metrics.alignment.base import declared
from fa_bench.report.groups import CONTROL, Groups, finished_by_seed, group_labels, group_runs, tasks
from fa_bench.report.numbers import known, mean, number, std
from fa_bench.report.own import claim
from fa_bench.report.plot import LEGEND_MOST, Panel, Part, legend, look, new_figure, save, tidy, write_parts
from fa_bench.report.runs import Run, metrics_of
from fa_bench.utils.text import escape_mathtext

DENSITY = "algorithm.density"
COLUMNS = 4  # panels side by side where there is one for each layer


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

    The overview holds all tasks (`groups.tasks`); of curves and layers each task has figures of its own, with the task in
    their names where there are several.
    """
    by_task = tasks(group_runs(runs))
    overview = claim(out_dir / f"{name}.png")
    panels = overview_panels(runs)
    write_parts([Part(title, groups, panels) for title, groups in by_task.items()], overview, len(panels))
    written = [overview]
    slugs: dict[str, str] = {}
    for title in by_task:  # titles that differ in marks alone must not share a file
        slugs[title] = slug if (slug := _slug(title)) not in slugs.values() else f"{slug[:91]}-{_digest(title)}"
    for title, groups in by_task.items():
        end = f"-{slugs[title]}" if len(by_task) > 1 else ""
        by_layer = {name: layer_panels(groups, name) for name, metric in metrics_of(runs).items() if metric.plot}
        for kind, shown in {"curves": CURVES, **by_layer}.items():
            if shown:
                written.append(claim(out_dir / f"{name}_{kind}{end}.png"))
                write_parts([Part(title, groups, shown)], written[-1], 2 if kind == "curves" else min(COLUMNS, len(shown)))
    series = {title: found for title, groups in by_task.items() if (found := density_series(groups))}
    if series:
        written.append(claim(out_dir / f"{name}_density.png"))
        _write_density({title: by_task[title] for title in series}, series, written[-1])
    return written


def _slug(title: str) -> str:
    """A title as a part of a file's name, of at most 100 characters."""
    words = re.sub(r"[^A-Za-z0-9.]+", "-", title).strip("-")
    return words if len(words) <= 100 else f"{words[:91]}-{_digest(title)}"


def _digest(title: str) -> str:
    return hashlib.sha256(title.encode(errors="backslashreplace")).hexdigest()[:8]


def layer_panels(groups: Groups, quantity: str) -> list[Panel]:
    """One panel for every layer in which some run has values of the quantity, in the order of execution."""
    metric = declared([quantity])[quantity]
    axis = f"{metric.title} ({metric.unit})" if metric.unit else metric.title
    runs = [run for members in groups.values() for run in members]
    layers: dict[str, list[float]] = {}
    for run in runs:
        for line in run.metrics:
            for layer, value in ((line.get("angles") or {}).get(quantity) or {}).items():
                layers.setdefault(layer, []).extend(known([value]))
    order = max((list(run.layers(quantity)) for run in runs), key=len, default=[])
    chosen = sorted((layer for layer, values in layers.items() if values),
                    key=lambda layer: order.index(layer) if layer in order else len(order))
    return [Panel(layer, axis, _layer(quantity, layer), metric.unit == "°") for layer in chosen]


def density_series(groups: Groups) -> dict[str, list[tuple[float, float, float]]]:
    """Density of the feedback, mean and standard deviation of the test accuracy (%), for rules that ran at several densities."""
    labels = group_labels(groups)
    series: dict[str, list[tuple[float, float, float]]] = {}
    for group, members in groups.items():
        accuracies = _final(members)
        density = members[0].config.get(DENSITY)
        if isinstance(density, (int, float)) and density > 0 and accuracies:
            name = " ".join(word for word in labels[group].split(" ") if not word.startswith(f"{DENSITY}="))
            series.setdefault(name, []).append((density, mean(accuracies), std(accuracies)))
    return {name: sorted(points) for name, points in series.items() if len({point[0] for point in points}) > 1}


def _final(members: Sequence[Run]) -> list[float]:
    return [100 * value for value in known(run.result.get("test_accuracy") for run in finished_by_seed(members).values())]


def _write_density(by_task: Mapping[str, Groups], series: Mapping[str, Any], path: Path) -> None:
    """Accuracy against density, a panel for each task; the control, which has no density, is a line across."""
    figure = new_figure(4.0)
    names = [CONTROL, *dict.fromkeys(name for found in series.values() for name in found)]
    for axes, (title, groups) in zip(figure.subplots(1, len(by_task), squeeze=False).flat, by_task.items(), strict=True):
        tidy(axes)
        axes.set(title=escape_mathtext(title), xlabel="density of the feedback", ylabel="test accuracy (%)", xscale="log")
        for members in groups.values():
            if members[0].result["algorithm"] == CONTROL and (accuracies := _final(members)):
                centre, spread = mean(accuracies), std(accuracies)
                axes.axhline(centre, linewidth=1.6, **look(0))
                axes.axhspan(centre - spread, centre + spread, color=look(0)["color"], alpha=0.1, linewidth=0)
        for name, points in series[title].items():
            x, means, stds = zip(*points, strict=True)
            axes.errorbar(x, means, yerr=stds, linewidth=1.6, marker="o", markersize=3, capsize=2, **look(names.index(name)))
        axes.xaxis.set_major_locator(FixedLocator(sorted({point[0] for points in series[title].values() for point in points})))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    legend(figure, [truncate(escape_mathtext(name), LEGEND_MOST) for name in names])
    save(figure, path)
