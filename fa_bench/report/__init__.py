"""Reports on runs: tables and figures that compare rules with each other and with published numbers.

Pandas, SciPy and matplotlib are imported only when they are needed, so that reading run directories stays fast.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fa_bench.errors import DataError, names, printable, truncate
from fa_bench.report.files import MARKDOWN, NAME, PAGE, RUNS, check_file, recorded_files, register, report_lock, write_record
from fa_bench.report.quantities import Selection
from fa_bench.report.references import BEST, NEAREST
from fa_bench.report.runs import VERSIONS, short_path
from fa_bench.runs.checked_json import RecordError
from fa_bench.runs.schemas import SUCCESSES
from fa_bench.utils.drawing import default_style
from fa_bench.utils.files import CONFIG, METRICS, RESULT, atomic, resolved, temporary_name
from fa_bench.utils.text import escape_markdown

if TYPE_CHECKING:
    from fa_bench.report.figures import Picture
    from fa_bench.report.html import Table
    from fa_bench.report.runs import Run
    from fa_bench.runs.sweep import PlannedRun

#: The maximum number of characters in a line about a gap in the report.
MAX_LINE = 1000
#: The maximum number of lines about runs that have not started, below the table on the terminal.
MAX_SHOWN = 4
LEGEND = """\
Accuracies are in %, their differences in percentage points, other scores and their differences in their own unit, angles in
degrees, times in seconds of training. Choose settings by their validation score and compare the chosen ones by their test score.
The statistics of a row cover its n finished runs, one per seed. Runs that diverged, failed, were stopped by a callback, were
interrupted or are still running are listed in their row but excluded from the statistics.
std is the sample standard deviation. ± 95 % is half the width of the Student t interval of the mean; for two seeds, the range
of the values is shown instead. Weight angle and norm ratio are means over the layers whose feedback carries an error; the delta
angle is a mean over all layers but the output layers. A rule beats the floor if its mean test score is better than that of
`frozen`, which trains only the output layer. Accuracies and R² are better if they are higher; errors, perplexities and bits are
better if they are lower. Differences from bp are paired by seed. Cohen's d_z is their mean divided by their standard deviation. p
is the p-value of the two-sided paired t test; p (Holm) is corrected by Holm's method for all rows of the task except those of bp
and of floors. d_z and the p-values need at least three pairs. Differences from published numbers are between means.
"""
_REFERENCES = {
    BEST: """\
If a task has several rows of bp, the rows of other rules are compared with the row of bp that has the best validation score (last
epoch, mean over its finished runs). Rows with the same code and data are preferred and, among these, rows with the same number of
epochs and the same scale. If several rows are equally similar in code and data, a row with runs that diverged is chosen only if
none of the others can be. Rows of `frozen` are chosen in the same way.
""",
    NEAREST: """\
