"""Measures how far a rule's errors are from those of backpropagation, on a fixed batch and without side effects.

The error of a layer is taken at its activation, where the rule delivers the error. Edge rules deliver the error at the input of
the next weighted layer, and most cut rules deliver it at the output of a cut module. Batch normalisation uses the statistics of
the batch and does not update its running statistics; dropout is off.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fa_bench.errors import ConfigError, CoverageError, names, truncate
from fa_bench.mechanisms.contexts import in_mode, same_randomness, set_temporarily, without_side_effects
from fa_bench.mechanisms.cut.positions import mean_loss
from fa_bench.mechanisms.rule import INPUT, OUTPUT, Rule
from fa_bench.mechanisms.trace import loss_output, named_results, tensors_in, trace_model
from fa_bench.mechanisms.weighted_layers import sample_axis, weight_gradient, weighted_layers
from fa_bench.metrics.alignment.base import declared
from fa_bench.registry.registries import METRICS

Point = tuple[str, str]
LOGITS: Point = ("", OUTPUT)


class AlignmentMeter:
    """Measures alignment metrics of an attached rule on one fixed batch, without side effects.

    Args:
        rule: an attached rule.
        x: inputs (N, ...).
        y: targets (N,), (N, O) if they are numbers, or (N, P...) for outputs with positions.
        metrics: names of the metrics; None: all that are registered.
        indices: the indices of the samples in the training set, for rules with `Rule.needs_indices`.

    Raises:
        CoverageError: if the model returns several outputs and neither the rule nor its objective names the one that is trained.

    Examples:
        >>> import torch, fa_bench
        >>> from fa_bench.metrics.meter import AlignmentMeter
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> rule = fa_bench.attach(model, "bp")
        >>> x, y = torch.ones(5, 4), torch.zeros(5, dtype=torch.int64)
        >>> meter = AlignmentMeter(rule, x, y, metrics=["weight_angle", "norm_ratio"])
        >>> meter.measure()
        {'weight_angle': {'0': 0.0, '2': 0.0}, 'norm_ratio': {'0': 1.0, '2': 1.0}}
    """

    def __init__(
        self, rule: Rule, x: Tensor, y: Tensor, metrics: Iterable[str] | None = None, indices: Tensor | None = None
    ) -> None:
        self.rule, self.x, self.y, self.indices = rule, x, y, indices
        self.metrics = [metric() for metric in declared(METRICS if metrics is None else metrics).values()]
        with rule.exact():
            self.trace = trace_model(rule.model, x[:2], output=rule.loss_output)
        _require_one(rule, self.trace.results)
        self.points = rule.error_points(self.trace)

    @property
    def feedback_layers(self) -> list[str]:
        """Layers whose feedback propagates an error, that is, all layers (including projection shortcuts) except those whose
        input does not depend on any parameter, such as the first layer."""
        return self.trace.reached

    @property
    def output_layers(self) -> list[str]:
        """Layers that feed the logits, where the delta angle is 0 by construction."""
        return self.trace.outputs

    def inputs(self) -> Tensor:
        """A copy of `x` for one pass, because the model may change its input in place."""
        return self.x.clone()

    def measure(self) -> dict[str, dict[str, float]]:
        """The values as {metric: {layer: value}}, with the layers in the order of execution; undefined values are NaN."""
        with measurement_mode(self.rule):
            passes = Passes(self)
            values = {metric.name: metric.measure(passes) for metric in self.metrics}
        for name, of_layer in values.items():
            if not isinstance(of_layer, dict) or not all(isinstance(value, (int, float)) for value in of_layer.values()):
                raise ConfigError(
                    f"metric {name}: its measure must return a dict with a number for each layer, not "
                    f"{truncate(repr(of_layer), 100)}"
                )
        return {
            name: {layer: float(of_layer[layer]) for layer in self.trace.order if layer in of_layer}
            for name, of_layer in values.items()
        }


class Passes:
    """Forward and backward passes of a rule and of backpropagation on the same batch, each run when it is first needed.

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
        """The errors and tensors of a pass with the rule."""
        with self.rule.of_samples(self._meter.indices):
            return self._pass(lambda loss, logits: self.rule.deliver(loss, logits, self._meter.y))

    @functools.cached_property
    def exact(self) -> Record:
        """The errors and tensors of a pass with backpropagation."""
        _ = self.delivered  # so that the pass with the rule always comes first
        with self.rule.exact():
            return self._pass(lambda loss, logits: loss.backward())

    @property
    def gradients(self) -> dict[str, Tensor | None]:
        """The gradient that the rule computes for the weight of each layer."""
        return self.delivered.gradients

    @property
    def exact_gradients(self) -> dict[str, Tensor | None]:
        """The gradient that backpropagation computes for the weight of each layer."""
        return self.exact.gradients

    @functools.cached_property
    def weight_pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The pair (effective feedback, weight) of each layer, computed once for all metrics."""
        return self.rule.weight_pairs()

    @property
    def logits(self) -> Tensor:
        """The model's output for the batch, (N, C)."""
        return self.delivered.tensors[LOGITS].detach()

    def _pass(self, backward: Callable[[Tensor, Tensor], Any]) -> Record:
        """Run one forward and one backward pass, and record the tensors at the points. If any point is the input of a layer, the
        inputs and outputs of all layers are also recorded."""
        record, model = Record(), self.rule.model
        modules = dict(model.named_modules())
        cuts = {module for module, side in self.points.values() if side == OUTPUT}
        layers = set(self.trace.order) if any(side == INPUT for _, side in self.points.values()) else set()
        # These hooks run before the rule's own hooks, which replace the tensors at cuts.
        handles = [modules[path].register_forward_hook(record.outputs(path), prepend=True) for path in cuts | layers]
        handles += [
            modules[path].register_forward_pre_hook(record.inputs(path), prepend=True, with_kwargs=True) for path in layers
        ]
        try:
            with torch.enable_grad(), same_randomness(model):
                logits = measured_output(self.rule, model(self._meter.inputs()))
                record.watch(LOGITS, logits, modules[""])
                backward(mean_loss(self.rule.objective, logits, self._meter.y), logits)
        finally:
            # The hooks are removed, because they would make the tensors and the record keep each other alive in a cycle that the
            # garbage collector cannot detect.
            for handle in handles + record.handles:
                handle.remove()
        record.gradients = {path: weight_gradient(layer) for path, layer in weighted_layers(model).items()}
        for parameter in model.parameters():
            parameter.grad = None  # the next pass would add to it
        return record

    @functools.cached_property
    def one_step(self) -> dict[Point, Tensor]:
        """The error that exact backpropagation computes at each point from the rule's errors one layer above."""
        _, delivered = self.exact, self.delivered
        errors = {
            point: self._one_step_at_input(point[0])
            for point in set(self.points.values())
            if point[1] == INPUT and point in delivered.errors
        }
        if any(side == OUTPUT for _, side in self.points.values()):
            errors.update(self._one_step_at_outputs())
        return errors

    def _one_step_at_input(self, layer: str) -> Tensor:
        """The rule's error at a layer's input, with the contribution of each consumer of this tensor replaced by the exact
        contribution.

        Contributions that reach the tensor in other ways, such as through an identity shortcut, are already exact.
        """
        rule, delivered, delta = self.rule, self.delivered, self.delivered.errors[LOGITS]

        def of_call(call: Call) -> Tensor:
            error = call.error
            assert error is not None
            for path in self.trace.order:
                calls = zip(delivered.calls.get((path, INPUT), ()), delivered.calls.get((path, OUTPUT), ()), strict=False)
                for before, after in calls:
                    if before.is_same(call) and after.error is not None:
                        g = before.of_all_outputs(after.error)
                        contributed = rule.input_error(path, call.tensor, g, delta)
                        with rule.exact():
                            error = error - contributed + Rule.input_error(rule, path, call.tensor, g, delta)
            return error

        return joined([call.by_sample(of_call(call)) for call in delivered.calls[layer, INPUT] if call.error is not None])

    def _one_step_at_outputs(self) -> dict[Point, Tensor]:
        """The errors at the cuts from one exact backward pass through the segments between cuts. Each segment starts from the
        rule's errors at its output."""
        delivered, modules = self.delivered, dict(self.rule.model.named_modules())
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
            with self.rule.exact(), torch.enable_grad(), same_randomness(self.rule.model):
                logits = measured_output(self.rule, self.rule.model(self._meter.inputs()))
        finally:
            for handle in handles:
                handle.remove()
        torch.autograd.backward(
            [logits, *(output for output, _ in leaves.values())],
            [delivered.errors[LOGITS], *(delivered.errors[point] for point in leaves)],
        )
        return {point: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for point, (_, leaf) in leaves.items()}


