"""What a logger is: it receives a run's curves while they grow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fa_bench.errors import ConfigError
from fa_bench.registry.options import Options

if TYPE_CHECKING:
    from torch import Tensor

    from fa_bench.config.job import Job


@dataclasses.dataclass(eq=False)
class Logger(Options):
    """Base of the loggers, registered in `fa_bench.registry.registries.LOGGERS`; override what is needed."""

    def require(self) -> None:
        """Called before anything is trained; raise ConfigError, with what to install, where the logger cannot work."""

    def open(self, directory: Path, job: Job, step: int) -> None:
        """Begin: the run's directory, which exists, and the step that it resumes from; what was logged of later steps is void."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers at a step; tags such as ``loss/train`` or ``weight_angle/fc1``. After a resume a step may come again."""

    def histograms(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Log distributions of tensors at a step."""

    def flush(self) -> None:
        """Return once everything is on the disk: called before a checkpoint is written."""

    def finish(self, status: str, numbers: Mapping[str, float | None], step: int) -> None:
        """The run ended: finished, diverged, interrupted or failed, with its final accuracies and seconds."""

    def close(self) -> None:
        """Release everything, also after an error."""


def require_package(logger: str, package: str) -> None:
    """Refuse a logger whose package is not installed; raises ConfigError with the line that installs it."""
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise ConfigError(f"loggers=[{logger}]: needs a package of its own: pip install {package}")
