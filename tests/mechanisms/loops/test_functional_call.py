"""``torch.func.functional_call`` runs a forward pass with parameters that the model no longer has in the backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fa_bench.errors import StateError
from fa_bench.mechanisms.feedback_tensors import PREFIX
from fa_bench.registry.registries import ALGORITHMS

from .chain import CUT_RULES, RULES, Chain, assert_same, attach, batch, gradients

X, Y = batch(12)
#: Maps the name of a variant to its rule and options.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in RULES} | {
    "forward_gradient weight": ("forward_gradient", {"form": "weight"}),
    "information_alignment forward": ("information_alignment", {"update_forward": True}),
    "kp dual": ("kp", {"derivative": "dual"}),
}
REPEATING = [variant for variant, (name, _) in VARIANTS.items() if ALGORITHMS[name].repeats]
#: Cut rules that use learned feedback in the backward pass without running the model again.
LEARNED_AT_CUTS = ["dkp", "predsim", "bp_deepsup", "dgl", "asfp_lc"]


def attached(variant: str) -> tuple[Chain, Any]:
    name, options = VARIANTS[variant]
    model = Chain()
    return model, attach(model, name, **options)


def changed(model: Chain, weights_only: bool) -> dict[str, Tensor]:
    return {
        name: (parameter.detach() * 1.5).requires_grad_(parameter.requires_grad)
        for name, parameter in model.named_parameters()
        if not (weights_only and PREFIX in name)
    }


def by_functional_call(variant: str, weights_only: bool) -> dict[str, Tensor]:
    model, rule = attached(variant)
    values = changed(model, weights_only)
    logits = torch.func.functional_call(model, values, (X,))
    try:
        rule.backward(F.cross_entropy(logits, Y), logits, Y, indices=torch.arange(len(Y)))
    finally:
        found = gradients(model) | {name: value.grad for name, value in values.items() if value.grad is not None}
        # If the rule refuses, it does so before any gradient is computed.
        assert "head.weight" in found or not found
    return found


def by_copying(variant: str, weights_only: bool) -> dict[str, Tensor]:
    model, rule = attached(variant)
    values = changed(model, weights_only)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values.get(name, parameter))
    logits = model(X)
    rule.backward(F.cross_entropy(logits, Y), logits, Y, indices=torch.arange(len(Y)))
    return gradients(model)


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("variant", REPEATING)
def test_rules_with_repeated_passes_reject_functional_call(variant: str, weights_only: bool) -> None:
    with pytest.raises(StateError, match=r"'a\.[\w.]+' was a different tensor in the forward pass.*torch\.func\.functional_call"):
        by_functional_call(variant, weights_only)


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant not in REPEATING])
def test_functional_call_matches_copied_weights(variant: str) -> None:
    assert_same(by_functional_call(variant, True), by_copying(variant, True))


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant not in REPEATING])
def test_functional_call_with_feedback_matches_or_is_rejected(variant: str) -> None:
    if VARIANTS[variant][0] in LEARNED_AT_CUTS:
        with pytest.raises(StateError, match=r"feedback_\w+' was a different tensor in the forward pass.*pass only the weights"):
            by_functional_call(variant, False)
    else:
        assert_same(by_functional_call(variant, False), by_copying(variant, False))


@pytest.mark.parametrize("name", ["epc", "np_feedback", "dkp"])
def test_rejects_tensors_replaced_between_passes(name: str) -> None:
    model, rule = attached(name)
    logits = model(X)
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
    with pytest.raises(StateError, match="was a different tensor in the forward pass"):
        rule.backward(F.cross_entropy(logits, Y), logits, Y)
    logits = model(X)
    rule.backward(F.cross_entropy(logits, Y), logits, Y)


def test_set_of_cut_rules_with_learned_feedback() -> None:
    found = {name for name in CUT_RULES if name not in REPEATING and attached(name)[1].learned_feedback()}
    assert found == set(LEARNED_AT_CUTS)
