"""What carries the error: one small class for each way to obtain a layer's effective feedback, and the initialisers.

Every tensor here is in the weight's own layout: (O, I) for linear layers, (O, I/groups, K...) for convolutions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fa_bench.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


# ------------------------------------------------------------------------------------------------ initialisers
#: name -> (distribution, half-width or standard deviation from (fan_in, fan_out)). Fans include the kernel positions.
INITIALISERS: dict[str, tuple[str, Callable[[int, int], float]]] = {
    "xavier_uniform": ("uniform", lambda fan_in, fan_out: math.sqrt(6 / (fan_in + fan_out))),
    "xavier_normal": ("normal", lambda fan_in, fan_out: math.sqrt(2 / (fan_in + fan_out))),
    "kaiming_uniform": ("uniform", lambda fan_in, fan_out: math.sqrt(6 / fan_in)),
    "kaiming_normal_fan_out": ("normal", lambda fan_in, fan_out: math.sqrt(2 / fan_out)),
    "pytorch": ("uniform", lambda fan_in, fan_out: 1 / math.sqrt(fan_in)),
    "normal_fan_sum": ("normal", lambda fan_in, fan_out: math.sqrt(1 / (fan_in + fan_out))),
    "normal_fan_out": ("normal", lambda fan_in, fan_out: math.sqrt(1 / fan_out)),
    "uniform_one": ("uniform", lambda fan_in, fan_out: 1.0),
}


def fans(shape: Sequence[int]) -> tuple[int, int]:
    """(fan_in, fan_out) of a weight of this shape, kernel positions included, as torch counts them."""
    kernel = math.prod(shape[2:])
    return shape[1] * kernel, shape[0] * kernel


def seed_for(*parts: Any) -> int:
    """A seed made of a run's seed, a layer's path and a tensor's name, so that order and ranks do not matter."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def draw(shape: Sequence[int], init: str, seed: int, density: float = 1.0) -> Tensor:
    """A float32 tensor on the CPU drawn by the initialiser `init`; with `density` below 1, a Bernoulli mask on it.

    The mask does not change the variance of what remains.
    """
    distribution, width = INITIALISERS[init]
    generator = torch.Generator().manual_seed(seed)
    scale = width(*fans(shape))
    tensor = torch.empty(*shape)
    if distribution == "uniform":
        tensor.uniform_(-scale, scale, generator=generator)
    else:
        tensor.normal_(0.0, scale, generator=generator)
    return tensor if density == 1 else tensor.mul_(draw_mask(shape, density, seed))


def draw_mask(shape: Sequence[int], density: float, seed: int) -> Tensor:
    """A float32 mask on the CPU whose entries are one with probability `density` and zero otherwise."""
    generator = torch.Generator().manual_seed(seed_for(seed, "mask"))
    return torch.empty(*shape).bernoulli_(density, generator=generator)



def redraw_magnitudes(out: Tensor, init: str, seed: int) -> None:
    """Overwrite `out` with the absolute values of a fresh draw of the initialiser `init`, on its own device."""
    distribution, width = INITIALISERS[init]
    scale = width(*fans(out.shape))
    if distribution == "uniform" and out.device.type == "cpu":
        # Uniform bits from numpy: seven times faster than torch's serial generator on a CPU, and this runs at every step.
        words = -(-out.numel() // 2)
        bits = np.random.Generator(np.random.SFC64(seed)).integers(-(2**63), 2**63 - 1, size=words, dtype=np.int64)
        drawn = torch.from_numpy(bits.view(np.int32)[: out.numel()]).view(out.shape)
        out.copy_(drawn).mul_(scale / 2**31).abs_()
        return
    generator = torch.Generator(out.device).manual_seed(seed)
    if distribution == "uniform":
        out.uniform_(0.0, scale, generator=generator)
    else:
        out.normal_(0.0, scale, generator=generator).abs_()


# ------------------------------------------------------------------------------------------------ carriers
class Carrier:
    """How one layer obtains its effective feedback. Holds plain values; the tensors are buffers of the layer.

    Attributes:
        learned: names of the tensors that an optimizer trains.
    """

    learned: tuple[str, ...] = ()

    def effective(self, layer: Any) -> Tensor:
        """What carries the error now, in the weight's layout, detached."""
        raise NotImplementedError

    def before_forward(self, layer: Any) -> None:
        """Called at the start of every training forward."""

    def after_backward(self, layer: Any) -> list[tuple[Tensor, Tensor]]:
        """Pairs (destination, source) to be copied once the weight gradients are complete."""
        return []

    def shown(self, layer: Any) -> dict[str, Tensor]:
        """Tensors that are derived, not stored, and still belong into ``rule.feedback`` (reading only)."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs beside the tensors; plain values."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""


class Fixed(Carrier):
    """e_in = g B with B drawn once."""

    def effective(self, layer: Any) -> Tensor:
        return layer.feedback_B


class Learned(Fixed):
    """e_in = g B, and the gradient of B is a copy of the gradient of W.

    A copy, not an alias: SGD with Nesterov momentum changes gradients in place, and gradient scalers divide them, once
    for each tensor they are given.
    """

    learned = ("B",)

    def __init__(self) -> None:
        self._gradient: Tensor | None = None

    def after_backward(self, layer: Any) -> list[tuple[Tensor, Tensor]]:
        source, feedback = layer.weight.grad, layer.feedback_B
        if source is None:
            feedback.grad = None
            return []
        # One buffer for all steps: a fresh one each time costs more in page faults than the copy itself.
        if self._gradient is None or self._gradient.shape != source.shape or self._gradient.device != source.device:
            self._gradient = torch.empty_like(source)
        feedback.grad = self._gradient
        return [(self._gradient, source)]


class Transport(Carrier):
    """The true weight: backpropagation through this layer."""

    def effective(self, layer: Any) -> Tensor:
        return layer.weight.detach()


class Sign(Carrier):
    """B = s sign(W), recomputed from the current weight; sign(0) is 0.

    Args:
        scale: s, a positive number.
    """

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def effective(self, layer: Any) -> Tensor:
        feedback = torch.sign(layer.weight.detach()).mul_(self.scale)
        return feedback if layer.feedback_mask is None else feedback.mul_(layer.feedback_mask)

    def shown(self, layer: Any) -> dict[str, Tensor]:
        return {"B": self.effective(layer)}


class SignedMagnitude(Carrier):
    """B = |M| sign(W), recomputed from the current weight.

    Args:
        redraw: initialiser that draws M anew at every training forward, or None to keep it.
        seed: the layer's seed for redrawing; each draw is a pure function of it and of the draw's number.
    """

    def __init__(self, redraw: str | None = None, seed: int = 0) -> None:
        self.redraw, self.seed, self.draws = redraw, seed, 0

    def before_forward(self, layer: Any) -> None:
        if self.redraw is None:
            return
        self.draws += 1
        redraw_magnitudes(layer.feedback_M, self.redraw, seed_for(self.seed, self.draws))

    def effective(self, layer: Any) -> Tensor:
        feedback = torch.sign(layer.weight.detach()).mul_(layer.feedback_M.abs())
        return feedback if layer.feedback_mask is None else feedback.mul_(layer.feedback_mask)

    def state(self) -> dict[str, Any]:
        return {"draws": self.draws}

    def load_state(self, state: dict[str, Any]) -> None:
        self.draws = int(state["draws"])
