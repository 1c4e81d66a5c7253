"""The tensors of a rule whose distributions are worth a look, by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fa_bench.mechanisms.rule import Rule
from fa_bench.mechanisms.weighted_layers import weighted_layers


def named_tensors(rule: Rule) -> dict[str, Tensor]:
    """{name: tensor} of an attached rule, live; between a backward pass and the update its gradients are there, too.

    Names are ``weight/<layer>``, ``feedback/<layer or cut>/<tensor>`` and ``gradient/<layer>``, the gradient of the weight.
    """
    held: dict[str, Any] = {path: layer.weight for path, layer in weighted_layers(rule.model).items()}
    weights = {f"weight/{path}": weight for path, weight in held.items()}
    feedback = {f"feedback/{path}/{name}": tensor for path, tensors in rule.feedback.items() for name, tensor in tensors.items()}
    gradients = {f"gradient/{path}": weight.grad for path, weight in held.items() if weight.grad is not None}
    return {**weights, **feedback, **gradients}
