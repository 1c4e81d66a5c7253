"""The figures of a report: the overview, curves, quantities by layer, and final values against the swept settings."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from fa_bench.config.labels import label
from fa_bench.metrics.alignment.base import Metric, declared
from fa_bench.objectives.scores import ACCURACY, Score
from fa_bench.report.files import register
from fa_bench.report.groups import CONTROL, FLOOR, Groups, by_rule, group_labels, group_runs, natural_key, swept_keys, tasks
from fa_bench.report.numbers import known
from fa_bench.report.plot import (
    FILLS,
    STYLES,
    Line,
    Panel,
    Part,
    curves_figure,
    fix_layout,
    inline_svg,
    legend_entry,
    rule_style,
    save,
    setting_style,
)
from fa_bench.report.quantities import (
    POSITIONS,
    Quantity,
    Selection,
    best,
    curve,
    in_layer,
    layer_mean,
    measurements,
    primary,
    quantity,
    runs_of,
    scalar,
    scalar_names,
    scores_in,
)
from fa_bench.report.runs import Run, metrics_of
from fa_bench.report.settings import DENSITY, setting_figure

#: The maximum number of panels per row if there is a panel for each layer or rule.
COLUMNS = 4
#: The maximum number of lines in a panel, and the maximum number of settings of one rule among them. If either is exceeded, each
#: rule has its own panel of curves, and the overview and the figures by layer show only the best setting of each rule.
MAX_GROUPS, MAX_SETTINGS = 12, 4
#: The maximum number of settings in a legend that all panels share. If there are more settings, each panel has its own legend.
MAX_SHARED = 10
BEST = "Each rule at its best setting by the validation score (last epoch); all settings are in the figures of curves."


class Picture(NamedTuple):
    """A figure of a report: its title, its files, and the figure as an SVG element."""

    title: str
    paths: list[Path]
    svg: str


def write_figures(
    runs: Sequence[Run],
    out_dir: Path,
    name: str,
    selection: Selection = Selection(),  # noqa: B008
    swept: Sequence[Run] | None = None,
) -> list[Picture]:
    """Write every figure that `selection` includes and for which the runs have data, and return the figures. The overview, such
    as `name`.png, comes first.

    The overview shows all tasks (see `groups.tasks`). Each task has its own figures of curves and layers; if there are several
    tasks, the names of these files include the task. The figures of final values against settings show the runs in `swept`, by
    default all `runs`.

    Raises:
        DataError: a part of the selection does not exist in the runs.
    """
    pictures = []
    swept = selection.checked(runs if swept is None else swept)
    for suffix, title, figure in report_figures(selection.of(runs), selection, swept):
        stem = f"{name}_{suffix}" if suffix else name
        for form in selection.formats:
            register(out_dir / f"{stem}.{form}")
        fix_layout(figure)
        pictures.append(Picture(title, save(figure, out_dir / f"{stem}.png", selection.formats), inline_svg(figure, stem)))
    return pictures


def report_figures(runs: Sequence[Run], selection: Selection, swept: Sequence[Run]) -> Iterator[tuple[str, str, Figure]]:
    """Yield (end of the file name, title, figure) for every figure of a report; the overview comes first and has an empty end."""
    by_task, metrics = tasks(group_runs(runs)), metrics_of(runs)
    only = quantity(selection.metric, metrics, scores_in(runs)) if selection.metric else None
    x = selection.position
    yield "", "Overview", overview(by_task, [only] if only else None, metrics, x)
    by_score: dict[str, list[Run]] = {}
    for groups in tasks(group_runs(swept)).values():  # tasks with different scores cannot share an axis
        members = runs_of(groups)
        by_score.setdefault("" if only else primary(members).name, []).extend(members)
    for number, of_score in enumerate(by_score.values()):
        final = only or scalar(f"test_{(first := primary(of_score)).name}", [first])
        for key in swept_keys(group_runs(of_score)) if selection.x in ("", *POSITIONS) else [selection.x]:
            if (figure := setting_figure(tasks(group_runs(of_score)), key, final)) is not None:
                stem = "density" if key == DENSITY else _slug(key)
                yield f"{stem}-{final.name}" if number else stem, f"{final.title} against {key}", figure
    slugs: dict[str, str] = {}
    for title in by_task:  # titles that differ only in punctuation must not share a file
        slugs[title] = slug if (slug := _slug(title)) not in slugs.values() else f"{slug[:91]}-{_digest(title)}"
    for title, groups in by_task.items():
        end, of = (f"-{slugs[title]}", f": {title}") if len(by_task) > 1 else ("", "")
        for kind, heading, figure in task_figures(title, groups, metrics, only, x):
            yield f"{kind}{end}", f"{heading}{of}", figure


def task_figures(
    title: str, groups: Groups, metrics: Mapping[str, type[Metric]], only: Quantity | None, x: str
) -> Iterator[tuple[str, str, Figure]]:
    """Yield (kind, title, figure) for the figures of one task, which show its curves and its alignment metrics by layer; the kind
    becomes a part of the file name."""
    if only is None or is_large(groups):  # otherwise, the overview already shows the selected quantity
        for part in curve_parts(title, groups, only, x):
            of = part.panels[0].quantity
            is_first = of.name == f"test_{primary(runs_of(groups)).name}" or of == only
            yield ("curves" if is_first else f"curves_{of.name}", of.title if part.same_axes else "Curves", curves_figure([part]))
    for name, metric in metrics.items():
        if (only.name == name if only else metric.plot) and (parts := layers_parts(title, groups, name, x)):
            yield name, f"{metric.title.capitalize()} by layer", curves_figure(parts, BEST if is_large(groups) else "")


def curve_parts(title: str, groups: Groups, only: Quantity | None, x: str) -> list[Part]:
    """The parts of figures that show the curves of a task: those of `only` or, if it is None, of the primary test score and
    of all other scores and losses with data.

    A small task has one part, in which the quantities are side by side; a large one has a part for each quantity.
    """
    scores = _ordered_scores(runs_of(groups))
    curves = (
        [only]
        if only
        else [
            each
            for number, name in enumerate(scalar_names(scores))
            if has_data(groups, each := scalar(name, scores)) or number == 0
        ]
    )
    if is_large(groups):
        return [rules_part(title, groups, each, x) for each in curves]
    return [lines_part(title, groups, curves, x, min(3, len(curves)))]


def _ordered_scores(runs: Sequence[Run]) -> list[Score]:
    """The scores of a task's runs, with the primary one first."""
    first = primary(runs)
    return [first, *(score for score in scores_in(runs) if score.name != first.name)]


