"""Who writes a run's directory: one process at a time, by a lock that ends with the process, however it ends.

The lock is filelock's, which other processes forked from its holder, such as those that read data, do not inherit.
"""

from __future__ import annotations

import json
import os
import platform
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fa_bench.errors import HeldError, OutputError, RunDirectoryError
from fa_bench.files import check_lock, write_text
from fa_bench.runs.ownership import HOLDER, LOCK

#: How long to try for a lock, in seconds: whoever looks whether it is held holds it for a moment, and a killed process takes one.
PATIENCE = 3.0


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file at `path`, whose folder exists; it is removed in the end.

    Raises:
        Timeout: where another process holds it.
        RunDirectoryError: where something else has its name.
        OSError: where it cannot be made.
    """
    check_lock(path)
    lock = FileLock(path, timeout=PATIENCE, poll_interval=0.02)
    with lock:
        try:
            yield
        finally:
            with suppress(OSError):  # Windows removes no open file; one that stays is taken again
                path.unlink()


@contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Be the only process that writes a directory, which is made where it is not there.

    Raises:
        HeldError: naming the process that writes it.
        OutputError: where the directory cannot be made or written.
    """
    about = {"pid": os.getpid(), "host": platform.node(), "command": " ".join(sys.argv),
             "started": datetime.now().astimezone().isoformat(timespec="seconds")}
    lock = locked(directory / LOCK)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.__enter__()
    except Timeout:
        raise HeldError(f"{directory}: {_in_words(_said(directory))} writes here; "
                        "wait for it, or choose another directory") from None
    except RunDirectoryError:
        raise
    except OSError as error:
        raise OutputError(f"{directory}: cannot be written ({error.strerror or error})") from None
    try:
        write_text(directory / HOLDER, json.dumps(about))
        yield
    finally:
        with suppress(OSError):
            (directory / HOLDER).unlink()
        lock.__exit__(None, None, None)


def holder(directory: Path) -> dict[str, Any] | None:
    """Who writes a run's directory: pid, host, command, started; None where nobody does."""
    path = directory / LOCK
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return None
        with FileLock(path, timeout=0):
            return None
    except Timeout:
        return _said(directory)
    except PermissionError:  # somebody else's: what it says is all there is
        return _said(directory) or None
    except OSError:
        return None


def _said(directory: Path) -> dict[str, Any]:
    """What the holder says of itself; nothing in the moment before it does."""
    try:
        about = json.loads((directory / HOLDER).read_bytes())
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def _in_words(about: dict[str, Any]) -> str:
    if not about:
        return "another process"
    return f"process {about.get('pid')} on {about.get('host')} (since {about.get('started')}: {about.get('command')})"
