"""Run directories as a report reads them: the records of each run, whether or not it came to an end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fa_bench.errors import DataError
from fa_bench.metrics.alignment.base import FEEDBACK, HIDDEN, Metric, declared
from fa_bench.registry import registries
from fa_bench.report.numbers import mean
from fa_bench.runs.readers import HEADER, RecordError, inconsistency, read_config, read_metrics, read_result
from fa_bench.utils.files import CONFIG, METRICS, RESULT, resolved

FINISHED = "finished"
#: What a result records of the version of the code and of the data: runs in which these differ are never averaged.
VERSIONS = {"code_hash": "code", "data_hash": "data"}


@dataclass(frozen=True)
class Run:
    """One run: its directory, the content of `result.json`, the lines of `metrics.jsonl`, one an epoch, and its config by the
    keys of its command line, empty where there is none."""

    directory: Path
    result: dict[str, Any]
    metrics: list[dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether the run trained to its last epoch."""
        return self.result["status"] == FINISHED

    @property
    def preset(self) -> str | None:
        """The preset that the run came from; of a result that does not record it, the folder that is named after it."""
        return self.result["experiment"] if "experiment" in self.result else resolved(self.directory).parent.parent.name

    @property
    def epochs(self) -> int | None:
        """The epochs that the run trained, or was to train where that is not recorded."""
        return self.result.get("epoch") or self.result.get("epochs")

    @property
    def row(self) -> str:
        """What the runs of one row of a report share: their group, and the hashes of the code that ran them and of their data."""
        return "@".join([self.result["group"], *(value for key in VERSIONS if (value := self.result.get(key)))])

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
        """Mean of one quantity of an `angles` record over the layers that its metric declares, in its own unit.

        NaN where no such layer has a value.
        """
        by_layer = (angles or {}).get(quantity) or {}
        over = declared([quantity])[quantity].layers
        if over == FEEDBACK:
            layers = self.result.get("feedback_layers") or []
        else:
            layers = [layer for layer in by_layer if over != HIDDEN or layer not in (self.result.get("output_layers") or ())]
        return mean(by_layer.get(layer) for layer in layers)


def read_run(directory: Path) -> Run | None:
    """The run in `directory`, or None where it holds no `result.json`.

    Raises:
        RecordError: a record cannot be read, or is not one that a run writes; the message names file and key.
    """
    directory = Path(directory)
    result = read_result(directory / RESULT)
    if result is None:
        return None
    metrics, config = read_metrics(directory / METRICS), read_config(directory / CONFIG)
    if problem := inconsistency(result, metrics):
        raise RecordError(directory / METRICS, problem)
    return Run(directory, result, metrics, config.values)


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
                found.setdefault(resolved(file.parent), file.parent)
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
    return "/".join(resolved(directory).parts[-3:])


def metrics_of(runs: Iterable[Run]) -> dict[str, type[Metric]]:
    """The alignment metrics that are registered, and others that some of the runs measured, by name and in their order."""
    measured = {name for run in runs for line in (run.result, *run.metrics) for name in line.get("angles") or ()}
    return declared({*registries.METRICS, *measured})