def overview_quantities(metrics: Mapping[str, type[Metric]], first: Score = ACCURACY) -> list[Quantity]:
    """The primary test score, and the mean over layers of every angle that has a column in tables."""
    return [
        scalar(f"test_{first.name}", [first]),
        *(layer_mean(name, metric) for name, metric in metrics.items() if metric.column and metric.unit == "°"),
    ]


def overview(
    by_task: Mapping[str, Groups], quantities: Sequence[Quantity] | None, metrics: Mapping[str, type[Metric]], x: str
) -> Figure:
    """A figure of all tasks, one below the other, with a panel for each quantity (None: `overview_quantities`). For a large task,
    it shows the best setting of each rule."""
    parts = []
    for title, groups in by_task.items():
        shown = quantities or overview_quantities(metrics, primary(runs_of(groups)))
        parts.append(lines_part(title, _chosen(groups), shown, x, len(shown), group_labels(groups)))
    return curves_figure(parts, BEST if any(map(is_large, by_task.values())) else "")


def layers_parts(title: str, groups: Groups, name: str, x: str) -> list[Part]:
    """A list of one part of a figure, which shows an alignment metric with a panel for each layer; empty if there are no values.
    For a large task, the part shows the best setting of each rule."""
    layers = layer_quantities(groups, name)
    columns = min(COLUMNS, len(layers))
    return [lines_part(title, _chosen(groups), layers, x, columns, group_labels(groups))] if layers else []


def layer_quantities(groups: Groups, name: str) -> list[Quantity]:
    """The metric `name` in every layer for which some run has a value, in the order of execution."""
    runs = [run for members in groups.values() for run in members]
    layers: dict[str, bool] = {}
    for run in runs:
        for record in measurements(run):
            for layer, value in ((record.get("angles") or {}).get(name) or {}).items():
                layers[layer] = layers.get(layer, False) or bool(known([value]))
    order = max((list(run.layers(name)) for run in runs), key=len, default=[])
    ordered = sorted(
        (layer for layer, has_values in layers.items() if has_values),
        key=lambda layer: order.index(layer) if layer in order else len(order),
    )
    return [in_layer(name, declared([name])[name], layer) for layer in ordered]


def has_data(groups: Groups, of: Quantity) -> bool:
    """Whether some run has a value of the quantity in some epoch."""
    return any(known([of.value(run, line)]) for members in groups.values() for run in members for line in run.metrics)


def is_large(groups: Groups) -> bool:
    """Whether there are too many groups, or too many of one rule, to show a line for each of them in one panel."""
    return len(groups) > MAX_GROUPS or any(len(members) > MAX_SETTINGS for members in by_rule(groups).values())


