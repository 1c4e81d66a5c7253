"""Plots of curves over the epochs: panels with one line per group of runs, in figures of one style."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Figure objects, not pyplot: the backend and figures of a notebook or script stay as they are.
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fa_bench.errors import truncate
from fa_bench.report.groups import Groups, finished_by_seed, group_labels, status_counts
from fa_bench.report.numbers import mean, std
from fa_bench.report.runs import Run
from fa_bench.utils.files import atomic
from fa_bench.utils.text import escape_mathtext

# Six of Okabe and Ito's colours, and six found by search so that each pair of the twelve differs (CIE76 distance of at least 14)
# also under simulated protanopia, deuteranopia and tritanopia. The second six are dashed.
COLOURS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9",
           "#C20078", "#332288", "#999933", "#8400CD", "#004D40", "#661100")
STYLES = ("-", "--", ":", "-.")
PER_STYLE = 6  # groups that share a line style
LEGEND_WIDTH, MAX_LEGEND = 40, 200  # characters of a line of an entry, and of the whole entry
MAX_MARKED = 12  # points of a line with markers: sparse measurements show as points, and a single one is visible
WIDTH, LINE = 13, 0.2  # inches: width of a figure, height of a line of its legend

Value = Callable[[Run, Mapping[str, Any]], float]


class Panel(NamedTuple):
    """One panel: its title, its axis label with the unit, and the value that it reads from a run's record of an epoch."""

    title: str
    axis: str
    value: Value
    angle: bool = False


class Part(NamedTuple):
    """One part of a figure, with its own legend: its title, the groups of runs it shows, and its panels."""

    title: str
    groups: Groups
    panels: Sequence[Panel]


def write_parts(parts: Sequence[Part], path: Path, columns: int) -> None:
    """Write a PNG of parts below each other, each with its panels in rows of `columns` and its legend beside them.

    One line per group: the mean over seeds, with a band of ± one sample standard deviation. Lines cover the finished runs of a
    group, or all its runs if none has finished; the legend gives the statuses unless all have finished. Titles are shown if there
    are several parts. Equal runs give equal bytes, and `path` is replaced atomically.
    """
    legends = [_legend_entries(part.groups) for part in parts]
    heights = [_height(math.ceil(len(part.panels) / columns), entries) for part, entries in zip(parts, legends, strict=True)]
    figure = new_figure(sum(heights))
    subfigures = [figure] if len(parts) == 1 else figure.subfigures(len(parts), 1, height_ratios=heights, squeeze=False).flat
    for subfigure, part, entries in zip(subfigures, parts, legends, strict=True):
        if len(parts) > 1:
            subfigure.suptitle(escape_mathtext(part.title), fontsize=11, fontweight="bold")
        grid = list(subfigure.subplots(math.ceil(len(part.panels) / columns), columns, squeeze=False).flat)
        for axes, panel in zip(grid, part.panels, strict=False):
            _plot(axes, panel, part.groups)
        for axes in grid[len(part.panels):]:
            axes.set_axis_off()
        add_legend(subfigure, entries)
    save(figure, path)


def new_figure(height: float) -> Figure:
    """A figure of the common width and a height in inches."""
    return Figure(figsize=(WIDTH, height), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.1))


def add_legend(figure: Any, entries: Sequence[str]) -> None:
    """Add the legend beside the panels of a figure or subfigure: one line per entry, with the line styles in order."""
    figure.legend(
        handles=[Line2D([], [], linewidth=2, **line_style(index)) for index in range(len(entries))], labels=entries,
        loc="outside right center", frameon=False, fontsize=9, handlelength=2.8,
        title="mean ± std over seeds", title_fontsize=9, alignment="left",
    )


def save(figure: Figure, path: Path) -> None:
    """Write the figure atomically."""
    with atomic(Path(path)) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # characters that the font lacks show as boxes
        # Without matplotlib's version, which would change the bytes of equal pictures.
        figure.savefig(temporary, format="png", metadata={"Software": None})


def style_axes(axes: Axes) -> None:
    """The common style of axes: no frame, a faint grid behind the lines."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def line_style(index: int) -> dict[str, Any]:
    """Colour and style of the line with this index."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": STYLES[index // PER_STYLE % len(STYLES)]}


def curve(members: Sequence[Run], value: Value) -> list[tuple[int, float, float]]:
    """Epoch, mean over seeds and standard deviation, for the epochs in which some run has a value."""
    by_epoch: dict[int, list[float]] = {}
    for run in list(finished_by_seed(members).values()) or members:
        for line in run.metrics:
            by_epoch.setdefault(line["epoch"], []).append(value(run, line))
    points = ((epoch, mean(values), std(values)) for epoch, values in sorted(by_epoch.items()))
    return [point for point in points if not math.isnan(point[1])]


def _height(rows: int, entries: Sequence[str]) -> float:
    # The legend has one column: for a large sweep the figure becomes taller; more columns would squeeze the panels.
    return max(4.0 if rows == 1 else 2.6 * rows, 0.6 + LINE * sum(1 + entry.count("\n") for entry in entries))


def _plot(axes: Axes, panel: Panel, groups: Groups) -> None:
    axes.set(title=escape_mathtext(panel.title), xlabel="epoch", ylabel=panel.axis)
    series = {index: points for index, members in enumerate(groups.values()) if (points := curve(members, panel.value))}
    if not series:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", va="center", color="0.4")
        return
    style_axes(axes)
    for index, points in series.items():
        epochs, means, stds = zip(*points, strict=True)
        style = line_style(index)
        axes.plot(epochs, means, linewidth=1.6, marker="o" if len(points) <= MAX_MARKED else "", markersize=3, **style)
        axes.fill_between(epochs, [m - s for m, s in zip(means, stds, strict=True)],
                          [m + s for m, s in zip(means, stds, strict=True)], color=style["color"], alpha=0.2, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if panel.angle:
        axes.axhline(90, color="0.6", linewidth=1, linestyle=(0, (1, 3)))
        axes.set_ylim(-3, max(95, 5 + max(point[1] for points in series.values() for point in points)))
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 1.5, 3, 4.5, 6, 10]))  # ticks at 30 or 45 degrees


def _legend_entries(groups: Groups) -> list[str]:
    labels, entries = group_labels(groups), []
    for group, members in groups.items():
        # Wrapped, because the legend takes its width from the panels.
        lines = textwrap.wrap(truncate(escape_mathtext(labels[group]), MAX_LEGEND), LEGEND_WIDTH, break_on_hyphens=False)
        entries.append("\n".join(lines + [f"({status_counts(members)})"] * any(not run.finished for run in members)))
    return entries
