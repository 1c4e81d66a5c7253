"""Tests of rules with model outputs that are changed in place before the loss: the logits of a class are masked, or the logits
are divided by a temperature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor

from fa_bench.errors import StateError
from fa_bench.registry.registries import ALGORITHMS
from tests.versions import needs_compiler

from .chain import RULES, Chain, assert_same, attach, batch, draw_the_same_for_every_sample, gradients

X, Y = batch(12)
LABELS = Y.clamp(max=1)  # the masked class does not occur
INDICES = torch.arange(len(Y))
#: Rules that evaluate the objective on the model's output themselves, and would therefore ignore a change between output and
#: loss.
OF_OBJECTIVE = [name for name, rule in ALGORITHMS.items() if getattr(rule, "learns_by_objective", False)] + ["np_feedback"]
#: Rules that measure the scale of every loss unless it is given.
ALWAYS_MEASURED = ["f3"]


def masked(logits: Tensor) -> None:
    logits[:, 2] = -1e9


def halved(logits: Tensor) -> None:
    logits /= 2


Change = Callable[[Tensor], None]


def learn(
    name: str, change: Change, in_place: bool, factor: float = 1.0, scale: float | None = None, options: Any = None
) -> dict[str, Tensor]:
    model = Chain()
    rule = attach(model, name, **(options or {}))
    logits = model(X)
    loss_of = logits if in_place else logits.clone()
    change(loss_of)
    loss = F.cross_entropy(loss_of, LABELS)
    rule.backward(loss if factor == 1 else loss * factor, logits, LABELS, scale, INDICES)
    return gradients(model)


@pytest.fixture(autouse=True)
def noise(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_the_same_for_every_sample(monkeypatch)


def test_set_of_rules_learning_from_objective() -> None:
    assert {"node_perturbation", "weight_perturbation", "pepita", "epc", "pc", "np_feedback"} == set(OF_OBJECTIVE)


@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize("change", [masked, halved])
@pytest.mark.parametrize("name", OF_OBJECTIVE)
def test_objective_rules_reject_output_changed_in_place(name: str, change: Change, scale: float | None) -> None:
    with pytest.raises(StateError, match=rf"rule '{name}' learns from the model's output as the forward pass returned it"):
        learn(name, change, True, scale=scale)


@pytest.mark.parametrize("name", [name for name in OF_OBJECTIVE if name != "np_feedback"])
def test_objective_rules_reject_output_changed_in_later_pass(name: str) -> None:
    model = Chain()
    rule = attach(model, name)
    for _ in range(4):
        logits = model(X)
        rule.backward(F.cross_entropy(logits, Y), logits, Y, 1.0)
    logits = model(X)
    halved(logits)
    before = gradients(model)
    with pytest.raises(StateError, match="make the change within the model or in an objective of your own"):
        rule.backward(F.cross_entropy(logits, Y), logits, Y, 1.0)
    assert_same(gradients(model), before)


@pytest.mark.parametrize("change", [masked, halved])
@pytest.mark.parametrize("name", [name for name in RULES if name not in (*OF_OBJECTIVE, *ALWAYS_MEASURED)])
def test_in_place_change_matches_change_of_copy(name: str, change: Change) -> None:
    assert_same(learn(name, change, True), learn(name, change, False))


@pytest.mark.parametrize("name", ["drtp", "local_error", "predsim", "fdfa", "ldrl", "dfc", "forward_forward"])
def test_changed_output_requires_loss_scale(name: str) -> None:
    """The scale cannot be inferred from changed logits, because half the error would look like half the scale."""
    with pytest.raises(StateError, match=r"cannot infer it: the model's output was changed in place.*Pass the scale"):
        learn(name, halved, True, factor=0.25)
    assert_same(learn(name, halved, True, 0.25, scale=0.25), learn(name, halved, False, 0.25, scale=0.25))


@pytest.mark.parametrize("name", ["fdfa", "dfc"])
def test_plain_backward_rejects_changed_output(name: str) -> None:
    model = Chain()
    attach(model, name)
    logits = model(X)
    halved(logits)
    with pytest.raises(StateError, match="the model's output was changed in place"):
        F.cross_entropy(logits, Y).backward()


def test_f3_accepts_changed_output_only_for_error() -> None:
    with pytest.raises(StateError, match="cannot infer it: the model's output was changed in place"):
        learn("f3", halved, True)
    assert_same(learn("f3", halved, True, scale=1.0), learn("f3", halved, False, scale=1.0))
    options = {"information": "delayed_error", "first_epoch": "current"}
    learn("f3", halved, False, scale=1.0, options=options)
    with pytest.raises(StateError, match="rule 'f3' learns from the model's output as the forward pass returned it"):
        learn("f3", halved, True, scale=1.0, options=options)


@needs_compiler
@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:The .grad attribute")
def test_compiled_model_in_place_change_matches_change_of_copy() -> None:
    """A compiled model behaves in the same way whether the logits are changed in place or in a copy."""
    torch._dynamo.reset()
    found = []
    for in_place in (False, True):
        model = Chain()
        rule = attach(model, "drtp")
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        logits = compiled(X)
        changed = logits if in_place else logits.clone()
        halved(changed)
        with pytest.raises(ValueError, match="is not a multiple of that of the mean cross-entropy"):
            rule.backward(F.cross_entropy(changed, Y) / 4, logits, Y)
        model.zero_grad()
        logits = compiled(X)
        changed = logits if in_place else logits.clone()
        halved(changed)
        rule.backward(F.cross_entropy(changed, Y) / 4, logits, Y, 0.25)
        found.append(gradients(model))
    assert_same(*found)
