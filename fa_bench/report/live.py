"""A sweep while it runs: one line a run, shown again every few seconds. Nothing is written."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from fa_bench.config.labels import differing_keys, duration, label
from fa_bench.errors import DataError, printable
from fa_bench.report.numbers import known, mean
from fa_bench.report.runs import Run, find_runs, place
from fa_bench.report.states import DIVERGED, INTERRUPTED, RUNNING, epochs_of, reason, running
from fa_bench.runs.locks import lock_holder
from fa_bench.runs.readers import RecordError, inconsistency, read_config, read_metrics, read_result
from fa_bench.runs.sweep import PlannedRun, find_planned_runs
from fa_bench.utils.files import CONFIG, METRICS, RESULT, resolved

DONE, FAILED, STALLED, WAITING = "done", "failed", "stalled", "waiting"
#: The states in the order in which they are counted, and in which runs are shown where not all fit.
STATES = (RUNNING, STALLED, FAILED, DIVERGED, INTERRUPTED, WAITING, DONE)
#: The states of runs that will not change unless somebody starts them again.
ENDED = {DONE, FAILED, DIVERGED}
#: A run is taken for stalled that has written nothing for this many of its epochs and for QUIET seconds; in its first epoch, of
#: which nobody knows how long it takes, for FIRST_EPOCH seconds.
QUIET_EPOCHS, QUIET, FIRST_EPOCH = 5, 600.0, 3600.0
TITLES = ("run", "state", "epoch", "train loss", "val %", "test %", "s/epoch", "left", "")
LEFT_ALIGNED = (0, 1, 8)


@dataclasses.dataclass
class Line:
    """What is known of one run.

    Attributes:
        name: what it is called.
        state: one of `STATES`, or whatever else its result says.
        epoch, epochs: those done and those to do; None where not known.
        metrics: the record of the last epoch.
        pace: training seconds an epoch, as recorded; evaluation apart.
        overhead: for a run at work, the wall-clock time of an epoch as a multiple of `pace`.
        since: for a run at work, seconds since its last epoch ended, or since it started.
        remark: the reason of a failure and the like.
        left: seconds to go; None where not known.
    """

    name: str
    state: str
    epoch: int = 0
    epochs: int | None = None
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    pace: float | None = None
    overhead: float | None = None
    since: float = 0.0
    remark: str = ""
    left: float | None = None


class Watcher:
    """Looks at the runs at and below some folders, and at those that their sweep.json files announce.

    Args:
        folders: existing folders.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders
        self.faults: list[RecordError] = []
        self._read: dict[Path, tuple[Any, Run, dict[str, Any], str]] = {}

    def look(self, now: float) -> list[Line]:
        """A line for each run: announced ones in the order of their grids, then the others by their place.

        Lists of a sweep's runs that cannot be used are in `faults` afterwards.

        Args:
            now: the time, in seconds since the epoch.

        Raises:
            DataError: a folder is gone, or there is no run.
        """
        self.faults = []
        planned = {resolved(run.directory): run for run in find_planned_runs(self.folders, self.faults)}
        found = {resolved(directory): directory for directory in find_runs(self.folders)}
        if not planned and not found:
            raise DataError(f"{', '.join(map(str, self.folders))}: no runs there or below")
        directories = [*planned, *(path for path in found if path not in planned)]
        facts = {directory: self._facts(directory) for directory in directories}
        names = _names({path: config for path, (_, config, _) in facts.items() if path not in planned})
        lines = []
        for path, (run, config, fault) in facts.items():
            announced = planned.get(path, PlannedRun(path, names.get(path, ""), 0))
            lines.append(_line(announced, run, config, fault, now))
        _estimate(lines)
        return lines

    def said(self) -> list[str]:
        """A line for each list of a sweep's runs that the last look could not use."""
        return [printable(f"left out: {error}") for error in self.faults]

    def _facts(self, directory: Path) -> tuple[Run, dict[str, Any], str]:
        """The records (of a run without a result: an empty one), the config, and what cannot be read; again if a file changed."""
        stamp = [_stamp(directory / name) for name in (RESULT, METRICS, CONFIG)]
        if directory not in self._read or self._read[directory][0] != stamp:
            result: dict[str, Any] = {}
            metrics: list[dict[str, Any]] = []
            config: dict[str, Any] = {}
            fault = ""
            try:
                config = read_config(directory / CONFIG).values
                metrics = read_metrics(directory / METRICS)
                result = read_result(directory / RESULT) or {}
                if result and (problem := inconsistency(result, metrics)):
                    raise RecordError(directory / METRICS, problem)
            except RecordError as error:
                result, fault = {}, f"{error.path.name}: {error.problem}"
            # Of the epochs the last will do: a long sweep's records would fill the memory.
            self._read[directory] = stamp, Run(directory, result, metrics[-1:]), config, fault
        return self._read[directory][1:]


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def _line(planned: PlannedRun, run: Run, config: dict[str, Any], fault: str, now: float) -> Line:
    directory, last = run.directory, run.metrics[-1] if run.metrics else {}
    status, epoch = run.result.get("status"), last.get("epoch", 0)
    line = Line(planned.label, WAITING, epoch, planned.epochs or run.result.get("epochs") or epochs_of(config), last)
    line.pace = last["seconds"] / epoch if last.get("seconds") and epoch else None
    if status == "finished":
        line.state = DONE
    elif running(directory):
        line.state = RUNNING
        started = max(_started(directory), _modified(directory / CONFIG))
        ended = _modified(directory / METRICS)
        line.since = now - max(ended, started)
        if line.pace and ended > started:
            # What it took since this start, and so too little for epochs of an earlier one: never less than the training itself.
            line.overhead = max((ended - started) / epoch / line.pace, 1.0)
        quiet = now - _last_write(directory)
        if quiet > (max(QUIET, QUIET_EPOCHS * line.pace * (line.overhead or 1)) if line.pace else FIRST_EPOCH):
            line.state, line.remark = STALLED, f"nothing written for {duration(quiet)}"
    elif status is not None or fault:
        line.state, line.remark = status or FAILED, reason(run.result)
    elif last or config:
        line.state = INTERRUPTED
    line.remark = fault or line.remark
    return line


