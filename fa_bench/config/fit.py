"""Check that the components and options of a run fit together, as far as this can be determined from the config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fa_bench.errors import ConfigError, OptionError, names
from fa_bench.registry.kinds import CLASSES, TOKENS, VALUES
from fa_bench.registry.registries import ARCHITECTURES, OBJECTIVES

if TYPE_CHECKING:
    from fa_bench.config.job import RunOptions


def require_fit(run: RunOptions, components: Mapping[str, Any]) -> None:
    """Refuse components that cannot be trained together.

    Args:
        run: the options of the run.
        components: the component of each group.

    Raises:
        ConfigError: if the objective or the architecture does not support the dataset, or if compile=true and the rule
            cannot be compiled.
        OptionError: if rule and objective name different outputs, or if the rule computes errors from labels although the targets
            are numbers.
    """
    dataset, objective, rule = components["dataset"], components["objective"], components["algorithm"]
    if dataset.targets not in objective.targets:
        allowed = [name for name, cls in OBJECTIVES.items() if dataset.targets in cls.targets]
        raise ConfigError(
            f"objective={objective.name} requires {names(objective.targets)} as targets, but those of dataset="
            f"{dataset.name} are {dataset.targets} (allowed objectives: {names(allowed)})"
        )
    architecture, task = components["architecture"], (dataset.inputs, dataset.targets)
    if task not in architecture.tasks:
        allowed = [name for name, cls in ARCHITECTURES.items() if task in cls.tasks]
        hint = "; whole numbers that are features must be stored as floats" if task == (TOKENS, CLASSES) else ""
        raise ConfigError(
            f"architecture={architecture.name} does not support dataset={dataset.name}, whose inputs are "
            f"{dataset.inputs} and whose targets are {dataset.targets} (allowed architectures: "
            f"{names(allowed) or 'none'}){hint}"
        )
    output, of_rule = objective.output, getattr(rule, "output", None)
    if output is not None and of_rule is not None and str(output) != str(of_rule):
        raise OptionError("algorithm.output", f"={of_rule} conflicts with objective.output={output}; set only one of them")
    if dataset.targets == VALUES and getattr(rule, "needs_target", False) and not getattr(rule, "takes_numbers", False):
        option = getattr(rule, "without_target", "")
        mend = f"algorithm.{option}, or " if option else ""
        raise OptionError(
            "algorithm",
            f"={rule.name} computes its errors from class labels, but the targets of dataset={dataset.name} are numbers; use "
            f"{mend}a rule such as dfa",
        )
    if run.compile is True and rule.repeats:
        raise ConfigError(
            f"compile=true is not possible with algorithm={rule.name}, which runs the model again in the backward pass; use "
            "compile=false"
        )
