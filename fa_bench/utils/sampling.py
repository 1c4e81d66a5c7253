"""Sample random tensors with a table of initialisers and with seeds derived from names."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fa_bench.errors import ConfigError, names, nearest, truncate
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class Initialiser(NamedTuple):
    """The distribution of one initialiser.

    Attributes:
        is_uniform: whether the distribution is uniform in [-scale, scale), rather than normal with mean 0 and standard deviation
            scale.
        scale: computes the scale from (fan_in, fan_out).
        law: the distribution as text, for the docs.
        fill: overwrites a tensor in another way, given a generator; None for the distributions above.
    """

    is_uniform: bool
    scale: Callable[[int, int], float]
    law: str
    fill: Callable[[Tensor, torch.Generator | None], Tensor] | None = None


def _one_of(*values: float) -> Callable[[Tensor, torch.Generator | None], Tensor]:
    """A function that fills a tensor with independent entries, each of which takes one of the values with equal probability."""

    def fill(tensor: Tensor, generator: torch.Generator | None) -> Tensor:
        chosen = torch.randint(len(values), tensor.shape, generator=generator, device=tensor.device)
        return tensor.copy_(torch.tensor(values, device=tensor.device)[chosen])

    return fill


def _one(fan_in: int, fan_out: int) -> float:
    return 1.0


def _identities(sign: int) -> Callable[[Tensor, torch.Generator | None], Tensor]:
    """A function that fills a tensor (O, ...) with identity matrices (O, O) side by side, where every second one is multiplied by
    `sign`."""

    def fill(tensor: Tensor, generator: torch.Generator | None) -> Tensor:
        rows = torch.arange(tensor.shape[0], device=tensor.device).unsqueeze(1)
        columns = torch.arange(math.prod(tensor.shape[1:]), device=tensor.device)
        signs = torch.where(columns // len(rows) % 2 == 1, sign, 1)
        return tensor.copy_(((columns % len(rows) == rows) * signs).view(tensor.shape))

    return fill


#: The initialisers of weights and feedback; for fan_in and fan_out, see `fans`. U(a) is the uniform distribution on [-a, a), and
#: N(0, v) is the normal distribution with variance v.
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
    "trinomial": Initialiser(False, _one, "-1, 0 or 1, with equal probability; for feedback only", _one_of(-1, 0, 1)),
    "binomial": Initialiser(False, _one, "0 or 1, with equal probability; for feedback only", _one_of(0, 1)),
    "identity": Initialiser(False, _one, "identity matrices (fan_out, fan_out) side by side; for feedback only", _identities(1)),
    "identity_pm": Initialiser(
        False, _one, "identity matrices side by side, every second one negative; for feedback only", _identities(-1)
    ),
}

#: The initialisers for weights, and for feedback with given signs, where only the magnitudes are sampled.
CONTINUOUS = [name for name, initialiser in INITIALISERS.items() if initialiser.fill is None]


def initialiser_of(name: str, what: str = "", others: Sequence[str] = ()) -> Initialiser:
    """The initialiser called `name`.

    Args:
        name: the name.
        what: the tensor's name in the error message.
        others: further names that the caller accepts, for the error message.

    Raises:
        ConfigError: if there is no such initialiser; the message suggests the nearest name.
    """
    if not isinstance(name, str) or name not in INITIALISERS:
        allowed = [*INITIALISERS, *others]
        raise ConfigError(
            f"{f'{what}: ' if what else ''}there is no initialiser {truncate(repr(name), 100)}{nearest(str(name), allowed)} "
            f"(available: {names(allowed)})"
        )
    return INITIALISERS[name]


def fans(shape: Sequence[int]) -> tuple[int, int]:
    """The pair (fan_in, fan_out) for a weight of this shape. Both include the number of kernel positions as a factor, as in
    torch."""
    kernel = math.prod(shape[2:])
    return shape[1] * kernel, shape[0] * kernel


def seed_for(*parts: Any) -> int:
    """A seed derived from a run's seed and from names, such as a layer's path and a tensor's name. The result does not depend on
    the order of calls or on the rank of the process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def sample(shape: Sequence[int], init: str, seed: int, density: float = 1.0) -> Tensor:
    """A float32 tensor on the CPU, sampled by the initialiser `init`. If `density` is below 1, the tensor is multiplied by a
    Bernoulli mask.

    The mask does not rescale the remaining entries.
    """
    tensor = fill(torch.empty(*shape), init, torch.Generator().manual_seed(seed))
    return tensor if density == 1 else tensor.mul_(sample_mask(shape, density, seed))


def fill(tensor: Tensor, init: str, generator: torch.Generator | None = None) -> Tensor:
    """Overwrite `tensor` with a sample of the initialiser `init`, and return it. If `generator` is None, torch's global generator
    is used."""
    initialiser = initialiser_of(init)
    scale = initialiser.scale(*fans(tensor.shape))
    with torch.no_grad():
        if initialiser.fill is not None:
            return initialiser.fill(tensor, generator)
        if initialiser.is_uniform:
            return tensor.uniform_(-scale, scale, generator=generator)
        return tensor.normal_(0.0, scale, generator=generator)


