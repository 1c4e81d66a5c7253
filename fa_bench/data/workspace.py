"""A temporary folder in a folder that several processes share: one of them has it at a time, and none is left for ever."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from fa_bench.errors import DataError, RunDirectoryError
from fa_bench.files import check_lock

#: Says, within a folder, that it is one of these, and may be removed.
_MARK = ".made-by-fa-bench"
log = logging.getLogger("fa_bench")


@contextlib.contextmanager
def workspace(path: Path) -> Iterator[Path]:
    """An empty folder at `path` that no other process uses meanwhile; removed at the end.

    The name is fixed, so that what a killed process left there is removed by the next one that does the same thing.

    Raises:
        DataError: where something else than a folder is at `path`.
        OSError: where the folder cannot be made or locked.
    """
    lock = path.with_name(f"{path.name}.lock")
    try:
        check_lock(lock)
    except RunDirectoryError:
        raise DataError(f"{lock}: is no lock, but fa-bench would take it for one; remove or rename it") from None
    with _locked(lock):
        _remove(path)
        path.mkdir()
        (path / _MARK).touch()
        try:
            yield path
        finally:
            with contextlib.suppress(OSError):
                _remove(path)


def _remove(path: Path) -> None:
    """Remove the folder; a link or a file of its name is somebody else's."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise DataError(f"{path}: is no folder, but fa-bench unpacks and downloads there; remove or rename it")
    if path.exists():
        if not (path / _MARK).exists() and any(path.iterdir()):
            raise DataError(f"{path}: holds somebody's files, but fa-bench unpacks and downloads there; remove or rename it")
        for entry in path.iterdir():  # the mark goes last: a removal that is killed leaves a folder that is known
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != _MARK:
                entry.unlink()
        shutil.rmtree(path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file at `path`; it is removed at the end."""
    from filelock import FileLock, Timeout

    lock, waits = FileLock(path), False
    while True:
        # The file may be removed, and made again by a third process, between being opened and being locked. It was not where its
        # number is the same before and after: a number is not given again while the file is open here.
        with _opened(path) as before:
            try:
                lock.acquire(timeout=-1 if waits else 0)
            except Timeout:
                log.info("waiting for another process, which holds %s", path)
                waits = True
                continue
            if _same(path, before):
                break
        lock.release()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows keeps a file that another process has opened
            path.unlink()
        lock.release()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[os.stat_result]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        yield os.fstat(descriptor)
    finally:
        os.close(descriptor)


def _same(path: Path, before: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), before)
    except FileNotFoundError:
        return False
