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
from fa_bench.report.published import Entry, answering, headline
from fa_bench.report.runs import FINISHED, VERSIONS, Run, metrics_of
from fa_bench.report.states import ending
from fa_bench.utils.text import escape_markdown

BLANK = "-"
#: Most characters of a cell that are shown; the CSV has all of it.
MOST_OF_CELL = 500


class Column(NamedTuple):
    """How a column of the frame is shown: its title with the unit, and a number format, or None for words.

    `timing`: it holds measured seconds, which differ from one time to the next that the same runs are run.
    """

    title: str
    format: str | None = None
    timing: bool = False


def metric_columns(metrics: Mapping[str, type[Metric]]) -> dict[str, Column]:
    """The columns of those alignment metrics that have one."""
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
    "runs": Column("of runs", ".0f"),
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
    "seconds_per_epoch": Column("seconds an epoch", ".2f", timing=True),
    "published": Column("published (%)", ".2f"),
    "published_std": Column("std", ".2f"),
    "published_difference": Column("difference to published (points)", "+.2f"),
    "published_source": Column("published in"),
    "note": Column("note"),
}
#: All in a report that differs between two sweeps of the same runs.
TIMINGS = [name for name, column in COLUMNS.items() if column.timing]


def summarise(runs: Sequence[Run], published: Sequence[Entry] = ()) -> pd.DataFrame:
    """One row per group, in order of first appearance: a column for each key in which the configs differ, and `COLUMNS`.

    Accuracies are in %, differences in percentage points, angles in degrees, times in seconds of training. Statistics
    are over the `n` finished runs, one for each seed; `runs` and `status` count every run, and `unfinished` says of the
    others how each stands: diverged, failed, interrupted and running ones enter no statistic. `*_std` is the sample standard
    deviation, `*_ci95` half the width of the 95 % Student t interval of the mean; both are NaN for one seed. A group is
    compared with the `bp` and the `frozen` group of its own task that `groups.reference` chooses, `bp_row` where there are
    several; without one these columns are blank, as are those of published numbers where none of `published` answers to it.
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
    """How the frame's columns are shown, in its order: those of `COLUMNS`, and of alignment metrics of plugins."""
    added = metric_columns(declared(name for name in frame.attrs.get("metrics", ()) if name not in COLUMNS))
    return {name: column for name in frame if (column := {**COLUMNS, **added}.get(name)) is not None}


def to_text(frame: pd.DataFrame) -> str:
    """The table for a terminal: one line per group; how many runs its means are of, statuses and notes where that says more."""
    means, stds = _cells(frame, "test_accuracy"), _cells(frame, "test_accuracy_std")
    width = max(map(len, means), default=0)
    accuracy = [centre if centre == BLANK else f"{centre.rjust(width)} ± {spread}"
                for centre, spread in zip(means, stds, strict=True)]
    columns = [("label", COLUMNS["label"].title, _cells(frame, "label")),
               ("accuracy", "test accuracy % (mean ± std)", accuracy)]
    partly = any(status.partition(" ")[2] != FINISHED for status in frame["status"])
    if partly:
        columns.append(("in means", "in means", [f"{n} of {runs}" for n, runs in zip(frame["n"], frame["runs"], strict=True)]))
    angles = {name: column for name, column in columns_of(frame).items() if column.title.endswith("(°)")}
    columns += [(name, column.title, _cells(frame, name, angles)) for name, column in angles.items()]
    columns += [("seconds", COLUMNS["seconds"].title, _cells(frame, "seconds"))] if "seconds" in frame else []
    if frame["published"].notna().any():
        columns += [(name, title, _cells(frame, name)) for name, title in (
            ("published", COLUMNS["published"].title), ("published_difference", "difference"))]
    if partly:
        columns.append(("status", COLUMNS["status"].title, _cells(frame, "status")))
    if any(frame["note"]):
        columns.append(("note", COLUMNS["note"].title, _cells(frame, "note")))
    formats = columns_of(frame)
    padded = [_pad([title, *map(printable, cells)], right=name in formats and formats[name].format is not None)
              for name, title, cells in columns]
    lines = ["  ".join(cells).rstrip() for cells in zip(*padded, strict=True)]
    rule = "  ".join("-" * len(cells[0]) for cells in padded)
    return "\n".join([lines[0], rule, *lines[1:]])


def to_markdown(frame: pd.DataFrame, columns: Mapping[str, Column] = COLUMNS) -> str:
    """The table in Markdown: those of `columns` in which some row has something."""
    table = [[escape_markdown(column.title), "---" if column.format is None else "---:",
              *(cell if cell == BLANK or column.format else escape_markdown(cell) for cell in cells)]
             for name, column in columns.items() if name in frame and set(cells := _cells(frame, name, columns)) - {BLANK}]
    lines = zip(*table, strict=True)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def to_csv(frame: pd.DataFrame) -> str:
    """The frame as CSV, numbers with ten digits and text on one line, the same bytes on every platform."""
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
    entry, ours = headline(answering(published, members), members)
    notes = [f"does not beat {FLOOR}" if beats is False else "", control.note,
             f"floor: {floor.label}" if floor.label else "", floor.note,
             f"{repeated} repeated run(s) not counted" if repeated else "", entry.remark(members) if entry else ""]
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
    """How many of the runs have not finished, and how each stands: ``1 of 3: seed 2 diverged in epoch 3, first in fc1``."""
    said = [f"seed {run.result['seed']} {ending(run)}" for run in runs if not run.finished]
    return f"{len(said)} of {len(runs)}: {'; '.join(said)}" if said else ""


def _accuracies(runs: Sequence[Run], key: str) -> dict[int, float]:
    """The known accuracies of the finished runs in %, by seed."""
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
    return truncate(str(value), MOST_OF_CELL) if form is None else format(value, form)


def _pad(cells: Sequence[str], right: bool) -> list[str]:
    width = max(map(len, cells))
    return [cell.rjust(width) if right else cell.ljust(width) for cell in cells]
