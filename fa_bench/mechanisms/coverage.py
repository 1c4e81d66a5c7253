"""What a rule covers, said in a table, and the models that no rule is put into."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Collection, Iterable
from typing import Any

from fa_bench.errors import CoverageError, nearest
from fa_bench.lazy import torch
from fa_bench.text import aligned, by_x, indented


@dataclasses.dataclass(frozen=True)
class Covered:
    """One weight that the rule covers.

    Attributes:
        layer, kind, shape: its layer's path and type, and its own shape.
        feedback: words that go on from "its error": an edge rule says what carries it on to the layer below, a cut rule where
            it comes from.
        learns: whether the weight is trained.
    """

    layer: str
    kind: str
    shape: tuple[int, ...]
    feedback: str
    learns: bool = True


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
        """A table: each covered layer, its weight and what its error does; then the weights that are not covered, and why."""
        covered, uncovered = len(self.covered), len(self.uncovered)
        left = f"{uncovered} weight{'s' * (uncovered != 1)} not covered" if uncovered else "every weight"
        lines = [f"{self.rule} covers {covered} layer{'s' * (covered != 1)}, {left}"]
        rows = [("layer", "type", "weight", "its error"), *(
            (c.layer, c.kind, by_x(c.shape) + ("" if c.learns else " frozen"), c.feedback) for c in self.covered)]
        lines += indented(aligned(rows))
        if uncovered:
            lines += indented(aligned([("not covered", "why"), *self.uncovered.items()]))
            lines.append("  What is not covered learns by its true local gradient.")
        return "\n".join(lines)

    def noting_frozen(self, model: Any) -> Coverage:
        """The same, with the layers of `model` noted whose weights are not trained."""
        return dataclasses.replace(self, covered=tuple(
            dataclasses.replace(entry, learns=model.get_submodule(entry.layer).weight.requires_grad) for entry in self.covered
        ))

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
