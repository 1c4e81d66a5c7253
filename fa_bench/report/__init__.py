"""Reports on finished runs: tables and figures that compare the rules with each other and with published numbers.

Pandas, SciPy and matplotlib are imported when a report is written, so that reading run directories stays quick.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from fa_bench.errors import DataError
from fa_bench.files import RESULT, atomic
from fa_bench.report.runs import read_run

NAME = "report"
LEGEND = """\
Accuracies are in %, differences in percentage points, angles in degrees, times in seconds of training. Statistics are over the
finished runs, one per seed: std is the sample standard deviation, ± 95 % half the width of the Student t interval of the mean.
Weight angle and norm ratio are means over the layers whose feedback carries error, the delta angle over all but the output
layers. Beats floor: the mean is above that of the `frozen` rule, which learns its output layer only. Differences to bp are of the
same seed, and to the published number of the means.
"""
_PUBLISHED = """\
Ours is the mean of the last epoch over the finished runs, one per seed. Inside: whether it lies in the published range.
"""


class Report(NamedTuple):
    """What was written: the table for a terminal, the paths of report.md and of the overview figure, and whether every run
    that was found had finished."""

    text: str
    markdown: Path
    figure: Path
    complete: bool


def write_report(run_dirs: Iterable[Path], out_dir: Path) -> Report:
    """Report on the runs in `run_dirs`: write report.md, tables as report*.csv and figures as report*.png into `out_dir`.

    Each file is replaced in one step. Equal runs give equal bytes, in whatever order and wherever they lie. Runs without a
    result or that did not finish are left out of the statistics and named, as are missing seeds and published rows.

    Raises:
        DataError: no directory holds a result, or a record cannot be read.
    """
    from fa_bench.report.against import COLUMNS, against_published
    from fa_bench.report.figures import write_figures
    from fa_bench.report.gaps import missing_seeds, not_finished, unanswered, without_result
    from fa_bench.report.groups import in_order
    from fa_bench.report.layers import by_layer
    from fa_bench.report.probes import LEGEND as PROBED
    from fa_bench.report.probes import probe_table
    from fa_bench.report.published import published
    from fa_bench.report.table import summarise, to_csv, to_markdown, to_text

    found = {Path(directory): read_run(directory) for directory in run_dirs}
    runs = in_order(run for run in found.values() if run is not None)
    if not runs:
        raise DataError(f"nothing to report: no {RESULT} in {', '.join(map(str, found)) or 'an empty list of runs'}")
    entries = published()
    frame, against = summarise(runs, entries), against_published(entries, runs)
    layers = by_layer(runs)
    probed, columns = probe_table(layers, dict.fromkeys(name for run in runs if run.finished for name in run.probed))
    unended = [*without_result(path for path, run in found.items() if run is None), *not_finished(runs)]
    seeds, rows = missing_seeds(runs), unanswered(entries, runs)

    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    figures = write_figures(runs, out_dir, NAME)
    sections = [
        "# Report", to_markdown(frame), LEGEND,
        *(["## Beside the published numbers", to_markdown(against, COLUMNS), _PUBLISHED] if len(against) else []),
        *(["## Probes", to_markdown(probed, columns), PROBED] if len(probed) else []),
        *_listed("## Runs that did not finish", unended), *_listed("## Missing seeds", seeds),
        *_listed("## Published, without a finished run here", rows),
        "## Figures", *(f"![{path.stem}]({path.name})" for path in figures),
    ]
    _write(out_dir / f"{NAME}.csv", to_csv(frame))
    _write(out_dir / f"{NAME}_layers.csv", to_csv(layers))
    if len(against):
        _write(out_dir / f"{NAME}_published.csv", to_csv(against))
    markdown = out_dir / f"{NAME}.md"
    _write(markdown, "\n\n".join(section.strip() for section in sections) + "\n")
    said = [("not finished", unended), ("missing", seeds)]
    remarks = [f"\n{what}: {line}" for what, lines in said for line in lines]
    if rows:
        remarks.append(f"\n{len(rows)} published rows of the preset have no finished run yet: see {markdown.name}")
    return Report(to_text(frame) + ("\n" + "".join(remarks) if remarks else ""), markdown, figures[0], not unended)


def _listed(title: str, lines: list[str]) -> list[str]:
    return [title, "\n".join(f"- {line}" for line in lines)] if lines else []


def _write(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_bytes(text.encode())
