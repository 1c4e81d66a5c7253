"""The files of a run, read back and checked: what others wrote there, edited or damaged must not reach a reader as it is.

One reader for each file. An error names the file, the key, its value and what is allowed there. Keys that are not listed here
are passed over, so that records of later versions can be read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fa_bench.errors import ConfigError, DataError, FaBenchError, names, nearest, printable
from fa_bench.utils.files import RESULT

#: How a run's config.yaml begins, and how its second line.
HEADER, CODE_HEADER = "# config hash: ", "# code hash: "
#: How a run may have ended, as its result says.
STATUSES = ("finished", "diverged", "failed", "interrupted")
#: Most levels of nesting, most bytes of a file, and most characters of a value that is shown: far above any real record.
MOST_LEVELS, MOST_BYTES, MOST_SHOWN = 20, 2**30, 60

Check = Callable[[str, Any], None]


class RecordError(DataError):
    """A file of a run that is damaged, or is no such file; `path` is the file, `problem` what is wrong with it."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path, self.problem = path, problem


class Config(NamedTuple):
    """A run's config by the keys of its command line, empty where there is none, and the hash of the code that ran it."""

    values: dict[str, Any]
    code_hash: str | None


class _Unfit(Exception):
    """A value that is not allowed."""

    def __init__(self, key: str, value: Any, allowed: str) -> None:
        shown = printable(repr(value))
        shown = shown if len(shown) <= MOST_SHOWN else f"{shown[:MOST_SHOWN - 3]}..."
        hint = nearest(value, STATUSES) if allowed == _STATUS and isinstance(value, str) else ""
        super().__init__(f"{printable(key[:MOST_SHOWN])}={shown} (allowed: {allowed}){hint}")


def _one(allowed: str, fits: Callable[[Any], bool]) -> Check:
    def check(key: str, value: Any) -> None:
        if not fits(value):
            raise _Unfit(key, value, allowed)

    return check


def _nullable(check: Check) -> Check:
    def nullable(key: str, value: Any) -> None:
        if value is not None:
            check(key, value)

    return nullable


def _list_of(check: Check) -> Check:
    def checked(key: str, value: Any) -> None:
        if not isinstance(value, list):
            raise _Unfit(key, value, "a list")
        for index, item in enumerate(value):
            check(f"{key}[{index}]", item)

    return checked


