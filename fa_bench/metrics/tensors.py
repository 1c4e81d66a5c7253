"""The tensors of a rule whose distributions loggers record, by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fa_bench.mechanisms.rule import Rule
from fa_bench.mechanisms.weighted_layers import weighted_layers


def named_tensors(rule: Rule) -> dict[str, Tensor]:
    """The tensors of an attached rule by name, without copying them. A gradient is included only if it has been computed and has
    not been reset.

    The names are ``weight/<layer>``, ``feedback/<layer or cut>/<tensor>`` and, for the gradient of a weight,
    ``gradient/<layer>``.
    """
    weights: dict[str, Any] = {path: layer.weight for path, layer in weighted_layers(rule.model).items()}
    return {
        **{f"weight/{path}": weight for path, weight in weights.items()},
        **{f"feedback/{path}/{name}": tensor for path, tensors in rule.feedback.items() for name, tensor in tensors.items()},
        **{f"gradient/{path}": weight.grad for path, weight in weights.items() if weight.grad is not None},
    }
