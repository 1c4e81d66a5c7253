"""Worker processes of a sweep exit when the process that started the sweep ends, even if it is killed."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from multiprocessing.connection import wait

#: The number of seconds between two checks of the parent if there is no sentinel to wait for.
_INTERVAL = 0.2
_watching: set[int] = set()


def exit_with_parent(starter: int) -> None:
    """Make this process exit as soon as its parent has ended.

    This has no effect in the process that started the sweep, or in a process that multiprocessing did not start, such as a Slurm
    job. The process ends as if it had been killed, and the next start resumes from the last checkpoint.

    Args:
        starter: the pid of the process that started the sweep.
    """
    if os.getpid() == starter or os.getpid() in _watching or multiprocessing.current_process().name == "MainProcess":
        return
    _watching.add(os.getpid())
    parent = multiprocessing.parent_process()
    if parent is None and os.getppid() != starter:  # the starter has ended; joblib's processes do not record their parent
        os._exit(1)
    threading.Thread(target=_watch, args=(None if parent is None else parent.sentinel, starter), daemon=True).start()


def _watch(sentinel: int | None, starter: int) -> None:
    if sentinel is not None:
        wait([sentinel])
    else:
        while os.getppid() == starter:
            time.sleep(_INTERVAL)
    os._exit(1)