def _mapping_to(check: Check) -> Check:
    def checked(key: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise _Unfit(key, value, "a mapping")
        for name, item in value.items():
            check(f"{key}.{name}", item)

    return checked


def _object(keys: Mapping[str, Check]) -> Check:
    def checked(key: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise _Unfit(key, value, "a mapping")
        for name in keys.keys() & value.keys():
            keys[name](f"{key}.{name}" if key else name, value[name])

    return checked


def _is_number(value: Any) -> bool:
    # A whole number of hundreds of digits is no float.
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)


def _is_fraction(value: Any) -> bool:
    return _is_number(value) and (0 <= value <= 1 or not math.isfinite(value))


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


_STATUS = names(STATUSES)
_TEXT = _one("text", lambda value: isinstance(value, str))
_NAME = _one("text, not empty", lambda value: isinstance(value, str) and value.strip() != "")
_NUMBER = _nullable(_one("a number, or null", _is_number))
_TIME = _nullable(_one("a number from 0, or null", lambda value: _is_number(value) and not value < 0))
_FRACTION = _nullable(_one("a number from 0 to 1, or null", _is_fraction))
_SEED = _one("a whole number", lambda value: _is_whole(value, -(2**63)))
_COUNT = _nullable(_one("a whole number from 0, or null", lambda value: _is_whole(value, 0)))
_EPOCH = _one("a whole number from 1", lambda value: _is_whole(value, 1))
_QUANTITIES = _nullable(_mapping_to(_nullable(_mapping_to(_NUMBER))))
_LAYERS = _nullable(_list_of(_TEXT))

_ACCURACIES = dict.fromkeys(("test_accuracy", "test_accuracy_at_best_val", "val_accuracy", "train_accuracy"), _FRACTION)
_RESULT = _object({
    "status": _one(_STATUS, lambda value: value in STATUSES), "label": _NAME, "group": _NAME, "algorithm": _NAME, "seed": _SEED,
    **dict.fromkeys(("experiment", "architecture", "dataset", "optimizer", "config_hash", "code_hash", "data_hash", "device"),
                    _nullable(_TEXT)),
    **dict.fromkeys(("epochs", "epoch", "step", "best_epoch"), _COUNT), **_ACCURACIES,
    "seconds": _TIME, "peak_memory_bytes": _TIME, "angles": _QUANTITIES, "probes": _QUANTITIES,
    "feedback_layers": _LAYERS, "output_layers": _LAYERS,
    "error": _nullable(_object({"type": _nullable(_TEXT), "message": _nullable(_TEXT), "epoch": _COUNT, "step": _COUNT,
                                "layer": _nullable(_TEXT)})),
})
_REQUIRED = ("status", "label", "group", "algorithm", "seed")
_RECORD = _object({
    "epoch": _EPOCH, **_ACCURACIES, **dict.fromkeys(("train_loss", "val_loss", "test_loss", "lr"), _NUMBER), "seconds": _TIME,
    "angles": _QUANTITIES, "probes": _QUANTITIES,
})
#: What every record of an epoch has, beside its number.
SCALARS = ("train_loss", "val_loss", "test_loss", "train_accuracy", "val_accuracy", "test_accuracy", "lr")
_CONFIG = _object({
    "seed": _SEED, "epochs": _EPOCH, "scale": _TEXT,
    **dict.fromkeys(("algorithm", "architecture", "dataset", "optimizer"), _NAME),
})
_PLANNED = _object({
    "directory": _one("a path", lambda value: isinstance(value, str) and value.isprintable() and 0 < len(value.encode()) < 4096),
    "label": _NAME, "epochs": _EPOCH,
})


def read_result(path: Path) -> dict[str, Any] | None:
    """A run's `result.json`, or None where there is no such file.

    Raises:
        RecordError: it cannot be read, lacks a key that a report needs, or has a value there that a run does not write.
    """
    content = _content(path)
    if content is None:
        return None
    result = _json(content, path)
    _check(_object({}), result, path)
    if missing := [key for key in _REQUIRED if key not in result]:
        raise RecordError(path, f"not a run's result: it lacks {names(missing)}")
    _check(_RESULT, result, path)
    return result


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a run's `metrics.jsonl`, one an epoch and in order; none where there is no such file.

    A torn last line is passed over, and of an epoch that was trained again the last record holds.

    Raises:
        RecordError: a line before the last is not an epoch's record, a value is not one that a run writes, or the file cannot
            be read.
    """
    lines = (_content(path) or b"").splitlines()
    epochs: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = _json(line, path)
            if not isinstance(record, dict) or "epoch" not in record:
                raise RecordError(path, "a mapping with 'epoch' is allowed")
        except RecordError as error:
            if number < len(lines):
                raise RecordError(path, f"line {number} is not an epoch's record: {error.problem}") from None
            continue
        _check(_RECORD, record, path, f"line {number}: ")
        epochs[record["epoch"]] = record
    return [epochs[epoch] for epoch in sorted(epochs)]


def recorded_lines(path: Path, epochs: int) -> list[str]:
    """The first lines of a run's `metrics.jsonl`, one for each of so many epochs, as a run takes them up again.

    Raises:
        RecordError: naming the line that is missing or is not the record of its epoch.
    """
    content = _content(path) if epochs else b""
    if content is None:
        raise RecordError(path, "missing")
    lines = content.splitlines()
    for number, line in enumerate(lines[:epochs], start=1):
        try:
            record = _json(line, path)
            _check(_RECORD, record, path)
        except RecordError:
            record = {}
        if record.get("epoch") != number or not record.keys() >= {*SCALARS}:
            raise RecordError(path, f"damaged (line {number} is not the record of epoch {number})")
    if len(lines) < epochs:
        raise RecordError(path, f"damaged ({len(lines)} of {epochs} epochs are there)")
    return [line.decode() for line in lines[:epochs]]


def read_config(path: Path) -> Config:
    """A run's `config.yaml`; an empty one where there is no such file.

    Raises:
        RecordError: it cannot be read, is no mapping, or has a value that no config has.
    """
    from omegaconf import OmegaConf

    from fa_bench.config.labels import flat
    from fa_bench.utils.yaml_files import read_yaml

    if not path.exists():
        return Config({}, None)
    try:
        config = OmegaConf.to_container(read_yaml(path), resolve=False)
        with path.open(encoding="utf-8") as file:
            header = [file.readline(500) for _ in range(2)][1]
    except ConfigError as error:
        problem = re.sub(r"^:(\d+)", r"line \1", str(error).removeprefix(str(path))).lstrip(": ")
        raise RecordError(path, problem) from None
    except Exception as error:  # OmegaConf meets odd content with errors of many kinds
        raise RecordError(path, f"not readable as a config ({type(error).__name__})") from None
    if not isinstance(config, dict):
        raise RecordError(path, "not a run's config (allowed: a mapping)")
    values = flat(config)  # type: ignore[arg-type]
    _check(_CONFIG, values, path)
    return Config(values, header.removeprefix(CODE_HEADER).strip() or None if header.startswith(CODE_HEADER) else None)


def read_planned(path: Path) -> list[dict[str, Any]]:
    """The runs that a sweep's `sweep.json` lists: directory, label and epochs; none where there is no such file.

    Raises:
        RecordError: it cannot be read, or is not one of fa_bench.
    """
    content = _content(path)
    if content is None:
        return []
    listed = _json(content, path)
    runs = listed.get("runs") if isinstance(listed, dict) else None
    if not isinstance(runs, list):
        raise RecordError(path, "not the list of a grid's runs: it lacks 'runs'")
    for index, run in enumerate(runs):
        lacking = [key for key in ("directory", "label", "epochs") if not isinstance(run, dict) or key not in run]
        if lacking:
            raise RecordError(path, f"not the list of a grid's runs: runs[{index}] lacks {names(lacking)}")
        _check(_PLANNED, run, path, f"not the list of a grid's runs: runs[{index}].")
    return runs


def disagreement(result: Mapping[str, Any], metrics: list[dict[str, Any]]) -> str:
    """In what a finished run's `result.json` and `metrics.jsonl` contradict each other; empty where in nothing.

    A result that does not record its epochs is taken at its word.
    """
    done = result.get("epoch")
    if result["status"] != "finished" or not done or len(metrics) == done:
        return ""
    return f"holds the records of {len(metrics)} epochs, but the run in {RESULT} has finished {done}"


def _content(path: Path) -> bytes | None:
    """What is in a file; None where there is none."""
    try:
        if not path.exists():
            return None
        if not path.is_file():  # a pipe would never end
            raise RecordError(path, "not a file")
        if path.stat().st_size > MOST_BYTES:
            raise RecordError(path, f"larger than {MOST_BYTES} bytes")
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except FaBenchError:
        raise
    except OSError as error:
        raise RecordError(path, f"unreadable: {error.strerror or error}") from None


def _json(text: bytes, path: Path) -> Any:
    try:
        value = json.loads(text)
    except RecursionError:
        raise RecordError(path, f"nested deeper than {MOST_LEVELS} levels") from None
    except ValueError as error:
        raise RecordError(path, f"unreadable: {error}") from None
    level = [value]
    for _ in range(MOST_LEVELS):
        nested = [item for item in level if isinstance(item, (dict, list))]
        level = [inner for item in nested for inner in (item.values() if isinstance(item, dict) else item)]
    if level:
        raise RecordError(path, f"nested deeper than {MOST_LEVELS} levels")
    return value


def _check(check: Check, value: Any, path: Path, where: str = "") -> None:
    try:
        check("", value)
    except _Unfit as error:
        raise RecordError(path, f"{where}{str(error).removeprefix('=')}") from None

