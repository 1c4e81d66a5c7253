"""The processes of data-parallel training, regardless of how they were started. Unless torch.distributed is initialised, there is
only one process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def process_count() -> int:
    """The number of processes."""
    return torch.distributed.get_world_size() if _is_distributed() else 1


def rank() -> int:
    """The rank of this process, counted from 0."""
    return torch.distributed.get_rank() if _is_distributed() else 0


def average(tensor: Tensor) -> None:
    """Replace a tensor with its mean over all processes; every process must call this function."""
    torch.distributed.all_reduce(tensor)
    tensor.div_(process_count())
