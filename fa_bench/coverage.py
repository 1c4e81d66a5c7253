"""What a rule covers, said in a table, and the models that no rule is put into."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Collection, Iterable
from typing import Any

from fa_bench.errors import CoverageError, nearest
from fa_bench.lazy import torch


@dataclasses.dataclass(frozen=True)
class Covered:
    """One weight that the rule covers: its layer's path, type and shape, and in words what brings its error."""

    layer: str
    kind: str
    shape: tuple[int, ...]
    feedback: str


@dataclasses.dataclass(frozen=True)
class Coverage:
    """Which weights a rule covers and which it does not.

    Attributes:
        rule: the rule's name.
        covered: the covered layers, in the order of the model.
        uncovered: weight name -> why it is not covered; such a weight learns by its true local gradient.
    """

    rule: str
    covered: tuple[Covered, ...]
    uncovered: dict[str, str]

    def __str__(self) -> str:
        rows = [("layer", "type", "weight", "error reaches it by")]
        rows += [(c.layer, c.kind, "x".join(map(str, c.shape)), c.feedback) for c in self.covered]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [f"{self.rule}: {len(self.covered)} layers covered, {len(self.uncovered)} weights not covered"]
        lines += ["  " + "  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]]).rstrip() for row in rows]
        lines += [f"  not covered: {name} ({why}); learns by its true local gradient" for name, why in self.uncovered.items()]
        return "\n".join(lines)

    def require(self, allow_uncovered: bool) -> None:
        """Raise CoverageError where nothing is covered, or weights are uncovered unasked."""
        if not self.covered:
            raise CoverageError(f"rule '{self.rule}' covers no layer of this model: it has no {COVERABLE}")
        if self.uncovered and not allow_uncovered:
            listed = "; ".join(f"{name} ({why})" for name, why in self.uncovered.items())
            raise CoverageError(f"rule '{self.rule}' leaves weights uncovered: {listed}. "
                                "Pass allow_uncovered=True to train them by their true local gradient")


COVERABLE = "nn.Linear, nn.Conv1d/2d/3d or nn.ConvTranspose1d/2d/3d of its own with a plain weight"


def foreign_weights(model: Any, covered: set[int]) -> dict[str, str]:
    """Weights of the model that belong to none of the layers whose parameters have the ids in `covered`.

    A parameter is a weight when it is a matrix or has two long dimensions; gains such as (C, 1, 1) are not.
    """
    uncovered = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in covered:
                continue
            lazy = isinstance(parameter, torch.nn.parameter.UninitializedParameter)
            if lazy or parameter.dim() == 2 or sum(size > 1 for size in parameter.shape) > 1:
                full = f"{path}.{name}" if path else name
                uncovered[full] = f"{type(module).__name__} is uninitialised" if lazy else f"in a {type(module).__name__}"
    return uncovered


def matching(patterns: Iterable[str], paths: Collection[str], option: str) -> set[str]:
    """The paths that names or patterns such as ``layer*.conv1`` mean; ``*`` stands for any characters, dots included.

    Raises:
        CoverageError: naming the option and the pattern that means nothing, with the nearest path.
    """
    found: set[str] = set()
    for pattern in patterns:
        matches = fnmatch.filter(paths, pattern)
        if not matches:
            raise CoverageError(f"{option}={pattern}: the model has no module of that name{nearest(pattern, paths)}")
        found.update(matches)
    return found


def check_model(model: Any) -> None:
    """Refuse what a rule cannot be put into.

    Raises:
        TypeError: where `model` is no module.
        CoverageError: for a model that is wrapped for data-parallel training, compiled, or has a rule already.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"attach needs an nn.Module, not {type(model).__name__}")
    for path, module in model.named_modules():
        where = f"the model's part '{path}'" if path else "the model"
        kind = type(module).__name__
        if kind in _WRAPPERS and type(module).__module__.startswith("torch."):
            raise CoverageError(f"{where} is wrapped in {kind}: attach to the plain model, then wrap it")
        if kind == "OptimizedModule" or module._compiled_call_impl is not None:
            raise CoverageError(f"{where} is compiled: attach to the plain model, then compile it")
        if (rule := getattr(module, RULE_ATTRIBUTE, None)) is not None:
            raise CoverageError(f"{where} has the rule '{rule.name}' already: call its detach() first")


_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")

#: Where an attached model keeps its rule, so that a deep copy of the model has a copy of the rule.
RULE_ATTRIBUTE = "_fa_bench_rule"
