"""The first mechanism: rules that change what one weighted layer does in its own backward pass."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fa_bench.config.options import option
from fa_bench.errors import CoverageError, names, nearest
from fa_bench.lazy import torch
from fa_bench.mechanisms.coverage import Coverage, Covered, foreign_weights, matching, not_coverable, outside_text
from fa_bench.mechanisms.pathways import FeedbackPathway, TransposeFeedback
from fa_bench.mechanisms.rule import Rule
from fa_bench.sampling import fans, sample, sample_mask, seed_for

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fa_bench.mechanisms.trace import Trace
    from fa_bench.mechanisms.updates import LearnedTensor


@dataclasses.dataclass
class LayerContext:
    """One layer that a rule is asked to give feedback to.

    Attributes:
        path: the layer's name.
        module: the layer itself, which is still the plain one.
        seed: the attach seed.
        is_output: whether the layer feeds the model's output.
    """

    path: str
    module: Any
    seed: int
    is_output: bool

    @functools.cached_property
    def fans(self) -> tuple[int, int]:
        """(fan_in, fan_out) of the weight."""
        return fans(self.module.weight.shape)

    def tensor_seed(self, name: str) -> int:
        """The seed of the tensor `name` of this layer."""
        return seed_for(self.seed, self.path, name)

    def put(
        self, name: str, init: str, density: float = 1.0, magnitude: bool = False, shape: Sequence[int] | None = None
    ) -> None:
        """Draw the feedback tensor `name`, in the weight's layout unless `shape` is given.

        `init` is an initialiser, or ``copy_w`` for the weight's own numbers; with `magnitude` their absolute values are taken.
        """
        weight = self.module.weight.detach()
        shape = weight.shape if shape is None else shape
        if init == "copy_w":
            tensor = weight.clone()
            if density < 1:
                tensor.mul_(sample_mask(shape, density, self.tensor_seed(name)).to(weight))
        else:
            tensor = sample(shape, init, self.tensor_seed(name), density).to(weight)
        self.keep(name, tensor.abs_() if magnitude else tensor)

    def put_mask(self, density: float, seeded_by: str = "mask", shape: Sequence[int] | None = None) -> None:
        """Draw the layer's sparsity mask, in the weight's layout unless `shape` is given; none where `density` is 1.

        ``seeded_by="B"`` gives the mask that `put` puts on B.
        """
        weight = self.module.weight
        shape = weight.shape if shape is None else shape
        self.keep("mask", sample_mask(shape, density, self.tensor_seed(seeded_by)).to(weight) if density < 1 else None)

    def keep(self, name: str, tensor: Tensor | None) -> None:
        """Make `tensor` the layer's feedback tensor `name`."""
        from fa_bench.mechanisms.layers import put_tensor

        weight = self.module.weight
        if tensor is not None and tensor.dim() in (4, 5):
            # A tensor in another memory format than the weight costs a copy at every step.
            last = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
            in_last = weight.is_contiguous(memory_format=last) and not weight.is_contiguous()
            tensor = tensor.contiguous(memory_format=last if in_last else torch.contiguous_format)
        put_tensor(self.module, name, None if tensor is None else tensor.detach())


