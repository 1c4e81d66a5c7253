"""The style of figures: the styles of rules and settings, panels of curves, readable axes, and byte-identical files."""

from __future__ import annotations

import hashlib
import io
import math
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

# Figure objects are used instead of pyplot, so that the backend and the figures of a notebook or script are not affected.
import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fa_bench.errors import names, truncate
from fa_bench.report.groups import CONTROL, FLOOR, status_counts
from fa_bench.report.numbers import known
from fa_bench.report.quantities import ACCURACY, ANGLE, FORMATS, LOSS, POSITIONS, Quantity, curve
from fa_bench.report.runs import Run
from fa_bench.report.states import DIVERGED
from fa_bench.utils.files import atomic
from fa_bench.utils.text import escape_mathtext

# Six of Okabe and Ito's colours, and six found by a search, so that each pair of the twelve differs (CIE76 distance of at least
# 14), even under simulated protanopia, deuteranopia and tritanopia. Their distance to the floor's grey is at least 13.
COLOURS = (
    "#000000",
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#C20078",
    "#332288",
    "#999933",
    "#8400CD",
    "#004D40",
    "#661100",
)
GREY = "#A8A8A8"
STYLES = ("-", "--", ":", "-.")
#: The fill style of the markers for the line style with the same index.
FILLS = ("full", "none", "left", "right")
_MARKERS = "osD^vPXp<>*"
#: The rules with solid, dashed, long-dashed and dash-dotted lines. The colour of a rule is that in `COLOURS[1:]` at the rule's
#: position in its table, so rules of different tables share colours.
_SOLID = ("fa", "dfa", "kp", "wm", "usf", "pfa", "dkp", "asap", "drtp", "brsf", "frsf")
_FLOORS = (FLOOR, "frozen_blocks")  # grey
_DASHED = ("forward_alignment", "dgl", "local_error", "mixed", "bp_fc", "pfa_o", "predsim", "asfp", "asfp_lc")
_LONG = (
    "activation_alignment",
    "fdfa",
    "symmetric_alignment",
    "np_feedback",
    "dual_propagation",
    "ldfa",
    "ddtp_linear",
    "bp_deepsup",
    "forward_forward",
    "node_perturbation",
    "weight_perturbation",
)
_DOTTED = ("regularized_mirror", "grape", "information_alignment", "forward_gradient", "pepita", "ldrl", "epc", "pc", "dfc", "f3")
#: The tables of rules, each with its line style and the shift of its markers.
_TABLES = ((_SOLID, STYLES[0], 0), (_DASHED, STYLES[1], 5), (_LONG, (0, (9, 3)), 3), (_DOTTED, (0, (4, 1, 1, 1)), 7))
#: The maximum numbers of characters in a line of a legend entry, of characters in an entry, and of entries in a legend.
LEGEND_WIDTH, MAX_LEGEND, MAX_ENTRIES = 40, 200, 60
#: The maximum number of points in a line that has a marker at every point, and the approximate number of markers on a longer
#: line.
MAX_MARKED, MARKERS = 12, 8
#: The width of a figure and the height of a line of its legend, in inches.
WIDTH, LINE = 13, 0.2
#: In a panel with at least TAIL lines, a line can be far off if it is beyond FAR interquartile ranges. If losses differ by more
#: than a factor of LOG, their axis is logarithmic.
TAIL, FAR, LOG = 4, 3, 50


def rule_style(rule: str) -> dict[str, Any]:
    """The default colour, line style and marker of a rule, which depend only on its name, even for rules of plugins."""
    if rule == CONTROL:
        return {"color": COLOURS[0], "linestyle": "-", "marker": "o"}
    if rule in _FLOORS:
        index = _FLOORS.index(rule)
        return {"color": GREY, "linestyle": STYLES[index], "marker": _MARKERS[1 + index]}
    for table, style, shift in _TABLES:
        if rule in table:
            index = table.index(rule)
            return {"color": COLOURS[1 + index], "linestyle": style, "marker": _MARKERS[(index + shift) % len(_MARKERS)]}
    digest = hashlib.sha256(rule.encode(errors="backslashreplace")).digest()
    return {
        "color": COLOURS[1 + digest[0] % 11],
        "linestyle": STYLES[2 + digest[1] % 2],
        "marker": _MARKERS[digest[2] % len(_MARKERS)],
    }


def setting_style(rule: str, index: int, count: int) -> dict[str, Any]:
    """The style of one of a rule's settings. Its colour is a shade of the rule's colour, from light for the first setting to
    full for the last."""
    style = rule_style(rule)
    lightness = 0 if count < 2 else 0.6 * (1 - index / (count - 1))
    red, green, blue = (channel + lightness * (1 - channel) for channel in to_rgb(style["color"]))
    return style | {"color": to_hex((red, green, blue)), "linestyle": STYLES[index % len(STYLES)]}


