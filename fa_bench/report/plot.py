"""The comparison figure: accuracy and angles over the epochs, one line per group of runs."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Figure objects, not pyplot: a notebook's or script's own backend and figures stay as they are.
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, MultipleLocator

from fa_bench.files import atomic
from fa_bench.report.runs import Run, finished_by_seed, group_labels, group_runs, mean, number, status_counts, std

# Six of Okabe and Ito's colours, and six found by search so that each pair of the twelve stays apart (CIE76 distance of 14
# or more) under simulated protanopia, deuteranopia and tritanopia too. The second six are dashed besides.
COLOURS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9",
           "#C20078", "#332288", "#999933", "#8400CD", "#004D40", "#661100")
STYLES = ("-", "--", ":", "-.")
PER_STYLE = 6  # groups that share a line style
LEGEND_WIDTH = 40  # characters
MARKED_UP_TO = 12  # points of a line: a probe every few epochs shows as points joined, and a single one shows at all

Value = Callable[[Run, Mapping[str, Any]], float]


class Panel(NamedTuple):
    """One panel: its title, its axis with the unit, and what it reads from one epoch's record of a run."""

    title: str
    axis: str
    value: Value
    angle: bool


PANELS = (
    Panel("Test accuracy", "test accuracy (%)", lambda run, line: 100 * number(line.get("test_accuracy")), False),
    Panel("Weight angle", "feedback to weight (degrees)",
          lambda run, line: run.layer_mean("weight_angle", line.get("angles")), True),
    Panel("Delta angle", "error to true error (degrees)",
          lambda run, line: run.layer_mean("delta_angle", line.get("angles")), True),
)


def plot_comparison(runs: Sequence[Run], path: Path) -> None:
    """Write a PNG with test accuracy (%), mean weight angle and mean delta angle (degrees) over the epochs.

    One line per group: the mean over seeds, with a band of ± one sample standard deviation. Lines cover the finished
    runs, or all runs of a group that has no finished one; the legend says how a group's runs ended where not all
    finished. Equal runs give equal bytes, and `path` is replaced in one step.
    """
    groups = group_runs(runs)
    labels = group_labels(groups)
    entries = [_legend_entry(labels[group], members) for group, members in groups.items()]
    # One legend column at 0.2 inches a line: a large grid's figure grows taller, where more columns would squeeze the panels.
    height = max(4.0, 0.6 + 0.2 * sum(1 + entry.count("\n") for entry in entries))
    figure = Figure(figsize=(13, height), dpi=120, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)
    for axes, panel in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        _draw(axes, panel, groups)
    figure.legend(
        handles=[Line2D([], [], linewidth=2, **_look(index)) for index in range(len(groups))],
        labels=entries,
        loc="outside right center", frameon=False, fontsize=9, handlelength=2.8,
        title="mean ± std over seeds", title_fontsize=9, alignment="left",
    )
    with atomic(Path(path)) as temporary:
        # Matplotlib would write its version, so that the bytes changed with it though the picture did not.
        figure.savefig(temporary, format="png", metadata={"Software": None})


def _draw(axes: Axes, panel: Panel, groups: Mapping[str, Sequence[Run]]) -> None:
    axes.set(title=panel.title, xlabel="epoch", ylabel=panel.axis)
    axes.spines[["top", "right"]].set_visible(False)
    series = {index: curve for index, members in enumerate(groups.values()) if (curve := _curve(members, panel.value))}
    if not series:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", va="center", color="0.4")
        return
    for index, curve in series.items():
        epochs, means, stds = zip(*curve, strict=True)
        axes.plot(epochs, means, linewidth=1.6, marker="o" if len(curve) <= MARKED_UP_TO else "", markersize=3,
                  **_look(index))
        axes.fill_between(epochs, [m - s for m, s in zip(means, stds, strict=True)],
                          [m + s for m, s in zip(means, stds, strict=True)],
                          color=_look(index)["color"], alpha=0.2, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    if panel.angle:
        axes.axhline(90, color="0.6", linewidth=1, linestyle=(0, (1, 3)))
        axes.set_ylim(-3, max(95, 5 + max(point[1] for curve in series.values() for point in curve)))
        axes.yaxis.set_major_locator(MultipleLocator(30))


def _curve(members: Sequence[Run], value: Value) -> list[tuple[int, float, float]]:
    """Epoch, mean over seeds and standard deviation, for the epochs in which some run has a value."""
    by_epoch: dict[int, list[float]] = {}
    for run in list(finished_by_seed(members).values()) or members:
        for line in run.metrics:
            by_epoch.setdefault(line["epoch"], []).append(value(run, line))
    points = ((epoch, mean(values), std(values)) for epoch, values in sorted(by_epoch.items()))
    return [point for point in points if not math.isnan(point[1])]


def _legend_entry(label: str, members: Sequence[Run]) -> str:
    # Wrapped: the legend takes its width from the panels.
    lines = textwrap.wrap(label, LEGEND_WIDTH, break_long_words=False, break_on_hyphens=False)
    return "\n".join([*lines, *([] if all(run.finished for run in members) else [f"({status_counts(members)})"])])


def _look(index: int) -> dict[str, str]:
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": STYLES[index // PER_STYLE % len(STYLES)]}
