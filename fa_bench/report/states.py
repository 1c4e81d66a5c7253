"""How a run stands: what its directory tells of one that has not written its result, or is at work again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fa_bench.config.labels import result_options
from fa_bench.config.scale import SCALES
from fa_bench.errors import truncate
from fa_bench.report.runs import Run, place
from fa_bench.runs.locks import lock_holder
from fa_bench.runs.readers import read_config, read_metrics
from fa_bench.utils.files import CONFIG, METRICS, RESULT, resolved

RUNNING, INTERRUPTED, DIVERGED = "running", "interrupted", "diverged"
#: Most characters of a failure's reason that are shown; the run's log has all of it.
MOST_OF_REASON = 300


def running(directory: Path) -> bool:
    """Whether a process is at work in the run's directory. Makes no file, keeps no lock."""
    return lock_holder(directory) is not None


def begun(directory: Path) -> bool:
    """Whether the directory holds a record of a run."""
    return any((directory / name).is_file() for name in (RESULT, METRICS, CONFIG))


def epochs_of(config: dict[str, Any]) -> int | None:
    """The epochs that a run of this config (by keys of the command line) trains at its scale; None where it does not say."""
    epochs, scale = config.get("epochs"), SCALES.get(str(config.get("scale", "full")))
    return epochs if epochs is None or scale is None else scale.epochs_of(epochs)


def as_it_stands(run: Run) -> Run:
    """The run, `running` where it had not finished and a process is at it again."""
    if run.finished or not running(run.directory):
        return run
    return dataclasses.replace(run, result=run.result | {"status": RUNNING, "error": None})


def with_data(runs: Sequence[Run]) -> list[Run]:
    """The runs, those that ended before their data's hash was recorded with the one that the others of their row have."""
    known: dict[str, set[str]] = {}
    for run in runs:
        if run.result.get("data_hash"):
            known.setdefault(_without_data(run).row, set()).add(run.result["data_hash"])
    return [run if run.result.get("data_hash") or len(hashes := known.get(run.row, ())) != 1
            else dataclasses.replace(run, result=run.result | {"data_hash": next(iter(hashes))}) for run in runs]


def _without_data(run: Run) -> Run:
    return dataclasses.replace(run, result=run.result | {"data_hash": None})


def without_result(directory: Path, others: Sequence[Run]) -> Run | None:
    """A run that wrote no result, with what its config tells in the place of one; None where it has no config.

    It is `running` or `interrupted`, and belongs to the group of those of `others` that differ from it in the seed alone.

    Raises:
        RecordError: a record cannot be read, or is not one that a run writes.
    """
    config, code = read_config(directory / CONFIG)
    if "algorithm" not in config or "seed" not in config:
        return None
    metrics = read_metrics(directory / METRICS)
    result = {key: config.get(key) for key in ("algorithm", "architecture", "dataset", "optimizer", "seed")} | {
        "status": RUNNING if running(directory) else INTERRUPTED, "label": config["algorithm"],
        "group": _group(directory, config, others), "epochs": epochs_of(config), "epoch": metrics[-1]["epoch"] if metrics else 0,
        "code_hash": code,
    }
    return Run(directory, result, metrics, config)


def _group(directory: Path, config: dict[str, Any], others: Sequence[Run]) -> str:
    folder, rule, own = resolved(directory).parent.name, config["algorithm"], result_options(config)
    if re.fullmatch(rf"{re.escape(rule)}-[0-9a-f]{{8}}", folder):
        return folder
    for run in others:
        if result_options(run.config) == own:
            return run.result["group"]
    # Not the group's true name, which only a checked config gives, but one that such runs of a rule share.
    return f"{rule}-{hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode()).hexdigest()[:8]}"


def reason(result: Mapping[str, Any]) -> str:
    """Why a run did not finish: where it diverged, ``in epoch 3, first in fc1``, or what it raised; empty where not recorded."""
    error = result.get("error") or {}
    if _located(result):
        return f"in epoch {error['epoch']}{f', first in {layer}' if (layer := error.get('layer')) else ''}"
    said = ": ".join(str(error[key]).strip().splitlines()[0] for key in ("type", "message") if str(error.get(key) or "").strip())
    return truncate(said, MOST_OF_REASON)


def ending(run: Run) -> str:
    """How a run that is not finished stands, in words: ``diverged in epoch 3, first in fc1``; with a failure's reason."""
    status, why = run.result["status"], reason(run.result)
    if _located(run.result):
        return f"{status} {why}"
    of = f" of {run.result['epochs']}" if run.result.get("epochs") else ""
    return f"{status} after {len(run.metrics)}{of} epochs{f', {why}' if why else ''}"


def _located(result: Mapping[str, Any]) -> bool:
    return result.get("status") == DIVERGED and (result.get("error") or {}).get("epoch") is not None


def unreadable(directory: Path) -> str:
    """A line for a directory of which no run can be made: it holds neither a result nor a config."""
    metrics = read_metrics(directory / METRICS)
    return f"no {RESULT}, {metrics[-1]['epoch'] if metrics else 0} epochs done ({place(directory)})"
