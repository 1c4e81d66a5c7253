"""The comparison table: one row per group of runs that differ in the seed only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from fa_bench.config.labels import differing_keys
from fa_bench.errors import format_value, printable, truncate
from fa_bench.metrics.alignment.base import Metric, declared
from fa_bench.registry.registries import METRICS
from fa_bench.report.groups import CONTROL, FLOOR, Groups, finished_by_seed, group_labels, group_runs, reference, status_counts
from fa_bench.report.numbers import half_width, known, mean, std
from fa_bench.report.published import Entry, headline, matching_entries
from fa_bench.report.runs import FINISHED, VERSIONS, Run, metrics_of
from fa_bench.report.states import describe_status
from fa_bench.utils.text import align_columns, escape_markdown

BLANK = "-"
#: Most characters of a cell in text and Markdown; the CSV has all of it.
MAX_CELL = 500


class Column(NamedTuple):
    """How a column is shown: its title with the unit, and a number format, None for text.

    `timing`: it has measured seconds, which differ whenever the same runs are repeated.
    """

    title: str
    format: str | None = None
    timing: bool = False


def metric_columns(metrics: Mapping[str, type[Metric]]) -> dict[str, Column]:
    """The columns of the alignment metrics that have one."""
    return {name: Column(f"{metric.title} ({metric.unit})" if metric.unit else metric.title, ".1f" if metric.unit else ".2f")
            for name, metric in metrics.items() if metric.column}


COLUMNS = {
    "label": Column("rule"),
    "group": Column("group"),
    "code_hash": Column("code"),
    "data_hash": Column("data"),
    "architecture": Column("architecture"),
    "dataset": Column("dataset"),
    "optimizer": Column("optimizer"),
    "n": Column("n", ".0f"),
    "runs": Column("runs", ".0f"),
    "seeds": Column("seeds"),
    "status": Column("status"),
    "unfinished": Column("not finished"),
    "val_accuracy": Column("validation accuracy (%)", ".2f"),
    "val_accuracy_std": Column("std", ".2f"),
    "val_accuracy_ci95": Column("± 95 %", ".2f"),
    "test_accuracy": Column("test accuracy (%)", ".2f"),
    "test_accuracy_std": Column("std", ".2f"),
    "test_accuracy_ci95": Column("± 95 %", ".2f"),
    "test_accuracy_at_best_val": Column("test accuracy at best validation (%)", ".2f"),
    "test_accuracy_at_best_val_std": Column("std", ".2f"),
    "test_accuracy_at_best_val_ci95": Column("± 95 %", ".2f"),
    "bp_difference": Column("paired difference to bp (points)", "+.2f"),
    "bp_difference_ci95": Column("± 95 %", ".2f"),
    "bp_difference_n": Column("pairs", ".0f"),
    "bp_row": Column("paired with"),
    "floor_accuracy": Column(f"floor: {FLOOR} (%)", ".2f"),
    "floor": Column("beats floor"),
    **metric_columns(declared(METRICS)),
    "seconds": Column("seconds", ".1f", timing=True),
    "seconds_per_epoch": Column("seconds per epoch", ".2f", timing=True),
    "published": Column("published (%)", ".2f"),
    "published_std": Column("std", ".2f"),
    "published_difference": Column("difference to published (points)", "+.2f"),
    "published_source": Column("published in"),
    "note": Column("note"),
}
#: The only part of a report that differs between two sweeps of the same runs.
TIMINGS = [name for name, column in COLUMNS.items() if column.timing]


def summarise(runs: Sequence[Run], published: Sequence[Entry] = ()) -> pd.DataFrame:
    """One row per group, in order of first appearance: a column for each key in which the configs differ, and `COLUMNS`.

    Accuracies are in %, differences in percentage points, angles in degrees, times in seconds of training. Statistics cover the
    `n` finished runs, one per seed. `runs` and `status` count all runs; `unfinished` describes the others (stopped, diverged,
    failed, interrupted, running), which are excluded from the statistics. `*_std` is the sample standard deviation, `*_ci95`
    half the width of the 95 % Student t interval of the mean; both are NaN for one seed. A group is compared with the `bp` and
    `frozen` groups of its task that `groups.reference` chooses (`bp_row` names one of several). Columns of references and
    published numbers are blank if there are none.
    """
    groups = group_runs(runs)
    labels = group_labels(groups)
    swept = [key for key in differing_keys(members[0].config for members in groups.values()) if key not in COLUMNS]
    metrics = metric_columns(metrics_of(runs))
    rows = [_row(labels[group], members, groups, published, metrics) | {
        key: format_value(config[key]) for key in swept if key in (config := members[0].config)}
        for group, members in groups.items()]
    first, timings = list(COLUMNS).index("n"), list(COLUMNS).index("seconds")
    others = [name for name in metrics if name not in COLUMNS]
    columns = [*list(COLUMNS)[:first], *swept, *list(COLUMNS)[first:timings], *others, *list(COLUMNS)[timings:]]
    frame = pd.DataFrame(rows, columns=columns).astype({"floor": object, **dict.fromkeys(swept, object)})
    frame.attrs["metrics"] = list(metrics)
    return frame


def columns_of(frame: pd.DataFrame) -> dict[str, Column]:
    """How the frame's columns are shown, in its order: those in `COLUMNS` and the alignment metrics of plugins."""
    added = metric_columns(declared(name for name in frame.attrs.get("metrics", ()) if name not in COLUMNS))
    return {name: column for name in frame if (column := {**COLUMNS, **added}.get(name)) is not None}


