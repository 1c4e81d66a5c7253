"""Tensors that share memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def copied_when_changed(tensor: Tensor) -> Tensor:
    """The same values for a second owner, copied when either owner first writes to them.

    For gradients that two tensors share: writes are rare (SGD with Nesterov momentum, clipping, gradient scalers), but must not
    reach both, as they would with an alias. A copy at every step would take 2.7 MB and a tenth of a step on the MLP.
    """
    return torch._lazy_clone(tensor)  # pyright: ignore[reportPrivateImportUsage]
