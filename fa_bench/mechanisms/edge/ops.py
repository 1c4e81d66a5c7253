"""The autograd Functions of edge rules.

Shapes: N batch, O out features or channels, I in features or channels, K kernel positions; ``...`` any further dimensions. The
Functions compute the forward pass of the plain layer. With g the error at the layer's output, their backward pass computes:

    gradient of the weight = correlation of the input with g            (as in backpropagation)
    gradient of the bias   = g summed over batch and space              (as in backpropagation)
    error at the input     = g times `feedback`                         (backpropagation uses the weight here)

Feedback has the weight's layout, so no transpose is needed. With feedback = weight, the result is bitwise identical to
backpropagation. If the layer's pathway requests it, another activation replaces the input in the gradient of the weight, or a
term is added to this gradient. A layer calls its Function with its own tensors, a `BackwardContext` and, as separate arguments,
the learned feedback tensors of ``context.gradients``. Because the feedback tensors are inputs, autograd accumulates their
gradients, and any code that monitors gradients works for them. The arithmetic of a small layer takes microseconds, so wrappers
are costly. Therefore, Functions have few arguments, combine forward and setup in one method, and do not mark the backward pass as
``once_differentiable``. Second derivatives are those of the formulas above.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fa_bench.mechanisms.edge.product import gradient_of_second
from fa_bench.utils.tensors import copied_when_changed

if TYPE_CHECKING:
    from fa_bench.mechanisms.edge.pathways import BackwardContext, FeedbackGradient


def _rows(tensor: Tensor) -> Tensor:
    """The tensor (..., F), flattened to (rows, F)."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


class FeedbackLinearFunction(torch.autograd.Function):
    """y = x Wᵀ + b with the error e_in = g B.

    Shapes: x (N, I), weight and feedback (O, I), bias (O) or None, y and g (N, O).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, context: BackwardContext, *learned: Tensor) -> Tensor:
        ctx.context = context
        feedback = weight if context.from_weight else context.feedback
        ctx.save_for_backward(*((feedback,) if context.activation else (feedback, x)))
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        context: BackwardContext = ctx.context
        feedback, *saved = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _, *needs_learned = ctx.needs_input_grad
        needs_error = needs_x or regresses(context.gradients, needs_learned)
        e_in = g.mm(context.from_weight(feedback) if context.from_weight else feedback) if needs_error else None
        x = _rows(context.activation()) if context.activation else saved[0]
        grad_weight = g.t().mm(x) if needs_weight else None
        if grad_weight is not None and context.local_gradient is not None:
            grad_weight = grad_weight + context.local_gradient(x, None, None)
        if not context.gradients:
            return e_in, grad_weight, g.sum(0) if needs_bias else None, None
        gradients = learned_gradients(
            context.gradients,
            needs_learned,
            grad_weight,
            e_in,
            lambda: g,
            of_activation=lambda activation: g.t().mm(_rows(activation)),
            of_hop=lambda hop: g.mm(hop.to(g.dtype)).t().mm(x),
            of_input=lambda one: one.of_input(x, None, one.rows),
        )
        return e_in if needs_x else None, grad_weight, g.sum(0) if needs_bias else None, None, *gradients


class ProductLinearFunction(torch.autograd.Function):
    """The layer y = x Wᵀ + b with the error e_in = ē R, where ē = g B; the gradient of R is ēᵀ x.

    Two products with the error cost less than computing B R, unless the batch is larger than the layer.

    Shapes: x (N, I), weight (O, I), bias (O) or None, first B (O, M), second R (M, I), y and g (N, O), ē (N, M).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, context: BackwardContext, *learned: Tensor) -> Tensor:
        ctx.save_for_backward(x, context.feedback, context.second_hop)
        ctx.gradients = context.gradients
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, first, second = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _, *needs_second = ctx.needs_input_grad
        between = g.mm(first) if needs_x or any(needs_second) else g
        e_in = between.mm(second) if needs_x else None
        grad_weight = g.t().mm(x) if needs_weight else None
        gradients = [
            (one.of_errors(g) if one.of_errors is not None else between.t().mm(x)) if needed else None
            for one, needed in zip(ctx.gradients, needs_second, strict=True)
        ]
        if not torch.compiler.is_compiling():
            for computed, gradient in zip(ctx.gradients, gradients, strict=True):
                computed.learned.on_gradient(gradient)
        return e_in, grad_weight, g.sum(0) if needs_bias else None, None, *gradients


