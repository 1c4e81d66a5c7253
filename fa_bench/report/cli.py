"""The command line of reports: ``fa-bench-report DIR...``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fa_bench.errors import DataError, FaBenchError, printable
from fa_bench.utils.files import resolved
from fa_bench.utils.output import exit_code

_DESCRIPTION = """\
Compare the runs in folders: mean, standard deviation and 95 % interval per rule over the seeds, paired differences to bp, the
floor, angles, and the published numbers of the presets, as report.md, report.csv and report.png, with further tables and figures
beside them. A sweep need not be complete: the report says what is missing. Or watch it while it runs: --live writes nothing.
"""
_CODES = """\
exit code: 0 where every run found had finished, and of a live view however its runs stand and however it ends, Ctrl-C included;
1 where the report leaves runs out; 2 where there is none
"""
INTERVAL, SHORTEST, LONGEST = 5.0, 0.5, 3600.0  # seconds between two looks at a sweep


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise DataError(f"{message}; see fa-bench-report --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``fa-bench-report``.

    Returns:
        The exit code: 0 where every run that was found or announced had finished; 1 where the report leaves some out; 2 where
        there is nothing to report or it cannot be written, with one line on standard error; 130 after an interrupt. Of a live
        view: 0, whatever it showed, and after an interrupt too, which is how one ends it; 2 as above.
    """
    return exit_code("fa-bench-report", lambda: _guarded(list(sys.argv[1:] if argv is None else argv)))


def _guarded(argv: list[str]) -> int:
    try:
        return _main(argv)
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
    parser.add_argument("--no-timings", action="store_true",
                        help="leave measured seconds out: two sweeps of the same runs then give the same bytes")
    live = parser.add_argument_group("a running sweep")
    live.add_argument("--live", action="store_true", help="show every run's state, epoch, last numbers and time left, again and "
                                                          "again until all have ended or Ctrl-C; off a terminal once")
    live.add_argument("--interval", metavar="SECONDS", type=float, help=f"how often (default: {INTERVAL:g})")
    live.add_argument("--once", action="store_true", help="show it a single time, in plain text")
    try:
        arguments = parser.parse_args(argv)
    except SystemExit:  # --help has been printed
        return 0
    _check(arguments)
    if arguments.live:
        from fa_bench.report.live import watch

        watch(arguments.folders, sys.stdout, INTERVAL if arguments.interval is None else arguments.interval, arguments.once)
        return 0

    from fa_bench.report import fault, write_report
    from fa_bench.report.runs import find_runs
    from fa_bench.runs.readers import RecordError
    from fa_bench.runs.sweep import find_planned_runs

    faults: list[RecordError] = []
    directories, planned = find_runs(arguments.folders), find_planned_runs(arguments.folders, faults)
    if not directories:
        begun = f" ({len(planned)} announced, none begun)" if planned else ""
        raise DataError(f"{', '.join(map(str, arguments.folders))}: no runs there or below{begun}")
    written = write_report(directories, arguments.out or _common(arguments.folders), planned,
                           timings=not arguments.no_timings, faults=[fault(error) for error in faults])
    print(f"{written.text}\n\nreport: {printable(written.markdown)}\ncurves: {printable(written.figure)}")
    return 0 if written.complete else 1


def _common(folders: Sequence[Path]) -> Path:
    """The folder that several have in common, or the one there is."""
    try:
        common = Path(os.path.commonpath([resolved(folder) for folder in folders]))
    except ValueError:  # on several drives
        common = Path(folders[0].anchor)
    if common == Path(common.anchor):
        raise DataError(f"{', '.join(map(str, folders))}: no folder in common; say where the report goes, --out DIR")
    return common


def _check(arguments: argparse.Namespace) -> None:
    for flag, given in (("--interval", arguments.interval is not None), ("--once", arguments.once)):
        if given and not arguments.live:
            raise DataError(f"{flag} goes with --live")
    for flag, given in (("--out", arguments.out is not None), ("--no-timings", arguments.no_timings)):
        if given and arguments.live:
            raise DataError(f"{flag} does not go with --live, which writes nothing")
    if arguments.interval is not None and not SHORTEST <= arguments.interval <= LONGEST:
        raise DataError(f"--interval={arguments.interval:g} is not within {SHORTEST:g} to {LONGEST:g} seconds")


if __name__ == "__main__":
    sys.exit(main())
