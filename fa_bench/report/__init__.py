"""Reports on runs: tables and figures that compare the rules with each other and with published numbers.

Pandas, SciPy and matplotlib are imported when a report is written, so that reading run directories stays quick.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fa_bench.errors import DataError, printable, truncate
from fa_bench.report.own import MARKDOWN, NAME, claim, record, turn, written
from fa_bench.report.runs import VERSIONS, place
from fa_bench.runs.readers import RecordError
from fa_bench.utils.drawing import default_style
from fa_bench.utils.files import RESULT, atomic, resolved, temporary_name
from fa_bench.utils.text import escape_markdown

if TYPE_CHECKING:
    from fa_bench.report.runs import Run
    from fa_bench.runs.sweep import PlannedRun

MOST_OF_LINE = 1000  # characters of a line about a run
LEGEND = """\
Accuracies are in %, differences in percentage points, angles in degrees, times in seconds of training. Choose between settings by
the validation accuracy; the test accuracy is for the settings chosen. Statistics are over the finished runs alone, n of them, one
per seed: a run that diverged, failed, was interrupted or is still running is counted and named in its row, and enters none. std
is the sample standard deviation, ± 95 % half the width of the Student t interval of the mean. Weight angle and norm ratio are
means over the layers whose feedback carries error, the delta angle over all but the output layers. Beats floor: the mean is above
that of the `frozen` rule, which learns its output layer only. Differences to bp are of the same seed, and to the published number
of the means. Where a task has several rows of bp, a row is paired with the one whose setting is its own or differs from it in
fewest keys, and of several such with the best by validation accuracy (last epoch, mean over its finished runs); so with several
rows of `frozen`.
"""
_PUBLISHED = """\
Ours is the mean of the last epoch over the finished runs, one per seed. Inside: whether it lies in the published range.
"""


class Report(NamedTuple):
    """What was written: the table for a terminal, the paths of report.md and of the overview figure, and whether every run
    that was found or planned had finished."""

    text: str
    markdown: Path
    figure: Path
    complete: bool


def write_report(
    run_dirs: Iterable[Path], out_dir: Path, planned: Iterable[PlannedRun] = (), timings: bool = True, faults: Iterable[str] = ()
) -> Report:
    """Report on the runs in `run_dirs`: write report.md, tables as report*.csv and figures as report*.png into `out_dir`.

    Each file is replaced in one step, and those of an earlier report that this one does not have are removed. Equal runs give
    equal bytes, in whatever order and wherever they lie. Runs that did not finish are counted in their rows, left out of the
    statistics and named, as are `planned` runs that have not begun, missing seeds and published rows; runs with a record that is
    damaged, or that no run writes, are left out and named with what is wrong.

    Args:
        run_dirs: the runs' directories, which need not hold a record yet.
        out_dir: where the report goes; made where it is not there.
        planned: runs that are to be there too, see `fa_bench.runs.sweep`.
        timings: whether to show measured seconds, the one thing in which two sweeps of the same runs differ.
        faults: lines on records that were left out before.

    Raises:
        DataError: no directory holds a run of which something can be said.
        RunDirectoryError: a file in its way that no report wrote, which is left as it is, or another process that writes there.
    """
    from fa_bench.report.against import COLUMNS, against_published
    from fa_bench.report.gaps import missing_seeds, not_begun, not_finished, unanswered
    from fa_bench.report.layers import by_layer
    from fa_bench.report.probes import LEGEND as PROBED
    from fa_bench.report.probes import probe_table
    from fa_bench.report.published import published
    from fa_bench.report.table import TIMINGS, columns_of, summarise, to_csv, to_markdown, to_text

    planned = list(planned)
    runs, left_out, unreadable, lacking = _read([*map(Path, run_dirs), *(run.directory for run in planned)])
    left_out = [*faults, *left_out]
    entries = published()
    frame, against = summarise(runs, entries), against_published(entries, runs)
    if not timings:
        frame = frame.drop(columns=TIMINGS)
    unended, waiting = [*unreadable, *not_finished(runs)], not_begun(lacking, planned)
    layers = by_layer(runs)
    probed, columns = probe_table(layers, dict.fromkeys(name for run in runs if run.finished for name in run.probed))
    seeds, rows = missing_seeds(runs), unanswered(entries, runs)
    left_out, unended, waiting, seeds = (
        [truncate(line, MOST_OF_LINE) for line in lines] for lines in (left_out, unended, waiting, seeds))

    out_dir = Path(out_dir)
    with turn(out_dir):
        markdown = claim(out_dir / MARKDOWN)
        earlier = written(out_dir)
        with default_style():
            from fa_bench.report.figures import write_figures

            figures = write_figures(runs, out_dir, NAME)
        tables = {f"{NAME}.csv": frame, f"{NAME}_layers.csv": layers} | (
            {f"{NAME}_published.csv": against} if len(against) else {})
        for name, table in tables.items():
            _write(out_dir / name, to_csv(table))
        sections = [
            "# Report", to_markdown(frame.drop(columns=[*VERSIONS]), columns_of(frame)), LEGEND,
            *(["## Beside the published numbers", to_markdown(against, COLUMNS), _PUBLISHED] if len(against) else []),
            *(["## Probes", to_markdown(probed, columns), PROBED] if len(probed) else []),
            *_listed("## Left out: records that are damaged or of another kind", left_out),
            *_listed("## Runs that did not finish", unended), *_listed("## Runs that have not begun", waiting),
            *_listed("## Missing seeds", seeds), *_listed("## Published, without a finished run here", rows),
            "## Tables", ", ".join(f"[{name}]({name})" for name in tables),
            "## Figures", *(f"![{path.stem}]({path.name})" for path in figures),
        ]
        _write(markdown, "\n\n".join(section.strip() for section in sections) + "\n")
        present = {markdown.name, *tables, *(path.name for path in figures)}
        for name in earlier - present:
            if not (out_dir / name).is_symlink():
                (out_dir / name).unlink(missing_ok=True)
            (out_dir / temporary_name(name)).unlink(missing_ok=True)
        record(out_dir, present)
    said = [("left out", left_out), ("not finished", unended), ("missing", _first(waiting)), ("missing", seeds)]
    remarks = [f"\n{printable(f'{what}: {line}')}" for what, lines in said for line in lines]
    if rows:
        remarks.append(f"\n{len(rows)} published rows of the preset have no finished run yet: see {markdown.name}")
    if unended or left_out:
        remarks.insert(0, "\nmeans are over the finished runs alone")
    return Report(to_text(frame) + ("\n" + "".join(remarks) if remarks else ""), markdown, figures[0],
                  complete=not unended and not waiting and not left_out)


class _Found(NamedTuple):
    """The runs in order, lines on those whose records cannot be used, lines on directories of which no run can be made, and
    directories that hold no record."""

    runs: list[Run]
    left_out: list[str]
    unreadable: list[str]
    lacking: list[Path]


def _read(directories: list[Path]) -> _Found:
    from fa_bench.report.groups import in_order
    from fa_bench.report.runs import read_run
    from fa_bench.report.states import as_it_stands, begun, unreadable, with_data, without_result

    found: dict[Path, Run | None] = {}
    faults: list[RecordError] = []
    lines: list[str] = []
    called = {resolved(directory): directory for directory in directories}
    for path, directory in called.items():
        try:
            found[path] = read_run(directory)
        except RecordError as error:
            faults.append(error)
    ended = [as_it_stands(run) for run in found.values() if run is not None]
    runs, lacking = list(ended), []
    for path in [path for path, run in found.items() if run is None]:
        if not begun(path):
            lacking.append(called[path])
            continue
        try:
            run = without_result(called[path], ended)
            if run is None:
                lines.append(unreadable(path))
            else:
                runs.append(run)
        except RecordError as error:
            faults.append(error)
    if not runs and faults:
        raise faults[0]
    if not runs:
        raise DataError(f"nothing to report: no {RESULT} in {', '.join(map(str, directories)) or 'an empty list of runs'}")
    return _Found(in_order(with_data(runs)), sorted(map(fault, faults)), sorted(lines), lacking)


def fault(error: RecordError) -> str:
    """A line on a record that cannot be used, the same wherever it lies."""
    return f"{place(error.path.parent)}/{error.path.name}: {error.problem}"


def _first(lines: list[str], shown: int = 3) -> list[str]:
    return lines if len(lines) <= shown + 1 else [*lines[:shown], f"{len(lines) - shown} more runs not begun"]


def _listed(title: str, lines: list[str]) -> list[str]:
    return [title, "\n".join(f"- {escape_markdown(line)}" for line in lines)] if lines else []


def _write(path: Path, text: str) -> None:
    with atomic(claim(path)) as temporary:
        temporary.write_bytes(text.encode())
