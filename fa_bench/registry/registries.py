"""The registries of components: one for each config group, one for each kind of component that an option selects by name, and one
for analyses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fa_bench.registry.registry import Registry

if TYPE_CHECKING:
    from fa_bench.analyses.base import Analysis
    from fa_bench.callbacks.base import Callback
    from fa_bench.data.base import Dataset
    from fa_bench.loggers.base import Logger
    from fa_bench.mechanisms.rule import Rule
    from fa_bench.metrics.alignment.base import Metric
    from fa_bench.metrics.probes.base import Probe
    from fa_bench.models.base import Architecture
    from fa_bench.objectives.base import Objective
    from fa_bench.optim.base import OptimizerOptions
    from fa_bench.schedules.base import Schedule

ALGORITHMS: Registry[Rule] = Registry("algorithm", "fa_bench.rules", "fa_bench.mechanisms.rule:Rule")
ARCHITECTURES: Registry[Architecture] = Registry("architecture", "fa_bench.models", "fa_bench.models.base:Architecture")
DATASETS: Registry[Dataset] = Registry("dataset", "fa_bench.data", "fa_bench.data.base:Dataset")
OPTIMIZERS: Registry[OptimizerOptions] = Registry("optimizer", "fa_bench.optim", "fa_bench.optim.base:OptimizerOptions")
OBJECTIVES: Registry[Objective] = Registry("objective", "fa_bench.objectives", "fa_bench.objectives.base:Objective")
GROUPS: tuple[Registry, ...] = (ALGORITHMS, ARCHITECTURES, DATASETS, OPTIMIZERS, OBJECTIVES)
SCHEDULES: Registry[Schedule] = Registry("schedule", "fa_bench.schedules", "fa_bench.schedules.base:Schedule")
METRICS: Registry[Metric] = Registry("metric", "fa_bench.metrics.alignment", "fa_bench.metrics.alignment.base:Metric")
CALLBACKS: Registry[Callback] = Registry("callback", "fa_bench.callbacks", "fa_bench.callbacks.base:Callback")
LOGGERS: Registry[Logger] = Registry("logger", "fa_bench.loggers", "fa_bench.loggers.base:Logger")
PROBES: Registry[Probe] = Registry("probe", "fa_bench.metrics.probes", "fa_bench.metrics.probes.base:Probe")
ANALYSES: Registry[Analysis] = Registry("analysis", "fa_bench.analyses", "fa_bench.analyses.base:Analysis")
#: Registries of components that an option selects by name, such as ``metrics=[weight_angle]`` or
#: ``optimizer.schedule.name=cosine``.
NAMED: tuple[Registry, ...] = (SCHEDULES, METRICS, PROBES, CALLBACKS, LOGGERS)

register_rule, register_architecture, register_dataset = ALGORITHMS.register, ARCHITECTURES.register, DATASETS.register
register_optimizer, register_objective, register_schedule = OPTIMIZERS.register, OBJECTIVES.register, SCHEDULES.register
register_metric, register_probe = METRICS.register, PROBES.register
register_callback, register_logger = CALLBACKS.register, LOGGERS.register
