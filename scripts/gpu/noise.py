"""Random numbers that do not depend on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def sampled_on_cpu() -> Iterator[None]:
    """A context in which a seed produces the same numbers on every device and, except for rounding, in every dtype.

    Without it, generators on two devices produce different numbers for the same seed. In this context, `Tensor.normal_` and
    `Tensor.uniform_` sample in float64 on the CPU with the seed of the given generator, copy the numbers to the tensor, and
    increment the seed. Calls without a generator are not affected.
    """
    normal, uniform = Tensor.normal_, Tensor.uniform_
    Tensor.normal_, Tensor.uniform_ = _on_cpu(normal), _on_cpu(uniform)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.normal_, Tensor.uniform_ = normal, uniform  # type: ignore[method-assign]


def _on_cpu(fill: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def sample(tensor: Tensor, *args: float, generator: torch.Generator | None = None, **named: float) -> Tensor:
        if generator is None:
            return fill(tensor, *args, **named)
        seed = generator.initial_seed()
        generator.manual_seed((seed + 1) % 2**64)  # so that the next call samples other numbers
        seeded = torch.Generator().manual_seed(seed)
        return tensor.copy_(fill(torch.empty(tensor.shape, dtype=torch.float64), *args, **named, generator=seeded))

    return sample
