"""Which files of a directory are a run's own: known by their full names, never by a pattern, and never through a link."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from fa_bench.errors import RunDirectoryError, names
from fa_bench.loggers.events.files import EVENT_NAME, EVENTS, NEW_EVENTS, recorded_events
from fa_bench.runs.readers import HEADER
from fa_bench.utils.files import CONFIG, CURVES, LOG, METRICS, RESULT, check_lock, temporary_name

CHECKPOINTS, LAST, PREVIOUS = "checkpoints", "last.pt", "previous.pt"
#: The lock, and who holds it.
LOCK, HOLDER = ".lock", ".holder.json"
_WRITTEN = (CONFIG, METRICS, CURVES, RESULT, HOLDER, EVENTS)
TEMPORARIES = (NEW_EVENTS, *map(temporary_name, _WRITTEN))
CHECKPOINT_TEMPORARIES = (temporary_name(LAST), temporary_name(PREVIOUS))
#: What a start that was killed before it wrote the config leaves beside the lock, and how each of these files begins.
_FIRST = {HOLDER: b'{"pid"', temporary_name(HOLDER): b'{"pid"', temporary_name(CONFIG): HEADER.encode()}
#: What others put there unasked, such as Hydra on request, file managers and fa-bench-report: neither touched nor refused.
_LEFT_ALONE = re.compile(r"\.hydra|(cli|fa_bench)\.log|\.DS_Store|Thumbs\.db|desktop\.ini|"
                         r"\.{0,2}report([_.][\w.-]+)?\.(md|csv|png|json|lock)(\.tmp)?")
#: Temporary files that earlier versions named after their process; left where they are.
_EARLIER = re.compile(rf"\.({'|'.join(map(re.escape, (CONFIG, METRICS, RESULT, LAST, 'events')))})\.\d+\.tmp")


def own_files(directory: Path, keep: bool) -> Iterator[Path]:
    """What a run removes as it starts, in order: checkpoints first, for those of other code must not outlive the config.

    Args:
        directory: the run's.
        keep: whether the run goes on from its checkpoint; then only its result and what was half written go.
    """
    if not keep:
        yield from (directory / CHECKPOINTS / name for name in (LAST, PREVIOUS))
    yield from (directory / CHECKPOINTS / name for name in CHECKPOINT_TEMPORARIES)
    yield from (directory / name for name in TEMPORARIES)
    yield directory / RESULT
    if not keep:
        yield from (directory / name for name in (LOG, METRICS, CURVES, *recorded_events(directory), EVENTS))


def check_own(directory: Path, is_own_events: Callable[[Path], bool] | None) -> None:
    """Refuse a directory with anything in it that is not a run's, or that is a link where a run has a file.

    Args:
        directory: exists.
        is_own_events: whether an event file is the run's, for a directory without a record, as earlier versions left it; None
            where the directory is not known to be the run's.

    Raises:
        RunDirectoryError: naming what is there.
    """
    files = {LOCK, LOG, *_WRITTEN, *TEMPORARIES, *recorded_events(directory)}
    foreign = []
    try:
        for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
            if _LEFT_ALONE.fullmatch(entry.name):
                continue
            if entry.name == CHECKPOINTS:
                _check_kind(Path(entry.path), folder=True)
                foreign += _foreign_checkpoints(Path(entry.path))
            elif entry.name in files:
                _check_kind(Path(entry.path))
                if is_own_events is None and not _comes_first(Path(entry.path)):
                    foreign.append(entry.name)
            elif is_own_events is None or not _made_earlier(Path(entry.path), is_own_events):
                foreign.append(entry.name)
    except FileNotFoundError:  # another process has ended meanwhile; whoever goes on looks again with the lock
        return
    except OSError as error:
        if isinstance(error, RunDirectoryError):
            raise
        raise RunDirectoryError(f"{directory}: cannot be read ({error.strerror})") from None
    if foreign:
        shown = names(map(repr, foreign[:3])) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise RunDirectoryError(f"{directory}: holds {shown}, no part of a run; choose another directory, or move that away")
    check_lock(directory / LOCK)


def _comes_first(path: Path) -> bool:
    """Whether a file with a name of a run's may be one in a directory without a config, which a run writes before the others."""
    if path.name in (LOCK, CONFIG):  # the one is checked by its text, the other belongs to a run of another kind
        return True
    begins = _FIRST.get(path.name)
    return begins is not None and begins.startswith(path.read_bytes()[:len(begins)])


def _foreign_checkpoints(folder: Path) -> list[str]:
    foreign = []
    for name in sorted(os.listdir(folder)):
        if name in (LAST, PREVIOUS, *CHECKPOINT_TEMPORARIES):
            _check_kind(folder / name)
        elif not _LEFT_ALONE.fullmatch(name) and not _EARLIER.fullmatch(name):
            foreign.append(f"{CHECKPOINTS}/{name}")
    return foreign


def _check_kind(path: Path, folder: bool = False) -> None:
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        raise RunDirectoryError(f"{path}: a link; a run follows and removes none: remove it, or choose another directory")
    if not (stat.S_ISDIR(mode) if folder else stat.S_ISREG(mode)):
        raise RunDirectoryError(f"{path}: not a {'folder' if folder else 'file'}, as a run has there; choose another directory")


def _made_earlier(path: Path, is_own_events: Callable[[Path], bool]) -> bool:
    """Whether an earlier version of fa_bench left a file in a run's directory, which had no record of such names."""
    if not stat.S_ISREG(path.lstat().st_mode):
        return False
    if _EARLIER.fullmatch(path.name):
        return True
    return EVENT_NAME.fullmatch(path.name) is not None and (path.stat().st_size == 0 or is_own_events(path))
