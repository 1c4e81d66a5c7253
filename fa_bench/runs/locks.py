"""The lock of a run directory, which allows only one process to write to it."""

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

from fa_bench.errors import DirectoryLockedError
from fa_bench.runs.ownership import HOLDER, LOCK
from fa_bench.utils.files import output_errors, write_text
from fa_bench.utils.locks import locked


@contextmanager
def lock_directory(directory: Path) -> Iterator[None]:
    """Hold the lock of a run directory within the block; the directory is created if it does not exist.

    Raises:
        DirectoryLockedError: if another process holds the lock; the message names that process if it is known.
        OutputError: if the directory cannot be created or written.
    """
    about = {
        "pid": os.getpid(),
        "host": platform.node(),
        "command": " ".join(sys.argv),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    lock = locked(directory / LOCK)
    with output_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        try:
            lock.__enter__()
        except Timeout:
            holder = _read_holder(directory)
            process = "another process"
            if holder:
                started = f"since {holder.get('started')}: {holder.get('command')}"
                process = f"process {holder.get('pid')} on {holder.get('host')} ({started})"
            raise DirectoryLockedError(
                f"{directory}: directory is locked by {process}; wait for it, or choose another directory"
            ) from None
    try:
        write_text(directory / HOLDER, json.dumps(about))
        yield
    finally:
        with suppress(OSError):
            (directory / HOLDER).unlink()
        lock.__exit__(None, None, None)


def lock_holder(directory: Path) -> dict[str, Any] | None:
    """A description of the process that holds a run directory's lock (pid, host, command, started), which is empty until that
    process has written it; None if the directory is not locked."""
    path = directory / LOCK
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return None
        with FileLock(path, timeout=0):
            return None
    except Timeout:
        return _read_holder(directory)
    except PermissionError:  # a lock that belongs to another user cannot be tested
        return _read_holder(directory) or None
    except OSError:
        return None


def _read_holder(directory: Path) -> dict[str, Any]:
    """The description that the holder of the lock has written about itself; empty if it has not written one yet."""
    try:
        about = json.loads((directory / HOLDER).read_bytes())
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}