@dataclasses.dataclass(eq=False)
class EdgeRule(Rule):
    """A rule that gives every weighted layer a carrier of its error; subclasses say which in `carrier`.

    Layers that are excluded carry the error by their weight, as in backpropagation.
    """

    include: list[str] = option(["*"], "layers (names, or patterns such as 'layer1.*'; * crosses dots) whose error "
                                           "the rule carries")
    exclude: list[str] = option([], "layers (names, or patterns; * crosses dots) that carry the error by their "
                                        "true weight instead")
    plain_last: bool = option(False, "the output layer carries its error by its true weight")

    def pathway(self, layer: LayerContext) -> FeedbackPathway:
        """Put the layer's feedback tensors in place and return what makes the effective feedback of them."""
        raise NotImplementedError

    def wire(self, sample_input: Any) -> Coverage:
        from fa_bench.mechanisms.layers import swap_in, weighted_layers

        self._layers: dict[str, Any] = {}
        self._learning: list[Any] = []
        self._learned: list[LearnedTensor] = []
        layers = weighted_layers(self.model)
        if not layers:
            raise CoverageError(f"rule '{self.name}' covers no layer of this model: {not_coverable(self.model)}")
        trace = self._seen(sample_input)
        outputs = trace.outputs if trace is not None and sample_input is not None else list(layers)[-1:]
        plain = set(layers) - matching(self.include, layers, "include") | matching(self.exclude, layers, "exclude")
        plain |= set(outputs) if self.plain_last else set()
        if plain.issuperset(layers):
            raise CoverageError(f"include={self.include}, exclude={self.exclude}, plain_last={self.plain_last} leave rule "
                                f"'{self.name}' no layer (layers: {names(layers)})")
        covered = []
        for path, layer in layers.items():
            kind = type(layer).__name__
            context = LayerContext(path, layer, self.seed, path in outputs)
            pathway = TransposeFeedback() if path in plain else self.pathway(context)
            swap_in(layer, path, pathway, self.mode)
            self._layers[path] = layer
            if pathway.learned:
                self._learning.append(layer)
                self._learned.extend(layer.learned.values())
            idle = "" if trace is None or path in trace.order else "; did not run in the sample forward"
            covered.append(Covered(path, kind, tuple(layer.weight.shape), f"goes on through {pathway.describe()}{idle}"))
        ids = {id(parameter) for layer in layers.values() for parameter in layer.parameters(recurse=False)}
        uncovered, local = foreign_weights(self.model, ids, trace.uses if trace is not None else None)
        return Coverage(self.name, tuple(covered), uncovered | self._used_outside(trace), local, self.notes() + self._tied())

    def _seen(self, sample_input: Any) -> Trace | None:
        """The model's structure; None where there is no sample, and none that could be made up: then training shows it."""
        try:
            return self.trace(sample_input)
        except CoverageError:
            if sample_input is not None:
                raise
            return None

    def _used_outside(self, trace: Trace | None) -> dict[str, str]:
        return {} if trace is None else {f"{path}.weight": outside_text(use) for path, use in trace.uses.outside.items()}

    def _tied(self) -> tuple[str, ...]:
        """Notes on learned feedback of weights that several layers share."""
        owners: dict[int, list[str]] = {}
        for path, module in self.model.named_modules():
            if module._parameters.get("weight") is not None:
                owners.setdefault(id(module.weight), []).append(path)
        learning = [path for path, layer in self._layers.items() if layer.pathway.follows]
        shared = {path: [at for at in owners[id(self._layers[path].weight)] if at != path] for path in learning}
        return tuple(f"'{path}' shares its weight with {names(others)}: the weight's gradient is the sum of theirs, and learned "
                     f"feedback follows the layer's own part." for path, others in shared.items() if others)

    def watched_modules(self) -> dict[str, nn.Module]:
        return dict(self._layers)

    def transporting_layers(self) -> dict[str, nn.Module]:
        return dict(self._layers)

    def unwire(self) -> None:
        from fa_bench.mechanisms.layers import FeedbackLayer, drop_tensors, swap_out

        self._learned = []
        for layer in {*self.model.modules(), *getattr(self, "_layers", {}).values()}:
            if isinstance(layer, FeedbackLayer):
                swap_out(layer)
            else:
                drop_tensors(layer)

    @property
    def feedback(self) -> dict[str, dict[str, Tensor]]:
        from fa_bench.mechanisms.layers import tensors_of

        for layer in self._layers.values():
            layer.pathway.materialize(layer)
        return {path: {**layer.pathway.shown(layer), **tensors_of(layer)} for path, layer in self._layers.items()}

    def effective_feedback(self, layer: str) -> Tensor:
        layers = self._layers
        if layer not in layers:
            raise CoverageError(f"rule '{self.name}' covers no layer '{layer}'{nearest(layer, layers)} "
                                f"(covered: {names(layers)})")
        return layers[layer].pathway.effective(layers[layer]).detach()

    def learned_feedback(self) -> list[LearnedTensor]:
        return self._learned

    def shared_gradients(self) -> list[tuple[Tensor, Tensor]]:
        # A weight that is used elsewhere too has the gradient of all its uses.
        named = list(self.model.named_parameters(remove_duplicate=False))
        uses = Counter(id(parameter) for _, parameter in named)
        uses.update(id(parameter) for name, parameter in named if name in self.coverage.uncovered)
        return [(layer.learned[layer.pathway.follows].tensor, layer.weight) for layer in self._learning
                if layer.pathway.follows and uses[id(layer.weight)] == 1]

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
