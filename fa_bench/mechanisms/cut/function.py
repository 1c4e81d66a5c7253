"""The autograd Functions of cut rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fa_bench.mechanisms.compiled import operator, stand_in
from fa_bench.mechanisms.cut.capture import format_of


class DeliverFunction(torch.autograd.Function):
    """The identity on the logits z. The backward pass returns the error at z, the error at each cut, and the gradients of the
    learned feedback tensors.

    Inputs:
        errors: a function that computes these errors and gradients from δ = ∂L/∂z and the saved cut tensors.
        cuts: the number of cut tensors.
        save_values: whether the values of the cut tensors are saved for `errors`.
        logits: z.
        *tensors: the cut tensors, which are the activations (N, ...) at the cuts, followed by the learned feedback tensors. If
            the rule learns in separate passes, these are only its trained parameters.
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


class CompiledDeliverFunction(torch.autograd.Function):
    """The variant of `DeliverFunction` for compiled graphs. Its backward pass calls the operator `cut_errors`.

    Inputs:
        key: the key of the `fa_bench.mechanisms.compiled.Handle` of the `fa_bench.mechanisms.cut.delivery.Delivery`.
        cuts: the argument `cuts` of `cut_errors`.
        count: the number of cut tensors.
        save_values: whether the values of the cut tensors are needed.
        save_logits: whether the values of the logits are needed.
        changes_delta: whether `cut_errors` also returns the error at the logits; otherwise, this error is δ.
        logits: z.
        *tensors: the cut tensors, followed by the learned feedback tensors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        key: str,
        cuts: str,
        count: int,
        save_values: bool,
        save_logits: bool,
        changes_delta: bool,
        logits: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.key, ctx.cuts, ctx.count, ctx.save_logits, ctx.changes_delta = key, cuts, count, save_logits, changes_delta
        # If the values of a tensor are not needed, a small stand-in of the same shape is saved.
        activations = tensors[:count] if save_values else map(stand_in, tensors[:count])
        # The logits are copied, because `PassOutput` cannot detect in-place changes of the output in a compiled graph.
        ctx.save_for_backward(*([logits.clone()] if save_logits else []), *activations, *map(stand_in, tensors[count:]))
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved, first = list(ctx.saved_tensors), int(ctx.save_logits)
        end = first + ctx.count
        results = cut_errors(delta, saved[:first], saved[first:end], saved[end:], ctx.changes_delta, ctx.cuts, ctx.key)
        others, error = (results[:-1], results[-1]) if ctx.changes_delta else (results, delta)
        return None, None, None, None, None, None, error, *others


@operator(
    "cut_errors(Tensor delta, Tensor[] logits, Tensor[] activations, Tensor[] learned, bool changes_delta, str cuts) -> Tensor[]",
    like=lambda delta, logits, activations, learned, changes_delta, cuts: [
        torch.empty(one.shape, dtype=one.dtype, device=one.device, memory_format=format_of(one))
        for one in (*activations, *learned, *([delta] if changes_delta else []))
    ],
)
def cut_errors(
    delivery: Any,
    delta: Tensor,
    logits: list[Tensor],
    activations: list[Tensor],
    learned: list[Tensor],
    changes_delta: bool,
    cuts: str,
) -> list[Tensor]:
    """The result of `fa_bench.mechanisms.cut.delivery.Delivery.errors_in_graph`, whose tensors share no memory with the arguments
    or with the rule's feedback."""
    return delivery.errors_in_graph(delta, logits, activations, learned, changes_delta, cuts)
