"""The first mechanism: rules that change what one weighted layer does in its own backward pass."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from fa_bench.coverage import Coverage, Covered, foreign_weights
from fa_bench.errors import CoverageError, names, nearest
from fa_bench.feedback import Carrier, draw, draw_mask, fans, seed_for
from fa_bench.lazy import torch
from fa_bench.rules.base import Rule

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclasses.dataclass
class Site:
    """One layer that a rule is asked to give feedback to.

    Attributes:
        path: the layer's name.
        layer: the layer, plain still.
        seed: the attach seed.
        is_output: whether the layer feeds the model's output.
    """

    path: str
    layer: nn.Module
    seed: int
    is_output: bool

    @functools.cached_property
    def fans(self) -> tuple[int, int]:
        """(fan_in, fan_out) of the weight."""
        return fans(self.layer.weight.shape)

    def tensor_seed(self, name: str) -> int:
        """The seed of the tensor `name` of this layer."""
        return seed_for(self.seed, self.path, name)

    def put(self, name: str, init: str, density: float = 1.0, magnitude: bool = False) -> None:
        """Draw the feedback tensor `name` in the weight's layout, or copy the weight where `init` is ``copy_w``."""
        weight = self.layer.weight.detach()
        if init == "copy_w":
            tensor = weight.clone()
            if density < 1:
                tensor.mul_(draw_mask(weight.shape, density, self.tensor_seed(name)).to(weight))
        else:
            tensor = draw(weight.shape, init, self.tensor_seed(name), density).to(weight)
        self._put(name, tensor.abs_() if magnitude else tensor)

    def put_mask(self, density: float) -> None:
        """Draw the layer's sparsity mask; none where `density` is 1."""
        weight = self.layer.weight
        mask = draw_mask(weight.shape, density, self.tensor_seed("mask")).to(weight) if density < 1 else None
        self._put("mask", mask)

    def _put(self, name: str, tensor: Tensor | None) -> None:
        from fa_bench.layers import put_tensor

        if tensor is not None and tensor.dim() in (4, 5):
            # A tensor in another memory format than the weight costs a copy at every step.
            tensor = torch.empty_like(self.layer.weight).copy_(tensor)
        put_tensor(self.layer, name, None if tensor is None else tensor.detach())


@dataclasses.dataclass(eq=False)
class EdgeRule(Rule):
    """A rule that gives every weighted layer a carrier of its error; subclasses say which in `carrier`."""

    def carrier(self, site: Site) -> Carrier:
        """Put the layer's feedback tensors in place and return what makes the effective feedback of them."""
        raise NotImplementedError

    def put_in(self, sample_input: Tensor | None) -> Coverage:
        from fa_bench.layers import swap_in, tensors_of, weighted_layers

        self._layers: dict[str, Any] = {}
        self._learning: list[Any] = []
        layers = weighted_layers(self.model)
        outputs = self.trace(sample_input).outputs if sample_input is not None else list(layers)[-1:]
        covered = []
        for path, layer in layers.items():
            kind = type(layer).__name__
            carrier = self.carrier(Site(path, layer, self.seed, path in outputs))
            swap_in(layer, path, carrier, self.mode)
            self._layers[path] = layer
            if carrier.learned:
                self._learning.append(layer)
            held = ", ".join(f"{name}{' learned' if name in carrier.learned else ''}" for name in tensors_of(layer))
            covered.append(Covered(path, kind, tuple(layer.weight.shape),
                                   f"{type(carrier).__name__} feedback{f' ({held})' if held else ''}"))
        ids = {id(parameter) for layer in layers.values() for parameter in layer.parameters(recurse=False)}
        return Coverage(self.name, tuple(covered), foreign_weights(self.model, ids))

    def take_out(self) -> None:
        from fa_bench.layers import drop_tensors, swap_out, weighted_layers

        for layer in weighted_layers(self.model).values():
            if hasattr(layer, "carrier"):
                swap_out(layer)
            drop_tensors(layer)

    def finish_gradients(self) -> None:
        pairs = [pair for layer in self._learning for pair in layer.carrier.after_backward(layer)]
        if pairs:
            torch._foreach_copy_([to for to, _ in pairs], [source for _, source in pairs])

    @property
    def feedback(self) -> dict[str, dict[str, Tensor]]:
        from fa_bench.layers import tensors_of

        for layer in self._layers.values():
            layer.carrier.settle(layer)
        return {path: {**layer.carrier.shown(layer), **tensors_of(layer)} for path, layer in self._layers.items()}

    def effective_feedback(self, layer: str) -> Tensor:
        layers = self._layers
        if layer not in layers:
            raise CoverageError(f"rule '{self.name}' covers no layer '{layer}'{nearest(layer, layers)} "
                                f"(covered: {names(layers)})")
        return layers[layer].carrier.effective(layers[layer]).detach()

    def feedback_parameters(self) -> list[Tensor]:
        from fa_bench.layers import tensors_of

        return [tensors_of(layer)[name] for layer in self._layers.values() for name in layer.carrier.learned]

    def state_dict(self) -> dict[str, Any]:
        states = {path: layer.carrier.state() for path, layer in self._layers.items()}
        return {path: state for path, state in states.items() if state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        layers = self._layers
        for path, values in state.items():
            layers[path].carrier.load_state(values)

    def weight_pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {path: (layer.carrier.effective(layer), layer.weight.detach()) for path, layer in self._layers.items()}
