"""The comparison table: one row per group of runs that differ in the seed only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from fa_bench.config.labels import differing_keys
from fa_bench.errors import format_value, printable, truncate
from fa_bench.metrics.alignment.base import Metric, declared
from fa_bench.objectives.scores import ACCURACY, Score
from fa_bench.registry.registries import METRICS
from fa_bench.report.best import Chosen, abridged
from fa_bench.report.cost import ENERGY, MEASURED, PREDICTED, Costs
from fa_bench.report.groups import CONTROL, FLOOR, finished_by_seed, group_runs, is_floor, status_counts, tasks
from fa_bench.report.numbers import Paired, half_width, holm, known, mean, paired, std, value_range
from fa_bench.report.published import Entry, headline, matching_entries
from fa_bench.report.references import BEST, Reference, References
from fa_bench.report.runs import FINISHED, VERSIONS, Run, metrics_of
from fa_bench.report.states import describe_status
from fa_bench.utils.text import align_columns, escape_markdown

BLANK = "-"
#: Maximum number of characters of a cell in text and Markdown; the CSV has all of it.
MAX_CELL = 500
#: Width in characters of the terminal's table, if possible, and the maximum number of lines of notes below it.
WIDTH, MAX_NOTES = 120, 12


class Column(NamedTuple):
    """How a column is shown: its title with the unit, and a number format, None for text.

    `timing`: it is measured, and differs whenever the same runs are repeated: seconds, memory and energy.
    """

    title: str
    format: str | None = None
    timing: bool = False


def metric_columns(metrics: Mapping[str, type[Metric]]) -> dict[str, Column]:
    """The columns of the alignment metrics that have one."""
    return {
        name: Column(f"{metric.title} ({metric.unit})" if metric.unit else metric.title, ".1f" if metric.unit else ".2f")
        for name, metric in metrics.items()
        if metric.column
    }


def _statistics_columns(name: str, title: str, form: str) -> dict[str, Column]:
    return {
        name: Column(title, form),
        f"{name}_std": Column("std", form),
        f"{name}_ci95": Column("± 95 %", form),
        f"{name}_low": Column("lowest", form),
        f"{name}_high": Column("highest", form),
    }


def score_columns(score: Score) -> dict[str, Column]:
    """The columns of a primary score."""
    unit = f" ({score.unit})" if score.unit else ""
    titles = {
        f"val_{score.name}": f"validation {score.title}",
        f"test_{score.name}": f"test {score.title}",
        f"test_{score.name}_at_best_val": f"test {score.title} at best validation",
    }
    return {
        name: column
        for key, title in titles.items()
        for name, column in _statistics_columns(key, f"{title}{unit}", score.format).items()
    }


def floor_column(score: Score) -> dict[str, Column]:
    """The column of the floor's mean of a primary score."""
    return {f"floor_{score.name}": Column(f"floor: {FLOOR}{f' ({score.unit})' if score.unit else ''}", score.format)}


COLUMNS = {
    "label": Column("rule"),
    "group": Column("group"),
    "code_hash": Column("code"),
    "data_hash": Column("data"),
    "architecture": Column("architecture"),
    "dataset": Column("dataset"),
    "optimizer": Column("optimizer"),
    "epochs": Column("epochs", ".0f"),
    "n": Column("n", ".0f"),
    "runs": Column("runs", ".0f"),
    "seeds": Column("seeds"),
    "status": Column("status"),
    "unfinished": Column("not finished"),
    **score_columns(ACCURACY),
    "bp_difference": Column("paired difference to bp (points)", "+.2f"),
    "bp_difference_ci95": Column("± 95 %", ".2f"),
    "bp_difference_low": Column("lowest", "+.2f"),
    "bp_difference_high": Column("highest", "+.2f"),
    "bp_difference_n": Column("pairs", ".0f"),
    "bp_difference_dz": Column("effect size (Cohen's d_z)", "+.2f"),
    "bp_difference_p": Column("p (paired t test)", ".2g"),
    "bp_difference_p_holm": Column("p (Holm)", ".2g"),
    "bp_row": Column("paired with"),
    **floor_column(ACCURACY),
    "floor_row": Column("floor's row"),
    "floor": Column("beats floor"),
    **metric_columns(declared(METRICS)),
    "seconds": Column("seconds", ".1f", timing=True),
    "seconds_per_epoch": Column("seconds per epoch", ".2f", timing=True),
    **{name: Column(*column) for name, column in PREDICTED.items()},
    **{name: Column(*column, timing=True) for name, column in MEASURED.items()},
    "published": Column("published (%)", ".2f"),
    "published_std": Column("std", ".2f"),
    "published_difference": Column("difference to published (points)", "+.2f"),
    "published_source": Column("published in"),
    "tried": Column("values tried", ".0f"),
    "chosen": Column("chosen"),
    "note": Column("note"),
}
#: The columns of the values that `best.choose_best` tried, in addition to those of its keys.
TRIED_COLUMNS = {"task": Column("task"), **{name: COLUMNS[name] for name in ("label", "n", "status", "val_accuracy", "chosen")}}
#: The columns of differences, in the unit of the row's score.
_DIFFERENCES = ("bp_difference", "bp_difference_ci95", "bp_difference_low", "bp_difference_high")
#: The ends of ranges, which tables show in place of the intervals of two values.
_ENDS = ("_low", "_high")
#: The only part of a report that differs between two sweeps of the same runs.
TIMINGS = [name for name, column in COLUMNS.items() if column.timing]