def _started(directory: Path) -> float:
    """When the process that holds the lock started, as it says there; 0 where it does not."""
    try:
        return datetime.fromisoformat((lock_holder(directory) or {})["started"]).timestamp()
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _last_write(directory: Path) -> float:
    """When something in the directory, or the list of its checkpoints, last changed."""
    return max(map(_modified, directory.iterdir()), default=0.0)


def _names(configs: dict[Path, dict[str, Any]]) -> dict[Path, str]:
    """What to call runs that no sweep.json names: rule, what the runs of the rule differ in, and seed; else their place."""
    by_rule: dict[str, list[dict[str, Any]]] = {}
    for config in configs.values():
        by_rule.setdefault(str(config.get("algorithm")), []).append(config)
    keys = {rule: differing_keys(found) for rule, found in by_rule.items()}
    names = {path: f"{label(config['algorithm'], config, keys[config['algorithm']])} seed {config.get('seed')}"
             if "algorithm" in config else place(path) for path, config in configs.items()}
    count = Counter(names.values())
    return {path: name if count[name] == 1 else f"{name} ({place(path)})" for path, name in names.items()}


def _estimate(lines: Sequence[Line]) -> None:
    """Fill in the seconds to go: of running runs, and of waiting ones by the pace of their rule's others, else of all."""
    overheads = known(line.overhead for line in lines)
    overhead = mean(overheads) if overheads else 1.0
    for line in lines:
        if line.state not in (RUNNING, WAITING) or not line.epochs:
            continue
        alike = known(other.pace for other in lines if _row(other) == _row(line)) or known(other.pace for other in lines)
        pace = line.pace or (mean(alike) if alike else None)
        if pace is not None:
            epoch = pace * (line.overhead or overhead)
            line.left = (line.epochs - line.epoch) * epoch - min(max(line.since, 0.0), epoch)


def _row(line: Line) -> str:
    return line.name.rpartition(" seed ")[0] or line.name


