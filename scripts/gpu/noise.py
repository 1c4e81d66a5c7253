"""Random numbers that do not depend on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def sampled_on_cpu() -> Iterator[None]:
    """A context in which a seed gives the same numbers on every device and in every dtype.

    The generators of two devices give different numbers for the same seed. Here, `Tensor.normal_` and `Tensor.uniform_` with a
    generator, which must have been seeded for this call, sample in float64 on the CPU with its seed, and copy the numbers to the
    tensor. Calls without a generator do not change.
    """
    normal, uniform = Tensor.normal_, Tensor.uniform_
    Tensor.normal_, Tensor.uniform_ = _on_cpu(normal), _on_cpu(uniform)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.normal_, Tensor.uniform_ = normal, uniform  # type: ignore[method-assign]


def _on_cpu(fill: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def sample(tensor: Tensor, *args: float, generator: torch.Generator | None = None) -> Tensor:
        if generator is None:
            return fill(tensor, *args)
        seeded = torch.Generator().manual_seed(generator.initial_seed())
        return tensor.copy_(fill(torch.empty(tensor.shape, dtype=torch.float64), *args, generator=seeded))

    return sample
