"""The content of report.html, a self-contained page with the tables, figures, configs and warnings of a report."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fa_bench.config.labels import result_options
from fa_bench.errors import format_value, printable, truncate
from fa_bench.objectives.scores import Score
from fa_bench.report.columns import Column
from fa_bench.report.groups import Groups, group_labels, group_runs, status_counts
from fa_bench.report.runs import Run
from fa_bench.report.states import describe_status
from fa_bench.report.text import BLANK, MAX_CELL, cell

if TYPE_CHECKING:
    import pandas as pd

    from fa_bench.report.figures import Picture

_STYLE, _SCRIPT = (Path(__file__).with_name(f"page.{ending}") for ending in ("css", "js"))
_SEEDS = {
    "seed": Column("seed", ".0f"),
    "status": Column("status"),
    "epoch": Column("epoch", ".0f"),
    "val": Column("validation"),
    "test": Column("test"),
    "seconds": Column("seconds", ".1f", timing=True),
}
#: The numeric columns that, like text, are shown once above the table if they are the same in all rows.
_COUNTS = ("epochs", "n", "runs")


class Table(NamedTuple):
    """A table of a report, with its title (empty for the summary), its rows, the format of its columns, and an explanation."""

    title: str
    frame: pd.DataFrame
    columns: Mapping[str, Column]
    legend: str = ""


def to_html(
    tables: Iterable[Table], lists: Mapping[str, Sequence[str]], runs: Sequence[Run], pictures: Iterable[Picture], timings: bool
) -> str:
    """The HTML of the page, which works offline, without other files, on phones, and in light and dark mode. The same runs give a
    byte-identical page.

    Args:
        tables: the first one is the summary.
        lists: {title: lines}, such as warnings and missing seeds; empty lists are omitted.
        runs: the runs whose configs and statuses are listed.
        pictures: the figures.
        timings: whether to include measured seconds.
    """
    style, script = _STYLE.read_text(encoding="utf-8"), _SCRIPT.read_text(encoding="utf-8")
    # Only the page's own script may run, regardless of what the labels and messages of runs contain.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    groups = group_runs(runs)
    summary, *others = (_table(table) for table in tables)
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        "<title>Report</title>",
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>\n{style}</style>",
        "</head>",
        "<body>",
        "<h1>Report</h1>",
        f"<p>{len(groups)} rows, {len(runs)} runs: {_text(status_counts(runs))}.</p>",
        *(_warnings(title, lines) for title, lines in lists.items() if lines),
        summary,
        '<section id="figures"><h2>Figures</h2>',
        *map(_figure, pictures),
        "</section>",
        *others,
        _runs(groups, timings),
        f"<script>{script}</script>",
        "</body>",
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def _text(value: object) -> str:
    return escape(printable(value))


def _warnings(title: str, lines: Sequence[str]) -> str:
    items = "\n".join(f"<li>{_text(line)}</li>" for line in lines)
    return f'<section class="warning"><h2>{_text(title)} ({len(lines)})</h2>\n<ul>\n{items}\n</ul></section>'


def _figure(picture: Picture) -> str:
    title = _text(picture.title)
    svg = picture.svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
    return f'<figure><figcaption>{title}</figcaption>\n<div class="scroll">{svg.strip()}</div></figure>'


def _table(table: Table) -> str:
    """A section with a table of the columns that are not blank in every row. Text and counts that are the same in all rows are
    shown above the table."""
    columns: list[tuple[Column, list[str]]] = []
    common: dict[str, str] = {}
    for name, column in table.columns.items():
        if name in table.frame:
            cells = [cell(value, column.format) for value in table.frame[name]]
            if len(cells) > 1 and len(set(cells)) == 1 and (column.format is None or name in _COUNTS):
                common |= {column.title: cells[0]} if cells[0] != BLANK else {}
            elif set(cells) - {BLANK}:
                columns.append((column, cells))
    if not columns:
        return f"<section><h2>{_text(table.title or 'Summary')}</h2><p>{_text(table.legend)}</p></section>"
    shared = f"<p>All rows: {_text(', '.join(f'{title} {value}' for title, value in common.items()))}.</p>" if common else ""
    legend = f"<details><summary>Explanation</summary><p>{_text(table.legend)}</p></details>" if table.legend else ""
    parts = [f"<section><h2>{_text(table.title or 'Summary')}</h2>", shared, _filter(), _grid(columns), legend, "</section>"]
    return "\n".join(filter(None, parts))


def _filter() -> str:
    return '<p class="filter"><label>Filter: <input type="search"></label> <output></output></p>'


def _grid(columns: Sequence[tuple[Column, Sequence[str]]]) -> str:
    numeric = [' class="number"' if column.format else "" for column, _ in columns]
    head = "".join(
        f'<th scope="col"{kind}><button type="button"{_spread(column)}>{_text(column.title)}</button></th>'
        for kind, (column, _) in zip(numeric, columns, strict=True)
    )
    rows = (
        "".join(f"<td{kind}>{_text(each)}</td>" for kind, each in zip(numeric, row, strict=True))
        for row in zip(*(cells for _, cells in columns), strict=True)
    )
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _spread(column: Column) -> str:
    """For a column that shows the spread of another column, the HTML attributes that name both, as a tooltip and for screen
    readers."""
    text = _text(f"{column.title} of {column.of}") if column.of else ""
    return f' title="{text}" aria-label="{text}"' if text else ""


def _runs(groups: Groups, timings: bool) -> str:
    """A section with the configs: first the options that all runs share, then the other options of each group with the statuses
    of its runs."""
    configs = {
        group: {key: format_value(value) for key, value in result_options(runs[0].config).items()}
        for group, runs in groups.items()
    }
    first = next(iter(configs.values()), {})
    shared = {key: value for key, value in first.items() if all(config.get(key) == value for config in configs.values())}
    labels = group_labels(groups)
    parts = ['<section id="runs"><h2>Configs and runs</h2>']
    if shared:
        parts.append(f"<details><summary>Options that all runs share ({len(shared)})</summary>{_options(shared)}</details>")
    parts += [_filter(), '<div class="groups">']
    for group, runs in groups.items():
        rest = {key: value for key, value in configs[group].items() if key not in shared}
        columns = {
            name: _score_column(column, runs[0].primary) if name in ("val", "test") else column
            for name, column in _SEEDS.items()
            if timings or not column.timing
        }
        values = [[_seed_value(name, run) for run in runs] for name in columns]
        cells = [
            (column, [cell(value, column.format) for value in column_values])
            for column, column_values in zip(columns.values(), values, strict=True)
        ]
        parts.append(
            f"<details><summary>{_text(labels[group])} <small>{_text(status_counts(runs))}</small></summary>"
            f"{_options(rest)}\n{_grid(cells)}</details>"
        )
    return "\n".join([*parts, "</div></section>"])


def _score_column(column: Column, score: Score) -> Column:
    return Column(f"{column.title} {score.in_unit}", score.format)


def _seed_value(name: str, run: Run) -> Any:
    if name == "status":
        return "finished" if run.finished else truncate(describe_status(run), MAX_CELL)
    return run.score(f"{name}_{run.primary.name}") if name in ("val", "test") else run.result.get(name)


def _options(options: Mapping[str, str]) -> str:
    pairs = "".join(
        f"<div><dt>{_text(key)}</dt><dd>{_text(truncate(value, MAX_CELL))}</dd></div>" for key, value in options.items()
    )
    return f"<dl>{pairs}</dl>" if options else ""