@dataclasses.dataclass
class Call:
    """A tensor at a module's input or output in one call of the module, and, after the backward pass, the tensor's gradient.

    Attributes:
        batch_axis: the axis of the samples.
        rows, outputs: which of the layer's outputs the call computed, if not all, and how many outputs the layer has.
        version: the tensor's version in that call; it increases if a later module changes the tensor in place.
    """

    tensor: Tensor
    error: Tensor | None = None
    batch_axis: int = 0
    rows: slice | None = None
    outputs: int = 0
    version: int = 0

    def is_same(self, other: Call) -> bool:
        """Whether another call has the same tensor in the same version."""
        return self.tensor is other.tensor and self.version == other.version

    def by_sample(self, tensor: Tensor) -> Tensor:
        """A tensor of this call's shape, with the axis of the samples moved to the front."""
        return tensor.movedim(self.batch_axis, 0) if self.batch_axis else tensor

    def of_all_outputs(self, g: Tensor) -> Tensor:
        """The error at the outputs of this call, padded with zeros for the layer's other outputs."""
        if self.rows is None:
            return g
        padded = g.new_zeros(*g.shape[:-1], self.outputs)
        padded[..., self.rows] = g
        return padded


def joined(tensors: list[Tensor]) -> Tensor:
    """The tensors of several calls as one tensor of shape (N, features) if each call has all samples, and (rows, features)
    otherwise. The tensor of a single call is returned unchanged."""
    if len(tensors) == 1:
        return tensors[0]
    if len({len(tensor) for tensor in tensors}) == 1:
        return torch.cat([tensor.flatten(1) for tensor in tensors], 1)
    return torch.cat([tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors])


