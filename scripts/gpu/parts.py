"""Parts of a GPU check, each in a process of its own, so that an error, a crash or a hang ends that part alone."""

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

#: Seconds that the last part leaves for the page, and that a part keeps from its budget to end by itself.
_END, _RESERVE = 3.0, 3.0


@dataclasses.dataclass
class Context:
    """What a part gets.

    Attributes:
        device: that is checked.
        data_dir: with the datasets.
        scratch: a temporary folder of the part.
        deadline: when the part must have ended, as `time.time()`.
    """

    device: str
    data_dir: Path
    scratch: Path
    deadline: float

    def left(self) -> float:
        """Seconds until the part must end."""
        return self.deadline - time.time() - _RESERVE

    def fits(self, seconds: float) -> bool:
        """Whether something that takes so long can be started."""
        return seconds < self.left()


@dataclasses.dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        name, title: of its section.
        run: fills its section.
        weight: its share of the time, relative to those of the other parts.
        minimum: with fewer seconds it is skipped.
    """

    name: str
    title: str
    run: Callable[[Context, Section], None]
    weight: float
    minimum: float


def budget(remaining: Sequence[Part], seconds: float) -> float:
    """Seconds for the first of the remaining parts, which divide what is left: later ones get what earlier ones did not use."""
    return seconds * remaining[0].weight / sum(part.weight for part in remaining)


def run_all(
    parts: Sequence[Part],
    sections: Sequence[Section],
    deadline: float,
    run_one: Callable[[Part, Section, float], None],
    changed: Callable[[], None],
    clock: Callable[[], float] = time.time,
) -> None:
    """Run the parts in order until `deadline`, which is a time of `clock`.

    Args:
        parts: in order.
        sections: their sections.
        deadline: when all must have ended.
        run_one: runs a part until a time.
        changed: called whenever a section has changed.
        clock: the time in seconds.
    """
    for number, (part, section) in enumerate(zip(parts, sections, strict=True)):
        start = clock()
        left = deadline - _END - start
        section.budget = max(budget(parts[number:], left), 0.0)
        if section.budget < part.minimum:
            section.status = SKIPPED
            section.notes.append(f"Skipped: {section.budget:.0f} s were left for it, and it needs {part.minimum:.0f} s.")
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
    """Run a part's process, which saves its section to `file`; it is killed at `until`, with all processes that it started.

    Args:
        command: that runs the part.
        section: updated while the process runs.
        file: of the section.
        log: gets the process's output.
        until: as `time.time()`.
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
        section.notes.append("The budget was used up, and the process was killed: the table has the rows that were complete.")
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
    """Kill a process that leads its group, and what is left of the group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_here(part: Part, context: Context, section: Section) -> int:
    """Run a part in this process; an error is recorded in its section. Returns the exit code."""
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
