"""Read JSON that may be damaged, edited or forged, and check every value before it is used.

A check is a function of the key and the value that raises an error if the value is not allowed. An error names the file, the key,
its value and the allowed values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from fa_bench.errors import DataError, FaBenchError, names, nearest, printable, truncate

#: The limits on the nesting depth, on the size of a file in bytes, and on the number of characters of a value in a message.
MAX_DEPTH, MAX_BYTES, MAX_VALUE = 20, 2**30, 60
#: The largest finite number allowed in a record. No run measures larger numbers, and they would make the statistics and axes of a
#: report overflow.
MAX_NUMBER = 1e100

Check = Callable[[str, Any], None]


class RecordError(DataError):
    """A file of a run is damaged, or is not the expected kind of file; `path` is the file, `problem` describes the problem."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path, self.problem = path, problem


class _InvalidValue(Exception):
    def __init__(self, key: str, value: Any, allowed: str, choices: Collection[str] = ()) -> None:
        hint = nearest(value, choices) if choices and isinstance(value, str) else ""
        key, value = (truncate(printable(text), MAX_VALUE) for text in (key, repr(value)))
        super().__init__(f"{key}={value} (allowed: {allowed}){hint}")


def value_of(allowed: str, is_valid: Callable[[Any], bool]) -> Check:
    """A check of a single value; `allowed` describes the valid values in words."""

    def check(key: str, value: Any) -> None:
        if not is_valid(value):
            raise _InvalidValue(key, value, allowed)

    return check


def one_of(choices: Collection[str]) -> Check:
    """A check that a value is one of the choices; its error message suggests the closest choice."""

    def check(key: str, value: Any) -> None:
        if value not in choices:
            raise _InvalidValue(key, value, names(choices), choices)

    return check


def nullable(check: Check) -> Check:
    """A check that accepts null, and any value that passes `check`."""

    def check_nullable(key: str, value: Any) -> None:
        if value is not None:
            check(key, value)

    return check_nullable


def list_of(check: Check) -> Check:
    """A check of a list whose items pass `check`."""

    def check_list(key: str, value: Any) -> None:
        A_LIST(key, value)
        for index, item in enumerate(value):
            check(f"{key}[{index}]", item)

    return check_list


def mapping_to(check: Check) -> Check:
    """A check of a mapping whose values pass `check`."""

    def check_items(key: str, value: Any) -> None:
        A_MAPPING(key, value)
        for name, item in value.items():
            check(f"{key}.{name}", item)

    return check_items


def mapping_of(checks: Mapping[str, Check]) -> Check:
    """A check of a mapping, with a check for each known key; other keys are ignored."""

    def check_keys(key: str, value: Any) -> None:
        A_MAPPING(key, value)
        for name in checks.keys() & value.keys():
            checks[name](f"{key}.{name}" if key else name, value[name])

    return check_keys


def complete(check: Check, required: tuple[str, ...]) -> Check:
    """A check of a mapping that also requires some keys to be present."""

    def check_complete(key: str, value: Any) -> None:
        check(key, value)
        for name in required:
            if name not in value:
                raise _InvalidValue(f"{key}.{name}", None, "a value")

    return check_complete


def is_int(value: Any, minimum: int = -(2**63)) -> bool:
    """Whether a value is a whole number of at most 64 bits that is at least `minimum`."""
    # Integers with hundreds of digits cannot be converted to a float.
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value < 2**63


def is_number(value: Any) -> bool:
    """Whether a value is a number. NaN and infinity are allowed, but other numbers must not exceed MAX_NUMBER in magnitude."""
    return (isinstance(value, float) and not MAX_NUMBER < abs(value) < math.inf) or is_int(value)


def is_fraction(value: Any) -> bool:
    """Whether a value is a number from 0 to 1 or a non-finite number."""
    return is_number(value) and (0 <= value <= 1 or not math.isfinite(value))


def is_path(value: Any) -> bool:
    """Whether a value can be the path of a file."""
    return isinstance(value, str) and value.isprintable() and 0 < len(value.encode()) < 4096


A_LIST = value_of("a list", lambda value: isinstance(value, list))
A_MAPPING = value_of("a mapping", lambda value: isinstance(value, dict))


def read_bytes(path: Path) -> bytes | None:
    """The content of a file; None if it does not exist.

    Raises:
        RecordError: if it is not a file, is too large, or cannot be read.
    """
    try:
        if not path.exists():
            return None
        if not path.is_file():  # reading a pipe would block
            raise RecordError(path, "not a file")
        if path.stat().st_size > MAX_BYTES:
            raise RecordError(path, f"larger than {MAX_BYTES} bytes")
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except FaBenchError:
        raise
    except OSError as error:
        raise RecordError(path, f"unreadable: {error.strerror or error}") from None


def parse_json(text: bytes, path: Path) -> Any:
    """Parse JSON text and return its value.

    Raises:
        RecordError: if the text is not JSON, or is nested too deeply.
    """
    too_deep = RecordError(path, f"nested deeper than {MAX_DEPTH} levels")
    try:
        value = json.loads(text)
    except RecursionError:
        raise too_deep from None
    except ValueError as error:
        raise RecordError(path, f"unreadable: {error}") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        containers = [item for item in level if isinstance(item, (dict, list))]
        level = [item for each in containers for item in (each.values() if isinstance(each, dict) else each)]
    if level:
        raise too_deep
    return value


def check_value(check: Check, value: Any, path: Path, prefix: str = "") -> None:
    """Check a value that was read from a file.

    Raises:
        RecordError: if the value is not allowed; the message has `prefix` before the key.
    """
    try:
        check("", value)
    except _InvalidValue as error:
        raise RecordError(path, f"{prefix}{str(error).removeprefix('=')}") from None
