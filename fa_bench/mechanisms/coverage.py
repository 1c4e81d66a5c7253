"""What a rule covers, said in a table, and the models that no rule is put into."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from fa_bench.errors import CoverageError, names, nearest
from fa_bench.lazy import torch
from fa_bench.text import aligned, by_x, indented

if TYPE_CHECKING:
    from fa_bench.mechanisms.uses import Uses

#: How the names of feedback tensors begin in the modules that have them.
PREFIX = "feedback_"
#: And those of the layers that local losses add.
AUXILIARY = PREFIX + "auxiliary_"


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
        uncovered: weight name -> why it is not covered. Such a weight learns by its local gradient and carries the error on by
            itself: weight transport, as far as an error passes it.
        local: weight name -> where it is, for weights that carry no error on (an embedding, a position table): they learn by
            their local gradient, and nothing is missing.
        notes: what else to know about the rule in this model.
    """

    rule: str
    covered: tuple[Covered, ...]
    uncovered: dict[str, str]
    local: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """A table: each covered layer, its weight and what its error does; then the weights that are not covered, and why."""
        covered, uncovered = len(self.covered), len(self.uncovered)
        left = f"{uncovered} weight{'s' * (uncovered != 1)} not covered" if uncovered else "every weight"
        lines = [f"{self.rule} covers {covered} layer{'s' * (covered != 1)}, {left}"]
        rows = [("layer", "type", "weight", "its error"), *(
            (c.layer, c.kind, by_x(c.shape) + ("" if c.learns else " frozen"), c.feedback) for c in self.covered)]
        lines += indented(aligned(rows))
        if self.local:
            lines += indented(aligned([("carries no error on", "where"), *self.local.items()]))
        if uncovered:
            lines += indented(aligned([("not covered", "why"), *self.uncovered.items()]))
            lines.append("  What is not covered learns by its local gradient and carries the error by itself (weight transport).")
        lines += indented(self.notes)
        return "\n".join(lines)

    def noting_frozen(self, model: Any) -> Coverage:
        """The same, with the layers of `model` noted whose weights are not trained."""
        return dataclasses.replace(self, covered=tuple(
            dataclasses.replace(entry, learns=model.get_submodule(entry.layer).weight.requires_grad) for entry in self.covered
        ))

    def require(self, allowed: bool | list[str], model: Any) -> None:
        """Refuse a rule that covers nothing, or that leaves weights uncovered which are not allowed to be.

        Args:
            allowed: whether weights may be uncovered; or which: names, or patterns such as ``lstm.*``.
            model: to say what else is in it.

        Raises:
            CoverageError: naming the weights.
        """
        if not self.covered:
            raise CoverageError(f"rule '{self.rule}' covers no layer of this model: {not_coverable(model)}")
        patterns = allowed if isinstance(allowed, list) else ["*"] if allowed else []
        refused = {name: why for name, why in self.uncovered.items() if not any(fnmatch.fnmatch(name, p) for p in patterns)}
        if refused:
            listed = "; ".join(f"{name} ({why})" for name, why in refused.items())
            raise CoverageError(
                f"rule '{self.rule}' leaves weights uncovered: {listed}. To train them by their true local gradient, while they "
                f"carry the error by themselves, pass {{allow_uncovered}}",
                {"allow_uncovered": [*patterns, *refused] if len(refused) <= 4 else True})


COVERABLE = "nn.Linear, nn.Conv1d/2d/3d or nn.ConvTranspose1d/2d/3d of its own with a plain weight"


def not_coverable(model: Any) -> str:
    """A sentence or more on why no layer of the model can be covered, and what to do."""
    nn = torch.nn
    found = [f"it has no {COVERABLE}"]
    for path, module in model.named_modules():
        where = f"'{path}' ({type(module).__name__})" if path else f"the model ({type(module).__name__})"
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            found.append(f"{where} computes its gates in one function, by its own weights: write it with nn.Linear layers "
                         f"for its input and its state to have it covered")
        elif isinstance(module, nn.MultiheadAttention):
            found.append(f"{where} computes its projections in one function, by its own weights: write them as nn.Linear layers "
                         f"to have them covered")
        elif isinstance(module, nn.Bilinear):
            found.append(f"{where} multiplies two inputs by its weight, for which there is no feedback: write it with nn.Linear "
                         f"layers to have it covered")
        elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            found.append(f"{where} passes no error on and needs no feedback")
    return "; ".join(found)


