"""The input of an attached model may require a gradient: it may be the output of a trainable module, or a leaf tensor."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .chain import RULES, Chain, attach, batch

X, Y = batch(12)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in RULES} | {
    "forward_gradient weight": ("forward_gradient", {"form": "weight"})
}
#: Variants that compute all gradients in separate passes, and no error for the input.
IN_PASSES = ["pepita", "forward_forward", "weight_perturbation", "forward_gradient weight", "epc", "pc", "dfc"]
MESSAGE = r"computes no error for the model's input, which requires a gradient.*Attach the rule to a model that also contains"


def attached(variant: str) -> tuple[Chain, Any]:
    name, options = VARIANTS[variant]
    model = Chain()
    return model, attach(model, name, **options)


def learn(model: nn.Module, rule: Any, x: Tensor) -> list[str]:
    """Run one forward and backward pass, and return the messages of its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logits = model(x)
        rule.backward(F.cross_entropy(logits, Y), logits, Y, indices=torch.arange(len(Y)))
    return [str(one.message) for one in caught]


def inputs() -> dict[str, tuple[Tensor, Tensor]]:
    """Two inputs, each with the tensor that would learn: the output of an encoder, and a leaf such as an adversarial input or a
    prompt."""
    torch.manual_seed(0)
    encoder, leaf = nn.Linear(8, 8), X.clone().requires_grad_()
    return {"encoder": (encoder(X), encoder.weight), "leaf": (leaf, leaf)}


@pytest.mark.parametrize("kind", ["encoder", "leaf"])
@pytest.mark.parametrize("variant", IN_PASSES)
def test_rules_without_input_error_warn_once(variant: str, kind: str) -> None:
    model, rule = attached(variant)
    assert learn(model, rule, X) == []
    x, learner = inputs()[kind]
    with pytest.warns(UserWarning, match=rf"rule '{rule.name}' {MESSAGE}"):
        model(x)
    x, learner = inputs()[kind]
    assert learn(model, rule, x) == [] and learner.grad is None
    assert learn(model, rule, x.detach()) == []


@pytest.mark.parametrize("kind", ["encoder", "leaf"])
@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant not in IN_PASSES])
def test_other_rules_propagate_error_to_input(variant: str, kind: str) -> None:
    model, rule = attached(variant)
    x, learner = inputs()[kind]
    assert learn(model, rule, x) == []
    assert learner.grad is not None and learner.grad.any()


@pytest.mark.parametrize("variant", IN_PASSES)
def test_input_error_warning_suggests_working_fixes(variant: str) -> None:
    model, rule = attached(variant)
    x, leaf = inputs()["leaf"]
    with rule.exact():
        assert learn(model, rule, x) == []
    other = X.clone().requires_grad_()
    F.cross_entropy(Chain()(other), Y).backward()
    torch.testing.assert_close(leaf.grad, other.grad)
    assert learn(model, rule, inputs()["encoder"][0].detach()) == []


def test_encoder_inside_attached_model_learns() -> None:
    encoder = nn.Linear(8, 8)
    whole = nn.Sequential(encoder, Chain())
    rule = attach(whole, "weight_perturbation")
    assert learn(whole, rule, X) == [] and encoder.weight.grad is not None and encoder.weight.grad.any()
