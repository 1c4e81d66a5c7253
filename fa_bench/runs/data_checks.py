"""Whether the data that a finished run was trained on are those that are there now."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fa_bench.config.job import Job
from fa_bench.errors import DataError
from fa_bench.registry.options import as_plain

#: The hashes that this process has found, so that the finished runs of a grid read their data once.
_hashes: dict[str, str] = {}


def forget() -> None:
    """Forget what was found: a new command is about to look."""
    _hashes.clear()


def compare(job: Job, result: dict[str, Any], read: Callable[[], str]) -> tuple[bool, str]:
    """Whether a finished run's result holds for the present data, and a line to say on that, or nothing.

    Data that cannot be read do not make a result wrong; the line then says that they were not compared.

    Args:
        job: the run.
        result: its result.json.
        read: loads the data and gives their hash; raises DataError where they are missing or broken.
    """
    data = [job.dataset.name, as_plain(job.dataset), str(Path(job.run.data_dir).resolve()), job.run.scale]
    key = json.dumps(data, sort_keys=True)
    try:
        now = _hashes[key] = _hashes.get(key) or read()
    except DataError as error:
        return True, f"its data could not be compared ({error})"
    if now == result.get("data_hash"):
        return True, ""
    return False, f"was trained on other data (hash {result.get('data_hash')}; now {now})"
