"""The autograd Function of cut rules. N batch, C classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class DeliverFunction(torch.autograd.Function):
    """The identity on the logits z (N, C). Its backward pass returns the error at z, the error at each cut, and the gradients of
    the learned feedback tensors.

    Inputs: `errors`, a function of δ = ∂L/∂z and the saved cut tensors that returns all of these; `cuts`, the number of cut
    tensors; `save_values`, whether their values are saved for `errors`; z; the cut tensors, (N, ...) each; the learned feedback
    tensors.
    """

    @staticmethod
    def forward(
        ctx: Any, errors: Callable[..., list[Tensor | None]], cuts: int, save_values: bool, logits: Tensor, *tensors: Tensor
    ) -> Tensor:
        ctx.errors = errors
        ctx.save_for_backward(*(tensors[:cuts] if save_values else ()))
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None, None, *ctx.errors(delta, ctx.saved_tensors)
