"""Rules whose every cut has a loss of its own, made of the activation there, the labels, and layers that the rule holds."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fa_bench.draws import seed_for
from fa_bench.errors import CoverageError, names
from fa_bench.lazy import nn, torch
from fa_bench.mechanisms.cuts import CutRule, Kept

if TYPE_CHECKING:
    from torch import Tensor
    from torch import nn as torch_nn

    from fa_bench.mechanisms.trace import Trace


@dataclasses.dataclass(eq=False)
class LocalRule(CutRule):
    """A cut rule whose error at a cut is the gradient of a local loss there; subclasses give `auxiliary` and `local_loss`.

    No error crosses a cut. The auxiliary layers are the rule's, not the model's: ``model.parameters()`` stays that of the plain
    model, ``rule.feedback_parameters()`` are the auxiliary parameters, ``rule.feedback`` shows them under their cut, and
    ``rule.state_dict()`` saves them. They follow the model to its device and dtype. Local losses do not carry the scale of a
    scaled loss, and are computed in the model's dtype under autocast.
    """

    reads_values = True

    @property
    def needs_target(self) -> bool:
        return True

    # -------------------------------------------------------------------------------------------- for subclasses
    def auxiliary(self, cut: str, shape: tuple[int, ...], classes: int) -> torch_nn.Module:
        """The auxiliary layers of one cut, on the CPU; torch's global generator is seeded for them and restored afterwards.

        Args:
            cut: the cut's module path.
            shape: the activation's shape without the batch.
            classes: number of classes.
        """
        raise NotImplementedError

    def local_loss(self, cut: str, auxiliary: torch_nn.Module, activation: Tensor, target: Tensor) -> Tensor:
        """The loss at one cut, a scalar; `activation` is (N, ...), `target` (N,)."""
        raise NotImplementedError

    # -------------------------------------------------------------------------------------------- life in a model
    def make_feedback(self, features: dict[str, tuple[int, ...]], classes: int) -> None:
        self._auxiliary = {}
        for cut, shape in features.items():
            with _seeded(seed_for(self.seed, cut, "auxiliary")):
                self._auxiliary[cut] = self.auxiliary(cut, shape, classes)

    def take_out(self) -> None:
        super().take_out()
        self._auxiliary: dict[str, torch_nn.Module] = {}

    def auxiliary_at(self, cut: str) -> torch_nn.Module:
        """The auxiliary layers of one cut, on the model's device and in its dtype."""
        module, like = self._auxiliary[cut], next(self.model.parameters())
        first = next(module.parameters(), None)
        if first is not None and (first.device != like.device or first.dtype != like.dtype):
            # In place: parameters keep their identity, and optimizers what they were given.
            module.to(like.device, like.dtype)
        return module

    # -------------------------------------------------------------------------------------------- training
    def signal(self, cut: str, kept: Kept, sent: Tensor, target: Tensor | None) -> Tensor:
        assert target is not None
        module, dtype = self.auxiliary_at(cut), next(self.model.parameters()).dtype
        learned = [] if self.mode.hold else list(module.parameters())
        with torch.enable_grad():
            activation = kept.tensor.detach().to(dtype).requires_grad_(True)
            loss = self.local_loss(cut, module, activation, target)
            error, *gradients = torch.autograd.grad(loss, [activation, *learned])
        for parameter, gradient in zip(learned, gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return error

    # -------------------------------------------------------------------------------------------- feedback, metrics
    def feedback_parameters(self) -> list[Tensor]:
        return [parameter for cut in self._auxiliary for parameter in self.auxiliary_at(cut).parameters()]

    @property
    def feedback(self) -> dict[str, dict[str, Tensor]]:
        return {cut: {**fixed, **dict(self.auxiliary_at(cut).named_parameters())} for cut, fixed in super().feedback.items()}

    def readouts(self) -> dict[str, Tensor]:
        """None: no error comes from the output."""
        return {}

    def weight_pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """None: no error is carried through any layer."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        states = {cut: dict(module.state_dict()) for cut, module in self._auxiliary.items()}
        return {cut: state for cut, state in states.items() if state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for cut, tensors in state.items():
            self.auxiliary_at(cut).load_state_dict(tensors)


class ModuleRule(LocalRule):
    """A local rule whose modules are the model's blocks and learn as wholes; the last one by the network's own loss.

    Where blocks that feed the output layer are named too, they belong to the last module.
    """

    declared = "blocks"
    modular = True

    def choose_cuts(self, cuts: tuple[str, ...], trace: Trace) -> tuple[str, ...]:
        last = {path for path, consumer in trace.consumer.items() if consumer in trace.outputs}
        chosen = tuple(cut for cut in cuts if last.isdisjoint(trace.feeds.get(cut, ())))
        if not chosen:
            raise CoverageError(f"rule '{self.name}' needs two modules or more: {names(cuts)} already feeds the output layer "
                                f"{names(trace.outputs)}; name the ends of earlier ones in cuts or in model.blocks")
        return chosen


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's global generator seeded, on the CPU, and as it was afterwards; those of other devices are not touched."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_rng_state(state)


# ------------------------------------------------------------------------------------------------ auxiliary layers
def kind_of_map(name: str, cut: str, shape: tuple[int, ...]) -> Any:
    """``nn.Conv`` and the like for maps of this shape, (C, ...) of one to three spatial dimensions: ``nn.Conv2d`` ...

    Raises:
        CoverageError: for maps of more dimensions.
    """
    dims = len(shape) - 1
    if dims > 3:
        raise CoverageError(f"cut '{cut}' has activations of shape {shape}; local losses take (F,) or maps of 1 to 3 dimensions")
    return getattr(nn, f"{name}{dims}d")


def reduced(shape: tuple[int, ...], limit: int) -> tuple[int, ...]:
    """Size to which a map (C, ...) is averaged so as to have at most `limit` features: sizes are halved in turn, rounded up.

    Empty for flat activations (F,), which have none to average over.
    """
    channels, *size = shape
    factors, turn = [1] * len(size), 0

    def halved() -> list[int]:
        return [math.ceil(length / factor) for length, factor in zip(size, factors, strict=True)]

    while channels * math.prod(halved()) > limit and max(halved(), default=1) > 1:
        factors[turn] *= 2
        turn = (turn + 1) % len(size)
    return tuple(halved())


def flattening(cut: str, shape: tuple[int, ...], limit: int) -> tuple[OrderedDict[str, torch_nn.Module], int]:
    """What flattens an activation, maps averaged first to at most `limit` features; and the number of features it gives."""
    layers: OrderedDict[str, torch_nn.Module] = OrderedDict()
    size = reduced(shape, limit)
    if size != shape[1:]:
        layers["pool"] = kind_of_map("AdaptiveAvgPool", cut, shape)(size)
    layers["flatten"] = nn.Flatten()
    return layers, shape[0] * math.prod(size)
