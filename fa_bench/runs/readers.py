"""Readers of a run's files, which may be damaged, edited or forged: every value is checked before it is used.

There is one reader for each file. An error names the file, the key, its value and what is allowed. Unknown keys are ignored, so
that records of later versions can be read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from fa_bench.errors import ConfigError, DataError, FaBenchError, names, nearest, printable, truncate
from fa_bench.objectives.scores import final_keys, score_keys, scores_of
from fa_bench.utils.files import RESULT

#: The beginning of the first line of a run's config.yaml, and of the second.
HEADER, CODE_HEADER = "# config hash: ", "# code hash: "
#: How a run may have ended.
STATUSES = ("finished", "stopped", "diverged", "failed", "interrupted")
#: The statuses of runs that ended well: after their last epoch, or because a callback stopped them.
SUCCESSES = STATUSES[:2]
#: Limits on the nesting depth, the bytes of a file, and the characters of a value in a message.
MAX_DEPTH, MAX_BYTES, MAX_VALUE = 20, 2**30, 60
#: The largest finite number of a record: no run measures larger ones, and the statistics and axes of a report would overflow.
MAX_NUMBER = 1e100

#: A config's line with its seed, and the seed with which configs that differ in it alone are parsed.
_SEED_LINE, _TEMPLATE_SEED = re.compile(r"^seed: (0|[1-9]\d{0,17})$", re.MULTILINE), 10**17 + 3
_COMMENTS = re.compile(r"\A(#.*\n)+")

Check = Callable[[str, Any], None]


class RecordError(DataError):
    """A file of a run is damaged, or is no such file; `path` is the file, `problem` what is wrong with it."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path, self.problem = path, problem


class Config(NamedTuple):
    """A run's config, flattened to the keys of the command line (empty if there is none), and the hash of its code."""

    values: dict[str, Any]
    code_hash: str | None


class PlannedRun(NamedTuple):
    """One run of a sweep: its directory, its label, and the number of epochs to train."""

    directory: Path
    label: str
    epochs: int


class _InvalidValue(Exception):
    def __init__(self, key: str, value: Any, allowed: str) -> None:
        hint = nearest(value, STATUSES) if allowed == _STATUS and isinstance(value, str) else ""
        key, value = (truncate(printable(text), MAX_VALUE) for text in (key, repr(value)))
        super().__init__(f"{key}={value} (allowed: {allowed}){hint}")


def _value(allowed: str, is_valid: Callable[[Any], bool]) -> Check:
    def check(key: str, value: Any) -> None:
        if not is_valid(value):
            raise _InvalidValue(key, value, allowed)

    return check


def _nullable(check: Check) -> Check:
    def check_nullable(key: str, value: Any) -> None:
        if value is not None:
            check(key, value)

    return check_nullable


def _list_of(check: Check) -> Check:
    def check_list(key: str, value: Any) -> None:
        _A_LIST(key, value)
        for index, item in enumerate(value):
            check(f"{key}[{index}]", item)

    return check_list


def _mapping_to(check: Check) -> Check:
    def check_items(key: str, value: Any) -> None:
        _A_MAPPING(key, value)
        for name, item in value.items():
            check(f"{key}.{name}", item)

    return check_items


def _object(checks: Mapping[str, Check]) -> Check:
    def check_keys(key: str, value: Any) -> None:
        _A_MAPPING(key, value)
        for name in checks.keys() & value.keys():
            checks[name](f"{key}.{name}" if key else name, value[name])

    return check_keys


def _complete(check: Check, required: tuple[str, ...]) -> Check:
    def check_complete(key: str, value: Any) -> None:
        check(key, value)
        for name in required:
            if name not in value:
                raise _InvalidValue(f"{key}.{name}", None, "a value")

    return check_complete


def _is_score_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[a-z][a-z0-9_]{0,59}", value) is not None and value != "loss"


def _is_int(value: Any, minimum: int = -(2**63)) -> bool:
    # Larger integers, of hundreds of digits, cannot be converted to a float.
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value < 2**63


def _is_number(value: Any) -> bool:
    return (isinstance(value, float) and not MAX_NUMBER < abs(value) < math.inf) or _is_int(value)


def _is_fraction(value: Any) -> bool:
    return _is_number(value) and (0 <= value <= 1 or not math.isfinite(value))


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and 0 < len(value.encode()) < 4096


