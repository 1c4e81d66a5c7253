"""The tables of components: one for each config group, the probes of layers, and the analyses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fa_bench.config.registry import Registry

if TYPE_CHECKING:
    from fa_bench.analyses.base import Analysis
    from fa_bench.data.base import Dataset
    from fa_bench.mechanisms.rule import Rule
    from fa_bench.metrics.probes.base import LayerProbe
    from fa_bench.models.base import Architecture
    from fa_bench.optim import OptimizerOptions

ALGORITHMS: Registry[Rule] = Registry("algorithm", "fa_bench.rules", "fa_bench.mechanisms.rule:Rule")
ARCHITECTURES: Registry[Architecture] = Registry("architecture", "fa_bench.models", "fa_bench.models.base:Architecture")
DATASETS: Registry[Dataset] = Registry("dataset", "fa_bench.data", "fa_bench.data.base:Dataset")
OPTIMIZERS: Registry[OptimizerOptions] = Registry("optimizer", "fa_bench.optim", "fa_bench.optim:OptimizerOptions")
GROUPS: tuple[Registry, ...] = (ALGORITHMS, ARCHITECTURES, DATASETS, OPTIMIZERS)
PROBES: Registry[LayerProbe] = Registry("probe", "fa_bench.metrics.probes", "fa_bench.metrics.probes.base:LayerProbe")
ANALYSES: Registry[Analysis] = Registry("analysis", "fa_bench.analyses", "fa_bench.analyses.base:Analysis")