def computed_weights(model: Any) -> str:
    """A sentence on the layers whose weight is no parameter but computed from others; empty where there are none."""
    found = [path for path, module in model.named_modules()
             if "weight" not in module._parameters and isinstance(getattr(module, "weight", None), torch.Tensor)]
    if not found:
        return ""
    return (f"the weight of {names(found)} is computed, by pruning or a parametrization, and no rule covers it: make it a plain "
            f"parameter first, with prune.remove, remove_weight_norm or remove_parametrizations of torch.nn.utils")


def foreign_weights(model: Any, covered: set[int], uses: Uses | None = None) -> tuple[dict[str, str], dict[str, str]]:
    """Weights of the model that belong to none of the layers whose parameters have the ids in `covered`.

    A parameter is a weight when it is a matrix or has two long dimensions; gains such as (C, 1, 1) are not.

    Args:
        model: the model.
        covered: ids of parameters.
        uses: what a sample forward showed of them, if there was one.

    Returns:
        (uncovered, local), as `Coverage` has them.
    """
    uncovered: dict[str, str] = {}
    local: dict[str, str] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in covered or not is_weight(name, parameter):
                continue
            full, kind = f"{path}.{name}" if path else name, type(module).__name__
            looked_up = isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag))
            if id(parameter) in uses.local if uses is not None and id(parameter) in uses.seen else looked_up:
                local[full] = f"in {_a(kind)}, looked up" if looked_up else f"in {_a(kind)}, only added to what it meets"
            else:
                uncovered[full] = f"in {_a(kind)}"
    return uncovered, local


def batch_note(what: str) -> str:
    """A note for a rule whose signal depends on which samples are in a batch."""
    return (f"{what[0].upper()}{what[1:]} depends on the batch: data-parallel ranks, and parts of a batch, differ from one pass "
            f"over the whole batch.")


def outside_text(use: str) -> str:
    """Why a weight is not covered that is used outside its layer, see `fa_bench.mechanisms.uses.Uses`."""
    return f"used outside its layer, by {use}: there it carries the error by itself"


def is_weight(name: str, parameter: Any) -> bool:
    """Whether a parameter of the model is a weight by its shape, and not feedback."""
    if name.startswith(PREFIX):
        return False
    return parameter.dim() == 2 or sum(size > 1 for size in parameter.shape) > 1


def _a(kind: str) -> str:
    return f"an {kind}" if kind[:1] in "AEIOU" or kind.startswith(("LSTM", "RNN")) else f"a {kind}"


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
        CoverageError: for a model that is wrapped for data-parallel training, compiled, has layers without a weight yet, or has a
            rule already.
    """
    from fa_bench.mechanisms.structure import rule_of_part

    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"attach needs an nn.Module, not {type(model).__name__}")
    for path, module in model.named_modules():
        where = f"the model's part '{path}'" if path else "the model"
        kind = type(module).__name__
        if isinstance(module, torch.nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
            raise CoverageError(f"{where} ({kind}) has no weight yet: run one forward pass, then attach")
        if kind in _WRAPPERS and type(module).__module__.startswith("torch."):
            raise CoverageError(f"{where} is wrapped in {kind}: attach to the plain model, then wrap it")
        if kind == "OptimizedModule" or module._compiled_call_impl is not None:
            raise CoverageError(f"{where} is compiled: attach to the plain model, then compile it")
        if (rule := getattr(module, RULE_ATTRIBUTE, None)) is not None:
            raise CoverageError(f"{where} has the rule '{rule.name}' already: call its detach() first")
        if (name := rule_of_part(module)) is not None:
            raise CoverageError(f"{where} is a part of another model that has the rule '{name}': call that rule's detach() first")
        if hasattr(module, "pathway") and kind.startswith("Feedback"):
            raise CoverageError(f"{where} is a copy of a layer that has feedback: copy the layer after detach()")


_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")

#: Where an attached model keeps its rule, so that a deep copy of the model has a copy of the rule.
RULE_ATTRIBUTE = "_fa_bench_rule"
