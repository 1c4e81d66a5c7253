"""Which process writes a run's directory: one at a time, by a lock."""

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
from fa_bench.runs.ownership import HOLDER, LOCK
from fa_bench.utils.files import write_text
from fa_bench.utils.locks import locked


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
