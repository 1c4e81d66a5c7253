"""The record of a run's event files, which allows a resumed run to recognise them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from fa_bench.utils.files import write_text

#: The file with the record. The names have to be recorded because TensorBoard requires a unique name for every event file.
EVENTS = ".events.json"
#: An event file that is being written; its name does not contain "tfevents", so TensorBoard ignores it.
NEW_EVENTS = ".events.tmp"
EVENT_NAME = re.compile(r"events\.out\.tfevents\.\d{10,}\.[^/\\]+\.\d+\.0")


def recorded_events(directory: Path) -> list[str]:
    """The recorded names of the event files of the run in `directory`, oldest first."""
    try:
        names = json.loads((directory / EVENTS).read_bytes())
    except (OSError, ValueError):
        return []
    return [name for name in names if isinstance(name, str) and EVENT_NAME.fullmatch(name)] if isinstance(names, list) else []


def record_events(directory: Path, files: Iterable[str]) -> None:
    """Record the names of a run's event files; raises OutputError if the record cannot be written."""
    write_text(directory / EVENTS, json.dumps(list(files)) + "\n")
