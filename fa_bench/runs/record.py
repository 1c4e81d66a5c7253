"""Write the records of a run: metrics.jsonl, angles.jsonl, result.json, and the curves for its loggers."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fa_bench import __version__
from fa_bench.callbacks.base import Callback
from fa_bench.config.job import Job
from fa_bench.loggers.base import Logger
from fa_bench.loggers.events.writer import final_values
from fa_bench.metrics.meter import AlignmentMeter
from fa_bench.metrics.probes.base import Probes, Quantities
from fa_bench.objectives.scores import PARTS, as_records, final_keys
from fa_bench.registry.registries import LOGGERS
from fa_bench.registry.specs import component
from fa_bench.runs.hashes import code_hash
from fa_bench.runs.loop import Progress, Trainer
from fa_bench.runs.readers import recorded_lines, recorded_measurements, scalar_keys
from fa_bench.utils.files import ANGLES, METRICS, RESULT, dump_json, write_text


class Recorder(Callback):
    """Writes a run's records to its directory.

    Args:
        directory: the run's directory, which exists; None in a process that writes nothing.
        job: the run.
        progress: the progress of the run; records of later epochs are dropped.
        probes: additional measurements of the layers.
        steps: the number of steps in an epoch.
        swept: the keys in which the runs of the sweep differ, for the loggers.

    Raises:
        RecordError: as in `recorded_lines` and `recorded_measurements`.
    """

    def __init__(
        self, directory: Path | None, job: Job, progress: Progress, probes: Probes, steps: int, swept: Mapping[str, bool]
    ) -> None:
        self.directory, self.probes, self.steps, self.scores = directory, probes, steps, job.scores
        self.lines: list[str] = []
        self.measurements: list[str] = []
        self.loggers: list[Logger] = []
        self._written = -1
        if directory is None:
            return
        self.lines = recorded_lines(directory / METRICS, progress.epoch)
        self.measurements = recorded_measurements(directory / ANGLES, progress.measurements, progress.probed)
        self._write_metrics()
        self._write_measurements()
        self.loggers = make_loggers(job)
        for logger in self.loggers:
            logger.swept = swept
            logger.open(directory, job, progress.step)

    def measured(self, step: int, angles: Quantities) -> None:
        """Record a measurement of the alignment metrics at a step, as {metric: {layer: value}}."""
        self.measurements.append(dump_json({"step": step, "epoch": step / self.steps, "angles": angles}))
        self.layers(step, angles)

    def layers(self, step: int, quantities: Quantities) -> None:
        """Record values of layers at a step, as {quantity: {layer: value}}."""
        values = {f"{quantity}/{layer}": value for quantity, layers in quantities.items() for layer, value in layers.items()}
        for logger in self.loggers:
            logger.scalars(values, step)

    def histograms(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Record the distributions of tensors at a step."""
        for logger in self.loggers:
            logger.histograms(tensors, step)

    def on_epoch_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        progress = trainer.progress
        if self.probes.due(progress.epoch):
            metrics = metrics | {"probes": self.measure_probes(progress)}
        self.lines.append(dump_json(metrics))
        self._write_metrics()
        self._write_measurements()
        values = {tag_of(key): metrics[key] for key in scalar_keys(metrics) if metrics[key] is not None}
        for logger in self.loggers:
            logger.scalars(values, progress.step)

    def flush(self) -> None:
        """Write all pending records to disk. This must be called before a checkpoint is written."""
        self._write_measurements()
        for logger in self.loggers:
            logger.flush()

    def measure_probes(self, progress: Progress) -> Quantities:
        """Measure and record the probes in the run's option `probes`, and return the values as {quantity: {layer: value}}."""
        quantities = self.probes.measure(progress.step)
        self.layers(progress.step, {f"probe/{quantity}": layers for quantity, layers in quantities.items()})
        return quantities

    def _write_metrics(self) -> None:
        self._write(METRICS, "".join(line + "\n" for line in self.lines))

    def _write_measurements(self) -> None:
        """Write angles.jsonl. This is not called after every measurement, because measurements may be only a few steps apart."""
        if self._written != len(self.measurements):
            self._write(ANGLES, "".join(line + "\n" for line in self.measurements))
            self._written = len(self.measurements)

    def _write(self, name: str, text: str) -> None:
        if self.directory is not None:
            write_text(self.directory / name, text)

    def finish(self, result: dict[str, Any]) -> None:
        """Write result.json, and pass the run's final status and metrics to the loggers."""
        try:
            self._write_measurements()
            # The loggers finish before the result is written, because the result marks the run as complete.
            for logger in self.loggers:
                logger.finish(result["status"], {key: result[key] for key in final_values(self.scores)}, result["step"])
        finally:
            self._write(RESULT, dump_json(result, indent=1) + "\n")

    def close(self) -> None:
        """Close the loggers."""
        for logger in self.loggers:
            logger.close()

    def last_metrics(self) -> dict[str, Any]:
        """The record of the last epoch; empty if no epoch has been recorded."""
        return json.loads(self.lines[-1]) if self.lines else {}


