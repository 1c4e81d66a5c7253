"""The live view of a sweep. It has one line per run and is updated every few seconds; nothing is written."""

from __future__ import annotations

import dataclasses
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from fa_bench.config.labels import distinct_labels, duration
from fa_bench.errors import DataError, printable
from fa_bench.objectives.scores import ACCURACY, scores_of
from fa_bench.report.numbers import known, mean
from fa_bench.report.runs import FINISHED, Run, find_runs, short_path
from fa_bench.report.states import DIVERGED, INTERRUPTED, RUNNING, STOPPED, current_status, epochs_of, reason
from fa_bench.runs.checked_json import RecordError
from fa_bench.runs.locks import lock_holder
from fa_bench.runs.readers import inconsistency, read_config, read_metrics, read_result
from fa_bench.runs.sweep import PlannedRun, find_planned_runs
from fa_bench.utils.files import CONFIG, METRICS, RESULT, resolved
from fa_bench.utils.text import align_columns

if TYPE_CHECKING:
    from rich.table import Table

DONE, FAILED, STALLED, WAITING = "done", "failed", "stalled", "waiting"
#: Maps each state to its colour on a terminal. If not all runs fit, those with the states listed first are shown. The summary
#: counts the states in this order, except that DONE comes first.
STATES = {
    RUNNING: "green",
    STALLED: "yellow",
    FAILED: "red",
    DIVERGED: "red",
    INTERRUPTED: "yellow",
    WAITING: "dim",
    STOPPED: "blue",
    DONE: "blue",
}
#: The states in which a run has ended. Interrupted runs are not included, because they may be resumed.
ENDED = {DONE, STOPPED, FAILED, DIVERGED}
#: A run counts as stalled if it has written nothing for the duration of QUIET_EPOCHS epochs and for at least QUIET seconds. In
#: the first epoch, whose duration is unknown, the limit is FIRST_EPOCH seconds.
QUIET_EPOCHS, QUIET, FIRST_EPOCH = 5, 600.0, 3600.0
TITLES = ("run", "state", "epoch", "train loss", "val", "test", "s/epoch", "left", "")
NUMBERS = range(2, 8)  # the columns of numbers
MIN_NAME = 16  # minimum number of characters of a run's name on a narrow terminal


@dataclasses.dataclass
class Line:
    """The state of one run.

    Attributes:
        name: the label and seed of the run.
        state: one of `STATES`, or another status from the run's result.
        epoch, epochs: the number of epochs completed, and the total number (None if unknown).
        metrics: the record of the last epoch.
        pace: recorded training seconds per epoch, without evaluation.
        overhead: for a running run, the wall-clock time of an epoch as a multiple of `pace`.
        since: for a running run, seconds since its last epoch ended or, if that is later, since it was started or resumed.
        remark: the reason for a failure, or another remark.
        remaining: estimated seconds until the run ends; None if unknown.
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
    remaining: float | None = None


class Watcher:
    """Reads the runs in some folders and their subfolders, and the runs that sweep.json files announce there.

    Args:
        folders: existing folders.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders
        self.errors: list[RecordError] = []
        self._cache: dict[Path, tuple[Any, Run, str]] = {}

    def look(self, now: float) -> list[Line]:
        """A line for each run. Announced runs come first, in the order of their sweeps, followed by the others, sorted by path.

        Afterwards, `errors` contains an error for each sweep.json file that could not be used.

        Args:
            now: the current time, as a Unix timestamp.

        Raises:
            DataError: a folder no longer exists, or there is no run.
        """
        self.errors = []
        planned = {resolved(run.directory): run for run in find_planned_runs(self.folders, self.errors)}
        runs = {path: self._read(path) for path in dict.fromkeys([*planned, *map(resolved, find_runs(self.folders))])}
        if not runs:
            raise DataError(f"{', '.join(map(str, self.folders))}: no runs found")
        names = _names({path: run.config for path, (run, _) in runs.items() if path not in planned})
        lines = [
            _line(planned.get(path) or PlannedRun(path, names[path], 0), run, problem, now)
            for path, (run, problem) in runs.items()
        ]
        _estimate(lines)
        return lines

    def notes(self) -> list[str]:
        """A line for each sweep.json that the last `look` could not use."""
        return [printable(f"excluded: {error}") for error in self.errors]

    def _read(self, directory: Path) -> tuple[Run, str]:
        """The records of a run, with an empty result if there is none, and a description of the problem, which is empty if no
        record is damaged. The files are read again only if one of them has changed."""
        stamp = [_stamp(directory / name) for name in (RESULT, METRICS, CONFIG)]
        if directory not in self._cache or self._cache[directory][0] != stamp:
            result: dict[str, Any] = {}
            metrics: list[dict[str, Any]] = []
            config: dict[str, Any] = {}
            problem = ""
            try:
                config = read_config(directory / CONFIG).values
                metrics = read_metrics(directory / METRICS)
                result = read_result(directory / RESULT) or {}
                if result and (mismatch := inconsistency(result, metrics)):
                    raise RecordError(directory / METRICS, mismatch)
            except RecordError as error:
                result, problem = {}, f"{error.path.name}: {error.problem}"
            # Only the last epoch is kept, because all records of a long sweep would fill the memory.
            self._cache[directory] = stamp, Run(directory, result, metrics[-1:], config), problem
        return self._cache[directory][1:]


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def _line(planned: PlannedRun, run: Run, problem: str, now: float) -> Line:
    directory, last = run.directory, run.metrics[-1] if run.metrics else {}
    epoch, state = last.get("epoch", 0), current_status(directory, run.result)
    line = Line(planned.label, state, epoch, planned.epochs or run.result.get("epochs") or epochs_of(run.config), last)
    line.pace = last["seconds"] / epoch if last.get("seconds") and epoch else None
    if state == FINISHED:
        line.state = DONE
    elif state == RUNNING:
        started = max(_started(directory), _modified(directory / CONFIG))
        ended = _modified(directory / METRICS)
        line.since = now - max(ended, started)
        if line.pace and ended > started:
            # The measured time covers only the current process. It is too short if the run was resumed, so it is raised to at
            # least the training time.
            line.overhead = max((ended - started) / epoch / line.pace, 1.0)
        quiet = now - max(map(_modified, directory.iterdir()), default=0.0)
        if quiet > (max(QUIET, QUIET_EPOCHS * line.pace * (line.overhead or 1)) if line.pace else FIRST_EPOCH):
            line.state, line.remark = STALLED, f"nothing written for {duration(quiet)}"
    elif run.result:
        line.remark = reason(run.result)
    elif problem or not (last or run.config):
        line.state = FAILED if problem else WAITING
    line.remark = problem or line.remark
    return line


