"""fa_bench: benchmark learning rules that avoid weight transport.

    rule = fa_bench.attach(model, "kp")                                      # in your own training loop
    runs = fa_bench.run("algorithm=kp", "dataset=digits", seed=[0, 1, 2])     # in the runner
    study = fa_bench.tune("algorithm=bp,kp", "dataset=digits", budget=20)     # a hyperparameter search

This module also provides what most plugins need: base classes, `option` to declare options, and decorators that register
components.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fa_bench.api import run, tune
    from fa_bench.callbacks.base import Callback
    from fa_bench.data.base import ArrayDataset, Dataset
    from fa_bench.errors import FaBenchError
    from fa_bench.loggers.base import Logger
    from fa_bench.mechanisms.cut.rule import CutRule
    from fa_bench.mechanisms.edge.pathways import FeedbackPathway, FixedFeedback, LearnedFeedback
    from fa_bench.mechanisms.edge.rule import EdgeRule
    from fa_bench.mechanisms.rule import Rule
    from fa_bench.mechanisms.surgery import attach, attached_rule
    from fa_bench.metrics.alignment.base import Metric
    from fa_bench.metrics.probes.base import Probe
    from fa_bench.models.base import Architecture
    from fa_bench.objectives.base import Objective
    from fa_bench.objectives.scores import Score
    from fa_bench.optim.base import OptimizerOptions
    from fa_bench.registry.options import option
    from fa_bench.registry.registries import (
        register_architecture,
        register_callback,
        register_dataset,
        register_logger,
        register_metric,
        register_objective,
        register_optimizer,
        register_probe,
        register_rule,
        register_schedule,
    )
    from fa_bench.report.frames import load_results
    from fa_bench.report.plots import plot_curves, plot_layers, plot_setting
    from fa_bench.schedules.base import Schedule

__version__ = "0.2.0"

#: Maps each name to the module that defines it. Modules are imported on first use, so that the command line can start without
#: torch.
_MODULES = {
    "attach": "mechanisms.surgery",
    "attached_rule": "mechanisms.surgery",
    "run": "api",
    "tune": "api",
    "load_results": "report.frames",
    "FaBenchError": "errors",
    **dict.fromkeys(("plot_curves", "plot_layers", "plot_setting"), "report.plots"),
    "option": "registry.options",
    "Rule": "mechanisms.rule",
    "EdgeRule": "mechanisms.edge.rule",
    "CutRule": "mechanisms.cut.rule",
    "Architecture": "models.base",
    "Dataset": "data.base",
    "ArrayDataset": "data.base",
    "OptimizerOptions": "optim.base",
    "Objective": "objectives.base",
    "Score": "objectives.scores",
    "Schedule": "schedules.base",
    "Metric": "metrics.alignment.base",
    "Probe": "metrics.probes.base",
    **dict.fromkeys(("FeedbackPathway", "FixedFeedback", "LearnedFeedback"), "mechanisms.edge.pathways"),
    "Callback": "callbacks.base",
    "Logger": "loggers.base",
    **dict.fromkeys(
        (
            "register_rule",
            "register_architecture",
            "register_dataset",
            "register_optimizer",
            "register_objective",
            "register_schedule",
            "register_metric",
            "register_probe",
            "register_callback",
            "register_logger",
        ),
        "registry.registries",
    ),
}
__all__ = [
    "Architecture",
    "ArrayDataset",
    "Callback",
    "CutRule",
    "Dataset",
    "EdgeRule",
    "FaBenchError",
    "FeedbackPathway",
    "FixedFeedback",
    "LearnedFeedback",
    "Logger",
    "Metric",
    "Objective",
    "OptimizerOptions",
    "Probe",
    "Rule",
    "Schedule",
    "Score",
    "__version__",
    "attach",
    "attached_rule",
    "load_results",
    "option",
    "plot_curves",
    "plot_layers",
    "plot_setting",
    "register_architecture",
    "register_callback",
    "register_dataset",
    "register_logger",
    "register_metric",
    "register_objective",
    "register_optimizer",
    "register_probe",
    "register_rule",
    "register_schedule",
    "run",
    "tune",
]


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return getattr(importlib.import_module(f"fa_bench.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'fa_bench' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