def summarise(
    runs: Sequence[Run],
    published: Sequence[Entry] = (),
    reference: str = BEST,
    context: Sequence[Run] | None = None,
    chosen: Mapping[str, Chosen] | None = None,
) -> pd.DataFrame:
    """One row per group, in order of first appearance: a column for each key in which the configs differ, and `COLUMNS`.

    Accuracies are in %, their differences in percentage points, angles in degrees, times in seconds of training. A primary score
    other than accuracy has columns like those of accuracy, with its name and in its unit. Statistics cover the `n` finished runs,
    one per seed. `runs` and `status` count all runs; `unfinished` describes the others (stopped, diverged, failed, interrupted,
    running), which are excluded from the statistics. `*_std` is the sample standard deviation, `*_ci95` half the width of the 95
    % Student t interval of the mean, NaN for fewer than three seeds; `*_low` and `*_high` are the lowest and the highest value,
    NaN for one seed. A group is compared with the groups of `bp` (`bp_row`) and `frozen` (`floor_row`) that
    `references.References` chooses. Columns of references and published numbers are blank if there are none.

    Args:
        runs: the runs.
        published: entries to compare with.
        reference: `references.BEST` or `references.NEAREST`.
        context: all runs of the report, if `runs` are a part of them: references are chosen, and p values corrected, among these.
        chosen: what was chosen, by row, see `best.choose_best`.
    """
    everything = group_runs(runs if context is None else context)
    references = References(everything, reference)
    groups = group_runs(runs)
    swept = [key for key in differing_keys(members[0].config for members in groups.values()) if key not in COLUMNS]
    metrics = metric_columns(metrics_of(runs))
    comparisons = {group: _compare(members, references) for group, members in (everything | groups).items()}
    corrected: dict[str, float] = {}
    for of_task in tasks(everything).values():
        corrected |= holm(
            {
                group: comparisons[group].difference.p
                for group, members in of_task.items()
                if (rule := members[0].result["algorithm"]) != CONTROL and not is_floor(rule)
            }
        )
    costs = Costs(run for members in everything.values() for run in members)
    rows = [
        _row(references.labels[group], members, comparisons[group], published, metrics, (chosen or {}).get(group))
        | {"bp_difference_p_holm": corrected.get(group, math.nan)}
        | costs.of(members)
        | {key: config[key] for key in swept if key in (config := members[0].config)}
        for group, members in groups.items()
    ]
    first, timings = list(COLUMNS).index("n"), list(COLUMNS).index("seconds")
    others = [name for name in metrics if name not in COLUMNS]
    primaries = list({members[0].primary.name: members[0].primary for members in groups.values()}.values())
    middle = list(COLUMNS)[first:timings]
    for score in primaries:
        for before, added in (("bp_difference", score_columns(score)), ("floor_row", floor_column(score))):
            at = middle.index(before)
            middle[at:at] = [name for name in added if name not in COLUMNS]
    columns = [*list(COLUMNS)[:first], *swept, *middle, *others, *list(COLUMNS)[timings:]]
    if all(math.isnan(row["energy_wh"]) for row in rows):
        columns = [name for name in columns if name not in ENERGY]
    frame = pd.DataFrame(
        {
            name: pd.Series([row.get(name, math.nan) for row in rows], dtype=object if name in ("floor", *swept) else None)
            for name in columns
        }
    )
    frame.attrs |= {"metrics": list(metrics), "swept": swept, "scores": primaries}
    return frame


