"""Report which weights of a model a rule covers, and why it does not cover the others."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from fa_bench.errors import CoverageError, names, nearest, truncate
from fa_bench.mechanisms.feedback_tensors import PREFIX
from fa_bench.utils.lazy import torch
from fa_bench.utils.text import align_columns, format_shape, indent

if TYPE_CHECKING:
    from fa_bench.mechanisms.uses import Uses


@dataclasses.dataclass(frozen=True)
class Covered:
    """One weight that the rule covers.

    Attributes:
        layer, kind, shape: the path and type of the layer, and the shape of the weight.
        feedback: completes the sentence "its error ...": for an edge rule, how it passes to the layer below; for a cut rule,
            where it comes from.
        learns: whether the weight is trained.
    """

    layer: str
    kind: str
    shape: tuple[int, ...]
    feedback: str
    learns: bool = True


@dataclasses.dataclass(frozen=True)
class Coverage:
    """The weights that a rule covers and those that it does not.

    Attributes:
        rule: the rule's name.
        covered: the covered layers, in the order of definition or, for a cut rule, of execution.
        uncovered: weight name -> why it is not covered. Such a weight learns from its local gradient. An error that passes
            through the layer is multiplied by the weight itself, which is weight transport.
        local: weight name -> where it is, for weights that pass no error on (an embedding, a position table): they learn from
            their local gradient and need no feedback.
        notes: additional notes on the rule in this model.
        transport: where errors that the rule itself defines pass through weights, such as ``within blocks`` or ``after 'norm'``.
    """

    rule: str
    covered: tuple[Covered, ...]
    uncovered: dict[str, str]
    local: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    transport: tuple[str, ...] = ()

    def __str__(self) -> str:
        """A report that lists the covered layers with their errors, the weights that propagate no error, the uncovered weights
        with the reasons, and the notes."""
        covered, uncovered = len(self.covered), len(self.uncovered)
        missing = f"{uncovered} weight{'s' * (uncovered != 1)} not covered" if uncovered else "every weight"
        lines = [f"{self.rule} covers {covered} layer{'s' * (covered != 1)}, {missing}"]
        rows = [
            ("layer", "type", "weight", "its error"),
            *((c.layer, c.kind, format_shape(c.shape) + ("" if c.learns else " frozen"), c.feedback) for c in self.covered),
        ]
        lines += indent(align_columns(rows))
        if self.local:
            lines += indent(align_columns([("propagates no error", "where"), *self.local.items()]))
        if uncovered:
            lines += indent(align_columns([("not covered", "why"), *self.uncovered.items()]))
            lines.append(
                "  Uncovered weights learn from their local gradient and propagate the error themselves (weight transport)."
            )
        lines += indent([*self.notes, *(f"Weight transport {where}." for where in self.transport)])
        return "\n".join(lines)

    def all_transport(self) -> list[str]:
        """Where errors pass through weights: `transport`, and the uncovered weights."""
        uncovered = f"through {len(self.uncovered)} uncovered weight{'s' * (len(self.uncovered) > 1)} ({names(self.uncovered)})"
        return [*self.transport, *([truncate(uncovered, 300)] if self.uncovered else [])]

    def with_frozen(self, model: Any) -> Coverage:
        """A copy of this coverage that marks the layers whose weights are frozen in `model`."""
        return dataclasses.replace(
            self,
            covered=tuple(
                dataclasses.replace(entry, learns=model.get_submodule(entry.layer).weight.requires_grad) for entry in self.covered
            ),
        )

    def require(self, allowed: bool | list[str], model: Any) -> None:
        """Raise an error if the rule covers nothing, or if it leaves weights uncovered that must be covered.

        Args:
            allowed: whether weights may be uncovered, or a list of those that may be: names, or patterns such as ``lstm.*``.
            model: the model, to explain why nothing is covered.

        Raises:
            CoverageError: in either case; in the second, the message names the weights.
        """
        if not self.covered:
            raise CoverageError(f"rule '{self.rule}' covers no layer of this model: {not_coverable(model)}")
        patterns = allowed if isinstance(allowed, list) else ["*"] if allowed else []
        refused = {name: why for name, why in self.uncovered.items() if not any(matches_name(name, p) for p in patterns)}
        if refused:
            listed = "; ".join(f"{name} ({why})" for name, why in refused.items())
            raise CoverageError(
                f"rule '{self.rule}' leaves weights uncovered: {listed}. To let them learn from their true local gradient "
                f"and propagate the error themselves (weight transport), pass {{allow_uncovered}}",
                {"allow_uncovered": [*patterns, *refused] if len(refused) <= 4 else True},
            )


COVERABLE = "nn.Linear, nn.Conv1d/2d/3d, nn.ConvTranspose1d/2d/3d, attention, recurrent or bilinear module with plain weights"


def not_coverable(model: Any) -> str:
    """The reasons why no layer of the model can be covered, as one or more clauses."""
    nn, reasons = torch.nn, [f"it has no {COVERABLE}"]
    compounds = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Bilinear)
    why = {
        compounds: "is a user-defined subclass, or has weights that are computed from other parameters",
        (nn.Embedding, nn.EmbeddingBag): "propagates no error and needs no feedback",
    }
    for path, module in model.named_modules():
        where = f"'{path}' ({type(module).__name__})" if path else f"the model ({type(module).__name__})"
        reasons += [f"{where} {text}" for kinds, text in why.items() if isinstance(module, kinds)]
    return "; ".join(reasons)


def computed_weights(model: Any) -> str:
    """A clause that names the layers whose weight is computed from other parameters, or an empty string if there are no such
    layers."""
    paths = [
        path
        for path, module in model.named_modules()
        if "weight" not in module._parameters and isinstance(getattr(module, "weight", None), torch.Tensor)
    ]
    if not paths:
        return ""
    return (
        f"the weight of {names(paths)} is computed by pruning or a parametrization, and no rule covers it; first turn it "
        f"into a plain parameter, with prune.remove, remove_weight_norm or remove_parametrizations of torch.nn.utils"
    )


def foreign_weights(model: Any, covered: set[int], uses: Uses | None = None) -> tuple[dict[str, str], dict[str, str]]:
    """The model's weights that are not in `covered`: those that a rule leaves uncovered, and those that need no feedback.

    A parameter counts as a weight if it is a matrix or has at least two dimensions of size greater than 1. Gains of shape (C, 1,
    1), for example, are not weights.

    Args:
        model: the model.
        covered: ids of parameters.
        uses: how a forward pass of a sample used the weights; None if no pass was traced.

    Returns:
        The pair (uncovered, local), as in `Coverage`.
    """
    uncovered: dict[str, str] = {}
    local: dict[str, str] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in covered or not is_weight(name, parameter):
                continue
            full, kind = f"{path}.{name}" if path else name, _kind(module)
            looked_up = isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag))
            if id(parameter) in uses.local if uses is not None and id(parameter) in uses.seen else looked_up:
                local[full] = f"in {_a(kind)}, looked up" if looked_up else f"in {_a(kind)}, only added to activations"
            else:
                uncovered[full] = f"in {_a(kind)}"
    return uncovered, local


def batch_note(what: str) -> str:
    """A note for a rule whose error depends on which samples form a batch."""
    return (
        f"{what[0].upper()}{what[1:]} depends on the batch, so results on data-parallel ranks and on micro-batches differ "
        f"from those of one pass over the whole batch."
    )


def noise_note() -> str:
    """A note for a rule that draws separate random numbers, such as noise, for every sample."""
    return (
        "Each sample has its own random numbers, so results on data-parallel ranks and on micro-batches differ from those of "
        "one pass over the whole batch."
    )


def outside_text(use: str) -> str:
    """The reason why a weight that is used outside its layer is not covered; see `fa_bench.mechanisms.uses.Uses`."""
    return f"used outside its layer, by {use}, where it propagates the error itself"


def is_weight(name: str, parameter: Any) -> bool:
    """Whether a parameter of the model has the shape of a weight and is not feedback."""
    if name.startswith(PREFIX):
        return False
    return parameter.dim() == 2 or sum(size > 1 for size in parameter.shape) > 1


def _kind(module: Any) -> str:
    """The type of a module, with a remark if its forward method was replaced. For a class outside of torch that shares its name
    with one of torch.nn, such as timm's Linear, the import path is included."""
    cls = type(module)
    is_other = cls.__name__ in vars(torch.nn) and not cls.__module__.startswith("torch.")
    name = f"{cls.__module__}.{cls.__name__}" if is_other else cls.__name__
    return f"{name} whose forward method was replaced" if "forward" in module.__dict__ else name


def _a(kind: str) -> str:
    return f"an {kind}" if kind[:1] in "AEIOU" or kind.startswith(("LSTM", "RNN")) else f"a {kind}"


def matches_name(name: str, pattern: str) -> bool:
    """Whether a pattern matches a name or is that name, which may contain brackets."""
    return name == pattern or fnmatch.fnmatch(name, pattern)


def matching(patterns: Iterable[str], paths: Collection[str], option: str) -> set[str]:
    """The paths that match names or patterns such as ``layer*.conv1``; ``*`` matches any characters, including dots.

    Raises:
        CoverageError: if a pattern matches nothing; the message names the option, the pattern and the nearest path.
    """
    matched: set[str] = set()
    for pattern in patterns:
        matches = [path for path in paths if matches_name(path, pattern)]
        if not matches:
            raise CoverageError(f"{option}={pattern}: the model has no module of that name{nearest(pattern, paths)}")
        matched.update(matches)
    return matched
