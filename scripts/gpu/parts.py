"""Runs each part of a GPU check in its own process, so that an error, a crash or a hang ends only that part."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .page import ERROR, OUT_OF_TIME, RUNNING, SKIPPED, Section

#: Seconds reserved for writing the page after the last part, and seconds that each part reserves to end before it is killed.
_END, _RESERVE = 3.0, 3.0


@dataclasses.dataclass
class Context:
    """The settings that a part receives.

    Attributes:
        device: the device that is checked.
        data_dir: the folder with the datasets.
        scratch: a temporary folder for the part.
        deadline: the time by which the part must have ended, as given by `time.time()`.
    """

    device: str
    data_dir: Path
    scratch: Path
    deadline: float

    def left(self) -> float:
        """The number of seconds until the part should end, which is shortly before its deadline."""
        return self.deadline - time.time() - _RESERVE

    def fits(self, seconds: float) -> bool:
        """Whether a task that takes this many seconds fits into the remaining time."""
        return seconds < self.left()


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of the GPU check.

    Attributes:
        name, title: the name and title of the part's section.
        run: the function that fills the section.
        weight: the part's share of the time, relative to those of the other parts.
        minimum: the part is skipped if it has fewer seconds than this.
    """

    name: str
    title: str
    run: Callable[[Context, Section], None]
    weight: float
    minimum: float


def budget(remaining: Sequence[Part], seconds: float) -> float:
    """The seconds available to the first of the remaining parts.

    The remaining parts share the `seconds` that are left, including time that earlier parts did not use.
    """
    return seconds * remaining[0].weight / sum(part.weight for part in remaining)


def run_all(
    parts: Sequence[Part],
    sections: Sequence[Section],
    deadline: float,
    run_one: Callable[[Part, Section, float], None],
    changed: Callable[[], None],
    clock: Callable[[], float] = time.time,
) -> None:
    """Run the parts in order until `deadline`, and skip parts whose share of the time is too small.

    Args:
        parts: the parts, in order.
        sections: the sections of the parts.
        deadline: the time, as given by `clock`, by which all parts must have ended.
        run_one: a function that runs a part until a given time.
        changed: called whenever a section has changed.
        clock: a function that returns the time in seconds.
    """
    for number, (part, section) in enumerate(zip(parts, sections, strict=True)):
        start = clock()
        left = deadline - _END - start
        section.budget = max(budget(parts[number:], left), 0.0)
        if section.budget < part.minimum:
            section.status = SKIPPED
            section.notes.append(f"Skipped: its share of the time was {section.budget:.0f} s, but it needs {part.minimum:.0f} s.")
        else:
            section.status = RUNNING
            changed()
            try:
                run_one(part, section, start + section.budget)
            except Exception as error:
                section.error, section.status = f"{type(error).__name__}: {error}", ERROR
            section.seconds = clock() - start
        changed()


def run_in_process(
    command: Sequence[str], section: Section, file: Path, log: Path, until: float, changed: Callable[[], None]
) -> None:
    """Run a part in a process that saves its section to `file`.

    At the time `until`, the process is killed together with all processes that it started.

    Args:
        command: the command that runs the part.
        section: the part's section, which is updated while the process runs.
        file: the file to which the process saves the section.
        log: the file to which the process's output is appended.
        until: a time as given by `time.time()`.
        changed: called when the section has changed.
    """
    with log.open("ab") as output:
        start = output.tell()
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, preexec_fn=os.setpgrp
        )
        seen = -1.0
        try:
            while process.poll() is None and time.time() < until:
                time.sleep(0.2)
                if file.exists() and (now := file.stat().st_mtime) != seen:
                    seen = now
                    section.update(file)
                    changed()
            is_late = process.poll() is None
        finally:
            _kill_group(process)
    section.update(file)
    if is_late:
        section.notes.append("The time was used up, so the process was killed; the table has the rows that were complete.")
    elif process.returncode and not section.error:
        with log.open("rb") as output:
            output.seek(start)
            tail = output.read().decode(errors="replace").splitlines()[-12:]
        section.error = "\n".join([f"the process ended with code {process.returncode}; its last lines:", *tail])
    section.path = None
    section.end()
    if is_late and not section.error and not section.misses:
        section.status = OUT_OF_TIME


def _kill_group(process: subprocess.Popen[Any]) -> None:
    """Kill a process and all others in its process group, which it leads."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_here(part: Part, context: Context, section: Section) -> int:
    """Run a part in this process, record any error in its section, and return the exit code 0."""
    section.status = RUNNING
    section.save()
    try:
        part.run(context, section)
    except Exception as error:
        traceback.print_exc()
        where = traceback.extract_tb(error.__traceback__)[-1]
        section.error = f"{type(error).__name__}: {error}\n({Path(where.filename).name}, line {where.lineno})"
    section.end()
    sys.stdout.flush()
    return 0
