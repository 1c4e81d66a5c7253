"""Measures how far a rule's errors are from those of backpropagation, on a fixed batch, and leaves no trace.

The delta angle of a layer is taken at the layer's activation: where the rule delivers the error there, for edge rules the
input of the next weighted layer, for cut rules the cut. Its reference is

- accumulated: the error of a full exact backward pass on the same batch and weights;
- one-step: the error that exact derivatives give from the rule's own errors one step above.

The output angle of a cut (Fig. 2 of the paper on direct Kolen-Pollack learning) is that between the logits and what its direct
feedback B (C, features) reads out of its activation a: a Bᵀ.

Batch normalisation uses the batch's statistics and leaves its running ones alone; dropout is off.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fa_bench.mechanisms.layers import weighted_layers
from fa_bench.mechanisms.rule import INPUT, OUTPUT, Rule
from fa_bench.mechanisms.trace import tensors_in, trace_model, without_side_effects
from fa_bench.metrics.angles import mean_sample_angle, norm_ratio, weight_angle


class Probe:
    """Angles of an attached rule on one fixed batch.

    Args:
        rule: an attached rule.
        x: inputs (N, ...).
        y: labels (N,).
    """

    def __init__(self, rule: Rule, x: Tensor, y: Tensor) -> None:
        self.rule, self.x, self.y = rule, x, y
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
        """{metric: {layer: value}} in the order of execution; degrees, ratios and norms. NaN where void."""
        rule = self.rule
        with untouched(rule):
            delivered = self._pass(lambda loss, logits: rule.deliver(loss, logits, self.y))
            for parameter in rule.model.parameters():
                parameter.grad = None  # the rule's own, which the true gradient would be added to
            with rule.exact():
                true = self._pass(lambda loss, logits: loss.backward())
            norms = {path: _norm(layer.weight.grad) for path, layer in weighted_layers(rule.model).items()}
            one_step = self._one_step(delivered)
        pairs = rule.weight_pairs()
        readouts = rule.readouts()
        deltas: dict[str, float] = {layer: 0.0 for layer in self.output_layers}
        steps = dict(deltas)
        for layer, point in self.points.items():
            if point in delivered.errors and point in true.errors:
                # An angle to a gradient that is only rounding noise would be noise too: angles() makes it NaN.
                deltas[layer] = mean_sample_angle(delivered.errors[point], true.errors[point])
                steps[layer] = mean_sample_angle(delivered.errors[point], one_step[point])
        logits = delivered.tensors["", OUTPUT].detach()
        activations = {layer: (point[0], delivered.tensors[point].detach().flatten(1).to(logits.dtype))
                       for layer, point in self.points.items() if point[0] in readouts and point in delivered.tensors}
        outputs = {layer: mean_sample_angle(a @ readouts[cut].t(), logits) for layer, (cut, a) in activations.items()}
        values = {
            "weight_angle": {layer: weight_angle(*pair) for layer, pair in pairs.items()},
            "norm_ratio": {layer: norm_ratio(*pair) for layer, pair in pairs.items()},
            "delta_angle": deltas, "delta_angle_one_step": steps, "true_gradient_norm": norms,
            "output_angle": outputs,
        }
        return {metric: {p: found[p] for p in self.trace.order if p in found} for metric, found in values.items()}

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
                logits = next(tensors_in(self.rule.model(self.x)))
                record.watch(("", OUTPUT), logits)
                backward(F.cross_entropy(logits, self.y), logits)
        finally:
            # The tensors' hooks too: with them tensors and record hold each other, out of the garbage collector's sight.
            for handle in handles + record.handles:
                handle.remove()
        return record

    def _one_step(self, delivered: Record) -> dict[tuple[str, str], Tensor]:
        """The exact errors at the points, one step below the rule's own errors."""
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

    def _one_step_at_outputs(self, delivered: Record) -> dict[tuple[str, str], Tensor]:
        """An exact backward pass of every part between the cuts at once, from the rule's errors at its upper end."""
        modules = dict(self.rule.model.named_modules())
        leaves: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}

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
                logits = next(tensors_in(self.rule.model(self.x)))
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

    tensors: dict[tuple[str, str], Tensor] = dataclasses.field(default_factory=dict)
    errors: dict[tuple[str, str], Tensor] = dataclasses.field(default_factory=dict)
    handles: list[Any] = dataclasses.field(default_factory=list)

    def watch(self, point: tuple[str, str], tensor: Tensor) -> None:
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


def _norm(gradient: Tensor | None) -> float:
    return math.nan if gradient is None else gradient.double().norm().item()