_STATUS = names(STATUSES)
_A_LIST = _value("a list", lambda value: isinstance(value, list))
_A_MAPPING = _value("a mapping", lambda value: isinstance(value, dict))
_TEXT = _value("text", lambda value: isinstance(value, str))
_NAME = _value("text, not empty", lambda value: isinstance(value, str) and value.strip() != "")
_NUMBER = _nullable(_value(f"a number of at most {MAX_NUMBER:g}, or null", _is_number))
_TIME = _nullable(_value(f"a number from 0 to {MAX_NUMBER:g}, or null", lambda value: _is_number(value) and not value < 0))
_FRACTION = _nullable(_value("a number from 0 to 1, or null", _is_fraction))
_SEED = _value("a whole number", _is_int)
_COUNT = _nullable(_value("a whole number >= 0, or null", lambda value: _is_int(value, 0)))
_EPOCH = _value("a whole number >= 1", lambda value: _is_int(value, 1))
_QUANTITIES = _nullable(_mapping_to(_nullable(_mapping_to(_NUMBER))))
_LAYERS = _nullable(_list_of(_TEXT))

_SCORE = _object(
    {
        "name": _value("a name of letters, digits and _, not 'loss'", _is_score_name),
        "title": _NAME,
        "unit": _TEXT,
        "higher_is_better": _value("true or false", lambda value: isinstance(value, bool)),
    }
)
_SCORES = _nullable(_list_of(_complete(_SCORE, ("name", "title"))))
_ACCURACIES = dict.fromkeys(("test_accuracy", "test_accuracy_at_best_val", "val_accuracy", "train_accuracy"), _FRACTION)
_STEP_COST: dict[str, Check] = dict.fromkeys(
    ("multiplications", "forward", "backward", "feedback", "optimizer", "bytes_moved", "peak_memory"), _COUNT
)
_COST = _object({"batch": _COUNT, "bp": _nullable(_object(_STEP_COST)), **_STEP_COST})
_RESULT = _object(
    {
        "status": _value(_STATUS, lambda value: value in STATUSES),
        "label": _NAME,
        "group": _NAME,
        "algorithm": _NAME,
        "seed": _SEED,
        **dict.fromkeys(
            ("experiment", "architecture", "dataset", "optimizer", "config_hash", "code_hash", "data_hash", "device"),
            _nullable(_TEXT),
        ),
        **dict.fromkeys(("epochs", "epoch", "step", "best_epoch"), _COUNT),
        **_ACCURACIES,
        "scores": _SCORES,
        "seconds": _TIME,
        "peak_memory_bytes": _TIME,
        "energy_wh": _TIME,
        "cost": _nullable(_COST),
        "angles": _QUANTITIES,
        "probes": _QUANTITIES,
        "rule_counts": _nullable(_mapping_to(_COUNT)),
        **dict.fromkeys(("feedback_layers", "output_layers", "weight_transport", "energy_counters"), _LAYERS),
        "error": _nullable(
            _object(
                {
                    "type": _nullable(_TEXT),
                    "message": _nullable(_TEXT),
                    "epoch": _COUNT,
                    "step": _COUNT,
                    "layer": _nullable(_TEXT),
                    "callback": _nullable(_TEXT),
                }
            )
        ),
    }
)
_REQUIRED = ("status", "label", "group", "algorithm", "seed")
_RECORD = _object(
    {
        "epoch": _EPOCH,
        **_ACCURACIES,
        **dict.fromkeys(("train_loss", "val_loss", "test_loss", "lr"), _NUMBER),
        "seconds": _TIME,
        "angles": _QUANTITIES,
        "probes": _QUANTITIES,
        "scores": _SCORES,
    }
)
_MEASUREMENT = _object(
    {
        "step": _value("a whole number >= 0", lambda value: _is_int(value, 0)),
        "epoch": _value("a number >= 0", lambda value: _is_number(value) and 0 <= value < math.inf),
        "angles": _QUANTITIES,
    }
)
_MEASUREMENT_KEYS = ("step", "epoch", "angles")
_CONFIG = _object(
    {
        "seed": _SEED,
        "epochs": _EPOCH,
        "scale": _TEXT,
        **dict.fromkeys(("algorithm", "architecture", "dataset", "optimizer"), _NAME),
    }
)
_PLANNED = _object({"directory": _value("a path", _is_path), "label": _NAME, "epochs": _EPOCH})


def scalar_keys(record: Any) -> list[str]:
    """The keys of every epoch's record of a run, beside its number, by the scores that a record declares."""
    return [*score_keys(scores_of(record)), "lr"]


def _check_scores(record: dict[str, Any], keys: list[str], path: Path, prefix: str = "") -> None:
    for key in keys:
        if key in record:
            _check(lambda _, value, key=key: _NUMBER(key, value), record[key], path, prefix)


