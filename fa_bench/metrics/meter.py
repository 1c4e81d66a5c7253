"""Measures how far a rule's errors are from those of backpropagation, on a fixed batch, and leaves no trace.

The error of a layer is taken at its activation: where the rule delivers it, for edge rules at the input of the next weighted
layer, for cut rules at the cut. Batch normalisation uses the batch's statistics and leaves its running ones alone; dropout is
off.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fa_bench.mechanisms.rule import INPUT, OUTPUT, Rule
from fa_bench.mechanisms.trace import tensors_in, trace_model, without_side_effects
from fa_bench.mechanisms.weighted_layers import weighted_layers
from fa_bench.metrics.alignment.base import declared
from fa_bench.registry.registries import METRICS

Point = tuple[str, str]


class AlignmentMeter:
    """Measures alignment metrics of an attached rule on one fixed batch, and leaves no trace.

    Args:
        rule: an attached rule.
        x: inputs (N, ...).
        y: targets (N,), or (N, O) where they are numbers.
        metrics: names of those to measure; None: all that are registered.
    """

    def __init__(self, rule: Rule, x: Tensor, y: Tensor, metrics: Iterable[str] | None = None) -> None:
        self.rule, self.x, self.y = rule, x, y
        self.metrics = [metric() for metric in declared(METRICS if metrics is None else metrics).values()]
        with rule.exact():
            self.trace = trace_model(rule.model, x[:2])
        self.points = rule.error_points(self.trace)

    @property
    def feedback_layers(self) -> list[str]:
        """Layers whose feedback carries an error: those that another layer's activation enters."""
        consumers = set(self.trace.consumer.values())
        return [layer for layer in self.trace.order if layer in consumers]

    @property
    def output_layers(self) -> list[str]:
        """Layers that feed the logits, where the delta angle is 0 by construction."""
        return self.trace.outputs

    def measure(self) -> dict[str, dict[str, float]]:
        """{metric: {layer: value}}, the layers in the order of execution; NaN where a value is void."""
        with untouched(self.rule):
            passes = Passes(self)
            values = {metric.name: metric.measure(passes) for metric in self.metrics}
        return {name: {layer: found[layer] for layer in self.trace.order if layer in found} for name, found in values.items()}


