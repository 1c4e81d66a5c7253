"""Run directories as a report reads them: the records, their groups, and the statistics that table and plot share."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fa_bench.errors import DataError, names
from fa_bench.files import CONFIG, METRICS, RESULT
from fa_bench.labels import differing, flat, label

FINISHED = "finished"
_REQUIRED = ("status", "label", "group", "algorithm", "seed")


@dataclass(frozen=True)
class Run:
    """One run: its directory, the content of `result.json`, and the lines of `metrics.jsonl`, one an epoch."""

    directory: Path
    result: dict[str, Any]
    metrics: list[dict[str, Any]]

    @property
    def finished(self) -> bool:
        """Whether the run trained to its last epoch."""
        return self.result["status"] == FINISHED

    def layer_mean(self, quantity: str, angles: Mapping[str, Any] | None) -> float:
        """Mean over layers of one quantity of an `angles` record, in its own unit (angles in degrees).

        `weight_angle` and `norm_ratio` count where feedback really carries error (`feedback_layers`); delta angles at
        every layer but the output layers, where each rule has the exact error. NaN where no such layer has a value.
        """
        by_layer = (angles or {}).get(quantity) or {}
        if quantity.startswith("delta"):
            layers = [layer for layer in by_layer if layer not in (self.result.get("output_layers") or ())]
        else:
            layers = self.result.get("feedback_layers") or []
        return mean(by_layer.get(layer) for layer in layers)


def read_run(directory: Path) -> Run | None:
    """The run in `directory`, or None where it holds no `result.json`.

    Raises:
        DataError: a record cannot be read or lacks a key that a report needs; the message names the file.
    """
    path = Path(directory) / RESULT
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: unreadable: {error}") from error
    missing = [key for key in _REQUIRED if not isinstance(result, dict) or key not in result]
    if missing:
        raise DataError(f"{path}: not a run's result: it lacks {names(missing)}")
    return Run(path.parent, result, _read_metrics(path.with_name(METRICS)))


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """The directories at and below `paths` that hold a `result.json`, each once, sorted.

    Raises:
        DataError: one of `paths` is no directory.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise DataError(f"{path}: no such directory")
        for file in sorted(path.rglob(RESULT)):
            found.setdefault(file.parent.resolve(), file.parent)
    return sorted(found.values())


def group_runs(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs of each group, that is of each config up to its seed, in the order in which the groups first appear."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.result["group"], []).append(run)
    return groups


def group_labels(groups: Mapping[str, Sequence[Run]]) -> dict[str, str]:
    """What to call each group: its label; where several groups share it, with what their configs differ in.

    A group that is still not told apart, for its config is not there or says nothing, goes by its own name.
    """
    labels = {group: str(runs[0].result["label"]) for group, runs in groups.items()}
    for name in [name for name, count in Counter(labels.values()).items() if count > 1]:
        configs = {group: read_config(groups[group][0].directory) for group, label in labels.items() if label == name}
        keys = differing(configs.values())
        labels |= {group: label(name, config, keys) for group, config in configs.items()}
    shared = Counter(labels.values())
    return {group: label if shared[label] == 1 else group for group, label in labels.items()}


def read_config(directory: Path) -> dict[str, Any]:
    """The config of the run in `directory` by the keys of its command line; empty where it holds none that can be read."""
    from omegaconf import OmegaConf

    path = directory / CONFIG
    try:
        config = OmegaConf.to_container(OmegaConf.create(path.read_text(encoding="utf-8")), resolve=False)
    except Exception:  # whatever a damaged file makes the parser say: labels must not cost the comparison
        return {}
    return flat(config) if isinstance(config, dict) else {}  # type: ignore[arg-type]


def finished_by_seed(runs: Iterable[Run]) -> dict[int, Run]:
    """The finished run of each seed: the last one given, because counting a repeated seed twice understates the spread."""
    return {run.result["seed"]: run for run in runs if run.finished}


def status_counts(runs: Iterable[Run]) -> str:
    """How many runs ended how, for example ``2 finished, 1 diverged``."""
    counts = Counter(run.result["status"] for run in runs)
    return ", ".join(f"{counts[status]} {status}" for status in sorted(counts, key=lambda s: (s != FINISHED, s)))


def number(value: Any) -> float:
    """A recorded value as a float; NaN where it is null or not finite."""
    return float(value) if value is not None and math.isfinite(value) else math.nan


def known(values: Iterable[Any]) -> list[float]:
    """The values that were recorded: null and not-finite ones are left out."""
    return [value for value in map(number, values) if not math.isnan(value)]


def mean(values: Iterable[Any]) -> float:
    """Mean of the known values; NaN where there is none."""
    present = known(values)
    return statistics.fmean(present) if present else math.nan


def std(values: Iterable[Any]) -> float:
    """Sample standard deviation (ddof=1) of the known values; NaN where there are fewer than two."""
    present = known(values)
    return statistics.stdev(present) if len(present) > 1 else math.nan


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """One record an epoch, in order; a torn last line is ignored, and of an epoch trained again the last one holds."""
    try:
        lines = path.read_bytes().splitlines() if path.is_file() else []
    except OSError as error:
        raise DataError(f"{path}: unreadable: {error}") from error
    epochs: dict[int, dict[str, Any]] = {}
    for index, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            epochs[record["epoch"]] = record
        except (ValueError, KeyError, TypeError) as error:
            if index < len(lines):
                raise DataError(f"{path}: line {index} is not an epoch's record: {error}") from error
    return [epochs[epoch] for epoch in sorted(epochs)]
