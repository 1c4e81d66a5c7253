"""Read the files of a run. They may be damaged, edited or forged, so every value is checked before it is used.

An error names the file, the key, its value and the allowed values. Unknown keys are ignored, so that records of later versions
can be read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from fa_bench.errors import ConfigError, names
from fa_bench.objectives.scores import final_keys, score_keys, scores_of
from fa_bench.runs.checked_json import (
    A_MAPPING,
    RecordError,
    check_value,
    parse_json,
    read_bytes,
)
from fa_bench.runs.schemas import (
    CONFIG,
    EPOCH_RECORD,
    MEASUREMENT,
    MEASUREMENT_KEYS,
    NUMBER,
    PLANNED,
    REQUIRED,
    RESULT_FILE,
    SUCCESSES,
)
from fa_bench.utils.files import RESULT

#: The prefixes of the first and the second line of a run's config.yaml.
HEADER, CODE_HEADER = "# config hash: ", "# code hash: "
#: The pattern of a config's seed line, and the seed that replaces the config's own, so that configs differing only in the seed
#: are parsed once.
_SEED_LINE, _TEMPLATE_SEED = re.compile(r"^seed: (0|[1-9]\d{0,17})$", re.MULTILINE), 10**17 + 3
_COMMENTS = re.compile(r"\A(#.*\n)+")


class Config(NamedTuple):
    """A run's config, flattened to the keys of the command line, and the hash of the code that wrote it. Without a config, the
    mapping is empty and the hash is None."""

    values: dict[str, Any]
    code_hash: str | None


class PlannedRun(NamedTuple):
    """One run of a sweep, with its directory, its label, and the number of epochs to train."""

    directory: Path
    label: str
    epochs: int


def scalar_keys(record: Any) -> list[str]:
    """The keys of the losses, the scores and the learning rate in the record of an epoch. They depend on the scores that the
    record declares."""
    return [*score_keys(scores_of(record)), "lr"]


def _check_scores(record: dict[str, Any], keys: list[str], path: Path, prefix: str = "") -> None:
    for key in keys:
        if key in record:
            check_value(lambda _, value, key=key: NUMBER(key, value), record[key], path, prefix)


def read_result(path: Path) -> dict[str, Any] | None:
    """A run's `result.json`; None if there is no such file.

    Raises:
        RecordError: the file cannot be read, lacks a required key, or has an invalid value.
    """
    content = read_bytes(path)
    if content is None:
        return None
    result = parse_json(content, path)
    check_value(A_MAPPING, result, path)
    if missing := [key for key in REQUIRED if key not in result]:
        raise RecordError(path, f"not a run's result: it lacks {names(missing)}")
    check_value(RESULT_FILE, result, path)
    _check_scores(result, final_keys(scores_of(result)), path)
    return result


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a run's `metrics.jsonl`, one per epoch and in order; empty if there is no such file.

    An incomplete last line is ignored. If an epoch was trained again, its last record is used.

    Raises:
        RecordError: a line before the last is not an epoch's record, a value is invalid, or the file cannot be read.
    """
    lines = (read_bytes(path) or b"").splitlines()
    epochs: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_json(line, path)
            if not isinstance(record, dict) or "epoch" not in record:
                raise RecordError(path, "allowed: a mapping with 'epoch'")
        except RecordError as error:
            if number < len(lines):
                raise RecordError(path, f"line {number} is not an epoch's record: {error.problem}") from None
            continue
        check_value(EPOCH_RECORD, record, path, f"line {number}: ")
        _check_scores(record, scalar_keys(record), path, f"line {number}: ")
        epochs[record["epoch"]] = record
    return [epochs[epoch] for epoch in sorted(epochs)]


def recorded_lines(path: Path, epochs: int, complete: bool = False) -> list[str]:
    """The first `epochs` lines of a run's `metrics.jsonl`, which a resumed run continues.

    Raises:
        RecordError: if a line is missing or is not the record of its epoch, or, with `complete`, if there are further lines.
    """
    content = read_bytes(path) if epochs else b""
    if content is None:
        raise RecordError(path, "missing")
    lines = content.splitlines()
    for number, line in enumerate(lines[:epochs], start=1):
        try:
            record = parse_json(line, path)
            check_value(EPOCH_RECORD, record, path)
        except RecordError:
            record = {}
        if record.get("epoch") != number or not record.keys() >= {*scalar_keys(record)}:
            raise RecordError(path, f"damaged (line {number} is not the record of epoch {number})")
    if len(lines) < epochs or (complete and len(lines) > epochs):
        raise RecordError(path, f"damaged ({len(lines)} of {epochs} epochs found)")
    return [line.decode() for line in lines[:epochs]]


