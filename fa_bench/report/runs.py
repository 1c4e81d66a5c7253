"""Run directories as a report reads them: the records of each run, whether or not it came to an end."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fa_bench.config.labels import flat
from fa_bench.config.yaml_files import read_yaml
from fa_bench.errors import DataError, names
from fa_bench.files import CONFIG, METRICS, RESULT
from fa_bench.report.numbers import mean
from fa_bench.runs.rundir import HEADER

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

    @property
    def preset(self) -> str | None:
        """The preset that the run came from; of a result that does not record it, the folder that is named after it."""
        return self.result["experiment"] if "experiment" in self.result else self.directory.resolve().parent.parent.name

    @property
    def epochs(self) -> int | None:
        """The epochs that the run trained, or was to train where that is not recorded."""
        return self.result.get("epoch") or self.result.get("epochs")

    @cached_property
    def config(self) -> dict[str, Any]:
        """The config by the keys of its command line; empty where there is none that can be read."""
        return read_config(self.directory)

    @property
    def probed(self) -> dict[str, dict[str, Any]]:
        """What the run's probes measured at its end: {quantity: {layer or block: value}}."""
        return self.result.get("probes") or {}

    @property
    def quantities(self) -> dict[str, dict[str, Any]]:
        """Everything that the run measured of its layers at its end: {quantity: {layer: value}}."""
        return {**(self.result.get("angles") or {}), **self.probed}

    def layers(self, quantity: str) -> dict[str, Any]:
        """The last values of one quantity by layer, in its own unit."""
        return self.quantities.get(quantity) or {}

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
    return Run(path.parent, result, read_metrics(path.parent))


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """The run directories at and below `paths`, with or without a result, each once, sorted.

    Raises:
        DataError: one of `paths` is no directory.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise DataError(f"{path}: no such directory")
        for file in sorted(file for name in (RESULT, METRICS, CONFIG) for file in path.rglob(name)):
            if file.name != CONFIG or _starts_a_run(file):
                found.setdefault(file.parent.resolve(), file.parent)
    return sorted(found.values())


def _starts_a_run(config: Path) -> bool:
    """Whether this config.yaml is a run's, and not one that commands are composed from."""
    try:
        with config.open(encoding="utf-8") as file:
            return file.read(len(HEADER)) == HEADER
    except (OSError, UnicodeDecodeError):
        return False


def place(directory: Path) -> str:
    """What to call a run's directory wherever it lies: preset, rule and seed, the last three folders of its path."""
    return "/".join(directory.resolve().parts[-3:])


def read_config(directory: Path) -> dict[str, Any]:
    """The config of the run in `directory` by the keys of its command line; empty where it holds none that can be read."""
    from omegaconf import OmegaConf

    path = directory / CONFIG
    try:
        config = OmegaConf.to_container(read_yaml(path), resolve=False)
    except Exception:  # whatever a damaged file makes the parser say: labels must not cost the comparison
        return {}
    return flat(config) if isinstance(config, dict) else {}  # type: ignore[arg-type]


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """One record an epoch, in order; a torn last line is ignored, and of an epoch trained again the last one holds.

    Raises:
        DataError: a line before the last is not an epoch's record, or the file cannot be read.
    """
    path = directory / METRICS
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
