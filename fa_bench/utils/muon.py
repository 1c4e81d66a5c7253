"""The Muon optimizer for torch. Its options are defined in `fa_bench.optim.muon`, so that torch is not imported to read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

#: Coefficients (a, b, c) of the Newton-Schulz iteration.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
#: adjust_lr -> the factor of the learning rate, computed from the numbers of rows and columns of a matrix.
ADJUSTMENTS: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}


def orthogonalized(matrix: Tensor, steps: int) -> Tensor:
    """The matrix with its singular values moved close to 1 by Newton-Schulz iterations; a zero matrix stays zero.

    Args:
        matrix: (rows, columns), in single or double precision.
        steps: number of iterations. After five, singular values that were above 1/100 of the matrix's norm are between 0.68 and
            1.14; smaller ones are between 0 and 1.21.
    """
    a, b, c = COEFFICIENTS
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()  # so that x @ x.t() is as small as possible
    x = _rescaled(wide)
    x = x / x.norm().clamp_min(torch.finfo(matrix.dtype).tiny)
    for _ in range(steps):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide is matrix else x.t()


def _rescaled(matrix: Tensor) -> Tensor:
    """The matrix times a power of two, so that the squares of its entries neither underflow nor overflow. The factor is 1 unless
    the norm is extreme, as it is when the gradients vanish because a loss is almost 0."""
    lowest = math.frexp(torch.finfo(matrix.dtype).tiny)[1]  # the exponent of the smallest normal number
    norm, bound, factor = matrix.norm(), 2.0 ** (lowest // 2 + 3), 2.0 ** (-lowest * 4 // 5)
    up = torch.where(norm < bound, factor, torch.ones_like(norm))
    return matrix * torch.where(norm > 1 / bound, 1 / factor, up)


class Muon(torch.optim.Optimizer):
    """Momentum with an orthogonalised update direction and decoupled weight decay, as described in `fa_bench.optim.muon`.

    Args:
        params: tensors with two or more dimensions, or groups of them; all dimensions after the first are flattened into one.
        lr, momentum, weight_decay: non-negative numbers.
        nesterov: Nesterov momentum.
        steps: Newton-Schulz iterations.
        adjust_lr: one of `ADJUSTMENTS`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float,
        nesterov: bool,
        steps: int,
        adjust_lr: str,
        weight_decay: float,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "nesterov": nesterov,
                "steps": steps,
                "adjust_lr": adjust_lr,
                "weight_decay": weight_decay,
            },
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every tensor that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    self._update(tensor, tensor.grad, group)
        return loss

    def _update(self, tensor: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, momentum = self.state[tensor], group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(tensor)
        buffer = state["momentum_buffer"].mul_(momentum).add_(gradient)
        direction = gradient.add(buffer, alpha=momentum) if group["nesterov"] else buffer
        matrix = direction.flatten(1)
        if matrix.dtype in (torch.float16, torch.bfloat16):
            matrix = matrix.float()
        update = orthogonalized(matrix, group["steps"]).reshape(tensor.shape).to(tensor.dtype)
        rate = group["lr"] * ADJUSTMENTS[group["adjust_lr"]](*matrix.shape)
        tensor.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)