If a task has several rows of bp, the rows of other rules are compared with the row of bp with the most similar settings. Rows
with the same code and data are preferred, then rows with the fewest differences in optimizer and epochs, then rows with the
fewest keys that differ. If several rows of bp are equally similar, the one with the best validation score (last epoch, mean over
its finished runs) is used. Rows of `frozen` are chosen in the same way.
""",
}
_BEST_LEGEND = """\
For each rule and each combination of the settings that are not listed here, the values with the best validation score (last
epoch, mean over the finished runs) were chosen. If several values are equally good, the smallest is chosen. Values with runs
that diverged count as tried, but are not chosen.
"""
_PUBLISHED_LEGEND = """\
The column `ours` gives the mean over the finished runs, one per seed, in the last epoch or in the epoch to which the published
number belongs. The column `inside` says whether this mean is in the published range.
"""


class Report(NamedTuple):
    """A report that was written: its table and notes as text for a terminal, and the paths of report.md and the overview figure.

    `complete`: whether all runs that were found or planned have finished or were stopped by a callback, and no record was
    excluded.
    """

    text: str
    markdown: Path
    figure: Path
    complete: bool


def write_report(
    run_dirs: Iterable[Path],
    out_dir: Path,
    planned: Iterable[PlannedRun] = (),
    timings: bool = True,
    unusable: Iterable[RecordError] = (),
    best: Sequence[str] = (),
    reference: str = BEST,
    aggregate: bool = False,
    shown: Iterable[Path] | None = None,
    selection: Selection = Selection(),  # noqa: B008
) -> Report:
    """Write a report on the runs in `run_dirs` to `out_dir`: report.md, tables as report*.csv, report.json, report.tex and
    runs.csv, figures as report*.png or in the selected formats, and report.html, which has the tables and figures on one page.

    Each file is replaced atomically; files of an earlier report that are not part of this one are removed. The same runs give
    byte-identical files, regardless of their order and their folders, except for the directories in runs.csv. Runs that have not
    finished are counted in their rows and listed, but excluded from the statistics. The report also lists `planned` runs that
    have not started, missing seeds, missing references, and published rows without a finished run. Runs with a record that is
    damaged or was not written by a run are excluded and listed with the problem.

    Args:
        run_dirs: the runs' directories, with or without records.
        out_dir: where the report is written; created if necessary.
        planned: the runs that sweeps announced, see `fa_bench.runs.sweep`.
        timings: whether to include measured seconds, memory and energy, which differ if the same runs are repeated.
        unusable: additional damaged records to list.
        best: keys whose values are chosen by the validation score for each rule; the chosen rows are compared. See `best`.
        reference: how the reference rows of bp and of floors are chosen, `references.BEST` or `references.NEAREST`.
        aggregate: whether to compare the rules over all tasks, see `aggregate`.
        shown: the directories of the runs in the terminal's table; all if None.
        selection: the content and the formats of the figures; the tables are complete.

    Raises:
        DataError: no directory has a run to report on, `best` has a key that is unknown or does not differ, no value of the keys
            can be chosen for any rule or for any selected rule, or a part of the selection does not exist in the runs.
        RunDirectoryError: a file that no report wrote is in the way, or another process is writing a report there.
    """
    from fa_bench.report.against import COLUMNS, against_published
    from fa_bench.report.aggregate import AGGREGATE_COLUMNS, AGGREGATE_LEGEND, over_tasks
    from fa_bench.report.alarms import ALARM_COLUMNS, alarms
    from fa_bench.report.best import choose_best
    from fa_bench.report.columns import TIMINGS, TRIED_COLUMNS, Column, columns_of, primary_scores, score_columns
    from fa_bench.report.cost import LEGEND as COST_LEGEND
    from fa_bench.report.cost import MEASURED, PREDICTED
    from fa_bench.report.export import RUN_TIMINGS, runs_table, to_json, to_latex
    from fa_bench.report.gaps import published_without_run
    from fa_bench.report.html import Table, to_html
    from fa_bench.report.layers import PROBES_LEGEND, by_layer, probe_table
    from fa_bench.report.published import published
    from fa_bench.report.table import summarise
    from fa_bench.report.text import to_csv, to_text

    out_dir, planned = Path(out_dir), list(planned)
    records = _read([*map(Path, run_dirs), *(run.directory for run in planned)])
    runs = records.runs
    choice = choose_best(runs, best) if best else None
    compared = choice.runs if choice else runs
    entries = published()
    frame = summarise(compared, entries, reference, chosen=choice.chosen if choice else None)
    against = against_published(entries, compared)
    all_runs = runs_table(runs, out_dir)
    if not timings:
        frame, all_runs = frame.drop(columns=TIMINGS, errors="ignore"), all_runs.drop(columns=RUN_TIMINGS)
    layers = by_layer(compared)
    probes, probe_columns = probe_table(layers, dict.fromkeys(name for run in compared if run.finished for name in run.probed))
    raised, alarms_legend = alarms(compared, reference)
    totals, left_out = over_tasks(compared) if aggregate else (None, [])
    warnings = [*(choice.warnings if choice else ()), *left_out]
    gaps = _gaps(records._replace(errors=[*unusable, *records.errors]), planned)
    without_run = published_without_run(entries, runs)
    selection.checked(runs)
    if choice and not selection.of(compared):
        problem = f"rules={names(selection.rules)}: no setting of these rules could be chosen"
        raise DataError("; ".join([problem, *choice.warnings]))
    lists = {
        "Excluded: damaged or foreign records": gaps.excluded,
        "Runs that have not finished": gaps.unfinished,
        "Runs that have not started": gaps.not_started,
        "Missing seeds": gaps.seeds,
        "Missing references": gaps.references,
        "Published rows without a finished run": without_run,
    }
    of_cost = [name for name in (*PREDICTED, *MEASURED) if name in frame]
    shown_tables = [Table("", frame.drop(columns=[*VERSIONS, *of_cost]), columns_of(frame), LEGEND + _REFERENCES[reference])]
    if choice:
        known = TRIED_COLUMNS | {
            key: column for score in primary_scores(choice.tried) for key, column in score_columns(score).items()
        }
        columns = {name: known.get(name, Column(name)) for name in choice.tried}
        shown_tables.append(Table(f"Values tried: {names(best)}", choice.tried, columns, _BEST_LEGEND))
    if totals is not None:
        shown_tables.append(Table("Over all tasks", totals, AGGREGATE_COLUMNS, AGGREGATE_LEGEND))
    if alarms_legend:
        shown_tables.append(Table("Alarms", raised, ALARM_COLUMNS, alarms_legend))
    shown_tables += [
        table
        for table in (
            Table(
                "Cost",
                frame.loc[frame["multiplications"].notna(), ["label", "architecture", "dataset", *of_cost]],
                columns_of(frame),
                COST_LEGEND,
            ),
            Table("Comparison with published numbers", against, COLUMNS, _PUBLISHED_LEGEND),
            Table("Probes", probes, probe_columns, PROBES_LEGEND),
        )
        if len(table.frame)
    ]

    with report_lock(out_dir):
        markdown = register(out_dir / MARKDOWN)
        earlier = recorded_files(out_dir)
        tables = {
            f"{NAME}.csv": to_csv(frame),
            f"{NAME}.json": to_json(frame),
            f"{NAME}.tex": to_latex(frame),
            RUNS: to_csv(all_runs),
            f"{NAME}_layers.csv": to_csv(layers),
        }
        tables |= {f"{NAME}_published.csv": to_csv(against)} if len(against) else {}
        tables |= {f"{NAME}_tried.csv": to_csv(choice.tried)} if choice else {}
        tables |= {f"{NAME}_alarms.csv": to_csv(raised)} if len(raised) else {}
        tables |= {f"{NAME}_aggregate.csv": to_csv(totals)} if totals is not None else {}
        for name in (PAGE, *tables):  # before the figures are written, so that a refused report leaves no figures
            check_file(out_dir / name, earlier)
        with default_style():
            from fa_bench.report.figures import write_figures

            pictures = write_figures(compared, out_dir, NAME, selection, swept=runs)
        for name, text in tables.items():
            _write(out_dir / name, text)
        sections = [
            "# Report",
            *_sections(shown_tables[:1]),
            *_list("## Warnings", warnings),
            *_sections(shown_tables[1:]),
            *(part for title, lines in lists.items() for part in _list(f"## {title}", lines)),
            "## Tables",
            ", ".join(f"[{name}]({name})" for name in [PAGE, *tables]),
            "## Figures",
            *map(_link, pictures),
        ]
        _write(markdown, "\n\n".join(section.strip() for section in sections) + "\n")
        _write(out_dir / PAGE, to_html(shown_tables, {"Warnings": warnings, **lists}, runs, pictures, timings))
        present = {markdown.name, PAGE, *tables, *(path.name for picture in pictures for path in picture.paths)}
        for name in earlier - present:
            if not (out_dir / name).is_symlink():
                (out_dir / name).unlink(missing_ok=True)
            (out_dir / temporary_name(name)).unlink(missing_ok=True)
        write_record(out_dir, present)
    have_ended = all(run.result["status"] in SUCCESSES for run in records.runs)
    complete = have_ended and not (records.unidentified or gaps.not_started or gaps.excluded)
    notes = [f"warning: {warning}" for warning in warnings]
    if shown is not None:
        own = records.only(shown)
        gaps, more = _gaps(own, planned), len(records.runs) - len(own.runs)
        if own.runs:
            frame = summarise(own.runs, entries, reference, context=records.runs)
        if more:
            notes.append(f"The report covers {more} more run{'s' * (more > 1)} of earlier sweeps in the same folder.")
    notes += _notes(gaps)
    if len(raised):
        notes.append(f"{len(raised)} alarm{'s' * (len(raised) > 1)} ({names(raised['quantity'].unique())}): see {markdown.name}")
    if without_run:
        notes.append(f"published rows of the experiment without a finished run: {len(without_run)} (see {markdown.name})")
    notes = [printable(note) for note in notes]
    return Report("\n".join([to_text(frame), *([""] if notes else []), *notes]), markdown, pictures[0].paths[0], complete)


class _Gaps(NamedTuple):
    """The lines that describe the gaps in a report."""

    excluded: list[str]
    unfinished: list[str]
    not_started: list[str]
    seeds: list[str]
    references: list[str]


def _gaps(records: _Records, planned: Sequence[PlannedRun]) -> _Gaps:
    from fa_bench.report.gaps import missing_references, missing_seeds, runs_not_started, unfinished_runs, unidentified_run

    lines = (
        sorted(map(_describe, records.errors)),
        [*sorted(map(unidentified_run, records.unidentified)), *unfinished_runs(records.runs)],
        runs_not_started(records.missing, planned),
        missing_seeds(records.runs, planned),
        missing_references(records.runs) if not (records.missing or records.errors or records.unidentified) else [],
    )
    return _Gaps(*([truncate(line, MAX_LINE) for line in of_kind] for of_kind in lines))


def _notes(gaps: _Gaps) -> list[str]:
    """The lines to print on the terminal; if many runs have not started, only the first ones are listed."""
    not_started = gaps.not_started
    if len(not_started) > MAX_SHOWN:
        not_started = [*not_started[: MAX_SHOWN - 1], f"{len(not_started) - MAX_SHOWN + 1} more runs not started"]
    kinds = (
        ("excluded", gaps.excluded),
        ("not finished", gaps.unfinished),
        ("missing", not_started),
        ("missing", gaps.seeds),
        ("missing", gaps.references),
    )
    notes = [f"{kind}: {line}" for kind, lines in kinds for line in lines]
    return ["Means are over the finished runs only.", *notes] if gaps.unfinished or gaps.excluded else notes


class _Records(NamedTuple):
    """The runs in the order of the report, the errors of unusable records, the directories with an unidentified run, and the
    directories without a record."""

    runs: list[Run]
    errors: list[RecordError]
    unidentified: list[Path]
    missing: list[Path]

    def only(self, directories: Iterable[Path]) -> _Records:
        """Only the records of the given directories."""
        wanted = {resolved(Path(directory)) for directory in directories}
        return _Records(
            [run for run in self.runs if resolved(run.directory) in wanted],
            [error for error in self.errors if resolved(error.path.parent) in wanted],
            *([path for path in paths if resolved(path) in wanted] for paths in (self.unidentified, self.missing)),
        )


def _read(directories: list[Path]) -> _Records:
    from fa_bench.report.groups import group_labels, group_runs, in_order
    from fa_bench.report.runs import read_run
    from fa_bench.report.states import run_without_result, with_current_status, with_data_hash

    runs: list[Run] = []
    errors: list[RecordError] = []
    without_result: list[Path] = []
    unidentified: list[Path] = []
    missing: list[Path] = []
    for path, directory in {resolved(directory): directory for directory in directories}.items():
        try:
            if (run := read_run(directory)) is not None:
                run = with_current_status(run)
                _ = run.measurements  # read now, so that a damaged file excludes the run
                runs.append(run)
            elif any((path / name).is_file() for name in (RESULT, METRICS, CONFIG)):
                without_result.append(directory)
            else:
                missing.append(directory)
        except RecordError as error:
            errors.append(error)
    with_result = list(runs)
    for directory in without_result:
        try:
            if (run := run_without_result(directory, with_result)) is not None:
                runs.append(run)
            else:
                unidentified.append(directory)
        except RecordError as error:
            errors.append(error)
    if not runs and errors:
        raise errors[0]
    if not runs:
        raise DataError(f"nothing to report: no {RESULT} in {', '.join(map(str, directories)) or 'an empty list of runs'}")
    ordered = in_order(with_data_hash(runs))
    # All parts of the report use these labels, even those that cover only some of the runs.
    labels = group_labels(group_runs(ordered))
    ordered = [dataclasses.replace(run, result=run.result | {"label": labels[run.row]}) for run in ordered]
    return _Records(ordered, errors, unidentified, missing)


def _describe(error: RecordError) -> str:
    """A line about a damaged record, with a short path that does not depend on where the run is stored."""
    return f"{short_path(error.path.parent)}/{error.path.name}: {error.problem}"


def _sections(tables: Iterable[Table]) -> list[str]:
    from fa_bench.report.text import to_markdown

    parts = [
        (f"## {escape_markdown(table.title)}" if table.title else "", to_markdown(table.frame, table.columns), table.legend)
        for table in tables
    ]
    return [part for of_table in parts for part in of_table if part]


def _link(picture: Picture) -> str:
    """Markdown that shows the figure in its first format other than PDF, if it has one, and links to its other files."""
    shown, *others = sorted(picture.paths, key=lambda path: path.suffix == ".pdf")
    links = [f"[{path.name}]({path.name})" for path in others]
    return " ".join([f"{'!' * (shown.suffix != '.pdf')}[{shown.stem}]({shown.name})", *links])


def _list(title: str, lines: list[str]) -> list[str]:
    return [title, "\n".join(f"- {escape_markdown(line)}" for line in lines)] if lines else []


def _write(path: Path, text: str) -> None:
    with atomic(register(path)) as temporary:
        temporary.write_bytes(text.encode())
