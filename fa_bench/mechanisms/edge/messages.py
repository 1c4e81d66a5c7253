"""Deliver activations that a compiled graph computes after a layer has run, but that the layer's weight gradient needs.

Without compilation, a layer's backward pass looks up such an activation. A compiled graph cannot do that, but it can pass
gradients. The function `receive` gives a layer an additional output, its messenger, and `send` makes the activation the gradient
that the messenger receives in the backward pass. Since `send` is applied to the model's outputs, its backward pass runs first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fa_bench.mechanisms.compiled import Handle, operator, stand_in

__all__ = ["Handle", "receive", "second_pass", "send"]


class _ReceiveFunction(torch.autograd.Function):
    """Zeros in the shape of a layer's output y, and the messenger in the shape of its input x.

    The backward pass receives the error at y and the activation, and returns the weight's gradient.
    """

    @staticmethod
    def forward(ctx: Any, layer: Any, weight: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        ctx.layer = layer
        return stand_in(y), stand_in(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor, activation: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        return None, ctx.layer.weight_gradient(activation, g), None, None


class _SendFunction(torch.autograd.Function):
    """The identity on the model's outputs, whose backward pass sends each message to its messenger."""

    @staticmethod
    def forward(ctx: Any, outputs: int, messages: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.messages = messages
        ctx.save_for_backward(*tensors[outputs : outputs + messages])
        return tuple(tensor.detach() for tensor in tensors[:outputs])

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None, *deltas, *[None] * ctx.messages, *ctx.saved_tensors


def receive(layer: Any, weight: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros to be added to the output y of a layer with the input x, and the messenger for the activation that the weight's
    gradient needs."""
    return _ReceiveFunction.apply(layer, weight, x, y)


def send(outputs: list[Tensor], messages: list[Tensor], messengers: list[Tensor]) -> tuple[Tensor, ...]:
    """The outputs, connected so that each messenger receives its message in the backward pass."""
    return _SendFunction.apply(len(outputs), len(messages), *outputs, *messages, *messengers)


@operator(
    "second_pass(Tensor[] given, Tensor[] true, int count, str names) -> Tensor[]",
    like=lambda given, true, count, names: [torch.empty_like(one, memory_format=torch.contiguous_format) for one in true[:count]],
)
def second_pass(rule: Any, given: list[Tensor], true: list[Tensor], count: int, names: str) -> list[Tensor]:
    """See `fa_bench.rules.forward_alignment.ForwardAlignment.second_pass`."""
    return rule.second_pass(given, true, count, names)