def to_text(frame: pd.DataFrame) -> str:
    """The table for a terminal, one line per group; numbers of runs, statuses and notes only if some group needs them."""
    formats = columns_of(frame)
    means, stds = _cells(frame, "test_accuracy"), _cells(frame, "test_accuracy_std")
    width = max(map(len, means), default=0)
    accuracies = [mean if mean == BLANK else f"{mean.rjust(width)} ± {std}" for mean, std in zip(means, stds, strict=True)]
    incomplete = any(status.partition(" ")[2] != FINISHED for status in frame["status"])
    numbers = [name for name, column in formats.items() if column.title.endswith("(°)") or name == "seconds"]
    # Title, cells, whether they are numbers.
    columns = [(COLUMNS["label"].title, _cells(frame, "label"), False), ("test accuracy % (mean ± std)", accuracies, False)]
    if incomplete:
        columns.append(("in means", [f"{n} of {runs}" for n, runs in zip(frame["n"], frame["runs"], strict=True)], False))
    columns += [(formats[name].title, _cells(frame, name, formats), True) for name in numbers]
    if frame["published"].notna().any():
        columns += [(COLUMNS["published"].title, _cells(frame, "published"), True),
                    ("difference", _cells(frame, "published_difference"), True)]
    columns += [(COLUMNS[name].title, _cells(frame, name), False)
                for name, needed in (("status", incomplete), ("note", any(frame["note"]))) if needed]
    table = []
    for title, cells, _ in columns:
        cells = [title, *map(printable, cells)]
        table.append([title, "-" * max(map(len, cells)), *cells[1:]])
    right = [index for index, (*_, is_number) in enumerate(columns) if is_number]
    return "\n".join(align_columns(list(zip(*table, strict=True)), right))


def to_markdown(frame: pd.DataFrame, columns: Mapping[str, Column] = COLUMNS) -> str:
    """The table in Markdown: those of `columns` that are not blank in every row."""
    table = [[escape_markdown(column.title), "---" if column.format is None else "---:",
              *(cell if cell == BLANK or column.format else escape_markdown(cell) for cell in cells)]
             for name, column in columns.items() if name in frame and set(cells := _cells(frame, name, columns)) - {BLANK}]
    lines = zip(*table, strict=True)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def to_csv(frame: pd.DataFrame) -> str:
    """The frame as CSV with ten digits per number and text on one line: the same bytes on every platform."""
    frame = frame.rename(columns=printable)
    plain = pd.DataFrame({name: column.map(lambda value: printable(value) if isinstance(value, str) else value)
                          for name, column in frame.items()})
    return plain.to_csv(index=False, float_format="%.10g", lineterminator="\n")


