"""A loop that never calls `rule.step()` causes a warning only if the rule needs the call."""

import copy
import warnings

import pytest
import torch

import fa_bench
from fa_bench.mechanisms.cut import sample_errors
from tests.mechanisms.loops.scripts import LEARNED, attached, net, steps

NEEDED = {
    "wm": {},
    "pfa": {"density": 0.5},
    "ldfa": {"rank": 2},
    "dkp": {"density": 0.5},
    "activation_alignment": {"signal": "noise"},
    "grape": {},
}
WARNING = "updated 3 times without rule.step"


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.01)


@pytest.mark.parametrize(
    ("name", "plain_backward"), [*((name, False) for name in NEEDED), ("wm", True), ("pfa", True), ("ldfa", True)]
)
def test_missing_rule_step_warns_once_if_needed(name, plain_backward):
    model, rule = attached(name, **NEEDED[name])
    assert rule.needs_step
    optimizer = sgd(model)
    with warnings.catch_warnings():  # every warning is an error
        steps(model, rule, optimizer, 3, rule_step=False, plain_backward=plain_backward)
    with pytest.warns(UserWarning, match=f"rule '{name}': the weights were {WARNING}") as found:
        steps(model, rule, optimizer, 5, rule_step=False, plain_backward=plain_backward)
    assert len(found) == 1


@pytest.mark.parametrize("name", NEEDED)
def test_loops_with_rule_step_give_no_warning(name):
    model, rule = attached(name, **NEEDED[name])
    optimizer, first = sgd(model), copy.deepcopy(model.state_dict())
    steps(model, rule, optimizer, 6)
    for _ in range(3):  # loading a state is not an update
        model.load_state_dict(first)
        steps(model, rule, optimizer, 1)
    for _ in range(2):  # accumulation: one update for several passes
        steps(model, rule, optimizer, 1, zero_grad=lambda: None)
        steps(model, rule, optimizer, 5, zero_grad=lambda: None, before_step=optimizer.zero_grad)


@pytest.mark.parametrize("name", [name for name in LEARNED if name not in NEEDED] + ["fa", "dfa", "drtp", "f3", "bp", "pepita"])
def test_other_rules_do_not_need_step(name):
    model, rule = attached(name)
    assert not rule.needs_step
    steps(model, rule, sgd(model), 6, rule_step=False)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("wm", {"mirror_steps": 0}),
        ("pfa", {"density": 1.0}),
        ("activation_alignment", {"signal": "input"}),
        ("dkp", {"density": 1.0}),
    ],
)
def test_needs_step_depends_on_options(name, options):
    assert not attached(name, **options)[1].needs_step


def test_f3_needs_step_only_with_multiple_processes(monkeypatch):
    model, rule = attached("f3")
    assert not rule.needs_step
    monkeypatch.setattr(sample_errors, "process_count", lambda: 2)
    with pytest.warns(UserWarning, match=WARNING):
        steps(model, rule, sgd(model), 4, rule_step=False)


def test_copied_model_with_frozen_first_layer_warns():
    model = net()
    model[0].requires_grad_(False)
    fa_bench.attach(model, "wm", seed=0)
    other = copy.deepcopy(model)
    rule = fa_bench.attached_rule(other)
    with pytest.warns(UserWarning, match=WARNING):
        steps(other, rule, torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=0.01), 5, rule_step=False)
    assert fa_bench.attached_rule(model)._step_reminder._weight is model[2].weight