def columns_of(frame: pd.DataFrame) -> dict[str, Column]:
    """How the frame's columns are shown, in its order: those in `COLUMNS` and the alignment metrics of plugins."""
    added = metric_columns(declared(name for name in frame.attrs.get("metrics", ()) if name not in COLUMNS))
    scores = primary_scores(frame)
    for score in scores:
        added |= {**score_columns(score), **floor_column(score)}
    if any(score.unit != "%" for score in scores):  # the differences are in the unit of each row's score
        added |= {
            name: Column(column.title.replace(" (points)", ""), column.format.replace(".2f", ".4f"))
            for name, column in COLUMNS.items()
            if name in _DIFFERENCES and column.format
        }
    return {name: column for name in frame if (column := {**COLUMNS, **added}.get(name)) is not None}


def primary_scores(frame: pd.DataFrame) -> list[Score]:
    """The primary scores of the rows of a frame."""
    return frame.attrs.get("scores") or [ACCURACY]


def to_text(frame: pd.DataFrame) -> str:
    """The table for a terminal, one line per group, and the groups' notes below it.

    Numbers of runs and statuses are shown only if some group needs them. If the table would be wider than `WIDTH`, titles are
    shortened, and then statuses are omitted.
    """
    formats = columns_of(frame)
    incomplete = any(status.partition(" ")[2] != FINISHED for status in frame["status"])
    counts = [f"{n} of {runs}" for n, runs in zip(frame["n"], frame["runs"], strict=True)]
    columns = [
        _TextColumn(COLUMNS["label"].title, _cells(frame, "label")),
        *(column for score in primary_scores(frame) for column in _score_texts(frame, score)),
        _TextColumn("in means", counts) if incomplete else _TextColumn("n", _cells(frame, "n"), is_number=True),
        *(
            _TextColumn(
                formats[name].title,
                _cells(frame, name, formats),
                is_number=True,
                short=formats[name].title.replace(" angle (°)", " °"),
            )
            for name, column in formats.items()
            if column.title.endswith("(°)") or name == "seconds"
        ),
    ]
    if frame["published"].notna().any():
        columns += [
            _TextColumn(COLUMNS["published"].title, _cells(frame, "published"), is_number=True, short="published"),
            _TextColumn("difference", _cells(frame, "published_difference"), is_number=True),
        ]
    if incomplete:
        columns.append(_TextColumn("status", _cells(frame, "status")))
    lines = _aligned(columns)
    if len(lines[0]) > WIDTH or len(lines[1]) > WIDTH:
        lines = _aligned([column._replace(title=column.short or column.title) for column in columns])
    if max(map(len, lines)) > WIDTH and incomplete:
        lines = _aligned([column._replace(title=column.short or column.title) for column in columns[:-1]])
    return "\n".join([*lines, *_notes(frame)])


def _score_texts(frame: pd.DataFrame, score: Score) -> list[_TextColumn]:
    name = "%" if score == ACCURACY else score.in_unit
    full = "test accuracy % (mean ± std)" if score == ACCURACY else f"test {name} (mean ± std)"
    return [
        _TextColumn(f"val {name}", _cells(frame, f"val_{score.name}", columns_of(frame)), is_number=True),
        _TextColumn(full, with_std(frame, f"test_{score.name}"), short=f"test {name} (± std)"),
    ]


class _TextColumn(NamedTuple):
    """A column of the terminal's table, and its shorter title for narrow tables."""

    title: str
    cells: Sequence[str]
    is_number: bool = False
    short: str = ""


def _aligned(columns: Sequence[_TextColumn]) -> list[str]:
    table = []
    for title, cells, *_ in columns:
        cells = [title, *map(printable, cells)]
        table.append([title, "-" * max(map(len, cells)), *cells[1:]])
    right = [index for index, column in enumerate(columns) if column.is_number]
    return align_columns(list(zip(*table, strict=True)), right)


