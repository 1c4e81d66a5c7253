"""The sweeper as a Hydra plugin. Hydra looks for plugins only in the package `hydra_plugins`.

Every program that uses Hydra in this environment imports this module, so fa_bench itself is imported only when a sweep starts.
"""

from __future__ import annotations

from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

ConfigStore.instance().store(
    group="hydra/sweeper",
    name="fa_bench",
    provider="fa_bench",
    node={"_target_": "hydra_plugins.fa_bench_sweeper.FaBenchSweeper"},
)


class FaBenchSweeper(Sweeper):
    """Expands experiments, checks every job, passes all jobs to the launcher at once, and writes the report."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def sweep(self, arguments: list[str]) -> Any:
        """Run the sweep over the overrides in `arguments`, and return the exit code."""
        from fa_bench.command.sweep import sweep

        assert self.hydra_context is not None and self.config is not None
        return sweep(self.hydra_context, self.task_function, self.config, arguments)
