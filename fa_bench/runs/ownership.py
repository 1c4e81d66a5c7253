"""Find the files in a directory that belong to a run. Files are recognised by their full names, never by a pattern, and links are
never followed."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from fa_bench.errors import RunDirectoryError, names
from fa_bench.loggers.events.files import EVENTS, NEW_EVENTS, recorded_events
from fa_bench.runs.readers import HEADER
from fa_bench.utils.files import ANGLES, CONFIG, CURVES, LOG, METRICS, RESULT, check_lock, temporary_name

CHECKPOINTS, LAST, PREVIOUS = "checkpoints", "last.pt", "previous.pt"
#: The lock, and the description of the process that holds it.
LOCK, HOLDER = ".lock", ".holder.json"
_WRITTEN = (CONFIG, METRICS, ANGLES, CURVES, RESULT, HOLDER, EVENTS)
TEMPORARIES = (NEW_EVENTS, *map(temporary_name, _WRITTEN))
CHECKPOINT_TEMPORARIES = (temporary_name(LAST), temporary_name(PREVIOUS))
#: The files other than the lock that may remain from a run that was killed before it wrote its config, with the first bytes of
#: each.
_EARLY_FILES = {HOLDER: b'{"pid"', temporary_name(HOLDER): b'{"pid"', temporary_name(CONFIG): HEADER.encode()}
#: Files of Hydra, file managers and fa-bench-report, which a run neither touches nor refuses.
IGNORED = re.compile(
    r"\.hydra|(cli|fa_bench)\.log|\.DS_Store|Thumbs\.db|desktop\.ini|"
    r"\.{0,2}report([_.][\w.-]+)?\.(md|csv|png|json|lock)(\.tmp)?"
)


def checkpoint_files(directory: Path) -> list[Path]:
    """The paths of a run's checkpoints, newest first; they need not exist."""
    return [directory / CHECKPOINTS / name for name in (LAST, PREVIOUS)]


def removable_files(directory: Path, resume: bool) -> Iterator[Path]:
    """Yield the files that a run removes when it starts. Checkpoints are removed first, because checkpoints of other code must
    not remain after the config has been replaced.

    Args:
        directory: the run's directory.
        resume: whether the run resumes from its checkpoint; then only its result and half-written files are removed.
    """
    if not resume:
        yield from checkpoint_files(directory)
    yield from (directory / CHECKPOINTS / name for name in CHECKPOINT_TEMPORARIES)
    yield from (directory / name for name in TEMPORARIES)
    yield directory / RESULT
    if not resume:
        yield from (directory / name for name in (LOG, METRICS, ANGLES, CURVES, *recorded_events(directory), EVENTS))


def refuse_foreign_files(directory: Path, is_own_run: bool) -> None:
    """Refuse a directory that contains anything other than a run's files, or a link in place of such a file.

    Args:
        directory: an existing directory.
        is_own_run: whether the config in the directory is that of the run; if not, the directory may contain only files that a
            run writes before its config.

    Raises:
        RunDirectoryError: if the directory is refused; the message names the files that are not the run's.
    """
    known = {LOCK, LOG, *_WRITTEN, *TEMPORARIES, *recorded_events(directory)}
    foreign = []
    try:
        for path in sorted(directory.iterdir()):
            if IGNORED.fullmatch(path.name):
                continue
            if path.name == CHECKPOINTS:
                _check_kind(path, is_folder=True)
                foreign += _foreign_checkpoints(path)
            elif path.name in known:
                _check_kind(path)
                if not is_own_run and not _may_precede_config(path):
                    foreign.append(path.name)
            else:
                foreign.append(path.name)
    except FileNotFoundError:  # another process has just ended; the check is repeated once the lock is held
        return
    except RunDirectoryError:
        raise
    except OSError as error:
        raise RunDirectoryError(f"{directory}: cannot be read ({error.strerror})") from None
    if foreign:
        listed = names(map(repr, foreign[:3])) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise RunDirectoryError(
            f"{directory}: contains {listed}, which no run wrote; choose another directory, or move foreign files elsewhere"
        )
    check_lock(directory / LOCK)


def _may_precede_config(path: Path) -> bool:
    """Whether a directory without a config may contain this file because a run writes the file before its config."""
    if path.name in (LOCK, CONFIG):  # `check_lock` checks the text of the lock, and `_check_kind` refuses a link
        return True
    prefix = _EARLY_FILES.get(path.name)
    return prefix is not None and prefix.startswith(path.read_bytes()[: len(prefix)])


def _foreign_checkpoints(folder: Path) -> list[str]:
    foreign = []
    for name in sorted(os.listdir(folder)):
        if name in (LAST, PREVIOUS, *CHECKPOINT_TEMPORARIES):
            _check_kind(folder / name)
        elif not IGNORED.fullmatch(name):
            foreign.append(f"{CHECKPOINTS}/{name}")
    return foreign


def _check_kind(path: Path, is_folder: bool = False) -> None:
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        raise RunDirectoryError(
            f"{path}: a link, which a run neither follows nor removes; remove it, or choose another directory"
        )
    if not (stat.S_ISDIR(mode) if is_folder else stat.S_ISREG(mode)):
        raise RunDirectoryError(f"{path}: not a {'folder' if is_folder else 'file'}; choose another directory")