def read_result(path: Path) -> dict[str, Any] | None:
    """A run's `result.json`; None if there is no such file.

    Raises:
        RecordError: it cannot be read, lacks a required key, or has an invalid value.
    """
    content = _read(path)
    if content is None:
        return None
    result = _parse_json(content, path)
    _check(_A_MAPPING, result, path)
    if missing := [key for key in _REQUIRED if key not in result]:
        raise RecordError(path, f"not a run's result: it lacks {names(missing)}")
    _check(_RESULT, result, path)
    _check_scores(result, final_keys(scores_of(result)), path)
    return result


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a run's `metrics.jsonl`, one per epoch and in order; empty if there is no such file.

    An incomplete last line is ignored; if an epoch was trained again, its last record counts.

    Raises:
        RecordError: a line before the last is not an epoch's record, a value is invalid, or the file cannot be read.
    """
    lines = (_read(path) or b"").splitlines()
    epochs: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = _parse_json(line, path)
            if not isinstance(record, dict) or "epoch" not in record:
                raise RecordError(path, "allowed: a mapping with 'epoch'")
        except RecordError as error:
            if number < len(lines):
                raise RecordError(path, f"line {number} is not an epoch's record: {error.problem}") from None
            continue
        _check(_RECORD, record, path, f"line {number}: ")
        _check_scores(record, scalar_keys(record), path, f"line {number}: ")
        epochs[record["epoch"]] = record
    return [epochs[epoch] for epoch in sorted(epochs)]


def recorded_lines(path: Path, epochs: int, complete: bool = False) -> list[str]:
    """The first `epochs` lines of a run's `metrics.jsonl`, which a resumed run continues.

    Raises:
        RecordError: naming the line that is missing or is not the record of its epoch; with `complete`, also if there are more.
    """
    content = _read(path) if epochs else b""
    if content is None:
        raise RecordError(path, "missing")
    lines = content.splitlines()
    for number, line in enumerate(lines[:epochs], start=1):
        try:
            record = _parse_json(line, path)
            _check(_RECORD, record, path)
        except RecordError:
            record = {}
        if record.get("epoch") != number or not record.keys() >= {*scalar_keys(record)}:
            raise RecordError(path, f"damaged (line {number} is not the record of epoch {number})")
    if len(lines) < epochs or (complete and len(lines) > epochs):
        raise RecordError(path, f"damaged ({len(lines)} of {epochs} epochs found)")
    return [line.decode() for line in lines[:epochs]]


def read_measurements(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's `angles.jsonl`, one per measurement in the order of steps; empty if there is no such file.

    Each has the keys step, epoch (step / steps per epoch) and angles, {metric: {layer: value}}; undefined values are None.

    Raises:
        RecordError: a line is not a measurement, a value is invalid, the steps do not increase, or the file cannot be read.
    """
    records: list[dict[str, Any]] = []
    for number, line in enumerate((_read(path) or b"").splitlines(), start=1):
        try:
            record = _parse_json(line, path)
            if not isinstance(record, dict) or not record.keys() >= {*_MEASUREMENT_KEYS}:
                raise RecordError(path, f"allowed: a mapping with {names(map(repr, _MEASUREMENT_KEYS))}")
        except RecordError as error:
            raise RecordError(path, f"line {number} is not a measurement: {error.problem}") from None
        _check(_MEASUREMENT, record, path, f"line {number}: ")
        if records and record["step"] <= (before := records[-1]["step"]):
            raise RecordError(path, f"line {number}: step={record['step']} (allowed: a step after {before})")
        records.append(record)
    return records


def recorded_measurements(path: Path, count: int, step: int | None) -> list[str]:
    """The first `count` lines of a run's `angles.jsonl`, the last of `step`, which a resumed run continues.

    Raises:
        RecordError: as `read_measurements`, or if lines are missing or others than those that the run wrote.
    """
    if count == 0:
        return []
    if not path.exists():
        raise RecordError(path, "missing")
    records = read_measurements(path)[:count]
    if len(records) < count:
        raise RecordError(path, f"damaged ({len(records)} of {count} measurements found)")
    if records[-1]["step"] != step:
        raise RecordError(path, f"damaged (line {count} is not the measurement at step {step})")
    return [line.decode() for line in (_read(path) or b"").splitlines()[:count]]