class Line(NamedTuple):
    """One line of a panel, with its label, its runs (which differ only in the seed), and its style."""

    label: str
    members: Sequence[Run]
    style: Mapping[str, Any]


class Panel(NamedTuple):
    """One panel of curves, with its title, the quantity that it shows, its lines, and the position along the runs that its x axis
    shows.

    `legend`: whether the panel has its own legend. `markers`: whether curves have markers; single points always have them.
    """

    title: str
    quantity: Quantity
    lines: Sequence[Line]
    x: str = "epoch"
    legend: bool = False
    markers: bool = True


class Part(NamedTuple):
    """One part of a figure, with its title, its panels in rows of `columns`, and the labels and styles in its legend.

    `same_axes`: whether the panels are small multiples of one quantity, with the same range and with labels only at the left and
    lower edges.
    """

    title: str
    panels: Sequence[Panel]
    columns: int
    legend: Sequence[tuple[str, Mapping[str, Any]]]
    same_axes: bool = False


class ReportFigure(Figure):
    """A figure that notebooks can show without pyplot."""

    def _repr_png_(self) -> bytes:
        return rendered(self, "png", "")


def curves_figure(parts: Sequence[Part], note: str = "") -> Figure:
    """A figure that shows parts one below the other, each with a legend beside its panels.

    Each line is the mean over seeds, with a band of ± one sample standard deviation. Crosses at the lower edge mark the last
    epochs of runs that diverged. The titles of parts are shown if there are several, and `note` is shown below the last part.
    """
    heights = [_height(part) for part in parts]
    figure = new_figure(sum(heights))
    subfigures = [figure] if len(parts) == 1 else figure.subfigures(len(parts), 1, height_ratios=heights, squeeze=False).flat
    for subfigure, part in zip(subfigures, parts, strict=True):
        if len(parts) > 1:
            subfigure.suptitle(escape_mathtext(part.title), fontsize=11, fontweight="bold")
        grid = list(subfigure.subplots(math.ceil(len(part.panels) / part.columns), part.columns, squeeze=False).flat)
        series = [
            [(line, points) for line in panel.lines if (points := curve(line.members, panel.quantity, panel.x))]
            for panel in part.panels
        ]
        everything = [line for lines in series for line in lines] if part.same_axes else None
        for axes, panel, lines in zip(grid, part.panels, series, strict=False):
            _plot(axes, panel, lines, everything or lines)
        if part.same_axes:
            label_edges(grid, len(part.panels), part.columns)
        for axes in grid[len(part.panels) :]:
            axes.set_axis_off()
        add_legend(subfigure, part.legend)
    if note:
        figure.supxlabel(note, fontsize=9, color="0.35")
    return figure


def new_figure(height: float) -> Figure:
    """A figure of the standard width and a given height in inches."""
    return ReportFigure(figsize=(WIDTH, height), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.1))


def legend_entry(label: str, members: Sequence[Run] = ()) -> str:
    """The text of a legend entry, wrapped because a wide legend would make the panels narrow. It includes the statuses of the
    runs if some run is unfinished."""
    lines = textwrap.wrap(truncate(escape_mathtext(label), MAX_LEGEND), LEGEND_WIDTH, break_on_hyphens=False)
    return "\n".join(lines + [f"({status_counts(members)})"] * any(not run.finished for run in members))


def add_legend(figure: Any, entries: Sequence[tuple[str, Mapping[str, Any]]], title: str = "mean ± std over seeds") -> None:
    """Add the legend, if it has any entry, beside the panels of a figure or subfigure."""
    if not entries:
        return
    shown = list(entries[:MAX_ENTRIES])
    if len(entries) > len(shown):
        shown.append((f"and {len(entries) - len(shown)} more", {"color": "none"}))
    figure.legend(
        handles=[Line2D([], [], **{"linewidth": 2, "markersize": 5, **style}) for _, style in shown],
        labels=[label for label, _ in shown],
        loc="outside right center",
        frameon=False,
        fontsize=9,
        handlelength=3.2,
        title=title,
        title_fontsize=9,
        alignment="left",
    )


def save(figure: Figure, path: Path, formats: Iterable[str] = FORMATS[:1]) -> list[Path]:
    """Write the figure atomically in each format, to `path` with the format's extension. Returns the paths."""
    paths = [path.with_name(f"{path.name.removesuffix('.png')}.{name}") for name in formats]
    for target in paths:
        with atomic(target) as temporary:
            temporary.write_bytes(rendered(figure, target.suffix[1:], target.stem))
    return paths


