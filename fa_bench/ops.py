"""The autograd Functions that every rule is made of: those of edge rules, for one hop and for two, and that of cut rules.

Shapes: N batch, O out features or channels, I in features or channels, K kernel positions, C classes; ``...`` any further
dimensions. Those of edge rules compute the forward pass of the plain layer. Backward, with g the gradient at the layer's output:

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


class Learn(NamedTuple):
    """How the gradient of learned feedback is made where it is not simply that of the weight.

    Attributes:
        receive: called with the gradient, in the learned tensor's layout.
        activation: returns what enters the gradient in place of the layer's input, in its shape; None for the input itself.
        hop: (B, R) of a product's two hops, where R learns: ē = g B enters the gradient in place of g, which then has the shape
            of R; see the two Functions that carry an error in two hops.
    """

    receive: Callable[[Tensor], None]
    activation: Callable[[], Tensor] | None = None
    hop: tuple[Tensor, Tensor] | None = None


def _rows(tensor: Tensor) -> Tensor:
    """(..., F) as (rows, F)."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


class FeedbackLinearFunction(torch.autograd.Function):
    """y = x Wᵀ + b with the error e_in = g B.

    Shapes: x (..., I), weight and feedback (O, I), bias (O) or None, y and g (..., O). With `activation`, what it returns enters
    the weight gradient in place of x, which is then not kept; with `learn`, feedback has a gradient of its own.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, feedback: Tensor,
        activation: Callable[[], Tensor] | None = None, learn: Learn | None = None,
    ) -> Tensor:
        ctx.save_for_backward(feedback, *(() if activation else (x,)))
        ctx.activation, ctx.learn, ctx.shape = activation, learn, x.shape
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        feedback, *kept = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        rows = _rows(g)
        e_in = rows.mm(feedback) if needs_x else None
        inputs = _rows(kept[0] if kept else ctx.activation())
        grad_weight = rows.t().mm(inputs) if needs_weight else None
        grad_bias = rows.sum(0) if needs_bias else None
        if ctx.learn is not None:
            other = inputs if ctx.learn.activation is None else _rows(ctx.learn.activation())
            error = rows if ctx.learn.hop is None else rows.mm(ctx.learn.hop[0].to(rows.dtype))
            ctx.learn.receive(error.t().mm(other))
        return e_in if e_in is None or g.dim() == 2 else e_in.view(ctx.shape), grad_weight, grad_bias, None, None, None


class ProductLinearFunction(torch.autograd.Function):
    """y = x Wᵀ + b with the error carried in two hops, ē = g B and e_in = ē R; gradient of R = ēᵀ x.

    Shapes: x (..., I), weight (O, I), bias (O) or None, first B (O, M), second R (M, I), y and g (..., O), ē (..., M).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, first: Tensor, second: Tensor, learn: Learn | None
    ) -> Tensor:
        ctx.save_for_backward(x, first, second)
        ctx.learn = learn
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, first, second = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        rows, inputs = _rows(g), _rows(x)
        between = rows.mm(first) if needs_x or ctx.learn is not None else None
        e_in = between.mm(second).view(x.shape) if needs_x and between is not None else None
        grad_weight = rows.t().mm(inputs) if needs_weight else None
        grad_bias = rows.sum(0) if needs_bias else None
        if ctx.learn is not None and between is not None:
            ctx.learn.receive(between.t().mm(inputs))
        return e_in, grad_weight, grad_bias, None, None, None


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
    None; y and g (N, O, ...). e_in is the input gradient of the same convolution with `feedback` for the weight. `activation`
    and `learn` as for the linear one.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, feedback: Tensor, geometry: Geometry,
        activation: Callable[[], Tensor] | None = None, learn: Learn | None = None,
    ) -> Tensor:
        ctx.save_for_backward(feedback, *(() if activation else (x,)))
        ctx.geometry, ctx.activation, ctx.learn = geometry, activation, learn
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        return torch.ops.aten.convolution(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        feedback, *kept = ctx.saved_tensors
        # Of the weight's argument only the shape enters the weight gradient, and of the input's only the shape enters the error,
        # so that one call serves all three.
        inputs = kept[0] if kept else ctx.activation()
        needs = list(ctx.needs_input_grad[:3])
        grads = torch.ops.aten.convolution_backward(g, inputs, feedback, ctx.bias_sizes, *ctx.geometry, needs)
        if ctx.learn is not None:
            other = inputs if ctx.learn.activation is None else ctx.learn.activation()
            error, learned = g, feedback
            if ctx.learn.hop is not None:
                first, learned = (tensor.to(g.dtype) for tensor in ctx.learn.hop)
                error = _first_hop(g, first, ctx.geometry.groups)
            ctx.learn.receive(weight_gradient(error, other, learned, ctx.geometry))
        return *grads, None, None, None, None


class ProductConvFunction(torch.autograd.Function):
    """A convolution with the error carried in two hops: ē = a 1x1 convolution of g by `first`, e_in = that of ē by `second`.

    Shapes: x (N, I, ...); weight (O, I/groups, K...); first B (O, M/groups); second R (M, I/groups, K...), the layout of a weight
    with M outputs; y and g (N, O, ...); ē (N, M, ...). Transposed: weight (I, O/groups, K...) and R (I, M/groups, K...). Within
    each group B's rows belong to that group's own part of R. Gradient of R = that of such a weight, from x and ē.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, first: Tensor, second: Tensor, geometry: Geometry,
        learn: Learn | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, first, second)
        ctx.geometry, ctx.learn = geometry, learn
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        return torch.ops.aten.convolution(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, first, second = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        geometry: Geometry = ctx.geometry
        _, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            g, x, weight, ctx.bias_sizes, *geometry, [False, needs_weight, needs_bias]
        )
        e_in = None
        if needs_x or ctx.learn is not None:
            between = _first_hop(g, first, geometry.groups)
            e_in, grad_second, _ = torch.ops.aten.convolution_backward(
                between, x, second, None, *geometry, [needs_x, ctx.learn is not None, False]
            )
            if ctx.learn is not None:
                ctx.learn.receive(grad_second)
        return e_in, grad_weight, grad_bias, None, None, None, None


def weight_gradient(g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The weight gradient of a convolution, in the shape of `weight`, whose values do not matter."""
    return torch.ops.aten.convolution_backward(g, x, weight, None, *geometry, [False, True, False])[1]


def _first_hop(g: Tensor, first: Tensor, groups: int) -> Tensor:
    """ē (N, M, ...) from g (N, O, ...) and B (O, M/groups): at every pixel, and within every group, ē = g B."""
    outputs, between = first.shape
    mixing = first.view(groups, outputs // groups, between).transpose(1, 2).reshape(groups * between, outputs // groups)
    ones = [1] * (g.dim() - 2)
    zeros = [0] * len(ones)
    return torch.ops.aten.convolution(g, mixing.view(*mixing.shape, *ones), None, ones, zeros, ones, False, zeros, groups)


class DeliverFunction(torch.autograd.Function):
    """The identity on the logits z (N, C), whose backward pass answers with an error for them and one for each cut.

    Inputs: `answer`, called with δ = ∂L/∂z and the kept tensors, returns the errors at z and at them; `keep`, whether it is
    given the kept tensors, which are then saved for it; z; the kept tensors, (N, ...) each.
    """

    @staticmethod
    def forward(ctx: Any, answer: Callable[..., list[Tensor]], keep: bool, logits: Tensor, *kept: Tensor) -> Tensor:
        ctx.answer = answer
        ctx.save_for_backward(*(kept if keep else ()))
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None, *ctx.answer(delta, ctx.saved_tensors)
