"""The command line of reports: ``fa-bench-report DIR...``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fa_bench.errors import DataError, FaBenchError, names, printable
from fa_bench.report.files import covered_directories
from fa_bench.report.quantities import FORMATS, POSITIONS, Selection
from fa_bench.report.references import BEST, CHOICES
from fa_bench.utils.files import resolved
from fa_bench.utils.output import exit_code

_DESCRIPTION = """\
Compare the rules of the runs in some folders. For each rule, the report has the mean, standard deviation and 95 % interval over
the seeds, the paired difference from bp, the comparison with the floor, the angles, and the published numbers of the experiment.
The report consists of report.md, .html, .csv, .json, .tex and .png, and of further tables and figures; runs.csv has one row per
run. A sweep may be incomplete: the report lists what is missing. With --live, a running sweep is shown and nothing is written.
"""
_CODES = """\
exit code: 0 if all runs have finished or were stopped by a callback; 1 if some have not, or are excluded from the report; 2 after
an error, for example if there is nothing to report.
The live view exits with 0 regardless of the states of the runs, even after Ctrl-C.
"""
INTERVAL, MIN_INTERVAL, MAX_INTERVAL = 5.0, 0.5, 3600.0  # seconds between two updates of the live view


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise DataError(f"{message}; see fa-bench-report --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``fa-bench-report``.

    Returns:
        The exit code: 0 if all runs that were found or announced have finished or were stopped by a callback; 1 if some have not,
        or are excluded; 2 after an error, with one line on standard error; 130 after an interrupt. The live view returns 0, even
        if it is interrupted, or 2 after an error.
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
    parser.add_argument("folders", metavar="DIR", nargs="+", type=Path, help="a run directory, or a folder with run directories")
    parser.add_argument("--out", metavar="DIR", type=Path, help="where to write the report (default: the common folder of DIR)")
    parser.add_argument(
        "--no-timings",
        action="store_true",
        help="omit measured seconds, memory and energy, so that two sweeps of the same runs give byte-identical reports",
    )
    parser.add_argument(
        "--best",
        metavar="KEY[,KEY]",
        help="for each rule, choose the values of these keys by the validation score, and compare only the chosen "
        "values; an example is --best optimizer.lr",
    )
    parser.add_argument(
        "--reference",
        choices=CHOICES,
        help="compare with the best rows of bp and frozen (default), or with those at the nearest settings",
    )
    parser.add_argument(
        "--aggregate", action="store_true", help="compare the rules over all tasks: interquartile mean with a bootstrap interval"
    )
    figures = parser.add_argument_group("figures", "what they show; the tables stay complete")
    figures.add_argument(
        "--format",
        metavar="LIST",
        type=_words,
        default=FORMATS[:1],
        help=f"formats of the files, separated by commas: {names(FORMATS)} (default: {FORMATS[0]})",
    )
    figures.add_argument("--rules", metavar="LIST", type=_words, help="only these rules, separated by commas")
    figures.add_argument(
        "--metric",
        metavar="NAME",
        default="",
        help="only this quantity: a score or loss such as val_accuracy, or an alignment metric such as weight_angle",
    )
    figures.add_argument(
        "--x",
        metavar="X",
        default="",
        help=f"plot curves against {', '.join(list(POSITIONS)[:-1])} or {list(POSITIONS)[-1]}, or final values "
        "against this swept key only, such as optimizer.lr",
    )
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        help="also write mean curves over the seeds for TensorBoard to the tensorboard folder next to the report",
    )
    live = parser.add_argument_group("a running sweep")
    live.add_argument(
        "--live",
        action="store_true",
        help="show the state, epoch, latest values and remaining time of every run, "
        "repeatedly until all have ended or Ctrl-C; once if not on a terminal",
    )
    live.add_argument("--interval", metavar="SECONDS", type=float, help=f"time between two updates (default: {INTERVAL:g})")
    live.add_argument("--once", action="store_true", help="show it only once, in plain text")
    try:
        arguments = parser.parse_args(argv)
    except SystemExit:  # --help has been printed
        return 0
    _check(arguments)
    if arguments.live:
        from fa_bench.report.live import watch

        watch(arguments.folders, sys.stdout, INTERVAL if arguments.interval is None else arguments.interval, arguments.once)
        return 0

    from fa_bench.report import write_report
    from fa_bench.report.best import parse_keys
    from fa_bench.report.runs import find_runs
    from fa_bench.runs.checked_json import RecordError
    from fa_bench.runs.sweep import find_planned_runs

    selection = Selection(arguments.format, arguments.rules or (), arguments.metric, arguments.x)
    unusable: list[RecordError] = []
    directories, planned = find_runs(arguments.folders), find_planned_runs(arguments.folders, unusable)
    if not directories:
        announced = f" ({len(planned)} announced, none started)" if planned else ""
        raise DataError(f"{', '.join(map(str, arguments.folders))}: no runs found{announced}")
    out_dir = arguments.out or _common(arguments.folders)
    if arguments.out is None:
        _check_wider(out_dir, directories)
    report = write_report(
        directories,
        out_dir,
        planned,
        timings=not arguments.no_timings,
        unusable=unusable,
        best=() if arguments.best is None else parse_keys(arguments.best),
        reference=arguments.reference or BEST,
        aggregate=arguments.aggregate,
        selection=selection,
    )
    print(f"{report.text}\n\nreport: {printable(report.markdown)}\ncurves: {printable(report.figure)}")
    if arguments.tensorboard:
        from fa_bench.report.mean_curves import write_mean_curves

        for line in write_mean_curves(directories, out_dir):
            print(printable(line))
    return 0 if report.complete else 1


def _words(text: str) -> tuple[str, ...]:
    """The distinct words in a list separated by commas."""
    return tuple(dict.fromkeys(word for part in text.split(",") if (word := part.strip())))


def _common(folders: Sequence[Path]) -> Path:
    """The lowest folder that contains all of `folders`."""
    try:
        common = Path(os.path.commonpath([resolved(folder) for folder in folders]))
    except ValueError:  # the folders are on several drives
        common = Path(folders[0].anchor)
    if common == Path(common.anchor):
        raise DataError(f"{', '.join(map(str, folders))}: no common folder; choose where to write the report with --out DIR")
    return common


def _check_wider(folder: Path, directories: Sequence[Path]) -> None:
    """Refuse to replace a report that also covers other runs."""
    covered = {resolved(directory) for directory in directories}
    others = [directory for directory in covered_directories(folder) if resolved(directory) not in covered]
    if others:
        raise DataError(
            f"{folder}: has a report that covers {len(others)} more run{'s' * (len(others) > 1)}; choose another "
            "folder with --out DIR"
        )


def _check(arguments: argparse.Namespace) -> None:
    for flag, given in (("--interval", arguments.interval is not None), ("--once", arguments.once)):
        if given and not arguments.live:
            raise DataError(f"{flag} requires --live")
    if arguments.best is not None and not arguments.best.replace(",", " ").split():
        raise DataError("--best: no key given; an example is --best optimizer.lr")
    selects = {
        "--format": arguments.format != FORMATS[:1],
        "--rules": arguments.rules is not None,
        "--metric": arguments.metric,
        "--x": arguments.x,
    }
    for flag, given in (
        ("--out", arguments.out is not None),
        ("--no-timings", arguments.no_timings),
        ("--best", arguments.best is not None),
        ("--reference", arguments.reference is not None),
        ("--aggregate", arguments.aggregate),
        ("--tensorboard", arguments.tensorboard),
        *selects.items(),
    ):
        if given and arguments.live:
            raise DataError(f"{flag} cannot be combined with --live, which writes nothing")
    if not arguments.format:
        raise DataError(f"--format is empty (allowed: {names(FORMATS)})")
    if arguments.rules == ():
        raise DataError("--rules: no rule given; an example is --rules bp,kp")
    if arguments.x == "seconds" and arguments.no_timings:
        raise DataError("--x seconds cannot be combined with --no-timings, which omits them")
    if arguments.interval is not None and not MIN_INTERVAL <= arguments.interval <= MAX_INTERVAL:
        allowed = f"{MIN_INTERVAL:g} to {MAX_INTERVAL:g} seconds"
        raise DataError(f"--interval={arguments.interval:g} is out of range (allowed: {allowed})")


if __name__ == "__main__":
    sys.exit(main())