@dataclasses.dataclass
class Record:
    """The tensors recorded in one pass and their gradients by (module, side), and the gradients of the weights by layer.

    A module may run several times in a pass, such as the layer of a recurrent module in every time step.
    """

    calls: dict[Point, list[Call]] = dataclasses.field(default_factory=dict)
    handles: list[Any] = dataclasses.field(default_factory=list)
    gradients: dict[str, Tensor | None] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def tensors(self) -> dict[Point, Tensor]:
        """The tensors that require gradients at each point, joined over all calls."""
        found = {
            point: [call.by_sample(call.tensor) for call in calls if call.tensor.requires_grad]
            for point, calls in self.calls.items()
        }
        return {point: joined(tensors) for point, tensors in found.items() if tensors}

    @functools.cached_property
    def errors(self) -> dict[Point, Tensor]:
        """The gradients that the pass has computed at each point, joined over all calls."""
        found = {
            point: [call.by_sample(call.error) for call in calls if call.error is not None] for point, calls in self.calls.items()
        }
        return {point: joined(errors) for point, errors in found.items() if errors}

    def watch(self, point: Point, tensor: Tensor, module: nn.Module, rows: slice | None = None) -> None:
        """Record a tensor immediately, and its gradient once the backward pass has computed it."""
        outputs = getattr(module, "out_features", 0)
        call = Call(tensor, None, sample_axis(module, tensor.dim()), rows, outputs, tensor._version)
        self.calls.setdefault(point, []).append(call)

        def hook(gradient: Tensor) -> None:
            call.error = gradient.detach()

        if tensor.requires_grad:
            self.handles.append(tensor.register_hook(hook))

    def inputs(self, path: str) -> Any:
        """A forward pre-hook that records a module's input."""
        return lambda module, args, kwargs: self.watch((path, INPUT), args[0], module, kwargs.get("rows"))

    def outputs(self, path: str) -> Any:
        """A forward hook that records a module's output."""
        return lambda module, args, output: self.watch((path, OUTPUT), next(tensors_in(output)), module)


def measured_output(rule: Rule, result: Any) -> Tensor:
    """The output from which an attached model's loss is computed, selected from the result of a forward pass.

    Raises:
        CoverageError: if there are several outputs, and neither the rule nor its objective names one.
    """
    if not isinstance(result, Tensor):
        _require_one(rule, named_results(result))
    return loss_output(result, rule.loss_output)


def _require_one(rule: Rule, results: Collection[str]) -> None:
    if rule.loss_output is not None or len(results) < 2:
        return
    objective = dataclasses.replace(rule.objective, output=next(iter(results)))
    kind = type(objective)
    options = {field.name: getattr(objective, field.name) for field in dataclasses.fields(kind) if field.init}
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    given = ", ".join(f"{name}={value!r}" for name, value in options.items() if value != defaults[name])
    raise CoverageError(
        f"rule '{rule.name}' is measured by the loss of one output, but this model returns {names(results)}: name the "
        f"output that is trained when you attach the rule, for example objective={kind.__name__}({given}), with "
        f"{kind.__name__} from {kind.__module__}"
    )


@contextmanager
def measurement_mode(rule: Rule) -> Iterator[None]:
    """A context manager for passes without side effects. The model is in training mode and uses the batch's statistics, but
    dropout is off and no new random tensors are sampled.

    Gradients are None at the start of the context. Afterwards, gradients, modes of modules and running statistics are restored.
    """
    model = rule.model
    with (
        set_temporarily([rule.mode], "freeze_random", True),
        set_temporarily(model.parameters(), "grad", None),
        set_temporarily([rule.mode], "layerwise", True),
        in_mode(model, True),
        without_side_effects(model),
    ):
        yield
