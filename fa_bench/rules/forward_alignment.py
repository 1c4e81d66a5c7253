"""Forward Alignment."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from fa_bench.config.options import option
from fa_bench.config.registries import ALGORITHMS
from fa_bench.draws import INITIALISERS
from fa_bench.errors import CoverageError
from fa_bench.lazy import torch
from fa_bench.mechanisms.carriers import Carrier, Transport
from fa_bench.mechanisms.carry import Carry, recomputing, reentrant
from fa_bench.mechanisms.coverage import batch_note
from fa_bench.mechanisms.edge import EdgeRule, Site

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from fa_bench.mechanisms.coverage import Coverage


@dataclasses.dataclass
class Pass:
    """One forward pass: the layers' true inputs, and those that arrive where random weights stand in for the layers' own."""

    true: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    random: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def arrives(self, path: str) -> Callable[[], Tensor]:
        """What gives the input that arrived at a layer, once the second pass is done."""
        return lambda: self.random[path]


class RandomForward(Transport):
    """The error goes through the weight; another activation enters the weight gradient."""

    always = True

    def __init__(self, rule: ForwardAlignment, first: bool) -> None:
        self.rule, self.first = rule, first
        self.tensors = "the weight" + ("" if first else "; random C makes the activation in its gradient")

    def carry(self, layer: Any, x: Tensor) -> Carry:
        current = self.rule.current
        if recomputing():
            # What is saved must be what the first pass saved; the activation is that pass's.
            return Carry(self.effective(layer), activation=None if self.first else reentrant(self.rule.name))
        if current is None and layer.mode.hold:
            return Carry(self.effective(layer))  # a probe that asks what this layer alone carries
        if current is None:
            raise CoverageError(f"layer '{layer.path}' ran outside a forward pass of the attached model: call the model itself")
        self.passed(layer, x)
        return Carry(self.effective(layer), activation=None if self.first else current.arrives(layer.path))

    def passed(self, layer: Any, x: Tensor) -> None:
        if self.rule.current is not None:
            self.rule.current.true[layer.path] = x.detach()


@ALGORITHMS.register("forward_alignment")
@dataclasses.dataclass(eq=False)
class ForwardAlignment(EdgeRule):
    """Forward Alignment: random forward weights in the weight update, the true error.

    Appendix A of Woo et al. 2021, eqs 26-27.

    e_in = g W, the true error; gradient of W = gᵀ h̃, where h̃ is what the layer's input would be if the layer in front of it,
    with its true input h, had the random fixed weight C in place of its own W and no bias: h̃ = φ(C h), with whatever lies
    between the two layers (normalisation by the batch's own statistics, activation, pooling, additions). The first layer has
    its true input. The weights of the layer in front align with C, whose angle to W is logged as the weight angle.

    Choices, where the paper treats one hidden layer only: every layer but the first learns so, the output layer too
    (``plain_last`` gives it its true input); C is drawn like the weights by ``c_init``, one for each layer, also where layers
    share their weight. It costs a second forward pass.

    In a model with batch normalisation the second pass depends on the batch itself: under data parallelism each rank has the
    statistics of its own part.
    """

    c_init: str = option("xavier_uniform", "initialiser of the random weights C", choices=list(INITIALISERS))

    def put_in(self, sample_input: Any) -> Coverage:
        self.current: Pass | None = None
        trace = self.trace(sample_input)
        again = [path for path in trace.order if trace.calls[path] > 1]
        if again:
            raise CoverageError(f"rule 'forward_alignment' needs layers that run once in a forward pass; '{again[0]}' runs "
                                f"{trace.calls[again[0]]} times")
        self._first = set(trace.inputs[0])
        coverage = super().put_in(sample_input)
        self._random = [path for path, layer in self._layers.items() if isinstance(layer.carrier, RandomForward)]
        return coverage

    def carrier(self, site: Site) -> Carrier:
        site.put("C", self.c_init)
        return RandomForward(self, site.path in self._first)

    # The second pass has no gradients, and within it neither does anything; nor in one that activation checkpointing repeats.
    def begin_forward(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        super().begin_forward(model, args, kwargs)
        if self.mode.training and not recomputing():
            self.current = Pass()
            self._call = args, kwargs

    def end_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        super().end_forward(model, args, output)
        if torch.is_grad_enabled() and self.current is not None and not recomputing():
            current, self.current = self.current, None
            call, self._call = self._call, ((), {})
            if output is not None:
                self._run_again(current, *call)

    def _run_again(self, current: Pass, args: Any, kwargs: Any) -> None:
        """A second forward pass in which every layer has its true input of the first one, and C."""
        from fa_bench.mechanisms.trace import without_side_effects

        def restart(path: str) -> Any:
            def hook(module: nn.Module, args: Any) -> Any:
                current.random[path] = args[0]
                return (current.true[path], *args[1:])
            return hook

        values: dict[str, Tensor] = {}
        for path in self._random:
            layer = self._layers[path]
            values[f"{path}.weight"] = layer.feedback_C
            if layer.bias is not None:
                values[f"{path}.bias"] = torch.zeros_like(layer.bias)
        handles = [self._layers[path].register_forward_pre_hook(restart(path)) for path in self._random]
        try:
            with torch.no_grad(), without_side_effects(self.model):
                # A parameter that other layers share is replaced in this layer alone, which has a C of its own.
                torch.func.functional_call(self.model, values, args, kwargs, tie_weights=False)
        finally:
            for handle in handles:
                handle.remove()

    def notes(self) -> tuple[str, ...]:
        normalised = any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in self.model.modules())
        return (batch_note("batch normalisation in the second forward pass"),) if normalised else ()

    def weight_pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """C and W: what aligns here."""
        return {path: (self._layers[path].feedback_C, self._layers[path].weight.detach()) for path in self._random}
