"""The records of runs, finished or not, as reports read them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fa_bench.errors import DataError
from fa_bench.metrics.alignment.base import FEEDBACK, HIDDEN, Metric, declared
from fa_bench.objectives.scores import Score, scores_of
from fa_bench.registry import registries
from fa_bench.report.numbers import mean, number
from fa_bench.runs.checked_json import RecordError
from fa_bench.runs.readers import HEADER, inconsistency, read_config, read_measurements, read_metrics, read_result
from fa_bench.utils.files import ANGLES, CONFIG, METRICS, RESULT, resolved

FINISHED = "finished"
#: The keys of a result that identify the version of the code and of the data. Runs that differ in them are never averaged.
VERSIONS = {"code_hash": "code", "data_hash": "data"}


@dataclass(frozen=True)
class Run:
    """A run, with its directory, `result.json`, the lines of `metrics.jsonl` (one per epoch), and its config by command-line keys
    (empty if there is none)."""

    directory: Path
    result: dict[str, Any]
    metrics: list[dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        state = self.result["status"] + (f", {text}" if (text := self.test_score) else "")
        return f"<Run {self.result['label']} seed {self.result['seed']}: {state}; {self.directory}>"

    @cached_property
    def measurements(self) -> list[dict[str, Any]]:
        """The lines of `angles.jsonl`, one per measurement of the alignment metrics: step, epoch (a fraction) and angles,
        {metric: {layer: value}}. The list is empty for a run of an older version.

        The file is read at the first access, because it is the largest of a run's records.

        Raises:
            RecordError: the file is damaged.
        """
        return read_measurements(self.directory / ANGLES)

    @property
    def scores(self) -> tuple[Score, ...]:
        """The scores of the run; the first is the primary score."""
        return scores_of(self.result if self.result.get("scores") else self.metrics[-1] if self.metrics else None)

    @property
    def primary(self) -> Score:
        """The score by which epochs and settings are chosen."""
        return self.scores[0]

    def score(self, key: str) -> float:
        """A score of the result, such as ``test_accuracy``, in the unit of tables (% for an accuracy); NaN if it is not
        recorded."""
        scales = {score.name: score.scale for score in self.scores}
        name = key.partition("_")[2].removesuffix("_at_best_val")
        return scales.get(name, 1) * number(self.result.get(key))

    @property
    def test_score(self) -> str:
        """The primary score of the test samples as text, such as ``test accuracy 97.10%``; empty if it is not recorded."""
        value = self.result.get(f"test_{self.primary.name}")
        return "" if value is None else f"test {self.primary.title} {self.primary.text(value)}"

    @property
    def finished(self) -> bool:
        """Whether the run trained to its last epoch."""
        return self.result["status"] == FINISHED

    @property
    def experiment(self) -> str | None:
        """The experiment to which the run belongs. Older results do not record it; for these, it is the name of the folder two
        levels above the run's directory."""
        return self.result["experiment"] if "experiment" in self.result else resolved(self.directory).parent.parent.name

    @property
    def epochs(self) -> int | None:
        """The number of epochs that the run trained or, if it recorded none, was supposed to train."""
        return self.result.get("epoch") or self.result.get("epochs")

    @property
    def row(self) -> str:
        """The key of the run's row in a report, which consists of its group and the hashes of its code and data."""
        return "@".join([self.result["group"], *(value for key in VERSIONS if (value := self.result.get(key)))])

    @property
    def probed(self) -> dict[str, dict[str, Any]]:
        """The results of the run's probes at its end, as {quantity: {layer or block: value}}."""
        return self.result.get("probes") or {}

    @property
    def quantities(self) -> dict[str, dict[str, Any]]:
        """All measurements of layers at the end of the run, as {quantity: {layer: value}}."""
        return {**(self.result.get("angles") or {}), **self.probed}

    def layers(self, quantity: str) -> dict[str, Any]:
        """The values of one quantity at the end of the run, by layer."""
        return self.quantities.get(quantity) or {}

    def layer_mean(self, quantity: str, angles: Mapping[str, Any] | None) -> float:
        """The mean of one quantity in an `angles` record over the layers that the metric declares.

        The mean is NaN if no such layer has a value.
        """
        by_layer = (angles or {}).get(quantity) or {}
        over = declared([quantity])[quantity].layers
        if over == FEEDBACK:
            layers = self.result.get("feedback_layers") or []
        else:
            layers = [layer for layer in by_layer if over != HIDDEN or layer not in (self.result.get("output_layers") or ())]
        return mean(by_layer.get(layer) for layer in layers)


def read_run(directory: Path) -> Run | None:
    """The run in `directory`, or None if there is no `result.json`.

    Raises:
        RecordError: a record is damaged or was not written by a run; the message names the file and the key.
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
    """The sorted and distinct run directories in `paths` and their subfolders, with or without a result.

    Raises:
        DataError: one of `paths` is not a directory.
    """
    directories: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise DataError(f"{path}: no such directory")
        for file in sorted(file for name in (RESULT, METRICS, CONFIG) for file in path.rglob(name)):
            if file.name != CONFIG or _is_a_runs_config(file):
                directories.setdefault(resolved(file.parent), file.parent)
    return sorted(directories.values())


#: A directory of runs, a run, or several of either, as `fa_bench.run` returns them.
Runs = str | os.PathLike[str] | Run | Iterable["str | os.PathLike[str] | Run"]


def runs_in(sources: Iterable[Runs]) -> list[Run | Path]:
    """The runs in `sources`, and the run directories in its directories and their subfolders, without duplicates and in the given
    order.

    Raises:
        DataError: a directory does not exist.
        TypeError: a source is neither a directory nor a run.
    """
    found: dict[Path, Run | Path] = {}
    for source in sources:
        single = isinstance(source, (str, os.PathLike, Run))
        if not single and (not isinstance(source, Iterable) or hasattr(source, "columns")):
            hint = "; pass its column, frame['directory']" if hasattr(source, "columns") else ""
            raise TypeError(f"{type(source).__name__} is neither a directory nor a run, nor a list of these{hint}")
        for item in [source] if single else source:
            if isinstance(item, Run):
                found.setdefault(resolved(item.directory), item)
            elif isinstance(item, (str, os.PathLike)):
                for directory in find_runs([Path(item)]):
                    found.setdefault(resolved(directory), directory)
            else:
                raise TypeError(f"{type(item).__name__}, an item of a list, is neither a directory nor a run")
    return list(found.values())


def _is_a_runs_config(config: Path) -> bool:
    """Whether a config.yaml belongs to a run, rather than to a folder of configs for the command line."""
    try:
        with config.open(encoding="utf-8") as file:
            return file.read(len(HEADER)) == HEADER
    except (OSError, UnicodeDecodeError):
        return False


def short_path(directory: Path) -> str:
    """The last three parts of a run directory's path, usually experiment, rule and seed, which do not depend on where the
    outputs are stored."""
    return "/".join(resolved(directory).parts[-3:])


def metrics_of(runs: Iterable[Run]) -> dict[str, type[Metric]]:
    """All registered alignment metrics, and any others that some of the runs measured, by name."""
    measured = {name for run in runs for line in (run.result, *run.metrics) for name in line.get("angles") or ()}
    return declared({*registries.METRICS, *measured})