def summary(lines: Sequence[Line]) -> str:
    """The sweep in a line: how many runs stand how, and the time left with as many at a time as run now."""
    counts = Counter(line.state for line in lines)
    order = [*STATES, *sorted(set(counts).difference(STATES))]
    said = f"{len(lines)} run{'s' * (len(lines) > 1)}: " + ", ".join(
        f"{counts[state]} {state}" for state in sorted(counts, key=lambda state: (state != DONE, order.index(state))))
    open_runs = [line for line in lines if line.state in (RUNNING, WAITING)]
    workers = counts[RUNNING]
    if not open_runs:
        return said
    if not workers:
        return f"{said}; none runs now"
    left = [line.left for line in open_runs if line.left is not None]
    if len(left) < len(open_runs):
        return f"{said}; time left not known before the first epoch ends"
    return f"{said}; about {duration(max(sum(left) / workers, *left))} left, {workers} at a time"


def table(lines: Sequence[Line], width: int | None = None, height: int | None = None) -> list[str]:
    """The lines of the view: titles, one line a run, and the sweep's.

    Args:
        lines: the runs.
        width: columns that a line may take; None for as many as it needs.
        height: lines in all; None for as many as there are runs. Of more runs those are left out that need least attention.
    """
    room = len(lines) if height is None else max(height - 3, 1)
    ranked = sorted(range(len(lines)), key=lambda index: STATES.index(state) if (state := lines[index].state) in STATES else 0)
    shown = [lines[index] for index in sorted(ranked[:room])]
    cells = [TITLES, *map(_cells, shown)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(TITLES))]
    if width is not None:
        widths[0] = min(widths[0], max(width - sum(widths[1:8]) - 2 * 7, 16))
    text = ["  ".join(
        _without_middle(cell, size).ljust(size) if column in LEFT_ALIGNED else cell.rjust(size)
        for column, (cell, size) in enumerate(zip(row, widths, strict=True))).rstrip() for row in cells]
    if len(shown) < len(lines):
        hidden = Counter(line.state for line in lines) - Counter(line.state for line in shown)
        text.append(f"not shown: {', '.join(f'{count} {state}' for state, count in hidden.items())}")
    text.append(summary(lines))
    return text if width is None else [line if len(line) <= width else f"{line[:width - 1]}…" for line in text]


def _cells(line: Line) -> tuple[str, ...]:
    def shown(value: Any, form: str, scale: float = 1) -> str:
        return "-" if value is None else format(scale * value, form)

    return (printable(line.name), line.state, f"{line.epoch}/{line.epochs or '?'}", shown(line.metrics.get("train_loss"), ".4f"),
            shown(line.metrics.get("val_accuracy"), ".2f", 100), shown(line.metrics.get("test_accuracy"), ".2f", 100),
            shown(line.pace, ".2f"), duration(line.left) if line.state == RUNNING and line.left is not None else "-",
            printable(line.remark))


def _without_middle(text: str, size: int) -> str:
    """The text without its middle where it is too long: rule and seed are at its ends."""
    head = size // 3
    return text if len(text) <= size else f"{text[:head]}…{text[head + 1 - size:]}"


def watch(folders: Iterable[Path], out: TextIO, interval: float, once: bool) -> None:
    """Show the runs at and below `folders` on `out`: again every `interval` seconds until all have ended or Ctrl-C is
    pressed; a single time, in plain text and whole, with `once` or where `out` is no terminal.

    Raises:
        DataError: as `Watcher.look`.
    """
    watcher = Watcher(list(folders))
    if once or not out.isatty() or os.environ.get("TERM") == "dumb":
        lines = table(watcher.look(time.time()))
        print("\n".join([*lines, *watcher.said()]), file=out)
        return
    before = 0
    try:
        while out.isatty():  # until its terminal is gone, too
            lines = watcher.look(time.time())
            width, height = shutil.get_terminal_size()
            hint = f"{time.strftime('%H:%M:%S')}, every {interval:g} s; Ctrl-C ends this view and nothing else"
            below = [*watcher.said(), hint]
            text = [*table(lines, width - 1, height - 1 - len(below)), *(line[:width - 1] for line in below)]
            # Up to the first line of what was shown before, and clear from there: what stood above stays.
            out.write((f"\x1b[{before}F\x1b[J" if before else "") + "\n".join(text) + "\n")
            out.flush()
            before = len(text)
            if all(line.state in ENDED for line in lines):
                return
            time.sleep(interval)
    except KeyboardInterrupt:
        out.write("\n")
