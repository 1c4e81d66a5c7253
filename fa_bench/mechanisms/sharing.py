"""Shared activations: which earlier activation stands in for a layer's input, brought to that input's shape.

The activations between weighted layers are counted along the order of execution: the stem makes number 1, which enters the
next layers, and so on; layers that take the same activation, such as a block's first convolution and its projection, count
once. With k layers to share, activation s = 1 + k ⌊(p - 2)/k⌋ stands in for activation p ≥ 2 (eqs 39-42 of Woo et al. 2021);
the layers that take activation 1 have it themselves.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fa_bench.config.options import option
from fa_bench.errors import CoverageError, names
from fa_bench.lazy import torch
from fa_bench.mechanisms.backward_context import BackwardContext, recomputing, refuse_reentrant
from fa_bench.mechanisms.edge import EdgeRule, LayerContext
from fa_bench.mechanisms.pathways import FeedbackPathway, FixedFeedback, LearnedFeedback, TransposeFeedback
from fa_bench.sampling import INITIALISERS

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fa_bench.mechanisms.coverage import Coverage
    from fa_bench.mechanisms.trace import Trace

MATCHES = ("max_pool", "avg_pool", "random")


class Source:
    """The activation that is shared at present, as its first consumer saw it.

    Args:
        consumer: that layer's path.
    """

    def __init__(self, consumer: str) -> None:
        self.consumer = consumer
        self._kept: tuple[Tensor, int] | None = None

    def keep(self, x: Tensor) -> None:
        """Called at every forward pass, by the first layer that takes the activation."""
        self._kept = x.detach(), x._version

    @property
    def is_gone(self) -> bool:
        """Whether no forward pass of the model is under way that has it."""
        return self._kept is None

    def forget(self) -> None:
        """Called at both ends of a forward pass: an activation belongs to its own pass."""
        self._kept = None

    def held(self, match: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        """What gives this forward's activation, matched, in the backward pass.

        Raises:
            CoverageError: where the layer that takes the activation first did not run in this pass.
        """
        if self._kept is None and recomputing():
            return refuse_reentrant("asap")  # the first pass has it; see there
        if self._kept is None:
            raise CoverageError(f"the activation that layers share is the input of '{self.consumer}', which did not run before "
                                f"them in this forward pass with gradients: all layers that share must run, in the same order, "
                                f"by a call of the model (activation checkpointing needs use_reentrant=False)")
        tensor, version = self._kept

        def give() -> Tensor:
            if tensor._version != version:
                raise RuntimeError("a shared activation was changed in place between its first use and the backward pass")
            return match(tensor)

        return give


def matcher(shape: tuple[int, ...], wanted: tuple[int, ...], kind: str, mixing: Tensor | None) -> Callable[[Tensor], Tensor]:
    """What brings an activation of one shape (without the batch) to another.

    Copies are concatenated along channels (features) until there are enough; then pooling with kernel = stride = the ratio of the
    sizes; ``random`` is one fixed random 1x1 convolution `mixing` with that stride in place of both. Where the number of
    dimensions differs, the activation is flattened first.

    Raises:
        ValueError: where whole ratios do not lead there.
    """
    if len(shape) != len(wanted):
        inner = matcher((math.prod(shape),), wanted, kind, mixing)
        return lambda x: inner(x.flatten(1))
    dims = len(shape) - 1
    if dims == 0:
        return _feature_matcher(shape[0], wanted[0], kind, mixing)
    strides = [math.ceil(have / want) for have, want in zip(shape[1:], wanted[1:], strict=True)]
    if mixing is None and wanted[0] % shape[0]:
        raise ValueError(f"{shape[0]} channels do not go into {wanted[0]} a whole number of times")
    if any(math.ceil(have / stride) != want for have, stride, want in zip(shape[1:], strides, wanted[1:], strict=True)):
        raise ValueError(f"pooling does not make {wanted[1:]} of {shape[1:]}")
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
        raise ValueError(f"neither of {have} and {want} features goes into the other a whole number of times")
    pool: Any = torch.nn.functional.max_pool1d if kind == "max_pool" else torch.nn.functional.avg_pool1d
    return lambda x: pool(x.unsqueeze(-2), have // want).squeeze(-2)


@dataclasses.dataclass(eq=False)
class SharedActivationFeedback(FeedbackPathway):
    """Wraps another carrier: keeps this layer's input for others, and takes a shared one in place of its own.

    Attributes:
        inner: what carries the error.
        source: the shared activation that stands in for this layer's input, or None.
        gives: the shared activation that is this layer's input, or None.
        shape, wanted: shapes, without the batch, of the shared activation and of this layer's input.
        kind: how one is brought to the other.
    """

    inner: FeedbackPathway
    source: Source | None
    gives: Source | None
    shape: tuple[int, ...]
    wanted: tuple[int, ...]
    kind: str

    always_needed = True

    def __post_init__(self) -> None:
        self.learned, self.follows, self.description = self.inner.learned, self.inner.follows, self.inner.description

    def describe(self) -> str:
        return super().describe() + (f"; shares the input of {self.source.consumer}" if self.source is not None else "")

    def context(self, layer: Any, x: Tensor) -> BackwardContext:
        if self.gives is not None:
            self.gives.keep(x)
        context = self.inner.context(layer, x)
        if self.source is None or (layer.mode.freeze_random and self.source.is_gone):
            return context  # a probe may ask what this layer alone carries
        return self.shared(layer, context, self.source.held(self.match(layer)))

    def match(self, layer: Any) -> Callable[[Tensor], Tensor]:
        """What brings the shared activation to the shape of this layer's input."""
        return matcher(self.shape, self.wanted, self.kind, layer._buffers.get("feedback_P"))

    def shared(self, layer: Any, context: BackwardContext, activation: Callable[[], Tensor]) -> BackwardContext:
        """Where the shared activation enters: here, the weight gradient."""
        return context._replace(activation=activation)

    def effective(self, layer: Any) -> Tensor:
        return self.inner.effective(layer)


