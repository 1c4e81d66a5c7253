"""A lock file that one process at a time can hold. The lock is released when the process ends, even if the process is killed.

The lock is implemented by filelock. Processes forked by the lock's holder, such as data workers, do not inherit the lock.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from fa_bench.utils.files import check_lock

#: Seconds to wait for a lock. A process that only checks a lock holds it for a moment, and a killed process takes a moment to
#: end.
PATIENCE = 3.0
log = logging.getLogger("fa_bench")


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock file at `path` within the block. The folder of `path` must exist. The file is removed at the end.

    Args:
        path: the lock file.
        wait: wait until the lock is free rather than for at most `PATIENCE` seconds.

    Raises:
        Timeout: if another process still holds the lock after `PATIENCE` seconds, unless `wait` is true.
        RunDirectoryError: if `path` exists and is not a lock file.
        OSError: if the file cannot be created.
    """
    check_lock(path)
    lock, end, warned = FileLock(path, poll_interval=0.02), time.monotonic() + PATIENCE, False
    while True:
        # Between opening and locking, another process may remove the file, and a third one may create it again. If the inode is
        # the same before and after locking, the file was not replaced, because an inode cannot be reused while the file is open
        # here. On file systems without locks, filelock uses a soft lock, which is held by the process that created the file.
        with nullcontext() if isinstance(lock, SoftFileLock) else _opened(path) as before:
            try:
                lock.acquire(timeout=(-1 if warned else 0) if wait else max(end - time.monotonic(), 0))
            except Timeout:
                if not wait:
                    raise
                log.info("waiting for another process, which holds %s", path)
                warned = True
                continue
            if before is None or _is_same(path, before):
                break
        lock.release()
    try:
        yield
    finally:
        with suppress(OSError):  # Windows cannot remove a file that another process has open
            path.unlink()
        lock.release()


@contextmanager
def _opened(path: Path) -> Iterator[os.stat_result]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        yield os.fstat(descriptor)
    finally:
        os.close(descriptor)


def _is_same(path: Path, before: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.lstat(), before)
    except FileNotFoundError:
        return False
