"""Write files atomically, so that a reader sees either the old file or the new one but never an incomplete one. Check paths
before runs write to them."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fa_bench.errors import FaBenchError, OutputError, RunDirectoryError, printable, truncate

#: The names of files in a run directory.
CONFIG, LOG, METRICS, CURVES, RESULT = "config.yaml", "run.log", "metrics.jsonl", "curves.csv", "result.json"
ANGLES = "angles.jsonl"

#: The allowed content of a lock file: nothing, or the record of the lock holder that filelock writes on file systems without
#: locks.
_LOCK_TEXT = re.compile(rb"\Z|\d+\r?\n[^\n]+\n\d+\r?\n\Z")


def temporary_name(name: str) -> str:
    """The temporary name of a file while it is being written."""
    return f".{name}.tmp"


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn any OSError within the block into an OutputError that names `path` and the reason."""
    try:
        yield
    except FaBenchError:
        raise
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder as `path`. A file written to the temporary path replaces `path` if the block ends
    without an error.

    The temporary name depends only on the name of `path`, so a file left by a killed process is replaced. Only one process at a
    time may write to `path`.

    Raises:
        OutputError: if the file cannot be written; the old file is unchanged.
    """
    temporary = path.with_name(temporary_name(path.name))
    with output_errors(path):
        try:
            temporary.unlink(missing_ok=True)  # if it is a link, writing would follow it
            yield temporary
            with temporary.open("rb+") as file:  # Windows cannot sync a file opened read-only
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def resolved(path: Path) -> Path:
    """The path with links resolved as far as possible; `Path.resolve` would raise an error for circular links."""
    return Path(os.path.realpath(path))


def check_lock(path: Path) -> None:
    """Refuse a path where there is anything but a lock file. Locking truncates the file, so its content must be that of a lock
    file, and there must be no other hard links to it."""
    try:
        status = path.lstat()
        if status.st_nlink == 0:  # the lock holder is removing it right now
            return
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and _LOCK_TEXT.match(path.read_bytes()[:4096]):
            return
    except OSError:  # it does not exist or, on Windows, is locked
        return
    raise RunDirectoryError(f"{path}: not a lock file; choose another directory")


def check_temporary(path: Path, prefix: bytes) -> None:
    """Refuse to create `path` if a file that fa-bench did not write has its temporary name, because that file would be replaced.

    Args:
        path: the file to be written.
        prefix: the first bytes of the file; a killed process may have written only some of them. If `prefix` is empty, the
            temporary file must be empty.
    """
    temporary = path.with_name(temporary_name(path.name))
    if os.path.lexists(path) or not os.path.lexists(temporary):
        return
    status = temporary.lstat()
    is_ours = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
    if is_ours and status.st_size:
        is_ours = prefix != b"" and prefix.startswith(temporary.read_bytes()[: len(prefix)])
    if not is_ours:
        raise RunDirectoryError(f"{temporary}: not written by fa-bench, which would overwrite it; move it elsewhere")


def refuse_root(path: Path, key: str) -> None:
    """Refuse the root of the file system as a folder for runs.

    Raises:
        RunDirectoryError: if `path` is the root; the message names the key that sets the path.
    """
    if "\0" in str(path):
        return  # `check_writable` refuses it
    if any(each == Path(each.anchor) for each in (Path(os.path.abspath(path)), resolved(path))):
        raise RunDirectoryError(f"{key}={path}: the root of the file system, where runs cannot be written; choose another folder")


def check_writable(path: Path) -> None:
    """Refuse, before training, a directory that cannot be created or written to.

    Raises:
        RunDirectoryError: if the directory is refused; the message names the path, or the part of it that is the obstacle, and
            the reason.
    """
    try:
        if "\0" in str(path):
            raise OSError("it contains a zero byte")  # `is_dir` would only say that there is no such directory
        path.resolve()  # raises an error for circular links
        for part in (path, *path.parents):
            if part.is_dir():
                # The operating system checks the length of a name only if its parent directory exists.
                longest = os.pathconf(part, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
                if any(len(os.fsencode(name)) > longest for name in path.relative_to(part).parts):
                    raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
                if not os.access(part, os.W_OK | os.X_OK):  # also fails on a read-only file system
                    raise RunDirectoryError(f"{part}: no permission to write there; choose another output_dir")
                return
            if part.is_symlink():
                raise RunDirectoryError(f"{part}: a broken link; remove it, or choose another output_dir")
            if part.exists():
                raise RunDirectoryError(f"{part}: a file, not a directory; choose another output_dir")
    except RunDirectoryError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # for circular links, the type depends on the version of Python
        reason = getattr(error, "strerror", None) or error
        raise RunDirectoryError(f"{truncate(printable(path), 200)}: not a valid directory ({reason})") from None


def write_failure(error: OSError) -> str:
    """A one-line message about an error of the operating system, with the path and the reason."""
    return f"{error.filename or 'output'}: cannot be written ({error.strerror or error})"


def dump_json(value: Any, indent: int | None = None) -> str:
    """The value as JSON text, with null for numbers that are not finite, because JSON has no NaN."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
