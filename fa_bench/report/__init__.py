"""Reports on runs: tables and figures that compare the rules with each other and with published numbers.

Pandas, SciPy and matplotlib are imported when a report is written, so that reading run directories stays fast.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fa_bench.errors import DataError, printable, truncate
from fa_bench.report.files import MARKDOWN, NAME, recorded_files, register, report_lock, write_record
from fa_bench.report.runs import VERSIONS, short_path
from fa_bench.runs.readers import SUCCESSES, RecordError
from fa_bench.utils.drawing import default_style
from fa_bench.utils.files import CONFIG, METRICS, RESULT, atomic, resolved, temporary_name
from fa_bench.utils.text import escape_markdown

if TYPE_CHECKING:
    from fa_bench.report.runs import Run
    from fa_bench.runs.sweep import PlannedRun

MAX_LINE = 1000  # characters of a line about a run
LEGEND = """\
Accuracies are in %, differences in percentage points, angles in degrees, times in seconds of training. Choose settings by their
validation accuracy and compare the chosen ones by their test accuracy. The statistics of a row cover its n finished runs, one per
seed. Runs that diverged, failed, were stopped by a callback, were interrupted or are still running are listed in their row but
excluded from the statistics.
std is the sample standard deviation; ± 95 % is half the width of the Student t confidence interval of the mean. Weight angle and
norm ratio are means over the layers whose feedback carries an error; the delta angle is a mean over all layers but the output
layers. A rule beats the floor if its mean is above that of `frozen`, which trains only the output layer. Differences to bp are
paired by seed; differences to published numbers are between means. If a task has several rows of bp, a row is paired with the one
whose settings differ from its own in the fewest keys; among several such rows, the one with the best validation accuracy (last
epoch, mean over its finished runs) is used. Rows of `frozen` are chosen in the same way.
"""
_PUBLISHED_LEGEND = """\
Ours is the mean over the finished runs in the last epoch, one per seed. Inside: whether it is in the published range.
"""


class Report(NamedTuple):
    """A report that was written: its table for a terminal, the paths of report.md and of the overview figure, and whether all
    runs that were found or planned have finished or were stopped by a callback."""

    text: str
    markdown: Path
    figure: Path
    complete: bool


def write_report(
    run_dirs: Iterable[Path], out_dir: Path, planned: Iterable[PlannedRun] = (), timings: bool = True,
    unusable: Iterable[RecordError] = (),
) -> Report:
    """Report on the runs in `run_dirs`: write report.md, tables as report*.csv and figures as report*.png into `out_dir`.

    Each file is replaced atomically; files of an earlier report that are not part of this one are removed. Equal runs give equal
    bytes, in any order and in any folders. Runs that have not finished are counted in their rows, excluded from the statistics
    and listed; so are `planned` runs that have not started, missing seeds and published rows without a run. Runs with a damaged
    or foreign record are excluded and listed with the problem.

    Args:
        run_dirs: the runs' directories, with or without records.
        out_dir: where the report is written; created if necessary.
        planned: further runs of the sweep, see `fa_bench.runs.sweep`.
        timings: whether to include measured seconds, the only difference between two sweeps of the same runs.
        unusable: further damaged records to list.

    Raises:
        DataError: no directory has a run to report on.
        RunDirectoryError: a file that no report wrote is in the way, or another process is writing a report there.
    """
    from fa_bench.report.against import COLUMNS, against_published
    from fa_bench.report.gaps import missing_seeds, published_without_run, runs_not_started, unfinished_runs
    from fa_bench.report.layers import PROBES_LEGEND, by_layer, probe_table
    from fa_bench.report.published import published
    from fa_bench.report.table import TIMINGS, columns_of, summarise, to_csv, to_markdown, to_text

    planned = list(planned)
    runs, errors, unidentified, missing = _read([*map(Path, run_dirs), *(run.directory for run in planned)])
    entries = published()
    frame, against = summarise(runs, entries), against_published(entries, runs)
    if not timings:
        frame = frame.drop(columns=TIMINGS)
    layers = by_layer(runs)
    probes, probe_columns = probe_table(layers, dict.fromkeys(name for run in runs if run.finished for name in run.probed))
    excluded, unfinished, not_started, seeds = ([truncate(line, MAX_LINE) for line in lines] for lines in (
        [*map(_describe, unusable), *sorted(map(_describe, errors))], [*unidentified, *unfinished_runs(runs)],
        runs_not_started(missing, planned), missing_seeds(runs)))
    without_run = published_without_run(entries, runs)

    out_dir = Path(out_dir)
    with report_lock(out_dir):
        markdown = register(out_dir / MARKDOWN)
        earlier = recorded_files(out_dir)
        with default_style():
            from fa_bench.report.figures import write_figures

            figures = write_figures(runs, out_dir, NAME)
        tables = {f"{NAME}.csv": frame, f"{NAME}_layers.csv": layers} | (
            {f"{NAME}_published.csv": against} if len(against) else {})
        for name, table in tables.items():
            _write(out_dir / name, to_csv(table))
        sections = [
            "# Report", to_markdown(frame.drop(columns=[*VERSIONS]), columns_of(frame)), LEGEND,
            *(["## Comparison with published numbers", to_markdown(against, COLUMNS), _PUBLISHED_LEGEND] if len(against) else []),
            *(["## Probes", to_markdown(probes, probe_columns), PROBES_LEGEND] if len(probes) else []),
            *_list("## Excluded: damaged or foreign records", excluded), *_list("## Runs that have not finished", unfinished),
            *_list("## Runs that have not started", not_started), *_list("## Missing seeds", seeds),
            *_list("## Published rows without a finished run", without_run),
            "## Tables", ", ".join(f"[{name}]({name})" for name in tables),
            "## Figures", *(f"![{path.stem}]({path.name})" for path in figures),
        ]
        _write(markdown, "\n\n".join(section.strip() for section in sections) + "\n")
        present = {markdown.name, *tables, *(path.name for path in figures)}
        for name in earlier - present:
            if not (out_dir / name).is_symlink():
                (out_dir / name).unlink(missing_ok=True)
            (out_dir / temporary_name(name)).unlink(missing_ok=True)
        write_record(out_dir, present)
    if len(not_started) > 4:
        not_started = [*not_started[:3], f"{len(not_started) - 3} more runs not started"]
    notes = [printable(f"{kind}: {line}") for kind, lines in (
        ("excluded", excluded), ("not finished", unfinished), ("missing", not_started), ("missing", seeds)) for line in lines]
    if without_run:
        notes.append(f"{len(without_run)} published rows of the experiment have no finished run yet: see {markdown.name}")
    if unfinished or excluded:
        notes.insert(0, "Means are over the finished runs only.")
    have_ended = all(run.result["status"] in SUCCESSES for run in runs)
    return Report("\n".join([to_text(frame), *([""] if notes else []), *notes]), markdown, figures[0],
                  complete=have_ended and not (unidentified or not_started or excluded))


class _Records(NamedTuple):
    """The runs in order, records that cannot be used, lines about directories whose run cannot be identified, and directories
    without a record."""

    runs: list[Run]
    errors: list[RecordError]
    unidentified: list[str]
    missing: list[Path]


def _read(directories: list[Path]) -> _Records:
    from fa_bench.report.gaps import unidentified_run
    from fa_bench.report.groups import in_order
    from fa_bench.report.runs import read_run
    from fa_bench.report.states import run_without_result, with_current_status, with_data_hash

    runs: list[Run] = []
    errors: list[RecordError] = []
    without_result: list[Path] = []
    unidentified, missing = [], []
    for path, directory in {resolved(directory): directory for directory in directories}.items():
        try:
            if (run := read_run(directory)) is not None:
                runs.append(with_current_status(run))
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
                unidentified.append(unidentified_run(directory))
        except RecordError as error:
            errors.append(error)
    if not runs and errors:
        raise errors[0]
    if not runs:
        raise DataError(f"nothing to report: no {RESULT} in {', '.join(map(str, directories)) or 'an empty list of runs'}")
    return _Records(in_order(with_data_hash(runs)), errors, sorted(unidentified), missing)


def _describe(error: RecordError) -> str:
    """A line about a damaged record that does not depend on where it lies."""
    return f"{short_path(error.path.parent)}/{error.path.name}: {error.problem}"


def _list(title: str, lines: list[str]) -> list[str]:
    return [title, "\n".join(f"- {escape_markdown(line)}" for line in lines)] if lines else []


def _write(path: Path, text: str) -> None:
    with atomic(register(path)) as temporary:
        temporary.write_bytes(text.encode())
