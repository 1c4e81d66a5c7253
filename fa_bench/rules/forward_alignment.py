"""Forward Alignment."""

from __future__ import annotations

import ast
import dataclasses
from typing import TYPE_CHECKING, Any

from fa_bench.errors import CoverageError
from fa_bench.mechanisms.checkpointing import recomputing, refuse_reentrant
from fa_bench.mechanisms.coverage import batch_note
from fa_bench.mechanisms.edge.pathways import BackwardContext, FeedbackPathway, TransposeFeedback
from fa_bench.mechanisms.edge.rule import EdgeRule, LayerContext
from fa_bench.mechanisms.feedback_options import init_option
from fa_bench.mechanisms.feedback_tensors import feedback_tensor
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from fa_bench.mechanisms.coverage import Coverage


@dataclasses.dataclass
class Pass:
    """The inputs of the layers in a forward pass, and in its repetition with random weights."""

    true: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    random: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    #: In a compiled graph, layer -> the messenger that carries the layer's input in the second pass; see
    #: `fa_bench.mechanisms.edge.messages`.
    messengers: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    is_compiled: bool = False

    def random_input(self, path: str) -> Callable[[], Tensor]:
        """A function that returns the input of a layer in the second pass; it must be called after that pass."""
        return lambda: self.random[path]


class RandomForward(TransposeFeedback):
    """Pathway in which the error passes through the weight, and the weight gradient uses the layer's input from the second pass
    (in the first layer, the true input)."""

    always_needed = True

    def __init__(self, rule: ForwardAlignment, first: bool) -> None:
        self.rule, self.first = rule, first
        self.description = "the weight" + ("" if first else "; its gradient uses the activation computed with the random C")

    def context(self, layer: Any, x: Tensor) -> BackwardContext:
        current = self.rule.current
        if torch.compiler.is_compiling():
            if current is not None and not current.is_compiled:
                from fa_bench.mechanisms.compiled import refuse_part

                refuse_part(self.rule.name, layer.path)
            if current is not None:
                self.observe(layer, x)
            return BackwardContext(self.effective(layer))
        if recomputing():
            # This context must contain the same tensors as that of the pass that is repeated, including the activation.
            return BackwardContext(self.effective(layer), activation=None if self.first else refuse_reentrant(self.rule.name))
        if current is None and layer.mode.freeze_random:
            return BackwardContext(self.effective(layer))  # a metric runs only this layer
        if current is None:
            raise CoverageError(f"layer '{layer.path}' ran outside a forward pass of the attached model; call the model itself")
        self.observe(layer, x)
        return BackwardContext(self.effective(layer), activation=None if self.first else current.random_input(layer.path))

    def forward(
        self, layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None, context: BackwardContext, *args: Any, **kwargs: Any
    ) -> Tensor:
        current = self.rule.current
        if self.first or current is None or not torch.compiler.is_compiling():
            return super().forward(layer, x, weight, bias, context, *args, **kwargs)
        y = layer.apply_feedback(x, weight.detach(), bias, context, *args, **kwargs)
        from fa_bench.mechanisms.edge.messages import receive

        # Layers of compound modules may compute only some rows of their output.
        rows = next((one for one in (*args, *kwargs.values()) if isinstance(one, slice)), None)
        weight = weight if rows is None else weight[rows]
        addend, current.messengers[layer.path] = receive(layer, weight, x, y)
        return y + addend

    def observe(self, layer: Any, x: Tensor) -> None:
        if self.rule.current is not None:
            self.rule.current.true[layer.path] = self.rule.kept(layer.path, x.detach())