def _notes(frame: pd.DataFrame) -> list[str]:
    """The rows' notes, each once with the labels of its rows."""
    labels: dict[str, list[str]] = {}
    for label, note in zip(frame["label"], frame["note"], strict=True):
        for part in note.split("; ") if note else ():
            labels.setdefault(part, []).append(label)
    lines = [f"{'all rows' if len(frame) == len(rows) > 1 else abridged(rows)}: {part}" for part, rows in labels.items()]
    if len(lines) > MAX_NOTES:
        lines[MAX_NOTES - 1 :] = [f"{len(lines) - MAX_NOTES + 1} more notes: see the report"]
    return ["", *(printable(f"note: {line}") for line in lines)] if lines else []


def to_markdown(frame: pd.DataFrame, columns: Mapping[str, Column] = COLUMNS) -> str:
    """The table in Markdown: those of `columns` that are not blank in every row; the range of two values is shown in the place
    of their interval."""
    shown = {
        name: _with_ranges(frame, name, columns)
        if f"{name.removesuffix('_ci95')}_low" in frame and name.endswith("_ci95")
        else _cells(frame, name, columns)
        for name in columns
        if name in frame and not name.endswith(_ENDS)
    }
    table = [
        [
            escape_markdown(columns[name].title),
            "---" if columns[name].format is None else "---:",
            *(cell if cell == BLANK or columns[name].format else escape_markdown(cell) for cell in cells),
        ]
        for name, cells in shown.items()
        if set(cells) - {BLANK}
    ]
    lines = zip(*table, strict=True)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def to_csv(frame: pd.DataFrame) -> str:
    """The frame as CSV with ten digits per number and text on one line, byte-identical on every platform.

    Values of configs are written as they are typed on the command line.
    """
    swept = frame.attrs.get("swept", ())
    plain = pd.DataFrame({printable(name): column.map(_typed if name in swept else _one_line) for name, column in frame.items()})
    return plain.to_csv(index=False, float_format="%.10g", lineterminator="\n")


def _one_line(value: Any) -> Any:
    return printable(value) if isinstance(value, str) else value


def _typed(value: Any) -> Any:
    return math.nan if isinstance(value, float) and math.isnan(value) else printable(format_value(value))


def with_std(frame: pd.DataFrame, name: str) -> list[str]:
    """The cells ``97.13 ± 0.16`` of a score; without the standard deviation for one seed."""
    columns = columns_of(frame)
    means, stds = _cells(frame, name, columns), _cells(frame, f"{name}_std", columns)
    width = max(map(len, means), default=0)
    return [
        mean if mean == BLANK else f"{mean.rjust(width)}{'' if std == BLANK else f' ± {std}'}"
        for mean, std in zip(means, stds, strict=True)
    ]


def _with_ranges(frame: pd.DataFrame, name: str, columns: Mapping[str, Column]) -> list[str]:
    """The cells of an interval; if there is none, the range of the values."""
    low, high = (_cells(frame, name.removesuffix("_ci95") + end, columns) for end in _ENDS)
    return [
        f"{a} to {b}" if cell == BLANK and a != BLANK else cell
        for cell, a, b in zip(_cells(frame, name, columns), low, high, strict=True)
    ]


class _Comparison(NamedTuple):
    """A row's references, and its paired differences to bp in percentage points."""

    control: Reference
    floor: Reference
    difference: Paired


def _compare(members: Sequence[Run], references: References) -> _Comparison:
    control, floor = (references.of(algorithm, members[0]) for algorithm in (CONTROL, FLOOR))
    key = f"test_{members[0].primary.name}"
    return _Comparison(control, floor, paired(_scores(members, key), _scores(control.runs, key)))


