"""Checks of the pathways that a rule creates. The error messages name the layer, what was found and what is required."""

from __future__ import annotations

from typing import Any

from fa_bench.errors import ComponentError, truncate
from fa_bench.mechanisms.feedback_tensors import feedback_tensor


def missing_tensor(pathway: Any, layer: str, name: str) -> ComponentError:
    """The error for a layer that lacks the feedback tensor `name`, which its pathway uses."""
    return ComponentError(
        f"layer '{layer}' has no feedback tensor '{name}', which {type(pathway).__qualname__} uses; create it in the rule's "
        f"method pathway with layer.put('{name}', ...)"
    )


def require_b(pathway: Any, layer: Any) -> None:
    """Require that a layer has a feedback tensor B in the shape of its weight."""
    if (feedback := feedback_tensor(layer, "B")) is None:
        raise missing_tensor(pathway, layer.path, "B")
    require_shape(layer, "its feedback tensor 'B' is", feedback)


def require_shape(layer: Any, what: str, feedback: Any) -> None:
    """Require that the effective feedback of a layer is a tensor in the shape of its weight; `what` introduces the tensor in the
    error message."""
    wanted = layer.weight.shape
    if getattr(feedback, "shape", None) != wanted:
        raise ComponentError(
            f"layer '{layer.path}': {what} {described(feedback)}; it must have the shape of the weight, {tuple(wanted)}"
        )


def described(value: Any) -> str:
    """A short description of a value, on one line."""
    shape = getattr(value, "shape", None)
    return truncate(" ".join(repr(value).split()), 100) if shape is None else f"a tensor of shape {tuple(shape)}"
