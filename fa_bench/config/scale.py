"""Scales, which shorten the runs of a config to fewer epochs and less data."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fa_bench.config.job import Job
    from fa_bench.optim.base import OptimizerOptions


@dataclasses.dataclass(frozen=True)
class Scale:
    """The factors and limits by which a run is shortened.

    Attributes:
        epochs: factor for the number of epochs (at least one remains), the lengths in schedules and the steps before training.
        train, test: maximum numbers of samples.
        batch_size, probe_size: maximum sizes.
    """

    epochs: float
    train: int
    test: int
    batch_size: int
    probe_size: int

    def epochs_of(self, epochs: int) -> int:
        """The reduced number of epochs."""
        return max(round(self.epochs * epochs), 1)


SCALES: dict[str, Scale | None] = {
    "full": None,
    "short": Scale(epochs=0.1, train=10_000, test=2_000, batch_size=1_000_000, probe_size=1_000_000),
    "smoke": Scale(epochs=0.0, train=24, test=8, batch_size=8, probe_size=4),
}


def scaled(job: Job) -> Job:
    """The job after its scale has been applied; the job itself if the scale is ``full``."""
    scale = SCALES[job.run.scale]
    if scale is None:
        return job
    run = dataclasses.replace(
        job.run,
        epochs=scale.epochs_of(job.run.epochs),
        batch_size=min(job.run.batch_size, scale.batch_size),
        probe_size=min(job.run.probe_size, scale.probe_size),
    )
    feedback = job.feedback_optimizer
    return dataclasses.replace(
        job,
        run=run,
        algorithm=job.algorithm.shortened(scale.epochs),
        optimizer=_optimizer(job.optimizer, scale),
        feedback_optimizer=feedback and _optimizer(feedback, scale),
    )


def _optimizer(options: OptimizerOptions, scale: Scale) -> OptimizerOptions:
    return dataclasses.replace(options, schedule=options.schedule.shortened(scale.epochs_of))