def fix_layout(figure: Figure) -> None:
    """Determine the layout once, for all formats."""
    if (engine := figure.get_layout_engine()) is not None:
        with _quiet():
            engine.execute(figure)
        figure.set_layout_engine("none")


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # characters that the font lacks are shown as boxes
        yield


def rendered(figure: Figure, form: str, name: str) -> bytes:
    """The bytes of the figure in one of `FORMATS`, which depend only on the figure and its name, because they contain no dates,
    versions or random ids."""
    # Text in SVG stays text, so that it can be searched. Ids depend on the figure's name, so that one page can contain several
    # figures.
    settings: Any = {"svg.hashsalt": name or "figure", "svg.fonttype": "none", "font.family": "sans-serif"}
    metadata = {"png": ("Software",), "svg": ("Date", "Creator"), "pdf": ("CreationDate", "Creator", "Producer")}[form]
    buffer = io.BytesIO()
    with _quiet(), matplotlib.rc_context(settings):
        # `savefig` is not used here, because it would draw each figure twice.
        canvas: Any = {"png": FigureCanvasAgg, "svg": FigureCanvasSVG, "pdf": FigureCanvasPdf}[form](figure)
        getattr(canvas, f"print_{form}")(buffer, metadata=dict.fromkeys(metadata))
    return buffer.getvalue()


def inline_svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element for a page. Ids to which nothing in the figure refers are removed, because they would not be
    unique."""
    text = rendered(figure, "svg", name).decode()
    text = text[text.index("<svg") :]
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda match: match.group() if match[1] in used else "", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Coordinates are truncated to hundredths of a point, which is precise enough and halves the size of a page.
    return re.sub(r' (d|x|y|transform)="[^"]*"', lambda match: re.sub(r"(\.\d\d)\d+", r"\1", match.group()), text)


def style_axes(axes: Axes) -> None:
    """Apply the common style of axes: only the left and bottom spines, and faint horizontal grid lines behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def label_edges(grid: Sequence[Axes], count: int, columns: int) -> None:
    """Label the axes of a grid of `count` panels only at its left and lower edges, with small tick labels."""
    for index, axes in enumerate(grid[:count]):
        axes.tick_params(labelsize=8)
        axes.set_ylabel(axes.get_ylabel() if index % columns == 0 else "")
        axes.set_xlabel(axes.get_xlabel() if index + columns >= count else "")


class Range(NamedTuple):
    """A readable range of an axis, whether the axis is logarithmic, and the limit of the typical values of lines. A line whose
    typical value is beyond the limit is outside the range."""

    low: float
    high: float
    log: bool
    limit: float

    def is_outside(self, value: float, kind: str) -> bool:
        return value < self.limit if kind == ACCURACY else value > self.limit


