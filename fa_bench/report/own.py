"""Which files of a folder a report may replace: those that reports wrote there, by their names in a record of the folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import Timeout

from fa_bench.errors import OutputError, RunDirectoryError
from fa_bench.utils.files import check_temporary, output_errors, write_text
from fa_bench.utils.locks import PATIENCE, locked

#: How the names of a report's files begin, and the names that every report has or may have.
NAME = "report"
MARKDOWN = f"{NAME}.md"
_ALWAYS = (MARKDOWN, f"{NAME}.csv", f"{NAME}_layers.csv", f"{NAME}_published.csv", f"{NAME}.png")
#: The record: the names of the files that reports wrote in its folder. Of a report without one, its own links tell.
RECORD, LOCK = f".{NAME}.json", f".{NAME}.lock"
_OWN_NAME = re.compile(rf"{NAME}(_[\w.-]+)?\.(md|csv|png)")
_BEGINS = "# Report\n"


@contextmanager
def turn(folder: Path) -> Iterator[None]:
    """Be the only process that writes a report into `folder`, which is made where it is not there.

    Raises:
        RunDirectoryError: another process does.
        OutputError: it cannot be written.
    """
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = locked(folder / LOCK)
    try:
        lock.__enter__()
    except Timeout:
        raise RunDirectoryError(f"{folder}: another report has been written there for {PATIENCE:g} s; try again") from None
    except OSError as error:
        if isinstance(error, RunDirectoryError):
            raise
        raise OutputError(f"{folder}: cannot be written ({error.strerror or error})") from None
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def written(folder: Path) -> set[str]:
    """The names of the files in `folder` that reports wrote there.

    Raises:
        RunDirectoryError: where something else has the record's name.
    """
    path = folder / RECORD
    if not os.path.lexists(path):
        return _linked(folder / MARKDOWN)
    try:
        names = json.loads(path.read_bytes()) if path.is_file() and not path.is_symlink() else None
    except (OSError, ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) and _OWN_NAME.fullmatch(name) for name in names):
        raise RunDirectoryError(f"{path}: not the record of a report's files; move it away")
    return set(names)


def claim(path: Path) -> Path:
    """`path`, once it is recorded as a report's own; to be called before the file is written.

    Raises:
        RunDirectoryError: there is something at `path` that no report wrote.
    """
    own = written(path.parent)
    _check(path, own)
    if path.name not in own or not (path.parent / RECORD).exists():
        record(path.parent, {*own, path.name})
    return path


def record(folder: Path, names: set[str]) -> None:
    """Record which files in `folder` are a report's."""
    check_temporary(folder / RECORD, b'["report')
    write_text(folder / RECORD, json.dumps(sorted(names)) + "\n")


def check(folder: Path) -> None:
    """Refuse a folder where a report could not be written, before what it is to report on is run.

    Raises:
        RunDirectoryError: naming a file in the report's way that no report wrote.
    """
    check_temporary(folder / RECORD, b'["report')
    own = written(folder)
    for name in _ALWAYS:
        _check(folder / name, own)


def _check(path: Path, own: set[str]) -> None:
    if path.name not in own:
        check_temporary(path, b"")
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file() or path.name not in own):
        raise RunDirectoryError(f"{path}: not written by a report of fa-bench, which would replace it; move it away")


def _linked(markdown: Path) -> set[str]:
    """A report's name, and those of the tables and figures that it shows; of versions that kept no record."""
    if markdown.is_symlink() or not markdown.is_file():
        return set()
    text = markdown.read_text(encoding="utf-8", errors="replace")
    return {MARKDOWN, *re.findall(rf"\]\(({NAME}[\w.-]*\.(?:png|csv))\)", text)} if text.startswith(_BEGINS) else set()
