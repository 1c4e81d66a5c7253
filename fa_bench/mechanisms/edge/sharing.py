"""Shared activations, which replace the inputs of layers in gradients. A shared activation is an earlier activation, resized to
the shape of the input that it replaces.

The activations that are inputs of sharing layers are numbered in the order of execution. The stem's output is number 1. An
activation that is the input of several layers, such as a block's first convolution and its projection, is counted once. If k
layers share, activation s = 1 + k ⌊(p - 2)/k⌋ replaces activation p ≥ 2 (eqs 39-42 of Woo et al. 2021). Layers whose input is
activation 1 use that activation itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fa_bench.errors import CoverageError, names
from fa_bench.mechanisms.checkpointing import recomputing, refuse_reentrant
from fa_bench.mechanisms.edge.pathways import (
    BackwardContext,
    FeedbackPathway,
    FixedFeedback,
    LearnedFeedback,
    TransposeFeedback,
)
from fa_bench.mechanisms.edge.rule import EdgeRule, LayerContext
from fa_bench.mechanisms.feedback_options import init_option
from fa_bench.mechanisms.feedback_tensors import feedback_tensor
from fa_bench.registry.options import option
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fa_bench.mechanisms.coverage import Coverage
    from fa_bench.mechanisms.trace import Trace

MATCHES = ("max_pool", "avg_pool", "random")


class SharedActivation:
    """An activation that other layers share, captured at the input of its first consumer.

    Args:
        consumer: the path of that layer.
    """

    def __init__(self, consumer: str) -> None:
        self.consumer = consumer
        self._captured: tuple[Tensor, int] | None = None

    def capture(self, x: Tensor) -> None:
        """Called in every forward pass by the first layer that has the activation as its input."""
        self._captured = x.detach(), 0 if torch.compiler.is_compiling() else x._version  # no versions in compiled graphs

    @property
    def is_missing(self) -> bool:
        """Whether the activation is missing, because no forward pass that has computed it is running."""
        return self._captured is None

    def clear(self) -> None:
        """Discard the activation; called before and after every forward pass, because an activation belongs to a single pass."""
        self._captured = None

    def in_backward(self, match: Callable[[Tensor], Tensor], rule: str) -> Callable[[], Tensor]:
        """A function that returns this forward pass's activation, resized to the layer's input, for the backward pass.

        Raises:
            CoverageError: if the first consumer of the activation did not run in this pass.
        """
        if self._captured is None and recomputing():
            return refuse_reentrant(rule)
        if self._captured is None:
            raise CoverageError(
                f"the activation that layers share is the input of '{self.consumer}', which did not run before "
                f"them in this forward pass with gradients: all layers that share must run, in the same order, "
                f"when the model is called (activation checkpointing needs use_reentrant=False)"
            )
        tensor, version = self._captured

        def matched() -> Tensor:
            if not torch.compiler.is_compiling() and tensor._version != version:
                raise RuntimeError("a shared activation was changed in place between its first use and the backward pass")
            return match(tensor)

        return matched


class DimensionsDiffer(ValueError):
    """An activation cannot be resized to a map with another number of dimensions."""


class PositionsDiffer(Exception):
    """The positions of two activations do not correspond, such as tokens in one and windows in the other."""


def matcher(
    shape: tuple[int, ...], wanted: tuple[int, ...], kind: str, mixing: Tensor | None, features_last: bool = False
) -> Callable[[Tensor], Tensor]:
    """A function that converts activations of one shape to another shape; both shapes exclude the batch.

    The activation is concatenated with copies of itself until it has enough channels, or features. A map is then pooled, with a
    kernel size and a stride equal to the ratio of the sizes, rounded up; features are pooled if there are too many. ``random``
    replaces both steps with a fixed random 1x1 convolution, `mixing`, with the same stride. If the wanted shape is flat, a map is
    flattened first. With `features_last`, as in fully connected layers, the features at every position of a sequence are matched.

    Raises:
        ValueError: if no whole number of copies, or no whole stride, yields the wanted shape.
        PositionsDiffer: with `features_last`, if the positions do not correspond.
    """
    if features_last and wanted[1:]:
        if shape[:-1] != wanted[:-1]:
            raise PositionsDiffer
        return _feature_matcher(shape[-1], wanted[-1], kind, mixing)
    if len(shape) != len(wanted):
        if len(wanted) > 1:
            raise DimensionsDiffer(f"an activation of shape {shape} cannot be resized to a map of shape {wanted}")
        inner = matcher((math.prod(shape),), wanted, kind, mixing)
        return lambda x: inner(x.flatten(1))
    dims = len(shape) - 1
    if dims == 0:
        return _feature_matcher(shape[0], wanted[0], kind, mixing)
    strides = [math.ceil(have / want) for have, want in zip(shape[1:], wanted[1:], strict=True)]
    if mixing is None and wanted[0] % shape[0]:
        raise ValueError(f"{wanted[0]} channels are not a multiple of {shape[0]}")
    if any(math.ceil(have / stride) != want for have, stride, want in zip(shape[1:], strides, wanted[1:], strict=True)):
        raise ValueError(f"pooling does not reduce {shape[1:]} to {wanted[1:]}")
    copies = wanted[0] // shape[0]
    convolve = getattr(torch.nn.functional, f"conv{dims}d")
    pool = getattr(torch.nn.functional, f"max_pool{dims}d" if kind == "max_pool" else f"avg_pool{dims}d")

    def match(x: Tensor) -> Tensor:
        if mixing is not None:
            return convolve(x, mixing.to(x.dtype), stride=strides)
        x = torch.cat([x] * copies, 1) if copies > 1 else x
        return x if max(strides) == 1 else pool(x, strides, ceil_mode=True)

    return match


def _feature_matcher(have: int, want: int, kind: str, mixing: Tensor | None) -> Callable[[Tensor], Tensor]:
    if mixing is not None:
        return lambda x: torch.nn.functional.linear(x, mixing.to(x.dtype))
    if want % have == 0:
        return (lambda x: x) if want == have else (lambda x: torch.cat([x] * (want // have), -1))
    if have % want:
        raise ValueError(f"neither of {have} and {want} features is a multiple of the other")
    pool: Any = torch.nn.functional.max_pool1d if kind == "max_pool" else torch.nn.functional.avg_pool1d
    return lambda x: pool(x.reshape(-1, 1, have), have // want).reshape(*x.shape[:-1], want)


@dataclasses.dataclass(eq=False)
class SharedActivationFeedback(FeedbackPathway):
    """A wrapper for another pathway that lets a shared activation replace the layer's input in gradients, or provides the layer's
    input to other layers.

    Attributes:
        inner: the pathway of the error.
        source: the shared activation that replaces this layer's input, or None.
        provides: the shared activation that is this layer's input, or None.
        shape, wanted: shapes, without the batch, of the shared activation and of this layer's input.
        kind: how the shared activation is resized, one of `MATCHES`.
    """

    inner: FeedbackPathway
    source: SharedActivation | None
    provides: SharedActivation | None
    shape: tuple[int, ...]
    wanted: tuple[int, ...]
    kind: str

    always_needed = True

    def __post_init__(self) -> None:
        self.learned, self.follows, self.description = self.inner.learned, self.inner.follows, self.inner.description

    def describe(self) -> str:
        return super().describe() + (f"; shares the input of {self.source.consumer}" if self.source is not None else "")

    def context(self, layer: Any, x: Tensor) -> BackwardContext:
        if self.provides is not None:
            self.provides.capture(_batch_first(layer, x))
        context = self.inner.context(layer, x)
        if self.source is None or (layer.mode.freeze_random and self.source.is_missing):
            return context  # a metric runs only this layer
        return self.shared(layer, context, self.source.in_backward(self.match(layer), layer.mode.rule))

    def match(self, layer: Any) -> Callable[[Tensor], Tensor]:
        """A function that converts the shared activation, (N, ...), to the shape of this layer's input."""
        match = matcher(self.shape, self.wanted, self.kind, feedback_tensor(layer, "P"), layer.weight.dim() == 2)
        return lambda activation: _batch_first(layer, match(activation), undo=True)

    def shared(self, layer: Any, context: BackwardContext, activation: Callable[[], Tensor]) -> BackwardContext:
        """The context in which the shared activation replaces the input, here in the weight gradient."""
        return context._replace(activation=activation)

    def effective(self, layer: Any) -> Tensor:
        return self.inner.effective(layer)


