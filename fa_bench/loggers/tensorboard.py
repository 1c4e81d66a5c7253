"""Curves for TensorBoard."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fa_bench.loggers.base import Logger
from fa_bench.registry.registries import LOGGERS

if TYPE_CHECKING:
    from torch import Tensor

    from fa_bench.config.job import Job


@LOGGERS.register("tensorboard")
@dataclasses.dataclass(eq=False)
class TensorBoard(Logger):
    """One event file in the run's directory, with curves, histograms and hyperparameters. View it with ``tensorboard --logdir
    outputs``."""

    def open(self, directory: Path, job: Job, step: int) -> None:
        from fa_bench.loggers.events.writer import EventFile

        self.events = EventFile(directory, job, step, self.swept)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.events.scalars(values, step)

    def histograms(self, tensors: Mapping[str, Tensor], step: int) -> None:
        self.events.histograms(tensors, step)

    def flush(self) -> None:
        self.events.flush()

    def finish(self, status: str, numbers: Mapping[str, float | None], step: int) -> None:
        self.events.finish(status, numbers, step)

    def close(self) -> None:
        self.events.close()
