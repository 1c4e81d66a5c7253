"""MLflow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fa_bench.config.labels import flatten
from fa_bench.loggers.base import Logger, require_package
from fa_bench.registry.registries import LOGGERS

if TYPE_CHECKING:
    from fa_bench.config.job import Job


@LOGGERS.register("mlflow")
@dataclasses.dataclass(eq=False)
class MLflow(Logger):
    """MLflow tracking, configured by environment variables such as MLFLOW_TRACKING_URI. Every start of a run, including a resume,
    creates a new MLflow run."""

    client: Any = dataclasses.field(init=False, default=None)

    def require(self) -> None:
        require_package(self.name, "mlflow")

    def open(self, directory: Path, job: Job, step: int) -> None:
        import mlflow

        self.client = mlflow.MlflowClient()  # pyright: ignore[reportAttributeAccessIssue]
        experiment = mlflow.set_experiment("fa_bench").experiment_id  # pyright: ignore[reportAttributeAccessIssue]
        self.run = self.client.create_run(experiment, run_name=f"{job.group} seed {job.run.seed}").info.run_id
        for key, value in flatten(job.plain()).items():
            self.client.log_param(self.run, key, value)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self.client.log_metric(self.run, tag, value, step=step)

    def finish(self, status: str, numbers: Mapping[str, float | None], step: int) -> None:
        for key, value in numbers.items():
            if value is not None:
                self.client.log_metric(self.run, f"final/{key}", value, step=step)
        self.client.set_terminated(self.run, "FINISHED" if status in ("finished", "stopped") else "FAILED")
