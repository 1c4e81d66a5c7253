"""The autograd Functions that every rule is made of: two for edge rules, one for cut rules.

Shapes: N batch, O out features or channels, I in features or channels, K kernel positions, C classes; ``...`` any further
dimensions. The first two compute the forward pass of the plain layer. Backward, with g the gradient at the layer's output:

    gradient of the weight = correlation of the true input with g       (as backpropagation)
    gradient of the bias   = g summed over batch and space              (as backpropagation)
    error at the input     = g carried by `feedback`                    (backpropagation has the weight here)

`feedback` has the weight's own layout, so that feedback = weight is backpropagation bit for bit, with no transpose anywhere.
Every wrapper counts here, for a small layer's arithmetic takes microseconds: forward and setup are one method (1.05 against 1.09
of plain backpropagation with ``setup_context``), and backward is not marked ``once_differentiable`` (2 % more). Second
derivatives through these Functions are those of the formulas above.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
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
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, feedback = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        if g.dim() == 2:
            rows, inputs = g, x
        else:
            rows, inputs = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        e_in = rows.mm(feedback) if needs_x else None
        grad_weight = rows.t().mm(inputs) if needs_weight else None
        grad_bias = rows.sum(0) if needs_bias else None
        return e_in if e_in is None or g.dim() == 2 else e_in.view(x.shape), grad_weight, grad_bias, None


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
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, feedback = ctx.saved_tensors
        # Of the weight's argument only the shape enters the weight gradient, so that one call serves all three.
        e_in, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            g, x, feedback, ctx.bias_sizes, *ctx.geometry, list(ctx.needs_input_grad[:3])
        )
        return e_in, grad_weight, grad_bias, None, None


class DeliverFunction(torch.autograd.Function):
    """The identity on the logits z (N, C), whose backward pass also answers with one error for each cut.

    Inputs: `answer`, called with δ = ∂L/∂z and the kept tensors, returns their errors; `keep`, whether it is given the kept
    tensors, which are then saved for it; z; the kept tensors, (N, ...) each.
    """

    @staticmethod
    def forward(ctx: Any, answer: Callable[..., list[Tensor]], keep: bool, logits: Tensor, *kept: Tensor) -> Tensor:
        ctx.answer = answer
        ctx.save_for_backward(*(kept if keep else ()))
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None, delta, *ctx.answer(delta, ctx.saved_tensors)