class Passes:
    """Forward and backward passes of a rule and of backpropagation on the same batch, each made when it is first asked for.

    Attributes:
        rule: the attached rule.
        trace: the model's structure.
        points: layer -> where the rule delivers the error at its activation, see `Rule.error_points`.
    """

    def __init__(self, meter: AlignmentMeter) -> None:
        self.rule, self.trace, self.points = meter.rule, meter.trace, meter.points
        self._meter = meter

    @functools.cached_property
    def delivered(self) -> Record:
        """Errors and tensors of a pass by the rule."""
        record = self._pass(lambda loss, logits: self.rule.deliver(loss, logits, self._meter.y))
        self._gradients = self._take_gradients()
        return record

    @functools.cached_property
    def exact(self) -> Record:
        """Errors and tensors of a pass by backpropagation."""
        _ = self.delivered  # first: it has the logits that the rule trains by
        with self.rule.exact():
            record = self._pass(lambda loss, logits: loss.backward())
        self._exact_gradients = self._take_gradients()
        return record

    @property
    def gradients(self) -> dict[str, Tensor | None]:
        """{layer: the gradient that the rule gives its weight}."""
        _ = self.delivered
        return self._gradients

    @property
    def exact_gradients(self) -> dict[str, Tensor | None]:
        """{layer: the gradient of its weight by backpropagation}."""
        _ = self.exact
        return self._exact_gradients

    @functools.cached_property
    def weight_pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """{layer: (effective feedback, weight)}; products and the like are computed once for all metrics."""
        return self.rule.weight_pairs()

    @property
    def logits(self) -> Tensor:
        """The model's output for the batch, (N, C)."""
        return self.delivered.tensors["", OUTPUT].detach()

    def _take_gradients(self) -> dict[str, Tensor | None]:
        found: dict[str, Any] = {path: layer.weight.grad for path, layer in weighted_layers(self.rule.model).items()}
        for parameter in self.rule.model.parameters():
            parameter.grad = None  # another pass would add to it
        return found

    def _pass(self, backward: Any) -> Record:
        """One forward and backward; the errors at the points, and at the outputs of the layers whose inputs are points."""
        record = Record()
        modules = dict(self.rule.model.named_modules())
        cuts = {module for module, side in self.points.values() if side == OUTPUT}
        layers = {path for path in self.trace.order if any(side == INPUT for _, side in self.points.values())}
        # In front of the rule's own hooks, which replace what they cut.
        handles = [modules[path].register_forward_hook(record.outputs(path), prepend=True) for path in cuts | layers]
        handles += [modules[path].register_forward_pre_hook(record.inputs(path), prepend=True) for path in layers]
        try:
            with torch.enable_grad():
                logits = next(tensors_in(self.rule.model(self._meter.x)))
                record.watch(("", OUTPUT), logits)
                backward(self.rule.objective.loss(logits, self._meter.y), logits)
        finally:
            # The tensors' hooks too: with them tensors and record hold each other, out of the garbage collector's sight.
            for handle in handles + record.handles:
                handle.remove()
        return record

    @functools.cached_property
    def one_step(self) -> dict[Point, Tensor]:
        """The exact errors at the points, one step below the rule's own errors."""
        _, delivered = self.exact, self.delivered
        found = {point: self._one_step_at_input(point[0], delivered) for point in set(self.points.values())
                 if point[1] == INPUT and point in delivered.errors}
        if any(side == OUTPUT for _, side in self.points.values()):
            found.update(self._one_step_at_outputs(delivered))
        return found

    def _one_step_at_input(self, layer: str, delivered: Record) -> Tensor:
        """The rule's error with the part that every consumer of this tensor brought replaced by its exact part.

        What came to the tensor by other ways, such as an identity shortcut, was exact already.
        """
        rule, x = self.rule, delivered.tensors[layer, INPUT]
        error = delivered.errors[layer, INPUT]
        for path in (p for p in self.trace.order if delivered.tensors.get((p, INPUT)) is x):
            g = delivered.errors.get((path, OUTPUT))
            if g is not None:
                carried = rule.input_error(path, x, g, delivered.errors["", OUTPUT])
                with rule.exact():
                    exact = Rule.input_error(rule, path, x, g, delivered.errors["", OUTPUT])
                error = error - carried + exact
        return error

    def _one_step_at_outputs(self, delivered: Record) -> dict[Point, Tensor]:
        """An exact backward pass of every part between the cuts at once, from the rule's errors at its upper end."""
        modules = dict(self.rule.model.named_modules())
        leaves: dict[Point, tuple[Tensor, Tensor]] = {}

        def split(path: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
                leaf = output.detach().clone().requires_grad_(True)
                leaves[path, OUTPUT] = (output, leaf)
                return leaf.clone()
            return hook

        cuts = {module for module, side in self.points.values() if side == OUTPUT and (module, side) in delivered.errors}
        handles = [modules[path].register_forward_hook(split(path)) for path in cuts]
        try:
            with self.rule.exact(), torch.enable_grad():
                logits = next(tensors_in(self.rule.model(self._meter.x)))
        finally:
            for handle in handles:
                handle.remove()
        torch.autograd.backward(
            [logits, *(kept for kept, _ in leaves.values())],
            [delivered.errors["", OUTPUT], *(delivered.errors[point] for point in leaves)],
        )
        return {point: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for point, (_, leaf) in leaves.items()}


@dataclasses.dataclass
class Record:
    """Tensors and their gradients at (module, side) of one pass; ("", output) is the logits."""

    tensors: dict[Point, Tensor] = dataclasses.field(default_factory=dict)
    errors: dict[Point, Tensor] = dataclasses.field(default_factory=dict)
    handles: list[Any] = dataclasses.field(default_factory=list)

    def watch(self, point: Point, tensor: Tensor) -> None:
        """Keep a tensor, and its gradient once the backward pass has it whole."""
        def keep(gradient: Tensor) -> None:
            self.errors[point] = gradient.detach()

        if tensor.requires_grad:
            self.tensors[point] = tensor
            self.handles.append(tensor.register_hook(keep))

    def inputs(self, path: str) -> Any:
        """A forward pre-hook that watches a module's input."""
        return lambda module, args: self.watch((path, INPUT), args[0])

    def outputs(self, path: str) -> Any:
        """A forward hook that watches a module's output."""
        return lambda module, args, output: self.watch((path, OUTPUT), next(tensors_in(output)))


@contextmanager
def untouched(rule: Rule) -> Iterator[None]:
    """Training mode on batch statistics without dropout; gradients, running statistics and draws as before afterwards."""
    model, mode = rule.model, rule.mode
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    held, mode.freeze_random = mode.freeze_random, True
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        model.train()
        with without_side_effects(model):
            yield
    finally:
        mode.freeze_random = held
        for module, training in modes:
            module.training = training
        for parameter, gradient in gradients:
            parameter.grad = gradient