@dataclasses.dataclass(eq=False)
class SharingRule(EdgeRule):
    """Base class of the rules with shared activations; the pathway class `sharing` determines where they are used."""

    k: int = option(2, "how many layers share an activation (2 and 4 in Woo et al. 2021)", minimum=2)
    match: str = option(
        "max_pool",
        "how a shared activation is resized to the shape of a later one: by copying and max- or "
        "average-pooling, or by a fixed random 1x1 convolution",
        choices=list(MATCHES),
    )
    linear: str = option(
        "auto",
        "fully connected layers: fa (own input, fixed feedback), share, or auto (share if the model has no convolution)",
        choices=["auto", "fa", "share"],
    )
    b_init: str = init_option("learned B", "pytorch", can_copy=True)
    linear_b_init: str = init_option("the fixed B of fully connected layers", "uniform_one")
    transport: bool = option(
        False,
        "convolutions use their weights as feedback, and so do fully connected layers if they share activations; if they do "
        "not, they keep their fixed feedback",
    )
    freeze_stem: bool = option(True, "the first layer keeps its initial weight and bias")

    sharing = SharedActivationFeedback

    def begin_forward(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        super().begin_forward(model, args, kwargs)
        self._clear_sources()

    def end_forward(self, model: nn.Module, args: Any, output: Any) -> Any:
        self._clear_sources()
        return super().end_forward(model, args, output)

    def _clear_sources(self) -> None:
        for source in self._sources.values():
            source.clear()

    def wire(self, sample_input: Any) -> Coverage:
        trace = self.trace(sample_input)
        groups = self.sharing_groups(self.model, trace)
        repeated = [path for group in groups for path in group if trace.calls[path] > 1]
        if repeated:
            raise CoverageError(
                f"rule '{self.name}' shares one activation with each layer, so a layer must run once in a "
                f"forward pass; {names(repeated)} runs {trace.calls[repeated[0]]} times"
            )
        self._groups = {path: number for number, group in enumerate(groups, start=1) for path in group}
        self._first = {number: group[0] for number, group in enumerate(groups, start=1)}
        self._sources = {shared: SharedActivation(self._first[shared]) for shared in map(self.source_of, [*self._first][1:])}
        self._shapes = {path: _without_batch(self.model.get_submodule(path), shape) for path, shape in trace.input_shapes.items()}
        self._stem = trace.order[0]
        self._unmatched: list[str] = []
        self._transporting = self.weight_transport_layers(self.model)
        coverage = super().wire(sample_input)
        if not self._unmatched:
            return coverage
        return dataclasses.replace(
            coverage,
            notes=(
                *coverage.notes,
                (
                    f"Layers that use their own input, because its positions are not those of the activation that they would "
                    f"share: {names(self._unmatched)}."
                ),
            ),
        )

    def sharing_groups(self, model: nn.Module, trace: Trace) -> list[list[str]]:
        """The layers that share, grouped by their input activation; the first group's input is activation 1, the stem's output.

        Raises:
            CoverageError: if there are fewer than two such activations.
        """
        convolutional = _convolutions(model)
        share_linear = self.shares_linear(convolutional)
        groups = [group for group in trace.inputs[1:] if share_linear or convolutional.issuperset(group)]
        if len(groups) < 2:
            sharing_layers = names(path for group in groups for path in group) or "none"
            would_suffice = not share_linear and len(trace.inputs) > 2  # fully connected layers would be enough
            raise CoverageError(
                f"rule '{self.name}' has nothing to share in this model: after the first layer '{trace.order[0]}' it needs two "
                f"activations that are inputs of sharing layers, but there are {len(groups)} (inputs of {sharing_layers}). "
                + (
                    "Pass {linear} so that fully connected layers share activations, too"
                    if would_suffice
                    else "It needs a deeper model"
                ),
                {"linear": "share"} if would_suffice else {},
            )
        return groups

    def shares_linear(self, convolutional: set[str]) -> bool:
        """Whether fully connected layers share activations in a model with these convolutions."""
        return self.linear == "share" or (self.linear == "auto" and not convolutional)

    def weight_transport_layers(self, model: nn.Module) -> set[str]:
        """The layers that pass the error through their weight. With `transport`, these are all layers if fully connected layers
        share activations, and only the convolutions otherwise; without it, there are none."""
        from fa_bench.mechanisms.weighted_layers import weighted_layers

        if not self.transport:
            return set()
        convolutional = _convolutions(model)
        return set(weighted_layers(model)) if self.shares_linear(convolutional) else convolutional

    def source_of(self, number: int) -> int:
        """The number of the activation that replaces activation `number`, which is at least 2."""
        return 1 + self.k * ((number - 2) // self.k)

    def _provided_by(self, path: str) -> SharedActivation | None:
        """The shared activation that is captured at the input of this layer, if any."""
        number = self._groups.get(path)
        return self._sources.get(number) if number is not None and self._first[number] == path else None

    def _plain_pathway(self, path: str) -> FeedbackPathway:
        plain, provides, shape = super()._plain_pathway(path), self._provided_by(path), self._shapes.get(path, ())
        return plain if provides is None else self.sharing(plain, None, provides, shape, shape, self.match)

    def pathway(self, layer: LayerContext) -> FeedbackPathway:
        number, transports = self._groups.get(layer.path), layer.path in self._transporting
        if number is None and not transports and (self.transport or layer.path != self._stem):
            layer.put("B", self.linear_b_init)
            return FixedFeedback()
        inner: FeedbackPathway = TransposeFeedback() if transports else LearnedFeedback()
        if not transports:
            layer.put("B", self.b_init)
        source = self.source_of(number) if number is not None and number > 1 else None
        provides = self._provided_by(layer.path)
        if source is None and provides is None:
            return inner
        wanted = self._shapes[layer.path]
        if source is None:
            return self.sharing(inner, None, provides, wanted, wanted, self.match)
        shape = self._shapes[self._first[source]]
        if self.match == "random":
            if layer.is_linear and wanted[1:]:
                size = [wanted[-1], shape[-1]]
            else:
                size = [wanted[0], shape[0] if len(shape) == len(wanted) else math.prod(shape), *[1] * (len(wanted) - 1)]
            layer.put("P", "kaiming_uniform", shape=size)
        pathway = self.sharing(inner, self._sources[source], provides, shape, wanted, self.match)
        try:
            pathway.match(layer.module)
        except PositionsDiffer:
            self._unmatched.append(layer.path)
            return inner if provides is None else self.sharing(inner, None, provides, wanted, wanted, self.match)
        except ValueError as error:
            raise CoverageError(
                f"rule '{self.name}' cannot resize the shared activation, the input of '{self._first[source]}', to the "
                f"shape of the input of '{layer.path}': {error}"
                + (
                    ""
                    if self.match == "random" or isinstance(error, DimensionsDiffer)
                    else "; {match} can resize activations to any number of channels or features"
                ),
                {} if self.match == "random" else {"match": "random"},
            ) from None
        return pathway


def _batch_first(layer: Any, x: Tensor, undo: bool = False) -> Tensor:
    """Move the batch axis of a layer's input `x` to the front, giving (N, ...); with `undo`, move it back."""
    from fa_bench.mechanisms.weighted_layers import sample_axis

    axis = sample_axis(layer, x.dim())
    return (x.movedim(0, axis) if undo else x.movedim(axis, 0)) if axis else x


def _without_batch(layer: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    from fa_bench.mechanisms.weighted_layers import sample_axis

    axis = sample_axis(layer, len(shape))
    return (*shape[:axis], *shape[axis + 1 :])


def _convolutions(model: nn.Module) -> set[str]:
    """The paths of a model's convolutions."""
    from fa_bench.mechanisms.weighted_layers import CONVOLUTIONS, weighted_layers

    return {path for path, layer in weighted_layers(model).items() if isinstance(layer, CONVOLUTIONS)}
