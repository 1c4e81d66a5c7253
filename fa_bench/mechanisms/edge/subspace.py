"""Learn the principal subspace of a layer's errors, in groups of output channels.

Shapes: `first` is B (O, M), in which the rows of each of G groups form a separate matrix (O/G, M); `errors` are g (rows, O).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def oja_gradient(first: Tensor, groups: int, rate: float, errors: Tensor) -> Tensor:
    """The gradient (O, M) of B by Oja's subspace rule, -rate (C B - B Bᵀ C B), where C = Σ gᵀ g / ‖g‖ is a sum over the rows."""
    device = first.device.type
    if torch.is_autocast_enabled(device):  # enabled by the caller of the backward pass
        with torch.autocast(device, enabled=False):
            return oja_gradient(first, groups, rate, errors)
    b = first.view(groups, len(first) // groups, -1)
    g = errors.to(first.dtype).unflatten(1, b.shape[:2]).movedim(1, 0)
    scale = rate / g.norm(dim=2, keepdim=True).clamp_min(torch.finfo(first.dtype).tiny)
    c_b = (g * scale).transpose(1, 2) @ (g @ b)
    return (b @ (b.transpose(1, 2) @ c_b) - c_b).flatten(0, 1)


def orthonormalized(first: Tensor, groups: int) -> Tensor:
    """The result of Gram-Schmidt orthonormalisation of the columns of B (O, M) in every group, from the first to the last."""
    b = first.view(groups, len(first) // groups, -1)
    q, r = torch.linalg.qr(b.to(torch.promote_types(b.dtype, torch.float32)))
    return (q * r.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)).flatten(0, 1).to(first.dtype)
