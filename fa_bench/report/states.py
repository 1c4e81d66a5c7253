"""The current status of runs, including runs without a result and runs that were resumed after they had written one.

`fa_bench.runs.rundir` determines how a given job can be resumed, whereas this module describes a directory without knowing its
job.
"""

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
from fa_bench.report.numbers import known
from fa_bench.report.runs import FINISHED, Run
from fa_bench.runs.locks import lock_holder
from fa_bench.runs.readers import read_config, read_metrics
from fa_bench.utils.files import CONFIG, METRICS, resolved

RUNNING, INTERRUPTED, DIVERGED, STOPPED = "running", "interrupted", "diverged", "stopped"
#: A note is added if the training loss of the last epoch is more than this many times that of the first epoch.
_RISE = 2
#: The maximum number of characters in the reason for a failure; the run's log has the full text.
MAX_REASON = 300


def current_status(directory: Path, result: Mapping[str, Any]) -> str:
    """The status in a run's result, or `interrupted` if there is no result. If the run has not finished and its directory is
    locked, the status is `running`.

    Checking the lock does not create a lock file.
    """
    status = result.get("status", INTERRUPTED)
    return RUNNING if status != FINISHED and lock_holder(directory) is not None else status


def epochs_of(config: dict[str, Any]) -> int | None:
    """The number of epochs that a run with this config trains at its scale; None if the config does not contain the number."""
    epochs, scale = config.get("epochs"), SCALES.get(str(config.get("scale", "full")))
    return epochs if epochs is None or scale is None else scale.epochs_of(epochs)


def with_current_status(run: Run) -> Run:
    """Return the run, with the status `running` if it had not finished and has been resumed."""
    if current_status(run.directory, run.result) != RUNNING:
        return run
    return dataclasses.replace(run, result=run.result | {"status": RUNNING, "error": None})


def with_data_hash(runs: Sequence[Run]) -> list[Run]:
    """The runs. A run that ended before its data hash was recorded gets the hash that the other runs of its row have, if it is
    the same in all of them."""

    def without(run: Run) -> str:
        return dataclasses.replace(run, result=run.result | {"data_hash": None}).row

    hashes: dict[str, set[str]] = {}
    for run in runs:
        if run.result.get("data_hash"):
            hashes.setdefault(without(run), set()).add(run.result["data_hash"])
    return [
        run
        if run.result.get("data_hash") or len(of_row := hashes.get(run.row, ())) != 1
        else dataclasses.replace(run, result=run.result | {"data_hash": next(iter(of_row))})
        for run in runs
    ]


def run_without_result(directory: Path, others: Sequence[Run]) -> Run | None:
    """A run that has not written a result, described by its config; None if there is no config with a rule and a seed.

    The run's status is `running` or `interrupted`. Its group is the name of its parent folder, if this is the name of a group of
    its rule, or else the group of the runs in `others` that differ from it only in the seed. If there are none, a name is derived
    from its rule and options. Its scores are those of the runs in `others` with the same dataset and objective.

    Raises:
        RecordError: a record is damaged or was not written by a run.
    """
    config, code = read_config(directory / CONFIG)
    if "algorithm" not in config or "seed" not in config:
        return None
    metrics = read_metrics(directory / METRICS)
    scores = next((run.result.get("scores") for run in others if _objective(run.config) == _objective(config)), None)
    result = {key: config.get(key) for key in ("algorithm", "architecture", "dataset", "optimizer", "seed")} | {
        "status": current_status(directory, {}),
        "label": config["algorithm"],
        "group": _group(directory, config, others),
        "epochs": epochs_of(config),
        "epoch": metrics[-1]["epoch"] if metrics else 0,
        "code_hash": code,
        "scores": scores,
    }
    return Run(directory, result, metrics, config)


def _objective(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that determines the scores of a run."""
    return {key: value for key, value in config.items() if key.partition(".")[0] in ("dataset", "objective")}


def _group(directory: Path, config: dict[str, Any], others: Sequence[Run]) -> str:
    folder, rule, relevant = resolved(directory).parent.name, config["algorithm"], result_options(config)
    if re.fullmatch(rf"{re.escape(rule)}-[0-9a-f]{{8}}", folder):
        return folder
    for run in others:
        if result_options(run.config) == relevant:
            return run.result["group"]
    # This is not the group's real name, which only a checked config determines. However, all such runs of a rule with the same
    # options get the same name.
    return f"{rule}-{hashlib.sha256(json.dumps(relevant, sort_keys=True, default=str).encode()).hexdigest()[:8]}"


def reason(result: Mapping[str, Any]) -> str:
    """The reason why a run did not finish: where it diverged (``in epoch 3, first in fc1``), why it was stopped, or its
    exception.

    Empty if not recorded.
    """
    error = result.get("error") or {}
    if _diverged_in_known_epoch(result):
        return f"in epoch {error['epoch']}{f', first in {layer}' if (layer := error.get('layer')) else ''}"
    parts = (str(error.get(key) or "").strip() for key in ("type", "message")[result.get("status") == STOPPED :])
    return truncate(": ".join(part.splitlines()[0] for part in parts if part), MAX_REASON)


def describe_status(run: Run) -> str:
    """The status of an unfinished run with its epochs and the reason, such as ``diverged in epoch 3, first in fc1``."""
    status, why = run.result["status"], reason(run.result)
    if _diverged_in_known_epoch(run.result):
        return f"{status} {why}"
    of = f" of {run.result['epochs']}" if run.result.get("epochs") else ""
    return f"{status} after {len(run.metrics)}{of} epochs{f', {why}' if why else ''}"


def _diverged_in_known_epoch(result: Mapping[str, Any]) -> bool:
    return result.get("status") == DIVERGED and (result.get("error") or {}).get("epoch") is not None


def rise_note(finished: Mapping[int, Run]) -> str:
    """A note if training ended with a loss above `_RISE` times that of the first epoch. This can happen if activations or
    weights keep growing but stay finite."""
    risen = {}
    for seed, run in sorted(finished.items()):
        losses = known(line.get("train_loss") for line in run.metrics)
        if len(losses) > 1 and losses[-1] > _RISE * losses[0] > 0:
            risen[seed] = losses
    if not risen:
        return ""
    seed, losses = max(risen.items(), key=lambda item: item[1][-1])
    of = f"{len(risen)} of {len(finished)} runs" if len(finished) > 1 else "the run"
    return f"the training loss of {of} rose, from {losses[0]:.3g} in the first epoch to {losses[-1]:.3g} (seed {seed})"
