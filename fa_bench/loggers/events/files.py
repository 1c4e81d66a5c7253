"""The record of the event files that a run has made, by which it knows them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from fa_bench.utils.files import write_text

#: The names of the event files that the run has made: TensorBoard wants them to have names of their own.
EVENTS = ".events.json"
#: An event file that is being written; a watching TensorBoard lists every name with "tfevents" in it.
NEW_EVENTS = ".events.tmp"
EVENT_NAME = re.compile(r"events\.out\.tfevents\.\d{10,}\.[^/\\]+\.\d+\.0")


def recorded_events(directory: Path) -> list[str]:
    """The names of the event files that the run in `directory` recorded as its own, in the order in which it made them."""
    try:
        found = json.loads((directory / EVENTS).read_bytes())
    except (OSError, ValueError):
        return []
    return [name for name in found if isinstance(name, str) and EVENT_NAME.fullmatch(name)] if isinstance(found, list) else []


def record_events(directory: Path, files: Iterable[str]) -> None:
    """Record the names of a run's event files; to be called before they are made.

    Raises:
        OutputError: where that cannot be written.
    """
    write_text(directory / EVENTS, json.dumps(list(files)) + "\n")