class Geometry(NamedTuple):
    """The geometry of a convolution; `padding` is symmetric zero padding."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


class FeedbackConvFunction(torch.autograd.Function):
    """A convolution of one to three dimensions, plain or transposed, whose backward pass uses `feedback`.

    Shapes: x (N, I, ...); weight and feedback (O, I/groups, K...), or (I, O/groups, K...) if transposed; bias (O) or None; y and
    g (N, O, ...). The error e_in is the input gradient of the same convolution with `feedback` as its weight.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, context: BackwardContext, geometry: Geometry, *learned: Tensor
    ) -> Tensor:
        feedback = weight if context.from_weight else context.feedback
        ctx.save_for_backward(*((feedback,) if context.activation else (feedback, x)))
        ctx.geometry, ctx.context = geometry, context
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        return torch.ops.aten.convolution(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        context: BackwardContext = ctx.context
        feedback, *saved = ctx.saved_tensors
        needs, needs_learned = ctx.needs_input_grad[:3], ctx.needs_input_grad[5:]
        if context.from_weight and needs[0]:
            feedback = context.from_weight(feedback)
        # The weight gradient uses only the shape of the weight argument, and the error uses only the shape of the input.
        # Therefore, one call can compute both and the bias gradient.
        x = context.activation() if context.activation else saved[0]
        through_product = any(
            needed and one.first_hop is not None for one, needed in zip(context.gradients, needs_learned, strict=True)
        )
        mask = [needs[0] or regresses(context.gradients, needs_learned), needs[1] or through_product, needs[2]]
        grads = torch.ops.aten.convolution_backward(g, x, feedback, ctx.bias_sizes, *ctx.geometry, mask)
        grad_weight = grads[1] if needs[1] else None
        if grad_weight is not None and context.local_gradient is not None:
            grad_weight = grad_weight + context.local_gradient(x, ctx.geometry, None)
        gradients = learned_gradients(
            context.gradients,
            needs_learned,
            grad_weight,
            grads[0],
            lambda: g.movedim(1, -1).flatten(0, -2),
            of_activation=lambda activation: weight_gradient(g, activation, feedback, ctx.geometry),
            of_hop=lambda hop: gradient_of_second(hop, grads[1], ctx.geometry.groups, ctx.geometry.transposed),
            of_input=lambda one: one.of_input(x, ctx.geometry, None),
        )
        return grads[0] if needs[0] else None, grad_weight, grads[2], None, None, *gradients


def regresses(how: tuple[FeedbackGradient, ...], needed: Sequence[bool]) -> bool:
    """Whether any of the required gradients depends on the error at the layer's input."""
    return any(is_needed and one.error_scale is not None for one, is_needed in zip(how, needed, strict=True))


def learned_gradients(
    how: tuple[FeedbackGradient, ...],
    needed: Sequence[bool],
    grad_weight: Tensor | None,
    e_in: Tensor | None,
    errors: Callable[[], Tensor],
    of_activation: Callable[[Tensor], Tensor],
    of_hop: Callable[[Tensor], Tensor],
    of_input: Callable[[Any], Tensor],
) -> list[Tensor | None]:
    """The gradients of learned feedback tensors.

    Args:
        how: how each gradient is computed.
        needed: whether each gradient is needed.
        grad_weight: the weight's gradient; None if the weight is frozen.
        e_in: the error at the layer's input; None if it is not needed.
        errors: returns the errors at the layer's output, (samples and positions, O).
        of_activation: computes the weight gradient with an activation in place of the input.
        of_hop: computes the gradient of the second factor of a product from the first factor.
        of_input: computes a gradient that depends on the layer's input, given the entry of `how`.
    """
    gradients: list[Tensor | None] = []
    for one, is_needed in zip(how, needed, strict=True):
        learned, activation, first_hop, of_errors, *_ = one
        gradient = None
        if is_needed and activation is not None:
            replacement = activation()
            if one.error_scale is not None:
                assert e_in is not None
                replacement = torch.add(replacement.reshape(e_in.shape), e_in, alpha=one.error_scale())
            gradient = of_activation(replacement)
        elif is_needed and first_hop is not None:
            gradient = of_hop(first_hop)
        elif is_needed and of_errors is not None:
            gradient = of_errors(errors())
        elif is_needed and one.of_input is not None:
            gradient = of_input(one)
        elif is_needed and grad_weight is not None:
            gradient = shared(grad_weight)
        gradients.append(gradient)
        if not torch.compiler.is_compiling():  # in a compiled graph, a hook of the tensor does this
            learned.on_gradient(gradient)
    return gradients


def shared(gradient: Tensor) -> Tensor:
    """A gradient that one tensor already uses, in a form that a second tensor can use as well."""
    return gradient.clone() if torch.compiler.is_compiling() else copied_when_changed(gradient)


def weight_gradient(g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The weight gradient of a convolution; only the shape of `weight` matters."""
    return torch.ops.aten.convolution_backward(g, x, weight, None, *geometry, [False, True, False])[1]