def read_config(path: Path) -> Config:
    """A run's `config.yaml`; empty if there is no such file.

    Raises:
        RecordError: it cannot be read, is not a mapping, or has an invalid value.
    """
    from fa_bench.utils.yaml_files import read_text

    if not path.exists():
        return Config({}, None)
    try:
        text = read_text(path)
        values = _config_but_seed(text) or _flat_config(text, str(path))
    except ConfigError as error:
        problem = re.sub(r"^:(\d+)", r"line \1", str(error).removeprefix(str(path))).lstrip(": ")
        raise RecordError(path, problem) from None
    except Exception as error:  # OmegaConf raises many types for odd content
        raise RecordError(path, f"not readable as a config ({type(error).__name__})") from None
    if values is None:
        raise RecordError(path, "not a run's config (allowed: a mapping)")
    _check(_CONFIG, values, path)
    second_line = text.partition("\n")[2].partition("\n")[0]
    has_code_hash = second_line.startswith(CODE_HEADER)
    return Config(values, second_line.removeprefix(CODE_HEADER).strip() or None if has_code_hash else None)


def _flat_config(text: str, source: str) -> dict[str, Any] | None:
    """The config in a text, flattened; None if it is not a mapping."""
    from omegaconf import OmegaConf

    from fa_bench.config.labels import flatten
    from fa_bench.utils.yaml_files import parse_yaml

    config = OmegaConf.to_container(parse_yaml(text, source), resolve=False)
    return flatten(config) if isinstance(config, dict) else None  # type: ignore[arg-type]


def _config_but_seed(text: str) -> dict[str, Any] | None:
    """The config in a text, parsed once for all seeds, because parsing takes most of the time of a report on many runs.

    None if the text has no line with a seed, or cannot be read; without it, the error would name another line.
    """
    found = _SEED_LINE.search(text)
    if found is None:
        return None
    body = _COMMENTS.sub("", text)  # the hashes at the top differ between seeds
    values = _parsed_template(_SEED_LINE.sub(f"seed: {_TEMPLATE_SEED}", body, count=1))
    # If that line is no key of the config, but part of a text in it, the seed is another one.
    return values | {"seed": int(found[1])} if values and values.get("seed") == _TEMPLATE_SEED else None


@lru_cache(maxsize=256)
def _parsed_template(text: str) -> dict[str, Any] | None:
    try:
        return _flat_config(text, "")
    except Exception:  # the text itself is read next, with the error that belongs to it
        return None


def read_sweep(path: Path) -> list[PlannedRun]:
    """The runs that a `sweep.json` lists, in its order; empty if there is no such file.

    Raises:
        RecordError: it cannot be read, is a link, or was not written by fa_bench.
    """
    if path.is_symlink():
        raise RecordError(path, "a link, which fa-bench does not follow")
    content = _read(path)
    if content is None:
        return []
    sweep = _parse_json(content, path)
    runs = sweep.get("runs") if isinstance(sweep, dict) else None
    if not isinstance(runs, list):
        raise RecordError(path, "not the list of a sweep's runs: it lacks 'runs'")
    for index, run in enumerate(runs):
        missing = [key for key in PlannedRun._fields if not isinstance(run, dict) or key not in run]
        if missing:
            raise RecordError(path, f"not the list of a sweep's runs: runs[{index}] lacks {names(missing)}")
        _check(_PLANNED, run, path, f"not the list of a sweep's runs: runs[{index}].")
    return [PlannedRun(path.parent / run["directory"], run["label"], run["epochs"]) for run in runs]


def inconsistency(result: Mapping[str, Any], metrics: list[dict[str, Any]]) -> str:
    """How the `result.json` and `metrics.jsonl` of a finished or stopped run contradict each other; empty if they do not.

    A result without its number of epochs is not compared.
    """
    epochs, status = result.get("epoch"), result["status"]
    if status not in SUCCESSES or not epochs:
        return ""
    if [line["epoch"] for line in metrics] == list(range(1, epochs + 1)):
        pairs = {
            key: (metrics[-1].get(key), result.get(key))
            for score in scores_of(result)[:1]
            for key in (f"test_{score.name}", f"val_{score.name}")
        }
        return next(
            (
                f"{key}={line} in the last epoch, but {key}={final} in {RESULT}"
                for key, (line, final) in pairs.items()
                if line is not None and final is not None and line != final and not math.isnan(line)
            ),
            "",
        )
    last = f", the last of epoch {metrics[-1]['epoch']}" if metrics and metrics[-1]["epoch"] != len(metrics) else ""
    ended = "stopped after" if status == "stopped" else "finished"
    return f"has records of {len(metrics)} epochs{last}, but {RESULT} says that the run {ended} {epochs}"


def _read(path: Path) -> bytes | None:
    """The content of a file; None if it does not exist."""
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


def _parse_json(text: bytes, path: Path) -> Any:
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


def _check(check: Check, value: Any, path: Path, prefix: str = "") -> None:
    try:
        check("", value)
    except _InvalidValue as error:
        raise RecordError(path, f"{prefix}{str(error).removeprefix('=')}") from None
