"""Random tensors: the initialisers, and seeds that depend on names alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fa_bench.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

#: name -> (distribution, half-width or standard deviation from (fan_in, fan_out)), of weights and of feedback. Fans include the
#: kernel positions.
INITIALISERS: dict[str, tuple[str, Callable[[int, int], float]]] = {
    "xavier_uniform": ("uniform", lambda fan_in, fan_out: math.sqrt(6 / (fan_in + fan_out))),
    "xavier_normal": ("normal", lambda fan_in, fan_out: math.sqrt(2 / (fan_in + fan_out))),
    "kaiming_uniform": ("uniform", lambda fan_in, fan_out: math.sqrt(6 / fan_in)),
    "kaiming_normal_fan_out": ("normal", lambda fan_in, fan_out: math.sqrt(2 / fan_out)),
    "pytorch": ("uniform", lambda fan_in, fan_out: 1 / math.sqrt(fan_in)),
    "normal_fan_sum": ("normal", lambda fan_in, fan_out: math.sqrt(1 / (fan_in + fan_out))),
    "normal_fan_out": ("normal", lambda fan_in, fan_out: math.sqrt(1 / fan_out)),
    "lecun_uniform": ("uniform", lambda fan_in, fan_out: math.sqrt(3 / fan_in)),
    "uniform_one": ("uniform", lambda fan_in, fan_out: 1.0),
    "zeros": ("uniform", lambda fan_in, fan_out: 0.0),
}


def fans(shape: Sequence[int]) -> tuple[int, int]:
    """(fan_in, fan_out) of a weight of this shape, kernel positions included, as torch counts them."""
    kernel = math.prod(shape[2:])
    return shape[1] * kernel, shape[0] * kernel


def seed_for(*parts: Any) -> int:
    """A seed made of a run's seed, a layer's path and a tensor's name, so that order and ranks do not matter."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def sample(shape: Sequence[int], init: str, seed: int, density: float = 1.0) -> Tensor:
    """A float32 tensor on the CPU drawn by the initialiser `init`; with `density` below 1, a Bernoulli mask on it.

    The mask does not change the variance of what remains.
    """
    tensor = fill(torch.empty(*shape), init, torch.Generator().manual_seed(seed))
    return tensor if density == 1 else tensor.mul_(sample_mask(shape, density, seed))


def fill(tensor: Tensor, init: str, generator: torch.Generator | None = None) -> Tensor:
    """Overwrite `tensor` with a draw of the initialiser `init`, by torch's global generator unless one is given; returns it."""
    distribution, width = INITIALISERS[init]
    scale = width(*fans(tensor.shape))
    with torch.no_grad():
        if distribution == "uniform":
            return tensor.uniform_(-scale, scale, generator=generator)
        return tensor.normal_(0.0, scale, generator=generator)


def sample_mask(shape: Sequence[int], density: float, seed: int) -> Tensor:
    """A float32 mask on the CPU whose entries are one with probability `density` and zero otherwise."""
    generator = torch.Generator().manual_seed(seed_for(seed, "mask"))
    return torch.empty(*shape).bernoulli_(density, generator=generator)


def resample_magnitudes(out: Tensor, init: str, seed: int) -> None:
    """Overwrite `out` with the absolute values of a fresh draw of the initialiser `init`, on its own device."""
    distribution, width = INITIALISERS[init]
    scale = width(*fans(out.shape))
    if distribution == "uniform" and out.device.type == "cpu":
        # numpy's raw bits, four numbers of 16 bits to the word: this runs at every step, and torch's own generator is serial on
        # a CPU. The 65536 magnitudes are the middles of equal parts of (0, scale): none is zero, and their mean is exact.
        words = -(-out.numel() // 4)
        bits = np.random.SFC64(seed).random_raw(words).view(np.int16)[: out.numel()]
        step = scale / 65536
        # Numbers from -32768 to 32767, moved and scaled in one pass.
        torch.add(out.new_tensor(32768.5 * step), torch.from_numpy(bits).view(out.shape), alpha=step, out=out)
        return
    generator = torch.Generator(out.device).manual_seed(seed)
    if distribution == "uniform":
        out.uniform_(0.0, scale, generator=generator)
    else:
        out.normal_(0.0, scale, generator=generator).abs_()
