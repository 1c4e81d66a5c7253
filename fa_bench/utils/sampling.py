"""Random tensors: the table of initialisers, and seeds derived from names."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class Initialiser(NamedTuple):
    """The distribution of one initialiser.

    Attributes:
        is_uniform: uniform in [-scale, scale), otherwise normal with mean 0 and standard deviation scale.
        scale: computes the scale from (fan_in, fan_out).
        law: the distribution as a formula, for the docs.
    """

    is_uniform: bool
    scale: Callable[[int, int], float]
    law: str


#: The initialisers of weights and feedback. Fans count kernel positions; U(a) is uniform in [-a, a), N(0, v) normal of variance
#: v.
INITIALISERS: dict[str, Initialiser] = {
    "xavier_uniform": Initialiser(True, lambda i, o: math.sqrt(6 / (i + o)), "U(√(6 / (fan_in + fan_out)))"),
    "xavier_normal": Initialiser(False, lambda i, o: math.sqrt(2 / (i + o)), "N(0, 2 / (fan_in + fan_out))"),
    "kaiming_uniform": Initialiser(True, lambda i, o: math.sqrt(6 / i), "U(√(6 / fan_in))"),
    "kaiming_normal_fan_out": Initialiser(False, lambda i, o: math.sqrt(2 / o), "N(0, 2 / fan_out)"),
    "pytorch": Initialiser(True, lambda i, o: 1 / math.sqrt(i), "U(1 / √fan_in), PyTorch's default"),
    "normal_fan_sum": Initialiser(False, lambda i, o: math.sqrt(1 / (i + o)), "N(0, 1 / (fan_in + fan_out))"),
    "normal_fan_out": Initialiser(False, lambda i, o: math.sqrt(1 / o), "N(0, 1 / fan_out)"),
    "lecun_uniform": Initialiser(True, lambda i, o: math.sqrt(3 / i), "U(√(3 / fan_in))"),
    "uniform_one": Initialiser(True, lambda i, o: 1.0, "U(1)"),
    "zeros": Initialiser(True, lambda i, o: 0.0, "all zero"),
}


def fans(shape: Sequence[int]) -> tuple[int, int]:
    """(fan_in, fan_out) of a weight of this shape; kernel positions are counted, as in torch."""
    kernel = math.prod(shape[2:])
    return shape[1] * kernel, shape[0] * kernel


def seed_for(*parts: Any) -> int:
    """A seed derived from a run's seed and names, such as a layer's path and a tensor's name, independent of order and rank."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def sample(shape: Sequence[int], init: str, seed: int, density: float = 1.0) -> Tensor:
    """A float32 tensor on the CPU, sampled by the initialiser `init`; with `density` below 1, multiplied by a Bernoulli mask.

    The mask does not rescale the remaining entries.
    """
    tensor = fill(torch.empty(*shape), init, torch.Generator().manual_seed(seed))
    return tensor if density == 1 else tensor.mul_(sample_mask(shape, density, seed))


def fill(tensor: Tensor, init: str, generator: torch.Generator | None = None) -> Tensor:
    """Overwrite `tensor` with a sample of the initialiser `init` and return it; `generator` defaults to torch's global one."""
    initialiser = INITIALISERS[init]
    scale = initialiser.scale(*fans(tensor.shape))
    with torch.no_grad():
        if initialiser.is_uniform:
            return tensor.uniform_(-scale, scale, generator=generator)
        return tensor.normal_(0.0, scale, generator=generator)


def sample_mask(shape: Sequence[int], density: float, seed: int) -> Tensor:
    """A float32 mask on the CPU whose entries are one with probability `density` and zero otherwise."""
    generator = torch.Generator().manual_seed(seed_for(seed, "mask"))
    return torch.empty(*shape).bernoulli_(density, generator=generator)


def resample_magnitudes(out: Tensor, init: str, seed: int) -> None:
    """Overwrite `out` with the absolute values of a new sample of the initialiser `init`, on the device of `out`."""
    initialiser = INITIALISERS[init]
    scale = initialiser.scale(*fans(out.shape))
    if initialiser.is_uniform and out.device.type == "cpu":
        # This runs at every step, and torch's generator is serial on a CPU. numpy's raw 64-bit words give four 16-bit numbers
        # each; they select centres of equal intervals of (0, scale), so that no magnitude is zero and their mean is exact.
        words = -(-out.numel() // 4)
        bits = np.random.SFC64(seed).random_raw(words).view(np.int16)[: out.numel()]
        step = scale / 65536
        # Shifts and scales the numbers, from -32768 to 32767, in one pass.
        torch.add(out.new_tensor(32768.5 * step), torch.from_numpy(bits).view(out.shape), alpha=step, out=out)
        return
    generator = torch.Generator(out.device).manual_seed(seed)
    if initialiser.is_uniform:
        out.uniform_(0.0, scale, generator=generator)
    else:
        out.normal_(0.0, scale, generator=generator).abs_()