def _started(directory: Path) -> float:
    """When the process that holds the directory's lock requested the lock, as a Unix timestamp; 0 if unknown."""
    try:
        return datetime.fromisoformat((lock_holder(directory) or {})["started"]).timestamp()
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _names(configs: dict[Path, dict[str, Any]]) -> dict[Path, str]:
    """Names for the runs that no sweep.json lists. A name consists of the rule, the values of the keys in which the rule's runs
    differ, and the seed. A run without a config is named by its path, and the path is added to names that are not unique."""
    rules = {path: str(config["algorithm"]) for path, config in configs.items() if "algorithm" in config}
    labels = distinct_labels(rules, configs)
    names = {
        path: f"{labels[path]} seed {config.get('seed')}" if path in labels else short_path(path)
        for path, config in configs.items()
    }
    count = Counter(names.values())
    return {path: name if count[name] == 1 else f"{name} ({short_path(path)})" for path, name in names.items()}


def _estimate(lines: Sequence[Line]) -> None:
    """Fill in the remaining seconds of running and waiting runs. If the pace of a run is unknown, it is estimated by the mean
    over its row or, failing that, over all runs."""
    overheads = known(line.overhead for line in lines)
    overhead = mean(overheads) if overheads else 1.0
    paces: dict[str | None, list[float]] = {}
    for line in lines:
        for row in (_row(line), None):
            paces.setdefault(row, []).extend(known([line.pace]))
    means = {row: mean(values) for row, values in paces.items() if values}
    for line in lines:
        if line.state not in (RUNNING, WAITING) or not line.epochs:
            continue
        pace = line.pace or means.get(_row(line), means.get(None))
        if pace is not None:
            epoch = pace * (line.overhead or overhead)
            line.remaining = (line.epochs - line.epoch) * epoch - min(max(line.since, 0.0), epoch)


def _row(line: Line) -> str:
    return line.name.rpartition(" seed ")[0] or line.name


def summary(lines: Sequence[Line]) -> str:
    """A one-line summary of the sweep: the number of runs in each state, and the time left if the number of simultaneous runs
    stays the same."""
    counts = Counter(line.state for line in lines)
    order = [DONE, *STATES, *sorted(set(counts).difference(STATES))]
    text = f"{len(lines)} run{'s' * (len(lines) > 1)}: " + ", ".join(
        f"{counts[state]} {state}" for state in sorted(counts, key=order.index)
    )
    unfinished = [line for line in lines if line.state in (RUNNING, WAITING)]
    workers = counts[RUNNING]
    if not unfinished:
        return text
    if not workers:
        return f"{text}; none is running"
    remaining = [line.remaining for line in unfinished if line.remaining is not None]
    if len(remaining) < len(unfinished):
        return f"{text}; time left unknown until the first epoch ends"
    return f"{text}; about {duration(max(sum(remaining) / workers, *remaining))} left, {workers} at a time"


