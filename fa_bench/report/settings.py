"""The figure of a final quantity against a swept setting, with one line per rule and a mark at the best setting of each rule."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from fa_bench.config.labels import differing_keys, is_number, short_key
from fa_bench.errors import format_value, truncate
from fa_bench.report.groups import CONTROL, FLOOR, Groups, by_rule, natural_key, value_key
from fa_bench.report.plot import (
    GREY,
    Range,
    add_legend,
    apply_range,
    cross,
    label_edges,
    new_figure,
    readable_range,
    rule_style,
    style_axes,
)
from fa_bench.report.quantities import ANGLE, Point, Quantity, best, point
from fa_bench.report.runs import VERSIONS
from fa_bench.utils.text import escape_mathtext

DENSITY = "algorithm.density"
_NAMES = {DENSITY: "density of the feedback", "optimizer.lr": "learning rate (optimizer.lr)"}
#: The maximum number of rules in a panel, and of panels for combinations of other settings. With more rules, each rule has its
#: own panel; with more combinations, only the best ones are shown.
MAX_RULES, MAX_PANELS = 12, 6
#: Ranks are shown above the values of a setting if a row of panels has at most MAX_RANKED values. At most MAX_TICKS values of a
#: panel are labelled.
MAX_RANKED, MAX_TICKS = 8, 14
#: The ratio of values from which an axis is logarithmic, and the smallest allowed gap between two values as a fraction of a
#: linear axis.
LOGARITHMIC, CLOSEST = 8, 0.05
RANKS = ("1st", "2nd", "3rd")
LEGEND = "mean ± std over seeds\nring: best by validation\n✕: some run diverged"
CHOSEN = "the other settings chosen by validation"


class Series(NamedTuple):
    """The points of one rule in the order of the setting. A rule without the setting has a single point with x = None.

    A null value of the setting is represented by the text ``null``.
    """

    rule: str
    points: list[Point]

    @property
    def best(self) -> Point | None:
        """The point with the best validation score; None if none is known."""
        scored = [point for point in self.points if not math.isnan(point.validation)]
        return max(scored, key=lambda point: point.validation, default=None)


def series_by_panel(groups: Groups, key: str, of: Quantity) -> dict[str, list[Series]]:
    """A map from the title of each combination of the other swept settings to the series of the rules. The result is empty if no
    rule has several values of `key`.

    A rule that sweeps only some of the other settings appears in every panel that matches the settings that it sweeps. If there
    are more than `MAX_PANELS` combinations, a single panel shows each rule and value at the combination with the best validation
    score.
    """
    rows: list[tuple[str, str, Any, dict[str, str]]] = []
    values: dict[str, set[str]] = {}
    for rule, members in by_rule(groups).items():
        configs = {group: runs[0].config for group, runs in members.items()}
        keys = [name for name in differing_keys(configs.values()) if name != key]
        versions = [name for name in VERSIONS if len({runs[0].result.get(name) for runs in members.values()}) > 1]
        for group, config in configs.items():
            others = {short_key(name, config): format_value(config[name]) for name in keys if name in config} | {
                VERSIONS[name]: str(groups[group][0].result.get(name))[:8] for name in versions
            }
            # A null value is a category, like text. Only a rule without the key has no position on the axis.
            x = "null" if key in config and config[key] is None else config.get(key)
            rows.append((rule, group, x, others))
            values.setdefault(rule, set()).add(repr(config.get(key)))
    if all(len(of_rule) < 2 for of_rule in values.values()):
        return {}
    combinations = list({repr(sorted(others.items())): others for *_, others in rows}.values())
    maximal = [each for each in combinations if not any(each.items() < other.items() for other in combinations)]
    if len(maximal) > MAX_PANELS:
        return {CHOSEN: _series(rows, groups, of)}
    return {
        " ".join(f"{name}={value}" for name, value in panel.items()): _series(
            [row for row in rows if row[3].items() <= panel.items()], groups, of
        )
        for panel in sorted(maximal, key=lambda panel: natural_key(str(panel)))
    }


def _series(rows: Sequence[tuple[str, str, Any, dict[str, str]]], groups: Groups, of: Quantity) -> list[Series]:
    at: dict[str, dict[str, tuple[Any, dict[str, Any]]]] = {}
    for rule, group, x, _ in rows:
        at.setdefault(rule, {}).setdefault(repr(x), (x, {}))[1][group] = groups[group]
    return [
        Series(
            rule,
            sorted(
                (point(x, members[best(members) or next(iter(members))], of) for x, members in cells.values()),
                key=lambda each: value_key(each.x),
            ),
        )
        for rule, cells in at.items()
    ]


def setting_figure(by_task: Mapping[str, Groups], key: str, of: Quantity) -> Figure | None:
    """Plot the final values of a quantity against the swept option `key`; returns None if no rule ran with several values of it.

    There is a panel for each task and combination of other settings, with one line per rule. If there are many rules, each has
    its own panel, in which the other rules except bp are grey.
    """
    panels = [
        (" | ".join(filter(None, (task * (len(by_task) > 1), title))), series)
        for task, groups in by_task.items()
        for title, series in series_by_panel(groups, key, of).items()
    ]
    if not panels:
        return None
    rules = list(dict.fromkeys(each.rule for _, series in panels for each in series))
    many = len(rules) > MAX_RULES
    drawn: list[tuple[str, list[Series], list[Series]]] = []
    for title, series in panels:
        if many:
            drawn += [
                (" | ".join(filter(None, (title, _summary(each, of)))), [each], [other for other in series if other is not each])
                for each in series
            ]
        else:
            drawn.append((title, series, []))
    columns = min(4 if many else 3, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    figure = new_figure(max(2.6 * rows if many else 4.6 * rows, 0.3 * len(rules) * (not many)))
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (title, series, background) in zip(grid, drawn, strict=False):
        ranks = _plot(axes, key, of, series, background, 0 if many else columns)
        axes.set_title(escape_mathtext(title), fontsize=9.5 if many else 11, pad=6 + 10 * ranks)
    if many:
        label_edges(grid, len(drawn), columns)
    for axes in grid[len(drawn) :]:
        axes.set_axis_off()
    if many:
        names = [(name, rule_style(name)) for name in (CONTROL, FLOOR) if name in rules]
        add_legend(figure, [*names, ("other rules", {"color": "0.85"})], LEGEND)
    else:
        only = panels[0][1] if len(panels) == 1 else [Series(rule, []) for rule in rules]
        add_legend(figure, [(escape_mathtext(_summary(each, of)), rule_style(each.rule)) for each in only], LEGEND)
    return figure


def _summary(series: Series, of: Quantity) -> str:
    """The rule and the value at its best setting, such as ``kp: 97.10 ± 0.20 at 0.05``."""
    chosen = series.best
    if chosen is None or math.isnan(chosen.mean):
        return truncate(series.rule, 40)
    spread = "" if math.isnan(chosen.std) else f" ± {chosen.std:{of.format}}"
    at = "" if chosen.x is None else f" at {_text(chosen.x)}"
    return f"{truncate(series.rule, 40)}: {chosen.mean:{of.format}}{spread}{at}"


def _text(x: Any) -> str:
    return f"{x:g}" if is_number(x) else format_value(x)


def _plot(axes: Axes, key: str, of: Quantity, series: Sequence[Series], background: Sequence[Series], columns: int) -> int:
    """Plot one panel, and return the number of rows of ranks above it, which is 0 if `columns` is 0."""
    style_axes(axes)
    axes.set(xlabel=_NAMES.get(key, key), ylabel=of.axis)
    every = [*series, *background]
    values = {repr(each.x): each.x for line in every for each in line.points if each.x is not None}
    ordered = sorted(values.values(), key=value_key)
    numeric = all(map(is_number, ordered)) and not _are_crowded(ordered)
    places = {repr(x): float(x) if numeric else float(index) for index, x in enumerate(ordered)}
    _scale(axes, ordered, numeric)
    known = [(line.rule, each) for line in every for each in line.points if not math.isnan(each.mean)]
    bars = [[each.mean, *([each.mean - each.std, each.mean + each.std] if each.std > 0 else [])] for _, each in known]
    limits = readable_range(bars, [each.mean for _, each in known], of.kind)
    for index, line in enumerate(every):
        is_background = index >= len(series)
        reference = line.rule in (CONTROL, FLOOR)
        style = rule_style(line.rule) if not is_background or reference else {"color": "0.88", "linestyle": "-", "marker": ""}
        style |= {"linewidth": 0.8 if is_background else 1.6, "zorder": 1.5 if is_background and not reference else 2}
        step = min(3.0, 16 / len(series))
        _draw(axes, line, places, style, 0 if is_background else step * (index - (len(series) - 1) / 2), limits, is_background)
    if of.kind == ANGLE:
        axes.axhline(90, color="0.6", linewidth=1, linestyle=(0, (1, 3)))
    apply_range(axes, limits, [f"{rule} at {_text(each.x)}" for rule, each in known], [each.mean for _, each in known], of.kind)
    if columns and len(ordered) <= MAX_RANKED // columns and not of.measured and len(series) > 1:
        return _rank(axes, series, places, of)
    return 0


def _are_crowded(ordered: Sequence[float]) -> bool:
    """Whether values would overlap on a linear axis but cannot be shown on a logarithmic axis, because some are not positive.
    Weight decays of 0, 1e-5 and 1e-3 are an example."""
    gaps = [high - low for low, high in itertools.pairwise(ordered)]
    positive = [value for value in ordered if value > 0]
    return (
        len(positive) < len(ordered)
        and bool(positive)
        and positive[-1] >= LOGARITHMIC * positive[0]
        and min(gaps) < CLOSEST * (ordered[-1] - ordered[0])
    )


def _scale(axes: Axes, ordered: Sequence[Any], numeric: bool) -> None:
    """Set ticks at the values; the axis is logarithmic if they are positive and span a factor of at least `LOGARITHMIC`."""
    if numeric and ordered[0] > 0 and ordered[-1] >= LOGARITHMIC * ordered[0]:
        factor = (ordered[-1] / ordered[0]) ** 0.08
        axes.set_xscale("log")
        axes.set_xlim(ordered[0] / factor, ordered[-1] * factor)
    else:
        first, last = (ordered[0], ordered[-1]) if numeric else (0, len(ordered) - 1)
        margin = 0.08 * (last - first) or 0.5
        axes.set_xlim(first - margin, last + margin)
    shown = range(0, len(ordered), math.ceil(len(ordered) / MAX_TICKS))
    axes.xaxis.set_major_locator(FixedLocator([float(ordered[index]) if numeric else index for index in shown]))
    axes.xaxis.set_minor_locator(NullLocator())
    texts = [truncate(_text(ordered[index]), 20) for index in shown]
    axes.set_xticklabels([escape_mathtext(text) for text in texts], rotation=30 if sum(map(len, texts)) > 40 else 0)


def _draw(
    axes: Axes,
    line: Series,
    places: Mapping[str, float],
    style: Mapping[str, Any],
    shift: float,
    limits: Range,
    is_background: bool,
) -> None:
    """Draw the results of one rule, shifted sideways by `shift` typographic points so that the error bars of rules do not
    overlap. A rule without the setting is drawn as a horizontal line."""
    figure: Any = axes.figure
    moved = axes.transData + ScaledTranslation(shift / 72, 0, figure.dpi_scale_trans)
    bars = {"elinewidth": 1, "capsize": 2, "markersize": 4.5}
    placed = [(places[repr(each.x)], each) for each in line.points if each.x is not None]
    known = [(x, each) for x, each in placed if not math.isnan(each.mean)]
    if known:
        x, mean, std = zip(*((x, each.mean, each.std) for x, each in known), strict=True)
        if is_background:
            axes.plot(x, mean, **{**style, "marker": ""})
        else:
            axes.errorbar(x, mean, yerr=std, transform=moved, **bars, **style)
    for each in (each for each in line.points if each.x is None and not math.isnan(each.mean)):
        axes.axhline(each.mean, **{**style, "marker": ""})
        if not math.isnan(each.std) and not is_background:
            axes.axhspan(each.mean - each.std, each.mean + each.std, color=style["color"], alpha=0.1, linewidth=0)
    if is_background:
        return
    best_point = line.best
    for x, each in placed:
        if each.diverged:
            cross(axes, x, style["color"], 2.5 * shift)
        if each is best_point and len(placed) > 1 and limits.low <= each.mean <= limits.high:
            axes.plot(
                [x],
                [each.mean],
                transform=moved,
                marker="o",
                markersize=11,
                markerfacecolor="none",
                markeredgecolor=style["color"],
                markeredgewidth=1.4,
                linestyle="",
                zorder=3,
            )


def _rank(axes: Axes, series: Sequence[Series], places: Mapping[str, float], of: Quantity) -> int:
    """Above each value of the setting, list the rules with the best means. Rules without the setting are not listed. Returns the
    number of rows."""
    sign = 1 if of.lower else -1
    rows = min(len(RANKS), sum(any(each.x is not None for each in line.points) for line in series))
    for name, place in places.items():
        here = sorted(
            (sign * each.mean, line.rule)
            for line in series
            for each in line.points
            if each.x is not None and repr(each.x) == name and not math.isnan(each.mean)
        )
        for row, (_, rule) in enumerate(here[:rows]):
            colour = rule_style(rule)["color"]
            axes.annotate(
                escape_mathtext(truncate(rule, 18)),
                (place, 1),
                xycoords=axes.get_xaxis_transform(),
                ha="center",
                xytext=(0, 4 + 10 * (rows - 1 - row)),
                textcoords="offset points",
                fontsize=8,
                color="0.45" if colour == GREY else colour,
                annotation_clip=False,
            )
    for row, label in enumerate(RANKS[:rows]):
        axes.annotate(
            label,
            (0, 1),
            xycoords="axes fraction",
            fontsize=8,
            ha="right",
            color="0.4",
            annotation_clip=False,
            xytext=(-2, 4 + 10 * (rows - 1 - row)),
            textcoords="offset points",
        )
    return rows
