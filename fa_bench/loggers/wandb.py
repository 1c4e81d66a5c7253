"""Weights & Biases."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fa_bench.loggers.base import Logger, require_package
from fa_bench.registry.registries import LOGGERS

if TYPE_CHECKING:
    from fa_bench.config.job import Job


@LOGGERS.register("wandb")
@dataclasses.dataclass(eq=False)
class Wandb(Logger):
    """Weights & Biases, configured by environment variables such as WANDB_PROJECT and WANDB_MODE. A resumed run continues the
    same W&B run."""

    run: Any = dataclasses.field(init=False, default=None)

    def require(self) -> None:
        require_package(self.name, "wandb")

    def open(self, directory: Path, job: Job, step: int) -> None:
        import wandb

        # wandb drops steps that repeat after a resume and prints a warning; the repeated steps have the same values.
        self.run = wandb.init(  # pyright: ignore[reportAttributeAccessIssue]
            id=f"{job.config_hash}-{job.run.seed}",
            resume="allow",
            dir=str(directory.parent),
            name=f"{job.group} seed {job.run.seed}",
            group=job.group,
            config=job.plain(),
            reinit=True,
        )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def finish(self, status: str, numbers: Mapping[str, float | None], step: int) -> None:
        self.run.summary.update({"status": status, **{key: value for key, value in numbers.items() if value is not None}})

    def close(self) -> None:
        if self.run is not None:
            self.run.finish()