def titles(lines: Sequence[Line]) -> tuple[str, ...]:
    """The titles of the columns. If all lines have the same primary score, the titles of the score columns include its name or
    unit, for example ``val %`` for accuracies."""
    found = {scores_of(line.metrics)[0] for line in lines if line.metrics} or {ACCURACY}
    first = found.pop()
    name = "" if found else " %" if first == ACCURACY else f" {first.in_unit}"
    return tuple(f"{title}{name}" if title in ("val", "test") else title for title in TITLES)


def plain_text(lines: Sequence[Line]) -> list[str]:
    """The view as plain text, with titles, one line per run, and the summary."""
    return [*align_columns([titles(lines), *map(_cells, lines)], NUMBERS), summary(lines)]


def table(lines: Sequence[Line], width: int, height: int) -> Table:
    """The live view as a table for a terminal.

    Args:
        lines: the runs.
        width: columns of the terminal. Long names are shortened in the middle, because rule and seed are at the ends; remarks are
            truncated.
        height: total number of lines. If not all runs fit, those whose states come last in `STATES` are only counted.
    """
    from rich.table import Table
    from rich.text import Text

    room = len(lines) if len(lines) <= height - 2 else max(height - 3, 1)
    order = list(STATES)
    ranked = sorted(range(len(lines)), key=lambda index: order.index(state) if (state := lines[index].state) in order else 0)
    shown = [lines[index] for index in sorted(ranked[:room])]
    hidden = Counter(line.state for line in lines) - Counter(line.state for line in shown)
    footer = [f"not shown: {', '.join(f'{count} {state}' for state, count in hidden.items())}"] * bool(hidden) + [summary(lines)]
    view = Table(
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="bold",
        caption_justify="left",
        caption_style="",
        caption=Text("\n".join(footer), no_wrap=True, overflow="ellipsis"),
    )
    for column, title in enumerate(titles(lines)):
        # Only the column with the remarks may shrink.
        view.add_column(title, justify="right" if column in NUMBERS else "left", no_wrap=bool(title), overflow="ellipsis")
    size = max((width - 60) // 2, MIN_NAME)
    for line in shown:
        name, state, *others = _cells(line)
        name = name if len(name) <= size else f"{name[: size // 3]}…{name[size // 3 + 1 - size :]}"
        view.add_row(Text(name), Text(state, style=STATES.get(state, "")), *(Text(cell, no_wrap=True) for cell in others))
    return view


def _cells(line: Line) -> tuple[str, ...]:
    def formatted(value: Any, form: str, scale: float = 1) -> str:
        return "-" if value is None else format(scale * value, form)

    first = scores_of(line.metrics)[0]
    scores = [formatted(line.metrics.get(f"{part}_{first.name}"), first.format, first.scale) for part in ("val", "test")]
    return (
        printable(line.name),
        line.state,
        f"{line.epoch}/{line.epochs or '?'}",
        formatted(line.metrics.get("train_loss"), ".4f"),
        *scores,
        formatted(line.pace, ".2f"),
        duration(line.remaining) if line.state == RUNNING and line.remaining is not None else "-",
        printable(line.remark),
    )


def watch(folders: Iterable[Path], out: TextIO, interval: float, once: bool) -> None:
    """Show the runs at and below `folders` on `out`, updated every `interval` seconds until all have ended or Ctrl-C is pressed.
    With `once`, or if `out` is not a terminal, the runs are shown only once, in plain text and unabridged.

    Raises:
        DataError: as in `Watcher.look`.
    """
    watcher = Watcher(list(folders))
    if once or not out.isatty() or os.environ.get("TERM") == "dumb":
        print("\n".join([*plain_text(watcher.look(time.time())), *watcher.notes()]), file=out)
        return
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    console = Console(file=out, force_terminal=True, highlight=False)
    try:
        with Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False) as live:
            console.show_cursor()  # a view that is killed must not leave it hidden
            while out.isatty():  # also ends if the terminal is gone
                lines = watcher.look(time.time())
                hint = f"{time.strftime('%H:%M:%S')}, every {interval:g} s; Ctrl-C ends only this view"
                notes = [Text(note, no_wrap=True, overflow="ellipsis") for note in (*watcher.notes(), hint)]
                live.update(Group(table(lines, console.width, console.height - len(notes)), *notes), refresh=True)
                if all(line.state in ENDED for line in lines):
                    return
                time.sleep(interval)
    except KeyboardInterrupt:
        pass
