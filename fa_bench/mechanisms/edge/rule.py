"""Edge rules, the first of the two mechanisms. An edge rule changes how a weighted layer passes the error to the layer below."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from fa_bench.errors import ComponentError, CoverageError, missing_method, names, nearest
from fa_bench.mechanisms.coverage import Coverage, Covered, foreign_weights, matching, outside_text
from fa_bench.mechanisms.edge.checks import described, missing_tensor
from fa_bench.mechanisms.edge.pathways import FeedbackPathway, TransposeFeedback
from fa_bench.mechanisms.feedback_options import COPY_WEIGHT, beta_option, derivative_option, init_option
from fa_bench.mechanisms.feedback_tensors import drop_tensors, feedback_tensor, put_tensor, require_tensor, tensors_of
from fa_bench.mechanisms.rule import Rule
from fa_bench.registry.options import option
from fa_bench.utils.lazy import torch
from fa_bench.utils.sampling import fans, initialiser_of, sample, sample_mask, seed_for

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fa_bench.mechanisms.derivative import Dual
    from fa_bench.mechanisms.edge.layers import FeedbackLayer
    from fa_bench.mechanisms.trace import Trace
    from fa_bench.mechanisms.updates import LearnedTensor
    from fa_bench.mechanisms.weighted_layers import WeightedLayer


@dataclasses.dataclass
class LayerContext:
    """A layer for which `EdgeRule.pathway` creates the feedback.

    Attributes:
        path: the layer's name in the model.
        module: the layer, which still has its plain class.
        seed: the seed passed to `attach`.
        is_output: whether the layer feeds the model's output or, if `attach` got no sample, is the last one that the model
            defines.
    """

    path: str
    module: WeightedLayer
    seed: int
    is_output: bool

    @functools.cached_property
    def fans(self) -> tuple[int, int]:
        """The pair (fan_in, fan_out) of the weight."""
        return fans(self.module.weight.shape)

    @property
    def is_linear(self) -> bool:
        """Whether the layer is fully connected."""
        return self.module.weight.dim() == 2

    def tensor_seed(self, name: str) -> int:
        """The seed of this layer's tensor `name`."""
        return seed_for(self.seed, self.path, name)

    def put(
        self, name: str, value: str | Tensor, density: float = 1.0, magnitude: bool = False, shape: Sequence[int] | None = None
    ) -> None:
        """Give the layer the feedback tensor `name`.

        Args:
            name: the tensor's name, which is ``feedback_NAME`` in the model's state_dict.
            value: an initialiser, ``copy_w`` for a copy of the weight, or the tensor itself, which is converted to the weight's
                device and dtype; the arguments below do not apply to a tensor.
            density: fraction of the entries that are not masked.
            magnitude: take the absolute values.
            shape: the tensor's shape, except for ``copy_w``; default: the shape of the weight.

        Raises:
            ConfigError: for an unknown initialiser.
            ComponentError: if `value` is neither a name nor a tensor.
        """
        weight = self.module.weight.detach()
        what = f"layer '{self.path}', feedback tensor '{name}'"
        if not isinstance(value, str):
            self._store(name, require_tensor(what, value).to(weight))
            return
        shape = tuple(weight.shape) if shape is None else shape
        if value == COPY_WEIGHT:
            tensor = weight.clone()
            if density < 1:
                tensor.mul_(sample_mask(shape, density, self.tensor_seed(name)).to(weight))
        else:
            initialiser_of(value, what, (COPY_WEIGHT,))
            tensor = sample(shape, value, self.tensor_seed(name), density).to(weight)
        self._store(name, tensor.abs_() if magnitude else tensor)

    def put_mask(self, density: float, seeded_by: str = "mask", shape: Sequence[int] | None = None) -> None:
        """Give the layer a sparsity mask, the feedback tensor `mask`; no mask is created if `density` is 1.

        Args:
            density: the probability of a one.
            seeded_by: the name from which the mask's seed is derived. If it is the name of a tensor, the mask is the one by which
                `put` multiplies that tensor.
            shape: the mask's shape; default: the shape of the weight.
        """
        weight = self.module.weight
        shape = tuple(weight.shape) if shape is None else shape
        self._store("mask", sample_mask(shape, density, self.tensor_seed(seeded_by)).to(weight) if density < 1 else None)

    def _store(self, name: str, tensor: Tensor | None) -> None:
        weight = self.module.weight
        if tensor is not None and tensor.dim() in (4, 5):
            # A tensor whose memory format differs from that of the weight would be copied at every step.
            last = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
            in_last = weight.is_contiguous(memory_format=last) and not weight.is_contiguous()
            tensor = tensor.contiguous(memory_format=last if in_last else torch.contiguous_format)
        put_tensor(self.module, name, tensor)


