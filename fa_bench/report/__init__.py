"""Reports on finished runs: a table and a figure that compare the rules.

Pandas, SciPy and matplotlib are imported when a report is written, so that reading run directories stays quick.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fa_bench.errors import DataError
from fa_bench.files import RESULT, atomic
from fa_bench.report.runs import read_run

LEGEND = """\
Accuracies are in %, differences in percentage points, angles in degrees, times in seconds of training. Statistics are over the
finished runs, one per seed: std is the sample standard deviation, ± 95 % half the width of the Student t interval of the mean.
Weight angle and norm ratio are means over the layers whose feedback carries error, the delta angle over all but the output
layers. Beats floor: the mean is above that of the `frozen` rule, which learns its output layer only.
"""


def write_comparison(run_dirs: Sequence[Path], out_dir: Path) -> tuple[str, Path]:
    """Compare the runs in `run_dirs`, in the order given: write comparison.csv, .md and .png into `out_dir`.

    Each file is replaced in one step, and equal runs give equal bytes. A directory without a result is left out of the
    statistics and named below the table.

    Returns:
        The table as text for a terminal, and the path of the figure.

    Raises:
        DataError: no directory holds a result, or a record cannot be read.
    """
    from fa_bench.report.plot import plot_comparison
    from fa_bench.report.table import summarise, to_markdown, to_text

    found = {Path(directory): read_run(directory) for directory in run_dirs}
    runs = [run for run in found.values() if run is not None]
    if not runs:
        raise DataError(f"nothing to compare: no {RESULT} in {', '.join(map(str, found)) or 'an empty list of runs'}")
    absent = [str(directory) for directory, run in found.items() if run is None]
    remark = f"\n\nwithout {RESULT}, so not in the table: {', '.join(absent)}" if absent else ""

    frame = summarise(runs)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, text in (("comparison.csv", frame.to_csv(index=False, float_format="%.10g", lineterminator="\n")),
                       ("comparison.md", f"{to_markdown(frame)}\n\n{LEGEND}{remark.lstrip()}".rstrip() + "\n")):
        with atomic(out_dir / name) as temporary:
            temporary.write_bytes(text.encode())
    figure = out_dir / "comparison.png"
    plot_comparison(runs, figure)
    return to_text(frame) + remark, figure
