"""The base class of loggers, which receive a run's curves during training."""

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
    """Base class of loggers, registered in `fa_bench.registry.registries.LOGGERS`; all methods are optional.

    Examples:
        >>> import dataclasses, fa_bench
        >>> @fa_bench.register_logger("printed")
        ... @dataclasses.dataclass(eq=False)
        ... class Printed(fa_bench.Logger):
        ...     '''Prints how a run ended.'''
        ...
        ...     def finish(self, status, numbers, step):
        ...         print("the run has", status)
        >>> runs = fa_bench.run("dataset=synthetic", "scale=smoke", "loggers=[printed]")
        fa seed 0...
        the run has finished...
    """

    #: Maps each key in which the runs of the sweep differ to whether all its values are numbers. The mapping is set before `open`
    #: is called, and is empty for a single run.
    swept: Mapping[str, bool] = dataclasses.field(init=False, default_factory=dict)

    def require(self) -> None:
        """Called before training. If a required package is missing, raise a ConfigError that says what to install."""

    def open(self, directory: Path, job: Job, step: int) -> None:
        """Start logging to the run's directory, which already exists. A resumed run continues from `step`, so discard all values
        logged after this step."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers at a step under tags such as ``loss/train`` or ``weight_angle/fc1``. Steps may repeat after a run has been
        resumed."""

    def histograms(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Log distributions of tensors at a step."""

    def flush(self) -> None:
        """Called before a checkpoint is written. Return only after everything logged so far is on disk."""

    def finish(self, status: str, numbers: Mapping[str, float | None], step: int) -> None:
        """Called at the end of the run. `status` is finished, stopped, diverged, interrupted or failed; `numbers` contains the
        final scores and the training time in seconds."""

    def close(self) -> None:
        """Release all resources. This method is also called after an error."""


def require_package(logger: str, package: str) -> None:
    """Raise a ConfigError with the installation command if the package that a logger needs is not installed."""
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise ConfigError(f"loggers=[{logger}]: requires an optional package: pip install {package}")