def typical(values: Sequence[float]) -> float:
    """The value that determines whether a curve is far from the others: the median of its second half."""
    return median(values[len(values) // 2 :])


def readable_range(lines: Sequence[Sequence[float]], centres: Sequence[float], kind: str) -> Range:
    """The axis range that covers these lines, except lines far below the others (for accuracies) or far above them (for losses).

    The typical values of the lines are in `centres`. A line is far off if its typical value is more than three interquartile
    ranges beyond the nearer quartile of all lines, and also beyond this quartile by more than 6 points of accuracy or a factor of
    about 30 of loss. Losses that differ by a large factor get a logarithmic axis; only on such an axis can a loss be far off, and
    the interquartile range is then that of the logarithms.
    """
    positive = [value for values in lines for value in values if value > 0]
    log = kind == LOSS and bool(positive) and max(positive) > LOG * min(positive)
    limit = -math.inf if kind == ACCURACY else math.inf
    if len(lines) >= TAIL and kind == ACCURACY:
        lower, _, upper = quantiles(sorted(centres), n=4, method="inclusive")
        limit = lower - FAR * max(upper - lower, 2)
    elif len(lines) >= TAIL and log:
        lower, _, upper = quantiles([math.log10(max(value, min(positive))) for value in centres], n=4, method="inclusive")
        limit = 10 ** min(upper + FAR * max(upper - lower, 0.5), 300)
    limits = Range(0, 1, log, limit)
    shown = [
        value
        for values, centre in zip(lines, centres, strict=True)
        if not limits.is_outside(centre, kind)
        for value in values
        if not log or value > 0
    ]
    low, high = min(shown, default=0.0), max(shown, default=1.0)
    if log:
        return limits._replace(low=low / 1.3, high=high * 1.3)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1
    low, high = low - margin, high + margin
    return limits._replace(low=max(low, -2.0), high=min(high, 102.0)) if kind == ACCURACY else limits._replace(low=low, high=high)


def apply_range(axes: Axes, limits: Range, labels: Sequence[str], centres: Sequence[float], kind: str) -> None:
    """Set the vertical axis to the range, and add a note about the lines outside it. `labels` and `centres` are those
    of the lines."""
    if limits.log:
        axes.set_yscale("log")
        axes.set_ylabel(f"{axes.get_ylabel()}, logarithmic")
    axes.set_ylim(limits.low, limits.high)
    off = [
        f"{truncate(label, 30)} ({centre:.3g})"
        for label, centre in zip(labels, centres, strict=True)
        if limits.is_outside(centre, kind)
    ]
    if off:
        text = f"{names(off[:2])}{f' and {len(off) - 2} more' if len(off) > 2 else ''}"
        below = kind == ACCURACY
        axes.text(
            0.99,
            0.08 if below else 0.97,
            escape_mathtext(f"{'▼ below' if below else '▲ above'} the axis: {text}"),
            transform=axes.transAxes,
            fontsize=7.5,
            ha="right",
            va="bottom" if below else "top",
            color="#A00000",
            zorder=5,
            bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1},
        )


def cross(axes: Axes, x: Any, colour: str, shift: float = 0) -> None:
    """Mark a divergence at `x` on the lower edge, moved to the right by `shift` points."""
    axes.annotate(
        "✕",
        (x, 0),
        xycoords=axes.get_xaxis_transform(),
        xytext=(shift, 4),
        textcoords="offset points",
        color=colour,
        ha="center",
        va="center",
        fontsize=11,
        fontweight="bold",
        annotation_clip=False,
        zorder=6,
    )


def _height(part: Part) -> float:
    # The legend has a single column, so a large sweep makes the figure taller. More columns would squeeze the panels.
    rows = math.ceil(len(part.panels) / part.columns)
    lines = sum(1 + entry.count("\n") for entry, _ in part.legend[:MAX_ENTRIES])
    return max(4.0 if rows == 1 else 2.6 * rows, 0.8 + LINE * lines)


Curve = list[tuple[float, float, float]]


def _plot(axes: Axes, panel: Panel, series: Sequence[tuple[Line, Curve]], in_range: Sequence[tuple[Line, Curve]]) -> None:
    """Plot the series of a panel. Except for angles, the vertical range is chosen for the series `in_range`."""
    axes.set_title(escape_mathtext(panel.title), fontsize=11)
    axes.set(xlabel=POSITIONS[panel.x], ylabel=panel.quantity.axis)
    if not series:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", va="center", color="0.4")
        return
    style_axes(axes)
    for line, points in series:
        x, means, stds = (list(column) for column in zip(*points, strict=True))
        style: dict[str, Any] = {"linewidth": 1.6, "markersize": 3.5, **line.style}
        if not panel.markers and len(points) > 1:
            style["marker"] = ""
        every = 1 if len(points) <= MAX_MARKED else math.ceil(len(points) / MARKERS)
        axes.plot(x, means, markevery=every, label=line.label, **style)
        if known(stds):
            low, high = ([m + sign * s for m, s in zip(means, stds, strict=True)] for sign in (-1, 1))
            axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=panel.x != "seconds", min_n_ticks=1))
    kind, means = panel.quantity.kind, [[point[1] for point in points] for _, points in in_range]
    if kind == ANGLE:
        axes.axhline(90, color="0.6", linewidth=1, linestyle=(0, (1, 3)))
        axes.set_ylim(-3, max(95, 5 + max(max(values) for values in means)))
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 1.5, 3, 4.5, 6, 10]))  # ticks every 30 or 45 degrees
    else:
        limits = readable_range(means, list(map(typical, means)), kind)
        apply_range(
            axes,
            limits,
            [line.label for line, _ in series],
            [typical([mean for _, mean, _ in points]) for _, points in series],
            kind,
        )
    ended = {
        (line.style["color"], x)
        for line in panel.lines
        for run in line.members
        if run.result["status"] == DIVERGED and run.metrics and (x := run.metrics[-1].get(panel.x)) is not None
    }
    for colour, x in sorted(ended):
        cross(axes, x, colour)
        axes.update_datalim([(float(x), 0.0)], updatey=False)  # the run may have ended before the first point of any line
    axes.autoscale_view(scaley=False)
    if panel.legend:
        axes.legend(fontsize=6.5, loc="best", framealpha=0.7, ncols=1 + (len(panel.lines) > 8))
