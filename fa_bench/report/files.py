"""The record of the files that reports wrote to a folder. A report may replace only files that are listed in the record."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import Timeout

from fa_bench.errors import OutputError, RunDirectoryError
from fa_bench.utils.files import check_lock, check_temporary, output_errors, write_text
from fa_bench.utils.locks import PATIENCE, locked

#: The prefix of the names of a report's files except runs.csv, and the files whose names do not depend on the runs.
NAME = "report"
MARKDOWN, PAGE, RUNS = f"{NAME}.md", f"{NAME}.html", "runs.csv"
_COMMON_FILES = (
    MARKDOWN,
    PAGE,
    RUNS,
    f"{NAME}.png",
    *(f"{NAME}.{end}" for end in ("csv", "json", "tex")),
    *(f"{NAME}_{table}.csv" for table in ("layers", "published", "tried", "alarms", "aggregate")),
)
#: The file that records the names of the files that reports wrote to its folder, and the lock file. If there is no record, the
#: links in report.md are used instead.
RECORD, LOCK = f".{NAME}.json", f".{NAME}.lock"
_FILE_NAME = re.compile(rf"{NAME}(_[\w.-]+)?\.(md|html|csv|png|svg|pdf|json|tex)|{re.escape(RUNS)}")
_FIRST_LINE = "# Report\n"


@contextmanager
def report_lock(folder: Path) -> Iterator[None]:
    """Create `folder` if necessary and lock it, so that within the block no other process writes a report into it.

    Raises:
        RunDirectoryError: another process is writing a report there.
        OutputError: the folder cannot be written.
    """
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = locked(folder / LOCK)
    try:
        lock.__enter__()
    except Timeout:
        raise RunDirectoryError(
            f"{folder}: another process is still writing a report there after {PATIENCE:g} s; try again"
        ) from None
    except RunDirectoryError:
        raise
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror or error})") from None
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def recorded_files(folder: Path) -> set[str]:
    """The names of the files that reports wrote to `folder`.

    Raises:
        RunDirectoryError: the file with the record's name is not a record.
    """
    path = folder / RECORD
    if not os.path.lexists(path):
        return _linked_files(folder / MARKDOWN)
    try:
        names = json.loads(path.read_bytes()) if path.is_file() and not path.is_symlink() else None
    except (OSError, ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) and _FILE_NAME.fullmatch(name) for name in names):
        raise RunDirectoryError(f"{path}: not a record of report files; move it elsewhere")
    return set(names)


def covered_directories(folder: Path) -> list[Path]:
    """The existing run directories that the report in `folder` covers, according to its runs.csv; empty if there is no readable
    report."""
    try:
        if RUNS not in recorded_files(folder) or (folder / RUNS).is_symlink():
            return []
        with (folder / RUNS).open(encoding="utf-8", newline="") as file:
            directories = [folder / row["directory"] for row in csv.DictReader(file) if row.get("directory")]
    except (OSError, ValueError, csv.Error):  # an unreadable report may be replaced
        return []
    return [directory for directory in directories if directory.is_dir()]


def register(path: Path) -> Path:
    """Record `path` as a report's file before it is written; returns `path`.

    Raises:
        RunDirectoryError: a file that no report wrote is in the way.
    """
    names = recorded_files(path.parent)
    check_file(path, names)
    if path.name not in names or not (path.parent / RECORD).exists():
        write_record(path.parent, {*names, path.name})
    return path


def write_record(folder: Path, names: set[str]) -> None:
    """Record which files in `folder` belong to a report."""
    check_temporary(folder / RECORD, b'["report')
    write_text(folder / RECORD, json.dumps(sorted(names)) + "\n")


def check_folder(folder: Path) -> None:
    """Refuse a folder into which a report could not be written. This is checked before the runs start.

    Raises:
        RunDirectoryError: a file that no report wrote is in the way.
    """
    check_lock(folder / LOCK)
    check_temporary(folder / RECORD, b'["report')
    names = recorded_files(folder)
    for name in _COMMON_FILES:
        check_file(folder / name, names)


def check_file(path: Path, names: set[str]) -> None:
    """Refuse to replace `path` if it exists, unless it is a regular file and among the report's files `names`.

    Raises:
        RunDirectoryError: `path` must not be replaced; the message names the file.
    """
    if path.name not in names:
        check_temporary(path, b"")
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file() or path.name not in names):
        raise RunDirectoryError(
            f"{path}: not written by a report of fa-bench, but a report would overwrite it; move it elsewhere"
        )


def _linked_files(markdown: Path) -> set[str]:
    """The names of report.md and of the tables and figures that it links to, for reports by versions of fa_bench that
    wrote no record."""
    if markdown.is_symlink() or not markdown.is_file():
        return set()
    text = markdown.read_text(encoding="utf-8", errors="replace")
    if not text.startswith(_FIRST_LINE):
        return set()
    endings = "png|svg|pdf|csv|html|json|tex"
    return {MARKDOWN, *re.findall(rf"\]\(({NAME}[\w.-]*\.(?:{endings})|{re.escape(RUNS)})\)", text)}
