"""The two autograd Functions that every edge rule is made of.

Shapes: N batch, O out features or channels, I in features or channels, K kernel positions; ``...`` any further
dimensions. Both compute the forward pass of the plain layer. Backward, with g the gradient at the layer's output:

    gradient of the weight = correlation of the true input with g       (as backpropagation)
    gradient of the bias   = g summed over batch and space              (as backpropagation)
    error at the input     = g carried by `feedback`                    (backpropagation has the weight here)

`feedback` has the weight's own layout, so that feedback = weight is backpropagation bit for bit, with no transpose anywhere.
The combined forward and setup style of Function costs less than ``setup_context`` (1.05 against 1.09 of plain backpropagation).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class FeedbackLinearFunction(torch.autograd.Function):
    """y = x Wᵀ + b with the error e_in = g B.

    Shapes: x (..., I), weight and feedback (O, I), bias (O) or None, y and g (..., O).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, feedback: Tensor) -> Tensor:
        ctx.save_for_backward(x, feedback)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, feedback = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        rows = g.reshape(-1, g.shape[-1])
        e_in = rows.mm(feedback).view(x.shape) if needs_x else None
        grad_weight = rows.t().mm(x.reshape(-1, x.shape[-1])) if needs_weight else None
        grad_bias = rows.sum(0) if needs_bias else None
        return e_in, grad_weight, grad_bias, None


class Geometry(NamedTuple):
    """How a convolution walks over its input; `padding` is symmetric and filled with zeros."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


class FeedbackConvFunction(torch.autograd.Function):
    """A convolution of one to three dimensions, plain or transposed, whose error is carried by `feedback`.

    Shapes: x (N, I, ...); weight and feedback (O, I/groups, K...), or (I, O/groups, K...) where transposed; bias (O) or
    None; y and g (N, O, ...). e_in is the input gradient of the same convolution with `feedback` for the weight.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, feedback: Tensor, geometry: Geometry
    ) -> Tensor:
        ctx.save_for_backward(x, feedback)
        ctx.geometry = geometry
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        return torch.ops.aten.convolution(x, weight, bias, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, feedback = ctx.saved_tensors
        # Of the weight's argument only the shape enters the weight gradient, so that one call serves all three.
        e_in, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            g, x, feedback, ctx.bias_sizes, *ctx.geometry, list(ctx.needs_input_grad[:3])
        )
        return e_in, grad_weight, grad_bias, None, None
