"""Writing files so that a reader sees the old one or the new one, never a part."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fa_bench.errors import OutputError

#: How the names of files end that are being written; killed processes leave them behind.
TEMPORARY = ".tmp"
#: Files of a run's directory.
CONFIG, LOG, METRICS, RESULT = "config.yaml", "run.log", "metrics.jsonl", "result.json"


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

    Raises:
        OutputError: where the file cannot be written; the old one is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    with writing(path):
        try:
            yield temporary
            with temporary.open("rb") as written:
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


def dump_json(value: Any, indent: int | None = None) -> str:
    """JSON with null where a number is not finite: JSON has no NaN."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
