"""Random numbers that do not depend on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class OnCPU(torch.Generator):
    """A generator of the CPU, whatever the device it is created for."""

    def __new__(cls, device: Any = "cpu") -> OnCPU:
        return super().__new__(cls)


@contextmanager
def sampled_on_cpu() -> Iterator[None]:
    """A context in which seeded generators give the same numbers on every device and in every dtype.

    The generators of two devices give different numbers for the same seed. Here, every new generator is one of the CPU, and
    `Tensor.normal_` and `Tensor.uniform_` sample from it in float64 and copy the numbers to the tensor. Calls without a generator
    do not change.
    """
    generator, normal, uniform = torch.Generator, Tensor.normal_, Tensor.uniform_
    torch.Generator = OnCPU  # type: ignore[misc]
    Tensor.normal_, Tensor.uniform_ = _on_cpu(normal), _on_cpu(uniform)  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Generator = generator  # type: ignore[misc]
        Tensor.normal_, Tensor.uniform_ = normal, uniform  # type: ignore[method-assign]


def _on_cpu(fill: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def sample(tensor: Tensor, *args: float, generator: torch.Generator | None = None) -> Tensor:
        if generator is None:
            return fill(tensor, *args)
        numbers: Any = torch.empty(tensor.shape, dtype=torch.float64)
        return tensor.copy_(fill(numbers, *args, generator=generator))

    return sample