def make_loggers(job: Job) -> list[Logger]:
    """The loggers of a run.

    Raises:
        ConfigError: if a logger's package is missing; the message says what to install.
    """
    loggers = [component(LOGGERS, spec) for spec in job.run.loggers]
    for logger in loggers:
        logger.require()
    return loggers


def tag_of(key: str) -> str:
    """The tag of a metric, such as loss/train for train_loss."""
    part, _, metric = key.partition("_")
    return f"{metric}/{part}" if part in PARTS else key


def base_result(job: Job, experiment: str | None = None) -> dict[str, Any]:
    """The result of a run that has not trained yet, with every key that a result has.

    The name of the experiment is recorded here and not in the config, so that equal configs identify the same run even in
    different experiments.
    """
    return {
        "status": "failed",
        "label": job.algorithm.name,
        "group": job.group,
        "experiment": experiment,
        "algorithm": job.algorithm.name,
        "architecture": job.architecture.name,
        "dataset": job.dataset.name,
        "optimizer": job.optimizer.name,
        "objective": job.objective.name,
        "seed": job.run.seed,
        "epochs": job.run.epochs,
        "epoch": 0,
        "step": 0,
        **dict.fromkeys(final_keys(job.scores)),
        "best_epoch": None,
        "scores": as_records(job.scores),
        "angles": {},
        "probes": {},
        "feedback_layers": [],
        "output_layers": [],
        "weight_transport": [],
        "rule_counts": {},
        "seconds": None,
        "compile_seconds": None,
        "peak_memory_bytes": None,
        "energy_wh": None,
        "energy_counters": [],
        "cost": None,
        "config_hash": job.config_hash,
        "code_hash": code_hash(job.run.plugins, job.own_classes),
        "data_hash": None,
        "initial_weights_hash": None,
        "batches_hash": None,
        "weights_hash": None,
        "feedback_hash": None,
        "optimizer_hash": None,
        "device": None,
        "world_size": 1,
        "git": git_state(),
        "versions": versions(),
        "error": None,
    }


def progress_result(recorder: Recorder, progress: Progress, meter: AlignmentMeter, complete: bool) -> dict[str, Any]:
    """The entries of a result that depend on training; `complete` says whether training ended with a final measurement."""
    last = recorder.last_metrics()
    return {
        "epoch": progress.epoch,
        "step": progress.step,
        "seconds": progress.seconds,
        "compile_seconds": progress.compile_seconds if progress.compile_seconds else None,
        "energy_wh": progress.energy_wh,
        **{key: last.get(key) for key in final_keys(recorder.scores)},
        f"test_{recorder.scores[0].name}_at_best_val": progress.test_at_best,
        "best_epoch": progress.best_epoch,
        "angles": (progress.angles if complete else last.get("angles")) or {},
        "feedback_layers": meter.feedback_layers,
        "output_layers": meter.output_layers,
        "rule_counts": meter.rule.counts(),
        "peak_memory_bytes": peak_memory(next(meter.rule.model.parameters()).device),
    }


def peak_memory(device: torch.device) -> int | None:
    """The peak memory so far, in bytes: of torch's allocator on a CUDA device, otherwise of this process. None on Windows, unless
    the device is a CUDA device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_name(device: torch.device) -> str:
    """A description of the device."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """The versions of the packages on which results depend."""
    from importlib.metadata import version

    packages = ("torch", "torchvision", "numpy", "hydra-core", "omegaconf")
    return {"fa_bench": __version__, "python": platform.python_version(), **{name: version(name) for name in packages}}


@lru_cache(maxsize=1)
def git_state() -> dict[str, Any]:
    """The commit of the checkout from which fa_bench runs, and whether it has uncommitted changes. Both are None if fa_bench does
    not run from a git checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10).stdout

    try:
        if Path(git("rev-parse", "--show-toplevel").strip()) != root:
            return {"commit": None, "dirty": None}
        return {"commit": git("rev-parse", "HEAD").strip(), "dirty": bool(git("status", "--porcelain").strip())}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
