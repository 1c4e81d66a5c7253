"""Writing files so that a reader sees the old one or the new one, never a part."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fa_bench.errors import OutputError, RunDirectoryError

#: Files of a run's directory.
CONFIG, LOG, METRICS, CURVES, RESULT = "config.yaml", "run.log", "metrics.jsonl", "curves.csv", "result.json"

#: What a lock's file says: nothing, or who holds it, as earlier versions wrote and filelock does on file systems without locks.
_LOCK_TEXT = re.compile(rb"\Z|\{\"pid\"|\d+\r?\n[^\n]+\n\d+\r?\n\Z")

def temporary_name(name: str) -> str:
    """What a file is called while it is being written."""
    return f".{name}.tmp"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within it whatever hinders writing `path` becomes an OutputError that names it and the reason."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes the place of `path` once the block ends well.

    The name follows from that of `path`, so that what a killed process left is replaced: one process at a time may write `path`.

    Raises:
        OutputError: where the file cannot be written; the old one is still there.
    """
    temporary = path.with_name(temporary_name(path.name))
    with writing(path):
        try:
            temporary.unlink(missing_ok=True)  # a link in its place would lead elsewhere
            yield temporary
            with temporary.open("rb+") as written:  # Windows syncs no file that is open for reading alone
                os.fsync(written.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_with(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` produce a file, atomically."""
    with atomic(path) as temporary:
        write(temporary)


def resolved(path: Path) -> Path:
    """The path without links, as far as they lead anywhere: `Path.resolve` raises for links that lead in a circle."""
    return Path(os.path.realpath(path))


def check_lock(path: Path) -> None:
    """Taking a lock empties its file: one with somebody's text, or another name elsewhere, is not taken."""
    try:
        kind = path.lstat()
        if kind.st_nlink == 0:  # its holder removes it this moment
            return
        if stat.S_ISREG(kind.st_mode) and kind.st_nlink == 1 and _LOCK_TEXT.match(path.read_bytes()[:4096]):
            return
    except OSError:  # none there, or, on Windows, one that is held
        return
    raise RunDirectoryError(f"{path}: not the lock of a run; choose another directory")


def check_half_written(path: Path, begins: bytes) -> None:
    """Refuse to write `path` for the first time where something else has its temporary name, which would be replaced.

    Args:
        path: the file to be written.
        begins: how it begins; what a killed process left half written does, too. Empty: nothing of it was written yet.
    """
    temporary = path.with_name(temporary_name(path.name))
    if os.path.lexists(path) or not os.path.lexists(temporary):
        return
    kind = temporary.lstat()
    own = stat.S_ISREG(kind.st_mode) and kind.st_nlink == 1
    if own and kind.st_size:
        own = begins != b"" and begins.startswith(temporary.read_bytes()[:len(begins)])
    if not own:
        raise RunDirectoryError(f"{temporary}: not written by fa-bench, which would replace it; move it away")


def check_place(path: Path) -> None:
    """Refuse a directory that can neither be made nor written to, or is the root, before a run takes its time.

    Raises:
        RunDirectoryError: naming the part of the path that is in the way, and why.
    """
    try:
        if "\0" in str(path):
            raise ValueError("a zero byte")  # which `is_dir` takes for a folder that is not there
        # Also as the links on the way make it.
        if any(place == Path(place.anchor) for place in (Path(os.path.abspath(path)), path.resolve())):
            raise RunDirectoryError(f"{path}: the root of the file system is no folder for runs; choose another output_dir")
        for part in (path, *path.parents):
            if part.is_dir():
                # Told by the system for a folder that is there alone, not for one below folders that are to be made.
                longest = os.pathconf(part, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
                if any(len(os.fsencode(name)) > longest for name in path.relative_to(part).parts):
                    raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
                if not os.access(part, os.W_OK | os.X_OK):  # a file system that may only be read says so, too
                    raise RunDirectoryError(f"{part}: no permission to write there; choose another output_dir")
                return
            if part.is_symlink():
                raise RunDirectoryError(f"{part}: a link that leads nowhere; remove it, or choose another output_dir")
            if part.exists():
                raise RunDirectoryError(f"{part}: a file, and no folder for runs; choose another output_dir")
    except RunDirectoryError:
        raise
    except (OSError, RuntimeError) as error:  # links that lead back to themselves are either, by the version of Python
        raise RunDirectoryError(f"{_cut(path)}: no possible folder ({getattr(error, 'strerror', None) or error})") from None
    except ValueError as error:
        raise RunDirectoryError(f"{str(path)!r}: no possible folder ({error})") from None


def _cut(path: Path) -> str:
    return text if len(text := str(path)) <= 200 else f"{text[:197]}..."


def cannot_write(error: OSError, path: Path | None = None) -> str:
    """One line about an operating system's error: the path (its own, or `path`) and the reason."""
    return f"{error.filename or path or 'output'}: cannot be written ({error.strerror or error})"


def dump_json(value: Any, indent: int | None = None) -> str:
    """JSON with null where a number is not finite: JSON has no NaN."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