def sample_mask(shape: Sequence[int], density: float, seed: int) -> Tensor:
    """A float32 mask on the CPU whose entries are one with probability `density` and zero otherwise."""
    generator = torch.Generator().manual_seed(seed_for(seed, "mask"))
    return torch.empty(*shape).bernoulli_(density, generator=generator)


def resample_magnitudes(out: Tensor, init: str, seed: int) -> None:
    """Overwrite `out` with the absolute values of a new sample of the initialiser `init`, on the device of `out`.

    The sample is the same as the result of `magnitudes`, except for rounding.
    """
    words = seed_words(seed)
    if out.device.type != "cpu":
        on_device = torch.tensor(words, dtype=torch.int32).to(out.device, non_blocking=True)
        out.copy_(magnitudes(on_device, out.shape, init, out.dtype))
        return
    wide = torch.promote_types(out.dtype, torch.float32)
    is_direct = out.is_contiguous() and out.dtype == wide
    values = out.view(-1) if is_direct else torch.empty(out.numel(), dtype=wide)
    for start in range(0, out.numel(), _PART):
        part = values[start : start + _PART]
        _magnitudes(torch.from_numpy(_hashed_part(start, len(part), *words)), init, wide, fans(out.shape), part)
    if not is_direct:
        out.copy_(values.view(out.shape))


def magnitudes(words: Tensor, shape: Sequence[int], init: str, dtype: torch.dtype) -> Tensor:
    """The absolute values of a sample of the initialiser `init`. The values can be computed on any device, and a compiler can
    fuse the computation.

    Entry i depends only on the seed and i, so the sample is the same on every device and with every compiler, except for
    rounding. The generators of torch differ between devices and are slow on CPUs.

    Args:
        words: `seed_words` of the seed, int32, (2,), on the device.
        shape: the shape of the sample.
        init: the initialiser.
        dtype: the dtype of the sample.
    """
    numbers = _hashed(words, math.prod(shape)).view(*shape)
    return _magnitudes(numbers, init, torch.promote_types(dtype, torch.float32), fans(shape)).to(dtype)


def seed_words(seed: int) -> tuple[int, int]:
    """A seed below 2^64 as two signed 32-bit numbers."""
    return tuple(int(word) for word in np.array([seed], np.uint64).view(np.int32))  # type: ignore[return-value]


def _magnitudes(numbers: Tensor, init: str, dtype: torch.dtype, fan_in_out: tuple[int, int], out: Tensor | None = None) -> Tensor:
    """Map uniformly distributed integers from -2^22 to 2^22 - 1 to magnitudes. No magnitude is zero unless the distribution's
    scale is zero, and the mean is exact for uniform distributions."""
    initialiser = initialiser_of(init)
    scale = initialiser.scale(*fan_in_out)
    step = (scale if initialiser.is_uniform else 1.0) / 2**23
    values = torch.add(numbers.new_full((), (2**22 + 0.5) * step, dtype=dtype), numbers, alpha=step, out=out)
    return values if initialiser.is_uniform else torch.erfinv(values, out=out).mul_(math.sqrt(2) * scale)


# The numbers from `_hashed` are the upper 23 bits of a hash of the index and the seed. The hash begins with a Weyl sequence in
# the index, which starts at the first half of the seed. The finaliser of MurmurHash3 mixes the Weyl sequence. Between the two
# multiplications of the finaliser, the second half of the seed is combined with the hash by XOR.
_WEYL, _MIX1, _MIX2 = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35
#: The number of values that are hashed at a time on a CPU, chosen so that they stay in its cache.
_PART = 65536
_buffers = threading.local()


def _hashed(words: Tensor, count: int) -> Tensor:
    """An int32 tensor (count,) of hashed integers from -2^22 to 2^22 - 1."""
    x = torch.arange(count, dtype=torch.int32, device=words.device) * _signed(_WEYL) + words[0]
    x = x ^ ((x >> 16) & 0xFFFF)
    x = (x * _signed(_MIX1)) ^ words[1]
    x = x ^ ((x >> 13) & 0x7FFFF)
    x = x * _signed(_MIX2)
    return (x ^ ((x >> 16) & 0xFFFF)) >> 9


def _hashed_part(start: int, count: int, first: int, second: int) -> np.ndarray:
    """The numbers of `_hashed` from index `start` on, in a buffer that the thread's next call overwrites. NumPy is used because
    this function runs at every step and torch has no unsigned shifts."""
    if not hasattr(_buffers, "of_thread"):
        _buffers.of_thread = np.arange(_PART, dtype=np.uint32) * np.uint32(_WEYL), *np.empty((2, _PART), np.uint32)
    weyl, x, shifted = (buffer[:count] for buffer in _buffers.of_thread)
    np.add(weyl, _unsigned(first + start * _WEYL), out=x)
    np.bitwise_xor(x, np.right_shift(x, 16, out=shifted), out=x)
    np.multiply(x, np.uint32(_MIX1), out=x)
    np.bitwise_xor(x, _unsigned(second), out=x)
    np.bitwise_xor(x, np.right_shift(x, 13, out=shifted), out=x)
    np.multiply(x, np.uint32(_MIX2), out=x)
    np.bitwise_xor(x, np.right_shift(x, 16, out=shifted), out=x)
    signed = x.view(np.int32)
    return np.right_shift(signed, 9, out=signed)


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def _unsigned(number: int) -> np.uint32:
    return np.uint32(number % 2**32)