@ALGORITHMS.register("forward_alignment")
@dataclasses.dataclass(eq=False)
class ForwardAlignment(EdgeRule):
    """Forward Alignment: the weight update uses random forward weights and the true error.

    The rule is given by eqs 26-27 in appendix A of Woo et al. 2021.

    The rule computes e_in = g W, the true error; gradient of W = gᵀ h̃. Here h̃ = φ(C h) is the input that the layer would have
    if the preceding layer had the same input h, a fixed random weight C instead of W, and no bias. The function φ is everything
    between the two layers (normalisation by the batch's own statistics, activation, pooling, additions). The first layer uses its
    true input. The weight of the preceding layer aligns with C; the angle between C and this weight is logged as the weight
    angle.

    The paper treats only one hidden layer, so the following are our choices. Every layer except the first learns by this rule,
    including the output layer, unless ``plain_last`` makes it use its true input. Each layer has its own C, sampled by
    ``c_init``, even if layers share their weight. The rule requires a second forward pass.

    In a model with batch normalisation, the second pass depends on the batch; under data parallelism, each rank uses the
    statistics of its part of the batch.
    """

    equations = (
        r"e_{\text{in}} &= g W",
        r"\nabla_W &= g^\top \tilde{h},\quad \tilde{h} = \varphi(C h)",
    )

    c_init: str = init_option("the random weights C")

    def wire(self, sample_input: Any) -> Coverage:
        from fa_bench.mechanisms.edge.messages import Handle

        self.current: Pass | None = None
        self._call: tuple[Any, dict[str, Any]] = (), {}
        self._handle = Handle(self)
        trace = self.trace(sample_input)
        repeated = [path for path in trace.order if trace.calls[path] > 1]
        if repeated:
            raise CoverageError(
                f"rule '{self.name}' needs layers that run once in a forward pass; '{repeated[0]}' runs "
                f"{trace.calls[repeated[0]]} times"
            )
        self._first, self._changed_in_place = set(trace.inputs[0]), trace.inputs_changed_in_place
        coverage = super().wire(sample_input)
        self._random_layers = [path for path, layer in self._layers.items() if isinstance(layer.pathway, RandomForward)]
        return coverage

    def pathway(self, layer: LayerContext) -> FeedbackPathway:
        layer.put("C", self.c_init)
        return RandomForward(self, layer.path in self._first)

    def kept(self, path: str, x: Tensor) -> Tensor:
        """The input of a layer for use after the pass; this is a copy if the model changes the input in place."""
        return x.clone() if path in self._changed_in_place else x

    # Neither the second pass itself nor a pass that activation checkpointing repeats starts a second pass.
    def begin_forward(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        super().begin_forward(model, args, kwargs)
        if self.mode.training and not recomputing():
            self.current = Pass(is_compiled=torch.compiler.is_compiling())
            self._call = args, kwargs

    def end_forward(self, model: nn.Module, args: Any, output: Any) -> Any:
        super().end_forward(model, args, output)
        if torch.compiler.is_compiling():
            current, self.current = self.current, None
            call, self._call = self._call, ((), {})
            return None if current is None or not current.messengers else self._connected(output, current, *call)
        if torch.is_grad_enabled() and self.current is not None and not recomputing():
            current, self.current = self.current, None
            call, self._call = self._call, ((), {})
            if output is not None:
                self._run_second_pass(current, *call)

    def _connected(self, output: Any, current: Pass, args: Any, kwargs: Any) -> Any:
        """The output of a compiled graph, connected such that the backward pass begins with the results of the second forward
        pass."""
        from fa_bench.mechanisms.edge.messages import second_pass, send
        from fa_bench.mechanisms.trace import named_results, replaced

        if not all(isinstance(one, torch.Tensor) for one in (*args, *kwargs.values())):
            raise CoverageError(f"rule '{self.name}' can be compiled only if all arguments of the model are tensors")
        # The layers that receive a message come first.
        paths = [*current.messengers, *(path for path in current.true if path not in current.messengers)]
        random = second_pass(
            [*args, *kwargs.values()],
            [current.true[path] for path in paths],
            len(current.messengers),
            repr((paths, list(kwargs))),
            self._handle.key,
        )
        results = named_results(output)
        connected = send(list(results.values()), random, list(current.messengers.values()))
        for result, replacement in zip(results.values(), connected, strict=True):
            output = replaced(output, result, replacement)
        return output

    def second_pass(self, given: list[Tensor], true: list[Tensor], count: int, names: str) -> list[Tensor]:
        """Run the second pass of a compiled graph, and return the inputs of some layers.

        Args:
            given: the model's arguments, with keyword arguments last.
            true: the inputs of the layers in the first pass.
            count: how many of these layers, counted from the first, need their inputs in the second pass; these inputs are
                returned.
            names: the ``repr`` of a pair: the paths of the layers and the names of the keyword arguments.
        """
        paths, keywords = ast.literal_eval(names)
        current = Pass(dict(zip(paths, true, strict=True)))
        positional = len(given) - len(keywords)
        self._run_second_pass(current, tuple(given[:positional]), dict(zip(keywords, given[positional:], strict=True)))
        return [current.random[path].clone(memory_format=torch.contiguous_format) for path in paths[:count]]

    def _run_second_pass(self, current: Pass, args: Any, kwargs: Any) -> None:
        """Run a second forward pass in which the layers with a C get their inputs from the first pass and use C as the weight."""
        from fa_bench.mechanisms.contexts import set_temporarily, without_side_effects
        from fa_bench.mechanisms.weighted_layers import bias_name, weight_name, weight_parameter

        def restart(path: str) -> Any:
            def hook(module: nn.Module, args: Any) -> Any:
                current.random[path] = self.kept(path, args[0])
                return (current.true[path], *args[1:])

            return hook

        values: dict[str, Tensor] = {}
        for path in self._random_layers:
            layer = self._layers[path]
            weight = weight_parameter(layer)
            values[weight_name(path, layer)] = feedback_tensor(layer, "C").view(weight.shape if weight is not None else ())
            if (bias := bias_name(path, layer)) is not None:
                # Layers of a compound module may share one bias, and within torch.func.functional_call, this bias is not an
                # nn.Parameter.
                owner, _, key = bias.rpartition(".")
                own: Any = self.model.get_submodule(owner)._parameters[key]
                zeroed = values.setdefault(bias, own.detach().clone())
                zeroed[getattr(layer, "bias_rows", None) or slice(None)] = 0
        handles = [self._layers[path].register_forward_pre_hook(restart(path)) for path in self._random_layers]
        try:
            with torch.no_grad(), without_side_effects(self.model), set_temporarily([self.mode], "always_layerwise", True):
                # If layers share a weight, it is replaced in each of them by the layer's own C.
                torch.func.functional_call(self.model, values, args, kwargs, tie_weights=False)
        finally:
            for handle in handles:
                handle.remove()

    def notes(self) -> tuple[str, ...]:
        normalised = any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in self.model.modules())
        return (batch_note("batch normalisation in the second forward pass"),) if normalised else ()

    def weight_pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The pairs of C and W, which align in this rule."""
        layers = {path: self._layers[path] for path in self._random_layers}
        return {path: (feedback_tensor(layer, "C"), layer.weight.detach()) for path, layer in layers.items()}
