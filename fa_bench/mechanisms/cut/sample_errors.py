"""The last error of every training sample.

Shapes: N batch, n training samples, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fa_bench.errors import StateError
from fa_bench.mechanisms.processes import process_count
from fa_bench.utils.memory_limits import require_memory
from fa_bench.utils.text import format_bytes


class SampleErrors:
    """The last error of every training sample, and a mask of the samples that have one.

    Data-parallel processes have different samples, which change from epoch to epoch, so `exchange` gives all processes the same
    errors.

    Args:
        count: n, the number of training samples.
        classes: C.
        like: a tensor with the model's device and dtype. The errors get this device and dtype, but at least 32 bits. If the model
            is moved or converted later, the errors follow.

    Attributes:
        errors: (n, C).
        seen: which samples have an error, bool (n,).
    """

    def __init__(self, count: int, classes: int, like: Tensor) -> None:
        dtype = torch.promote_types(like.dtype, torch.float32)
        if like.device.type == "cpu":
            require_memory(count * classes * dtype.itemsize, f"the errors of {count} training samples")
        self.errors = torch.zeros(count, classes, dtype=dtype, device=like.device)
        self.seen = torch.zeros(count, dtype=torch.bool, device=like.device)
        self._new: list[tuple[Tensor, Tensor]] = []

    @property
    def is_shared(self) -> bool:
        """Whether other processes need the errors of this one."""
        return process_count() > 1

    def describe(self) -> str:
        """How much memory the errors take, in words."""
        size = sum(one.numel() * one.element_size() for one in (self.errors, self.seen))
        return f"storing the most recent error of each of {len(self.errors):,} training samples takes {format_bytes(size)}"

    def read(self, indices: Tensor, first: Tensor) -> Tensor:
        """The errors (N, C) of the samples `indices` (N,), with the device and dtype of `first`. The row of `first` (N, C) is
        used for a sample that has no error yet."""
        if self.errors.device != first.device or self.errors.dtype != first.dtype:  # the model was moved, or converted
            self.errors, self.seen = self.errors.to(first), self.seen.to(first.device)
        indices = indices.to(first.device, torch.int64)
        return torch.where(self.seen[indices].unsqueeze(1), self.errors[indices], first)

    def write(self, indices: Tensor, errors: Tensor, is_shared: bool = True) -> None:
        """Replace the errors of the samples `indices` (N,) with `errors` (N, C). If `is_shared` is true, `exchange` later sends
        these errors to the other processes.

        If a sample's error is not finite, its previous one is kept, because a gradient scaler skips such an update.
        """
        indices, errors = indices.to(self.errors.device, torch.int64), errors.to(self.errors.dtype)
        finite = errors.isfinite().all(1)
        # Selecting only some rows would force a synchronisation with the GPU.
        self.errors.index_copy_(0, indices, torch.where(finite.unsqueeze(1), errors, self.errors[indices]))
        self.seen.index_copy_(0, indices, finite | self.seen[indices])
        if is_shared and self.is_shared:
            self._new.append((indices[finite].cpu(), errors[finite].cpu()))

    def exchange(self) -> None:
        """Send every process the errors that the others have written since the last exchange. All processes must call this
        method.

        If several processes have an error for the same sample, all processes use the one from the process with the highest rank.
        """
        if not self.is_shared:
            self._new.clear()
            return
        everywhere: list[Any] = [None] * process_count()
        torch.distributed.all_gather_object(everywhere, self._new)
        self._new = []
        device = self.errors.device
        for indices, errors in (one for of_process in everywhere for one in of_process):
            self.errors.index_copy_(0, indices.to(device), errors.to(device))
            self.seen[indices.to(device)] = True

    def state(self) -> dict[str, Tensor]:
        """A copy of the errors, for checkpoints."""
        return {"errors": self.errors.clone(), "seen": self.seen.clone()}

    def load_state(self, rule: str, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned.

        Raises:
            StateError: if the shapes differ; the message names the rule.
        """
        if state["errors"].shape != self.errors.shape or state["seen"].shape != self.seen.shape:
            raise StateError(
                f"not a state of rule '{rule}' in this model: errors of shape {tuple(state['errors'].shape)}; this rule "
                f"stores errors of shape {tuple(self.errors.shape)}"
            )
        self.errors.copy_(state["errors"])
        self.seen.copy_(state["seen"])