def _row(
    label: str,
    members: Sequence[Run],
    comparison: _Comparison,
    published: Sequence[Entry],
    metrics: Iterable[str],
    chosen: Chosen | None,
) -> dict[str, Any]:
    finished = finished_by_seed(members)
    primary = members[0].primary
    keys = test, val = f"test_{primary.name}", f"val_{primary.name}"
    final = _scores(members, test)
    control, floor, difference = comparison
    floor_mean = mean(_scores(floor.runs, test).values())
    final_mean = mean(final.values())
    beats = None if math.isnan(final_mean) or math.isnan(floor_mean) else primary.is_better(final_mean, floor_mean)
    repeated = sum(run.finished for run in members) - len(finished)
    entry, ours = headline(matching_entries(published, members), members)
    notes = [
        f"does not beat {FLOOR}" if beats is False else "",
        control.note,
        floor.note,
        *(f"weight transport {where}" for where in members[0].result.get("weight_transport") or ()),
        chosen.note if chosen else "",
        f"{repeated} run{'s' * (repeated > 1)} with a repeated seed not counted" if repeated else "",
        *(_missing_note(members, key) for key in keys),
        "2 seeds: the range in place of a 95 % interval" if len(final) == 2 else "",
        _pairs_note(final, control, difference),
        entry.remark(members) if entry else "",
    ]
    return {
        "label": label,
        **{key: members[0].result.get(key) for key in ("group", *VERSIONS, "architecture", "dataset", "optimizer", "epochs")},
        "n": len(finished),
        "runs": len(members),
        "seeds": " ".join(map(str, sorted(finished))),
        "status": status_counts(members),
        "unfinished": _unfinished(members),
        **_statistics(val, members),
        **_statistics(test, members),
        **_statistics(f"{test}_at_best_val", members),
        "bp_difference": difference.mean,
        "bp_difference_ci95": difference.half_width,
        "bp_difference_low": difference.low,
        "bp_difference_high": difference.high,
        "bp_difference_n": difference.n if control.runs else math.nan,
        "bp_difference_dz": difference.effect,
        "bp_difference_p": difference.p,
        "bp_row": control.label,
        **{name: mean(run.layer_mean(name, run.result.get("angles")) for run in finished.values()) for name in metrics},
        "seconds": mean(run.result.get("seconds") for run in finished.values()),
        "seconds_per_epoch": mean(_over(run.result.get("seconds"), run.epochs) for run in finished.values()),
        f"floor_{primary.name}": floor_mean,
        "floor_row": floor.label,
        "floor": beats,
        "published": entry.value if entry else math.nan,
        "published_std": entry.std if entry else math.nan,
        "published_difference": ours - entry.value if entry else math.nan,
        "published_source": entry.source if entry else "",
        "tried": chosen.tried if chosen else math.nan,
        "chosen": chosen.values if chosen else "",
        "note": "; ".join(filter(None, notes)),
    }


def _pairs_note(final: Mapping[int, float], control: Reference, difference: Paired) -> str:
    """A note if only some of the row's seeds are paired."""
    if not final or difference.n == len(final) or not finished_by_seed(control.runs):
        return ""
    return f"{difference.n} of {len(final)} seeds are paired with {control.label}"


def _missing_note(members: Sequence[Run], key: str) -> str:
    """A note if only some of the finished runs have a value: the statistics cover fewer than n."""
    present, n = len(_scores(members, key)), len(finished_by_seed(members))
    part = "test" if key.startswith("test") else "validation"
    return f"{present} of {n} finished runs have a {part} {members[0].primary.title}" if 0 < present < n else ""


def _unfinished(runs: Sequence[Run]) -> str:
    """The runs that have not finished: ``1 of 3: seed 2 diverged in epoch 3, first in fc1``."""
    unfinished = [f"seed {run.result['seed']} {describe_status(run)}" for run in runs if not run.finished]
    return f"{len(unfinished)} of {len(runs)}: {'; '.join(unfinished)}" if unfinished else ""


def _scores(runs: Sequence[Run], key: str) -> dict[int, float]:
    """The finished runs' known values of a score by seed, in the unit of tables."""
    return {seed: value for seed, run in finished_by_seed(runs).items() for value in known([run.score(key)])}


def _statistics(key: str, runs: Sequence[Run]) -> dict[str, float]:
    """Mean, standard deviation and interval of a score of the finished runs, in the unit of tables."""
    values = _scores(runs, key).values()
    low, high = value_range(values)
    return {
        key: mean(values),
        f"{key}_std": std(values),
        f"{key}_ci95": half_width(values),
        f"{key}_low": low,
        f"{key}_high": high,
    }


def _over(seconds: float | None, epochs: int | None) -> float | None:
    return seconds / epochs if seconds is not None and epochs else None


def _cells(frame: pd.DataFrame, name: str, columns: Mapping[str, Column] = COLUMNS) -> list[str]:
    return [cell(value, columns[name].format) for value in frame[name]]


def cell(value: Any, form: str | None) -> str:
    if pd.isna(value) or value == "":
        return BLANK
    if isinstance(value, bool):
        return "yes" if value else "no"
    return truncate(str(value), MAX_CELL) if form is None else format(value, form)
