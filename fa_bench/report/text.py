"""The comparison table as text, Markdown and CSV."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from fa_bench.errors import format_value, printable, truncate
from fa_bench.objectives.scores import ACCURACY, Score
from fa_bench.report.best import abridged
from fa_bench.report.columns import COLUMNS, Column, columns_of, primary_scores
from fa_bench.report.runs import FINISHED
from fa_bench.utils.text import align_columns, escape_markdown

BLANK = "-"
#: The maximum number of characters in a cell of text or Markdown tables; the CSV has the full text.
MAX_CELL = 500
#: The width in characters that the table on a terminal exceeds only if necessary, and the maximum number of notes below it.
WIDTH, MAX_NOTES = 120, 12
#: The ends of ranges, which tables show in place of the intervals of two values.
_ENDS = ("_low", "_high")


def to_text(frame: pd.DataFrame) -> str:
    """The table for a terminal, with one line per group, followed by the notes on the groups.

    Numbers of runs and statuses are shown only if some run has not finished. If the table would be wider than `WIDTH`, titles are
    shortened, and then settings and statuses are omitted.
    """
    formats = columns_of(frame)
    incomplete = any(status.partition(" ")[2] != FINISHED for status in frame["status"])
    counts = [f"{n} of {runs}" for n, runs in zip(frame["n"], frame["runs"], strict=True)]
    settings = [
        _TextColumn(printable(key), _cells(frame, key, formats), short=printable(key.rpartition(".")[2]))
        for key in frame.attrs.get("settings", ())
    ]
    columns = [
        _TextColumn(COLUMNS["label"].title, _cells(frame, "label")),
        *settings,
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
    for omitted in ([*settings], [*settings, *columns[-1:]] if incomplete else []):
        if omitted and max(map(len, lines)) > WIDTH:
            lines = _aligned([column._replace(title=column.short or column.title) for column in columns if column not in omitted])
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
    """The notes on the rows, in which each distinct note is listed once with the labels of its rows."""
    labels: dict[str, list[str]] = {}
    for label, note in zip(frame["label"], frame["note"], strict=True):
        for part in note.split("; ") if note else ():
            labels.setdefault(part, []).append(label)
    lines = [f"{'all rows' if len(frame) == len(rows) > 1 else abridged(rows)}: {part}" for part, rows in labels.items()]
    if len(lines) > MAX_NOTES:
        lines[MAX_NOTES - 1 :] = [f"{len(lines) - MAX_NOTES + 1} more notes: see the report"]
    return ["", *(printable(f"note: {line}") for line in lines)] if lines else []


def to_markdown(frame: pd.DataFrame, columns: Mapping[str, Column] = COLUMNS) -> str:
    """The table in Markdown, with those `columns` that are not blank in every row. If a row has only two values, their range
    replaces the interval."""
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
    """The frame as CSV, which is byte-identical on every platform. Numbers have up to ten significant digits, and each string is
    on one line.

    Values of configs are written as a user would type them on the command line.
    """
    swept = frame.attrs.get("swept", ())
    plain = pd.DataFrame({printable(name): column.map(_typed if name in swept else _one_line) for name, column in frame.items()})
    return plain.to_csv(index=False, float_format="%.10g", lineterminator="\n")


def _one_line(value: Any) -> Any:
    return printable(value) if isinstance(value, str) else value


def _typed(value: Any) -> Any:
    return math.nan if isinstance(value, float) and math.isnan(value) else printable(format_value(value))


def with_std(frame: pd.DataFrame, name: str) -> list[str]:
    """The cells of a score, such as ``97.13 ± 0.16``; the standard deviation is omitted for a single seed."""
    columns = columns_of(frame)
    means, stds = _cells(frame, name, columns), _cells(frame, f"{name}_std", columns)
    width = max(map(len, means), default=0)
    return [
        mean if mean == BLANK else f"{mean.rjust(width)}{'' if std == BLANK else f' ± {std}'}"
        for mean, std in zip(means, stds, strict=True)
    ]


def _with_ranges(frame: pd.DataFrame, name: str, columns: Mapping[str, Column]) -> list[str]:
    """The cells of an interval, or of the range of the values if no interval can be computed."""
    low, high = (_cells(frame, name.removesuffix("_ci95") + end, columns) for end in _ENDS)
    return [
        f"{a} to {b}" if cell == BLANK and a != BLANK else cell
        for cell, a, b in zip(_cells(frame, name, columns), low, high, strict=True)
    ]


def _cells(frame: pd.DataFrame, name: str, columns: Mapping[str, Column] = COLUMNS) -> list[str]:
    return [cell(value, columns[name].format) for value in frame[name]]


def cell(value: Any, form: str | None) -> str:
    if pd.isna(value) or value == "":
        return BLANK
    if isinstance(value, bool):
        return "yes" if value else "no"
    return truncate(str(value), MAX_CELL) if form is None else format(value, form)
