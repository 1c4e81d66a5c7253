"""Tests with a frozen part, an input that requires a gradient, and feedback that must stay fixed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.mechanisms.loops.chain import RULES, Chain, assert_same, attach, batch, state, train

X, Y = batch()


@pytest.mark.filterwarnings("ignore:.*computes no error for the model's input")
@pytest.mark.parametrize("frozen", [False, True], ids=["all learns", "first part frozen"])
@pytest.mark.parametrize("name", RULES)
def test_input_requiring_grad_does_not_change_gradients(name: str, frozen: bool) -> None:
    found = []
    for asks in (False, True):
        model = Chain()
        model.a.requires_grad_(not frozen)
        found.append(train(model, attach(model, name), X.clone().requires_grad_(asks), Y))
    assert_same(*found)


@pytest.mark.parametrize("name", RULES)
def test_frozen_feedback_is_unchanged_and_needs_no_optimizer(name: str) -> None:
    model = Chain()
    rule = attach(model, name)
    for feedback in rule.learned_feedback():
        feedback.tensor.requires_grad_(False)
    before = state(model)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        logits = model(X)
        rule.backward(F.cross_entropy(logits, Y), logits, Y, indices=torch.arange(len(Y)))
        optimizer.step()
        rule.step()
    learned = {f"{learned.name}" for learned in rule.learned_feedback()}
    after = state(model)
    assert not torch.equal(after["head.weight"], before["head.weight"])
    if learned:
        assert_same({key: after[key] for key in learned}, {key: before[key] for key in learned})


def test_mixed_freezes_only_k_with_weight() -> None:
    """K is frozen together with the weight, because it shares the weight's gradient; R has its own gradient and still learns."""
    model = Chain()
    model.b.requires_grad_(False)
    rule = attach(model, "mixed")
    assert not rule.feedback["b.fc"]["K"].requires_grad and rule.feedback["b.fc"]["R"].requires_grad
    assert all(rule.feedback[path][name].requires_grad for path in ("a.fc", "c.fc", "head") for name in "RK")
    train(model, rule, X, Y)


@pytest.mark.parametrize("name", ["dkp", "predsim", "dgl"])
def test_cut_feedback_is_frozen_with_layers_since_previous_cut(name: str) -> None:
    model = Chain()
    model.b.requires_grad_(False)
    rule = attach(model, name)
    resting = {place for place, tensors in rule.feedback.items() for tensor in tensors.values() if not tensor.requires_grad}
    assert resting == {"dkp": {"b.act"}, "predsim": {"b.act"}, "dgl": {"b"}}[name]
    train(model, rule, X, Y)