def _row(
    label: str, members: Sequence[Run], groups: Groups, published: Sequence[Entry], metrics: Iterable[str]
) -> dict[str, Any]:
    finished = finished_by_seed(members)
    final = _accuracies(members, "test_accuracy")
    control, floor = (reference(algorithm, members[0], groups) for algorithm in (CONTROL, FLOOR))
    control_final = _accuracies(control.runs, "test_accuracy")
    floor_mean = mean(_accuracies(floor.runs, "test_accuracy").values())
    differences = [final[seed] - control_final[seed] for seed in final if seed in control_final]
    final_mean = mean(final.values())
    beats = None if math.isnan(final_mean) or math.isnan(floor_mean) else final_mean > floor_mean
    repeated = sum(run.finished for run in members) - len(finished)
    entry, ours = headline(matching_entries(published, members), members)
    notes = [f"does not beat {FLOOR}" if beats is False else "", control.note,
             f"floor: {floor.label}" if floor.label else "", floor.note,
             f"{repeated} run{'s' * (repeated > 1)} with a repeated seed not counted" if repeated else "",
             entry.remark(members) if entry else ""]
    return {
        "label": label,
        **{key: members[0].result.get(key) for key in ("group", *VERSIONS, "architecture", "dataset", "optimizer")},
        "n": len(finished),
        "runs": len(members),
        "seeds": " ".join(map(str, sorted(finished))),
        "status": status_counts(members),
        "unfinished": _unfinished(members),
        **_statistics("val_accuracy", members), **_statistics("test_accuracy", members),
        **_statistics("test_accuracy_at_best_val", members),
        "bp_difference": mean(differences),
        "bp_difference_ci95": half_width(differences),
        "bp_difference_n": len(differences) if control.runs else math.nan,
        "bp_row": control.label,
        **{name: mean(run.layer_mean(name, run.result.get("angles")) for run in finished.values()) for name in metrics},
        "seconds": mean(run.result.get("seconds") for run in finished.values()),
        "seconds_per_epoch": mean(_over(run.result.get("seconds"), run.epochs) for run in finished.values()),
        "floor_accuracy": floor_mean,
        "floor": beats,
        "published": entry.value if entry else math.nan,
        "published_std": entry.std if entry else math.nan,
        "published_difference": ours - entry.value if entry else math.nan,
        "published_source": entry.source if entry else "",
        "note": "; ".join(filter(None, notes)),
    }


def _unfinished(runs: Sequence[Run]) -> str:
    """The runs that have not finished: ``1 of 3: seed 2 diverged in epoch 3, first in fc1``."""
    unfinished = [f"seed {run.result['seed']} {describe_status(run)}" for run in runs if not run.finished]
    return f"{len(unfinished)} of {len(runs)}: {'; '.join(unfinished)}" if unfinished else ""


def _accuracies(runs: Sequence[Run], key: str) -> dict[int, float]:
    """The finished runs' known accuracies in %, by seed."""
    return {seed: 100 * accuracy for seed, run in finished_by_seed(runs).items() for accuracy in known([run.result.get(key)])}


def _statistics(key: str, runs: Sequence[Run]) -> dict[str, float]:
    """Mean, standard deviation and interval of an accuracy of the finished runs, in %."""
    values = _accuracies(runs, key).values()
    return {key: mean(values), f"{key}_std": std(values), f"{key}_ci95": half_width(values)}


def _over(seconds: float | None, epochs: int | None) -> float | None:
    return seconds / epochs if seconds is not None and epochs else None


def _cells(frame: pd.DataFrame, name: str, columns: Mapping[str, Column] = COLUMNS) -> list[str]:
    return [_cell(value, columns[name].format) for value in frame[name]]


def _cell(value: Any, form: str | None) -> str:
    if pd.isna(value) or value == "":
        return BLANK
    if isinstance(value, bool):
        return "yes" if value else "no"
    return truncate(str(value), MAX_CELL) if form is None else format(value, form)