def _chosen(groups: Groups) -> Groups:
    """The groups to show: all of them or, for a large task, the best one of each rule. If no validation score of a rule is known,
    all its groups are shown."""
    if not is_large(groups):
        return groups
    chosen: dict[str, Sequence[Run]] = {}
    for members in by_rule(groups).values():
        chosen |= {group: members[group]} if (group := best(members)) is not None else members
    return {group: groups[group] for group in groups if group in chosen}


def _settings(groups: Groups) -> dict[str, str]:
    """For each group, the values of the keys that some rule sweeps, or the label without the rule if these values do not
    distinguish the groups of its rule."""
    keys, labels, settings = swept_keys(groups), group_labels(groups), {}
    for rule, members in by_rule(groups).items():
        texts = {group: label("", runs[0].config, keys).strip() for group, runs in members.items()}
        settings |= (
            texts
            if len(set(texts.values())) == len(texts)
            else {group: labels[group].removeprefix(rule).strip() for group in members}
        )
    return settings


def lines_part(
    title: str, groups: Groups, quantities: Sequence[Quantity], x: str, columns: int, labels: Mapping[str, str] | None = None
) -> Part:
    """A part with a panel for each quantity and a line for each group. The legend lists the lines that have points, and the
    groups with unfinished runs.

    The rule determines the colour, marker and line style of a line. If some rule has several groups, the setting determines the
    line style instead, and how markers are filled.
    """
    rules, labels, settings = by_rule(groups), labels or group_labels(groups), _settings(groups)
    shared = sorted(set(settings.values()), key=natural_key)
    are_several = any(len(members) > 1 for members in rules.values())
    lines = []
    for members in rules.values():
        for index, group in enumerate(members):
            style = rule_style(members[group][0].result["algorithm"])
            if are_several:
                number = shared.index(settings[group]) if len(shared) <= len(STYLES) else index
                number %= len(STYLES)  # there may be more settings than styles if none has a score
                style |= {"linestyle": STYLES[number], "fillstyle": FILLS[number]}
            lines.append(Line(labels[group], groups[group], style))
    return Part(
        title,
        [Panel(each.title, each, lines, x) for each in quantities],
        columns,
        [
            (legend_entry(line.label, line.members), line.style)
            for line in lines
            if any(not run.finished for run in line.members) or any(curve(line.members, each, x) for each in quantities)
        ],
    )


def rules_part(title: str, groups: Groups, of: Quantity, x: str) -> Part:
    """A part with a panel for each rule and, in it, a line for each setting of the rule. The best settings of the control and the
    floor are shown in the other panels as references."""
    settings, rules = _settings(groups), by_rule(groups)
    shared = sorted(set(settings.values()), key=natural_key)
    references = {
        rule: rules[rule][group]
        for rule in (CONTROL, FLOOR)
        if rule in rules and (group := best(rules[rule])) is not None and curve(rules[rule][group], of, x)
    }
    thin = {
        rule: rule_style(rule) | {"linewidth": 0.9, "marker": "", "color": "0.35" if rule == CONTROL else "0.66"}
        for rule in references
    }
    common = len(shared) <= MAX_SHARED
    panels = []
    for rule, members in rules.items():
        order = shared if common else sorted((settings[group] for group in members), key=natural_key)
        lines = [Line(f"{name} (best setting)", runs, thin[name]) for name, runs in references.items() if name != rule]
        lines += [
            Line(settings[group] or rule, members[group], setting_style(rule, order.index(settings[group]), len(order)))
            for group in members
        ]
        panels.append(Panel(rule, of, lines, x, legend=not common, markers=False))
    legend: list[tuple[str, Mapping[str, Any]]] = [(f"{rule} (best setting)", thin[rule]) for rule in references]
    if common:
        legend += [
            (legend_entry(setting or "single setting"), setting_style(CONTROL, index, len(shared)) | {"marker": ""})
            for index, setting in enumerate(shared)
        ]
    return Part(f"{title}: {of.title.lower()}", panels, min(COLUMNS, len(panels)), legend, same_axes=True)


def _slug(title: str) -> str:
    """Convert a title to a part of a file name, with at most 100 characters."""
    words = re.sub(r"[^A-Za-z0-9._]+", "-", title).strip("-")
    return words if len(words) <= 100 else f"{words[:91]}-{_digest(title)}"


def _digest(title: str) -> str:
    return hashlib.sha256(title.encode(errors="backslashreplace")).hexdigest()[:8]
