"""The processes that a launcher starts for a grid's jobs end when the process that started the grid does, even by a kill."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from multiprocessing.connection import wait

#: Seconds between two looks at the parent, where there is nothing to wait for.
_INTERVAL = 0.2
_watched: set[int] = set()


def end_with(starter: int) -> None:
    """End this process as soon as its parent has ended; within the process that started the grid, and in one that no
    multiprocessing started, such as a job of Slurm, nothing happens.

    What is cut short is as after a kill: the next start goes on from the last checkpoint.

    Args:
        starter: the number of the process that started the grid.
    """
    if os.getpid() == starter or os.getpid() in _watched or multiprocessing.current_process().name == "MainProcess":
        return
    _watched.add(os.getpid())
    parent = multiprocessing.parent_process()
    if parent is None and os.getppid() != starter:  # it has ended already; joblib's processes have no record of their parent
        os._exit(1)
    threading.Thread(target=_watch, args=(None if parent is None else parent.sentinel, starter), daemon=True).start()


def _watch(sentinel: int | None, starter: int) -> None:
    if sentinel is not None:
        wait([sentinel])
    else:
        while os.getppid() == starter:
            time.sleep(_INTERVAL)
    os._exit(1)
