"""Tensors that share memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def copied_when_changed(tensor: Tensor) -> Tensor:
    """A tensor with the same values for a second owner; the values are copied when either owner first writes to them.

    The function is meant for gradients that two tensors share. Writes to them are rare (SGD with Nesterov momentum, clipping,
    gradient scalers), but must not reach both tensors, as they would with an alias. On the MLP, a copy at every step would take
    2.7 MB and a tenth of the step's time.
    """
    return torch._lazy_clone(tensor)  # pyright: ignore[reportPrivateImportUsage]