#: The note if there was no forward pass of a sample.
_NOT_TRACED = (
    "Weights that are used outside their layers are found only in the first training pass; pass sample_input to find them now."
)


@dataclasses.dataclass(eq=False)
class EdgeRule(Rule):
    """A rule that gives every weighted layer a feedback pathway; subclasses implement `pathway`.

    Layers that are excluded pass the error through their weight, as in backpropagation.

    Examples:
        >>> import dataclasses, torch, fa_bench
        >>> @dataclasses.dataclass(eq=False)
        ... class Sparse(fa_bench.EdgeRule):
        ...     density: float = fa_bench.option(0.5, "fraction of B that is not zero", above=0, maximum=1)
        ...
        ...     def pathway(self, layer):
        ...         layer.put("B", "xavier_uniform", self.density)
        ...         return fa_bench.FixedFeedback()
        >>> rule = fa_bench.attach(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)), Sparse(density=1))
        >>> bool((rule.effective_feedback("1") == rule.feedback["1"]["B"]).all())
        True
    """

    include: list[str] = option(
        ["*"], "layers (names, or patterns such as 'layer1.*'; * also matches dots) that use the rule's feedback"
    )
    exclude: list[str] = option(
        [], "layers (names, or patterns; * also matches dots) that use their true weight as feedback instead"
    )
    plain_last: bool = option(False, "the output layer uses its true weight as feedback")
    derivative: str = derivative_option()
    beta: float = beta_option()

    def pathway(self, layer: LayerContext) -> FeedbackPathway:
        """Create the layer's feedback tensors with `layer.put` and return the pathway that uses them."""
        raise missing_method(self, "pathway")

    def _plain_pathway(self, path: str) -> FeedbackPathway:
        """The pathway of a layer that uses its weight as feedback because of `include`, `exclude` or `plain_last`."""
        return TransposeFeedback()

    def wire(self, sample_input: Any) -> Coverage:
        from fa_bench.mechanisms.edge.layers import swap_in
        from fa_bench.mechanisms.weighted_layers import kind_of, weight_name, weighted_layers

        self.mode.layerwise = True
        self._dual: Dual | None = None
        self._layers: dict[str, FeedbackLayer] = {}
        self._learning: list[FeedbackLayer] = []
        self._learned: list[LearnedTensor] = []
        layers = weighted_layers(self.model)
        if not layers:
            return Coverage(self.name, (), {})  # refused by `Coverage.require`
        trace = self._trace_if_possible(sample_input)
        outputs = trace.outputs if trace is not None and sample_input is not None else list(layers)[-1:]
        plain = set(layers) - matching(self.include, layers, "include") | matching(self.exclude, layers, "exclude")
        plain |= set(outputs) if self.plain_last else set()
        if plain.issuperset(layers):
            raise CoverageError(
                f"include={self.include}, exclude={self.exclude}, plain_last={self.plain_last} leave rule "
                f"'{self.name}' no layer (layers: {names(layers)})"
            )
        self._replace_derivatives(sample_input)
        covered = []
        for path, layer in layers.items():
            kind = kind_of(layer)
            context = LayerContext(path, layer, self.seed, path in outputs)
            pathway = self._plain_pathway(path) if path in plain else self._checked_pathway(context)
            self._layers[path] = layer = swap_in(layer, path, pathway, self.mode)
            pathway.check(layer)
            if pathway.learned:
                self._learning.append(layer)
                self._learned.extend(layer.learned.values())
            not_run = "" if trace is None or path in trace.order else "; did not run in the forward pass of the sample"
            covered.append(Covered(path, kind, tuple(layer.weight.shape), f"passes through {pathway.describe()}{not_run}"))
        ids = {id(parameter) for layer in layers.values() for parameter in layer.parameters(recurse=False)}
        uncovered, local = foreign_weights(self.model, ids, trace.uses if trace is not None else None)
        if trace is not None:
            uncovered |= {weight_name(path, layers[path]): outside_text(use) for path, use in trace.uses.outside.items()}
        notes = self.notes() + self._notes_on_tied_weights() + (() if self._dual is None else (self._dual.note(),))
        if trace is None:
            notes += (_NOT_TRACED,)
        return Coverage(self.name, tuple(covered), uncovered, local, notes)

    def _checked_pathway(self, layer: LayerContext) -> FeedbackPathway:
        """The result of `pathway`.

        Raises:
            ComponentError: if it is not a pathway, or if the layer lacks a tensor that the pathway learns.
        """
        pathway: Any = self.pathway(layer)
        if not isinstance(pathway, FeedbackPathway):
            raise ComponentError(
                f"{type(self).__qualname__}.pathway returned {described(pathway)} for layer '{layer.path}'; it must "
                "return an instance of fa_bench.FeedbackPathway, such as fa_bench.FixedFeedback()"
            )
        for name in pathway.learned:
            if feedback_tensor(layer.module, name) is None:
                raise missing_tensor(pathway, layer.path, name)
        return pathway

    def _replace_derivatives(self, sample_input: Any) -> None:
        """Replace the derivatives of nonlinearities, if the option requests it."""
        if self.derivative != "exact":
            from fa_bench.mechanisms.derivative import Dual

            self._dual = Dual(self.name, self.mode, self.beta)
            with self.exact():
                self._dual.wire(self.model, sample_input)

    def _trace_if_possible(self, sample_input: Any) -> Trace | None:
        """The model's structure, or None if there is no sample and zeros cannot replace it. In that case, the first training pass
        is checked instead."""
        try:
            return self.trace(sample_input)
        except CoverageError:
            if sample_input is not None:
                raise
            return None

    def _notes_on_tied_weights(self) -> tuple[str, ...]:
        """Notes on the learned feedback of weights that several layers share."""
        from fa_bench.mechanisms.weighted_layers import weight_parameter

        owners: dict[int, list[str]] = {}
        for path, module in self.model.named_modules():
            if (weight := weight_parameter(module)) is not None:
                owners.setdefault(id(weight), []).append(path)
        learning = {path: weight_parameter(layer) for path, layer in self._layers.items() if layer.pathway.follows}
        tied = {path: [other for other in owners[id(weight)] if other != path] for path, weight in learning.items()}
        return tuple(
            f"'{path}' shares its weight with {names(others)}: the gradient of the weight is the sum over all of them, and the "
            f"learned feedback of '{path}' follows only the part from '{path}'."
            for path, others in tied.items()
            if others
        )

    def watched_modules(self) -> dict[str, nn.Module]:
        return dict(self._layers) if self._dual is None else {**self._layers, **self._dual.modules}

    def begin_forward(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        super().begin_forward(model, args, kwargs)
        if self._dual is not None:
            self._dual.begin(args, kwargs)

    def end_forward(self, model: nn.Module, args: Any, output: Any) -> Any:
        try:
            return super().end_forward(model, args, output)
        finally:
            if self._dual is not None:
                is_training = output is not None and torch.is_grad_enabled() and not self.mode.exact
                self._dual.end((lambda: self.roots(output)) if is_training else None)

    def deliver(self, loss: Tensor, logits: Tensor | None, target: Tensor | None, loss_scale: float | None = None) -> None:
        with self.derivatives_of(loss, logits, target, loss_scale):
            super().deliver(loss, logits, target, loss_scale)

    def derivatives_of(
        self, loss: Tensor, logits: Tensor | None, target: Tensor | None, loss_scale: float | None
    ) -> AbstractContextManager[None]:
        """A context for the backward pass of a loss, in which the derivatives of nonlinearities can be computed."""
        return nullcontext() if self._dual is None else self._dual.delivering(self, loss, logits, target, loss_scale)

    def transporting_layers(self) -> dict[str, Any]:
        return dict(self._layers)

    def unwire(self) -> None:
        from fa_bench.mechanisms.edge.layers import FeedbackLayer, swap_out

        self._learned = []
        if (dual := getattr(self, "_dual", None)) is not None:
            dual.unwire(self.model)
        for layer in {*self.model.modules(), *getattr(self, "_layers", {}).values()}:
            if isinstance(layer, FeedbackLayer):
                swap_out(layer)
            else:
                drop_tensors(layer)

    @property
    def feedback(self) -> dict[str, dict[str, Tensor]]:
        for layer in self._layers.values():
            layer.pathway.materialize(layer)
        return {path: {**layer.pathway.derived(layer), **tensors_of(layer)} for path, layer in self._layers.items()}

    def effective_feedback(self, layer: str) -> Tensor:
        layers = self._layers
        if layer not in layers:
            raise CoverageError(
                f"rule '{self.name}' covers no layer '{layer}'{nearest(layer, layers)} (covered: {names(layers)})"
            )
        return layers[layer].pathway.effective(layers[layer]).detach()

    def learned_feedback(self) -> list[LearnedTensor]:
        return self._learned

    def shared_gradients(self) -> list[tuple[Tensor, Tensor]]:
        from fa_bench.mechanisms.weighted_layers import weight_parameter

        # The gradient of a weight that is also used elsewhere includes the contributions of all its uses.
        parameters = list(self.model.named_parameters(remove_duplicate=False))
        uses = Counter(id(parameter) for _, parameter in parameters)
        uses.update(id(parameter) for name, parameter in parameters if name in self.coverage.uncovered)
        followed = [
            (layer.learned[layer.pathway.follows].tensor, weight_parameter(layer))
            for layer in self._learning
            if layer.pathway.follows
        ]
        return [(tensor, weight) for tensor, weight in followed if weight is not None and uses[id(weight)] == 1]

    @property
    def needs_step(self) -> bool:
        return any(layer.pathway.needs_step(layer) for layer in self._learning)

    def step(self) -> None:
        super().step()
        for layer in self._learning:
            layer.pathway.after_step(layer)

    def state_dict(self) -> dict[str, Any]:
        states = {path: layer.pathway.state() for path, layer in self._layers.items()}
        return {path: state for path, state in states.items() if state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for path, layer in self._layers.items():
            if path in state:
                layer.pathway.load_state(state[path])

    def weight_pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {path: (layer.pathway.effective(layer), layer.weight.detach()) for path, layer in self._layers.items()}


@dataclasses.dataclass(eq=False)
class RandomFeedbackRule(EdgeRule):
    """Base class of the rules in which each layer has its own B, whose initialiser is an option."""

    b_init: str = init_option("B", can_copy=True)
    linear_b_init: str | None = init_option("B in fully connected layers; null: b_init", None, can_copy=True)

    def put_feedback(self, layer: LayerContext, density: float = 1.0) -> None:
        """Create the layer's B."""
        layer.put("B", self.linear_b_init if layer.is_linear and self.linear_b_init is not None else self.b_init, density)