@dataclasses.dataclass(eq=False)
class SharingRule(EdgeRule):
    """What the rules with shared activations have in common; `sharing` says where the shared activation enters."""

    k: int = option(2, "how many layers share an activation (2 and 4 in the paper)", minimum=2)
    match: str = option("max_pool", "how a shared activation gets a later one's shape: copies and max- or average-pooling, or "
                                    "one fixed random 1x1 convolution", choices=list(MATCHES))
    linear: str = option("auto", "fully connected layers: fa (own input, fixed feedback), share, or auto: share where the model "
                                 "has no convolution", choices=["auto", "fa", "share"])
    b_init: str = option("pytorch", "initialiser of learned B", choices=[*INITIALISERS, "copy_w"])
    linear_b_init: str = option("uniform_one", "initialiser of the fixed B of fully connected layers", choices=list(INITIALISERS))
    transport: bool = option(False, "convolutions and the layers that share carry the error by their weights; fully connected "
                                    "layers that do not share keep their fixed feedback")
    freeze_stem: bool = option(True, "the first layer keeps its initial weight and bias")

    #: The carrier that lets the shared activation in.
    sharing = SharedActivationFeedback

    def begin_forward(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        super().begin_forward(model, args, kwargs)
        self._forget()

    def end_forward(self, model: nn.Module, args: Any, output: Any) -> Any:
        self._forget()
        return super().end_forward(model, args, output)

    def _forget(self) -> None:
        for source in self._sources.values():
            source.forget()

    def wire(self, sample_input: Any) -> Coverage:
        trace = self.trace(sample_input)
        groups = self.sharing_groups(self.model, trace)
        self._groups = {path: number for number, group in enumerate(groups, start=1) for path in group}
        self._first = {number: group[0] for number, group in enumerate(groups, start=1)}
        self._sources = {shared: Source(self._first[shared]) for shared in map(self.source_of, [*self._first][1:])}
        self._shapes = {path: tuple(shape[1:]) for path, shape in trace.input_shapes.items()}
        self._stem = trace.order[0]
        self._by_weight = self.weight_transport_layers(self.model)
        return super().wire(sample_input)

    def sharing_groups(self, model: nn.Module, trace: Trace) -> list[list[str]]:
        """The layers that share, grouped by the activation that enters them, numbered from 1 on: the stem's output.

        Raises:
            CoverageError: where there are fewer than two such activations.
        """
        convolutional = _convolutions(model)
        share_linear = self.shares_linear(convolutional)
        groups = [group for group in trace.inputs[1:] if share_linear or convolutional.issuperset(group)]
        if len(groups) < 2:
            sharers = names(path for group in groups for path in group) or "none"
            # Where fully connected layers do not share yet and would be enough.
            helps = not share_linear and len(trace.inputs) > 2
            raise CoverageError(
                f"rule '{self.name}' has nothing to share in this model: after the first layer '{trace.order[0]}' it needs two "
                f"activations that enter layers which share, and finds {len(groups)} (into {sharers}). "
                + ("Pass {linear} to have fully connected layers share too" if helps else "It needs a deeper model"),
                {"linear": "share"} if helps else {})
        return groups

    def shares_linear(self, convolutional: set[str]) -> bool:
        """Whether fully connected layers share, in a model with these convolutions."""
        return self.linear == "share" or (self.linear == "auto" and not convolutional)

    def weight_transport_layers(self, model: nn.Module) -> set[str]:
        """The layers whose error goes through their own weight: with `transport`, convolutions and layers that share."""
        from fa_bench.mechanisms.layers import weighted_layers

        if not self.transport:
            return set()
        convolutional = _convolutions(model)
        return set(weighted_layers(model)) if self.shares_linear(convolutional) else convolutional

    def source_of(self, number: int) -> int:
        """The activation that stands in for activation `number` ≥ 2."""
        return 1 + self.k * ((number - 2) // self.k)

    def pathway(self, layer: LayerContext) -> FeedbackPathway:
        number, by_weight = self._groups.get(layer.path), layer.path in self._by_weight
        if number is None and not by_weight and (self.transport or layer.path != self._stem):
            layer.put("B", self.linear_b_init)
            return FixedFeedback()
        inner: FeedbackPathway = TransposeFeedback() if by_weight else LearnedFeedback()
        if not by_weight:
            layer.put("B", self.b_init)
        source = self.source_of(number) if number is not None and number > 1 else None
        gives = self._sources.get(number) if number is not None and self._first[number] == layer.path else None
        if source is None and gives is None:
            return inner
        wanted = self._shapes[layer.path]
        if source is None:
            return self.sharing(inner, None, gives, wanted, wanted, self.match)
        have = self._shapes[self._first[source]]
        if self.match == "random":
            channels = have[0] if len(have) == len(wanted) else math.prod(have)
            layer.put("P", "kaiming_uniform", shape=[wanted[0], channels, *[1] * (len(wanted) - 1)])
        pathway = self.sharing(inner, self._sources[source], gives, have, wanted, self.match)
        try:
            pathway.match(layer.module)
        except ValueError as error:
            raise CoverageError(f"rule '{self.name}' cannot bring the activation shared by '{self._first[source]}' to the shape "
                                f"of the input of '{layer.path}': {error}"
                                + ("" if self.match == "random" else "; {match} changes channels and features to any number"),
                                {} if self.match == "random" else {"match": "random"}) from None
        return pathway


def _convolutions(model: nn.Module) -> set[str]:
    """The paths of a model's convolutions."""
    from fa_bench.mechanisms.layers import CONVOLUTIONS, weighted_layers

    return {path for path, layer in weighted_layers(model).items() if isinstance(layer, CONVOLUTIONS)}
