"""Trains the nets of an analysis in the process of the analysis, without a run directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from fa_bench.errors import ConfigError, OptionError
from fa_bench.registry.registries import GROUPS, OBJECTIVES
from fa_bench.registry.specs import component

if TYPE_CHECKING:
    from fa_bench.config.job import Job
    from fa_bench.runs.assembly import Parts
    from fa_bench.runs.loop import Progress


def make_job(texts: Mapping[str, tuple[str, str]], **run: Any) -> Job:
    """Create a job from one string per config group, each written as ``NAME:OPTION=VALUE,...``.

    Args:
        texts: config group -> (the analysis's option, its value).
        **run: top-level options.

    Raises:
        ConfigError: for an unknown component.
        OptionError: for an invalid value, prefixed with the analysis's option.
    """
    from fa_bench.config.job import Job, RunOptions
    from fa_bench.objectives.cross_entropy import CrossEntropy

    parts: dict[str, Any] = {}
    for group in (group for group in GROUPS if group is not OBJECTIVES):
        key, text = texts[group.kind]
        try:
            parts[group.kind] = component(group, text)
        except OptionError as error:
            raise error.with_prefix(key) from None
    return Job(RunOptions(**run), feedback_optimizer=None, objective=CrossEntropy(), **parts)


def fit(job: Job, parts: Parts, on_epoch: Callable[[Progress, dict[str, Any]], None]) -> dict[str, dict[str, float]]:
    """Train to the last epoch and return the final alignment metrics.

    Raises:
        ConfigError: the run diverged.
    """
    from fa_bench.callbacks.base import Callback
    from fa_bench.runs.callbacks import Alignment
    from fa_bench.runs.divergence import Diverged, Divergence
    from fa_bench.runs.loop import Trainer

    class Watch(Callback):
        def on_epoch_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
            on_epoch(trainer.progress, metrics)

    trainer = Trainer(
        parts.rule, parts.optimizers, parts.splits, job.run, [Divergence(), Alignment(parts.meter, every=0), Watch()]
    )
    for _ in parts.rule.initial_phase():
        pass
    try:
        trainer.fit()
    except Diverged as error:
        raise ConfigError(f"{parts.rule.name} with seed {job.run.seed} diverged: {error}; a lower lr may help") from None
    return trainer.progress.angles or {}
