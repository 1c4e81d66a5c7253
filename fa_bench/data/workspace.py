"""A temporary folder in a shared folder. Only one process uses it at a time, and files left by a killed process are removed."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from fa_bench.errors import DataError, RunDirectoryError
from fa_bench.utils.locks import locked

#: A file that marks a folder as created by `workspace`, so that the folder may be removed.
_MARK = ".made-by-fa-bench"


@contextlib.contextmanager
def workspace(path: Path) -> Iterator[Path]:
    """Create an empty folder at `path` that is locked for this process and is removed at the end.

    The path is fixed, so the next process removes the files that a killed process left there.

    Raises:
        DataError: if `path` or its lock was not created by fa-bench.
        OSError: if the folder cannot be created or locked.
    """
    lock = path.with_name(f"{path.name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(lock, wait=True))
        except RunDirectoryError:
            raise DataError(f"{lock}: not a lock file of fa-bench; remove or rename it") from None
        _remove(path)
        path.mkdir()
        (path / _MARK).touch()
        try:
            yield path
        finally:
            with contextlib.suppress(OSError):
                _remove(path)


def _remove(path: Path) -> None:
    """Remove the folder; raises a DataError for a link, a file, or a folder with contents that fa-bench did not create."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise DataError(f"{path}: not a folder, but fa-bench downloads and unpacks there; remove or rename it")
    if path.exists():
        if not (path / _MARK).exists() and any(path.iterdir()):
            raise DataError(f"{path}: contains other files, but fa-bench downloads and unpacks there; remove or rename it")
        for entry in path.iterdir():  # the mark is removed last, so that an interrupted removal leaves a marked folder
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != _MARK:
                entry.unlink()
        shutil.rmtree(path)