def read_measurements(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's `angles.jsonl`, one per measurement in the order of steps; empty if there is no such file.

    Each line has the keys step, epoch (step / steps per epoch) and angles ({metric: {layer: value}}). Undefined values are None.

    Raises:
        RecordError: a line is not a measurement, a value is invalid, the steps do not increase, or the file cannot be read.
    """
    records: list[dict[str, Any]] = []
    for number, line in enumerate((read_bytes(path) or b"").splitlines(), start=1):
        try:
            record = parse_json(line, path)
            if not isinstance(record, dict) or not record.keys() >= {*MEASUREMENT_KEYS}:
                raise RecordError(path, f"allowed: a mapping with {names(map(repr, MEASUREMENT_KEYS))}")
        except RecordError as error:
            raise RecordError(path, f"line {number} is not a measurement: {error.problem}") from None
        check_value(MEASUREMENT, record, path, f"line {number}: ")
        if records and record["step"] <= (before := records[-1]["step"]):
            raise RecordError(path, f"line {number}: step={record['step']} (allowed: a step after {before})")
        records.append(record)
    return records


def recorded_measurements(path: Path, count: int, step: int | None) -> list[str]:
    """The first `count` lines of a run's `angles.jsonl`, which a resumed run continues; the last of these lines must be for
    `step`.

    Raises:
        RecordError: as in `read_measurements`, and if lines are missing or are not those that the run wrote.
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
    return [line.decode() for line in (read_bytes(path) or b"").splitlines()[:count]]


def read_config(path: Path) -> Config:
    """A run's `config.yaml`; empty if there is no such file.

    Raises:
        RecordError: the file cannot be read, is not a mapping, or has an invalid value.
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
    except Exception as error:  # OmegaConf raises many types of errors for odd content
        raise RecordError(path, f"not readable as a config ({type(error).__name__})") from None
    if values is None:
        raise RecordError(path, "not a run's config (allowed: a mapping)")
    check_value(CONFIG, values, path)
    second_line = text.partition("\n")[2].partition("\n")[0]
    has_code_hash = second_line.startswith(CODE_HEADER)
    return Config(values, second_line.removeprefix(CODE_HEADER).strip() or None if has_code_hash else None)


def _flat_config(text: str, source: str) -> dict[str, Any] | None:
    """The config in `text`, flattened; None if it is not a mapping."""
    from omegaconf import OmegaConf

    from fa_bench.config.labels import flatten
    from fa_bench.utils.yaml_files import parse_yaml

    config = OmegaConf.to_container(parse_yaml(text, source), resolve=False)
    return flatten(config) if isinstance(config, dict) else None  # type: ignore[arg-type]


def _config_but_seed(text: str) -> dict[str, Any] | None:
    """The config parsed from `text`. Configs that differ only in the seed are parsed once, because parsing would otherwise take
    most of the time of a report on many runs.

    The result is None if the text has no line with a seed or cannot be parsed. In that case, the caller must parse the text
    itself, so that errors name the right line.
    """
    found = _SEED_LINE.search(text)
    if found is None:
        return None
    body = _COMMENTS.sub("", text)  # the hashes at the top differ between seeds
    values = _parsed_template(_SEED_LINE.sub(f"seed: {_TEMPLATE_SEED}", body, count=1))
    # If the line belongs to a multi-line string in the config, the parsed seed is not the template seed.
    return values | {"seed": int(found[1])} if values and values.get("seed") == _TEMPLATE_SEED else None


@lru_cache(maxsize=256)
def _parsed_template(text: str) -> dict[str, Any] | None:
    try:
        return _flat_config(text, "")
    except Exception:  # the text itself is parsed next, which raises the error that belongs to it
        return None


def read_sweep(path: Path) -> list[PlannedRun]:
    """The runs that a `sweep.json` lists, in its order; empty if there is no such file.

    Raises:
        RecordError: the file cannot be read, is a link, or was not written by fa_bench.
    """
    if path.is_symlink():
        raise RecordError(path, "a link, which fa-bench does not follow")
    content = read_bytes(path)
    if content is None:
        return []
    sweep = parse_json(content, path)
    runs = sweep.get("runs") if isinstance(sweep, dict) else None
    if not isinstance(runs, list):
        raise RecordError(path, "not the list of a sweep's runs: it lacks 'runs'")
    for index, run in enumerate(runs):
        missing = [key for key in PlannedRun._fields if not isinstance(run, dict) or key not in run]
        if missing:
            raise RecordError(path, f"not the list of a sweep's runs: runs[{index}] lacks {names(missing)}")
        check_value(PLANNED, run, path, f"not the list of a sweep's runs: runs[{index}].")
    return [PlannedRun(path.parent / run["directory"], run["label"], run["epochs"]) for run in runs]


def inconsistency(result: Mapping[str, Any], metrics: list[dict[str, Any]]) -> str:
    """A description of how the `result.json` and `metrics.jsonl` of a finished or stopped run contradict each other; empty if
    they agree.

    A result that does not record the number of epochs is not compared.
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
    return f"has records of {len(metrics)} epochs{last}, but {RESULT} says that the run {ended} {epochs} epochs"
