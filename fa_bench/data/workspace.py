"""A temporary folder in a folder that several processes share: one of them has it at a time, and none is left for ever."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from fa_bench.errors import DataError, RunDirectoryError
from fa_bench.utils.locks import locked

#: Says, within a folder, that it is one of these, and may be removed.
_MARK = ".made-by-fa-bench"


@contextlib.contextmanager
def workspace(path: Path) -> Iterator[Path]:
    """An empty folder at `path` that no other process uses meanwhile; removed at the end.

    The name is fixed, so that what a killed process left there is removed by the next one that does the same thing.

    Raises:
        DataError: where something else than a folder is at `path`.
        OSError: where the folder cannot be made or locked.
    """
    lock = path.with_name(f"{path.name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(lock, wait=True))
        except RunDirectoryError:
            raise DataError(f"{lock}: is no lock, but fa-bench would take it for one; remove or rename it") from None
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
