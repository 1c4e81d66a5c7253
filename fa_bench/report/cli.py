"""The command line of reports: ``fa-bench-report DIR...``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fa_bench.errors import DataError, FaBenchError, printable

_DESCRIPTION = """\
Compare the runs in folders: mean, standard deviation and 95 % interval per rule over the seeds, paired differences to bp, the
floor, angles, and the published numbers of the presets, as report.md, report.csv and report.png, with further tables and figures
beside them. A sweep need not be complete: the report says what is missing.
"""
_CODES = "exit code: 0 where every run found had finished, 1 where the report leaves runs out, 2 where there is none"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise DataError(f"{message}; see fa-bench-report --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``fa-bench-report``.

    Returns:
        The exit code: 0 where every run that was found had finished; 1 where the report leaves some out; 2 where there is
        nothing to report or it cannot be written, with one line on standard error; 130 after an interrupt.
    """
    try:
        return _main(list(sys.argv[1:] if argv is None else argv))
    except (FaBenchError, OSError) as error:
        print(printable(f"fa-bench-report: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fa-bench-report: interrupted", file=sys.stderr)
        return 130


def _main(argv: list[str]) -> int:
    parser = _Parser(prog="fa-bench-report", description=_DESCRIPTION, epilog=_CODES, allow_abbrev=False)
    parser.add_argument("folders", metavar="DIR", nargs="+", type=Path, help="a run's directory, or a folder above such")
    parser.add_argument("--out", metavar="DIR", type=Path,
                        help="where the report goes (default: the folder given, or the one that several have in common)")
    try:
        arguments = parser.parse_args(argv)
    except SystemExit:  # --help has been printed
        return 0

    from fa_bench.report import write_report
    from fa_bench.report.runs import find_runs

    directories = find_runs(arguments.folders)
    if not directories:
        raise DataError(f"{', '.join(map(str, arguments.folders))}: no runs there or below")
    out = arguments.out or Path(os.path.commonpath([folder.resolve() for folder in arguments.folders]))
    written = write_report(directories, out)
    print(f"{written.text}\n\nreport: {written.markdown}\ncurves: {written.figure}")
    return 0 if written.complete else 1


if __name__ == "__main__":
    sys.exit(main())
