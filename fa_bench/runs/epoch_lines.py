"""The lines of a run's metrics.jsonl, one an epoch, as the run itself takes them up again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fa_bench.errors import RunDirectoryError

#: What every line has beside its epoch: numbers, or null.
SCALARS = ("train_loss", "val_loss", "test_loss", "train_accuracy", "val_accuracy", "test_accuracy", "lr")


def recorded_lines(path: Path, epochs: int) -> list[str]:
    """The first lines of a run's metrics.jsonl, one for each of so many epochs.

    Raises:
        RunDirectoryError: naming the file and the line that is missing or is not the record of its epoch.
    """
    try:
        lines = path.read_bytes().splitlines() if epochs else []
    except OSError as error:
        raise RunDirectoryError(f"{path}: cannot be read ({error.strerror})") from None
    for number in range(1, epochs + 1):
        if number > len(lines):
            raise RunDirectoryError(f"{path}: damaged ({len(lines)} of {epochs} epochs are there)")
        try:
            record = json.loads(lines[number - 1])
            whole = record["epoch"] == number and all(_is_number(record[key]) for key in SCALARS)
        except (ValueError, KeyError, TypeError, RecursionError):
            whole = False
        if not whole:
            raise RunDirectoryError(f"{path}: damaged (line {number} is not the record of epoch {number})")
    return [line.decode() for line in lines[:epochs]]


def _is_number(value: Any) -> bool:
    return value is None or type(value) in (int, float)
