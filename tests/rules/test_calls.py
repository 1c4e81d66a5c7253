"""Tests that calls which bypass a rule, or which the rule does not support, raise an error and do not affect later training."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fa_bench
from fa_bench.errors import CoverageError
from fa_bench.rules.fa import FA

from . import nets
from .helpers import assert_bitwise, rule_grads

CUT_RULES = ("dfa", "dkp", "drtp", "local_error", "predsim", "bp_deepsup", "dgl")


def attached(name: str):
    model, (x, y) = nets.mlp(), nets.batch("mlp")
    cuts = {"cuts": ["act1", "act2"]} if name in (*CUT_RULES, "ddtp_linear") else {}
    return model, fa_bench.attach(model, name, seed=0, sample_input=x, **cuts), x, y


@pytest.mark.parametrize("name", [*CUT_RULES, "forward_alignment"])
def test_rejects_calling_submodule_directly(name):
    """The call is allowed if the rule has no effect on it: without gradients, and within `rule.exact()`."""
    model, rule, x, y = attached(name)
    want = rule_grads(model, rule, x, y)
    with pytest.raises(CoverageError, match=r"'(act1|fc1)' ran outside a forward pass of the attached model; call the model"):
        model[:3](x)
    with torch.no_grad():
        model[:3](x)
    with rule.exact():
        model[:3](x)
    assert_bitwise(rule_grads(model, rule, x, y), want)


@pytest.mark.parametrize("name", CUT_RULES)
@pytest.mark.parametrize("loss", ["of other numbers", "of an exact pass"])
def test_rejects_loss_not_from_training_forward(name, loss):
    """Without this check, a rule would silently deliver no error."""
    model, rule, x, y = attached(name)
    if loss == "of an exact pass":
        with rule.exact():
            logits = model(x)
    else:
        logits = torch.zeros(len(y), 3, dtype=x.dtype, requires_grad=True)
    with pytest.raises(ValueError, match=rf"rule '{name}': the loss was not computed by a training forward pass"):
        rule.backward(F.cross_entropy(logits, y), logits, y)
    assert rule_grads(model, rule, x, y)["fc1.weight"].any()


@pytest.mark.parametrize("name", [name for name in CUT_RULES if name != "dgl"])  # with a single cut, dgl raises another error
def test_rejects_cut_that_runs_twice_or_never(name):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2, self.fc3 = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            self.act, self.idle = nn.ReLU(), nn.ReLU()

        def forward(self, x):
            return self.fc3(self.act(self.fc2(self.act(self.fc1(x)))))

    for cut, times in (("act", 2), ("idle", 0)):
        with pytest.raises(CoverageError, match=rf"cut '{cut}' runs {times} times in a forward pass"):
            fa_bench.attach(Twice(), name, sample_input=torch.zeros(2, 4), cuts=[cut])


@pytest.mark.parametrize("name", ["fa", "dfa"])
def test_rule_object_rejects_second_model_until_detached(name):
    model, rule, x, y = attached(name)
    want, other = rule_grads(model, rule, x, y), nets.mlp()
    with pytest.raises(CoverageError, match=rf"this '{name}' rule object is already attached to a model"):
        fa_bench.attach(other, rule, sample_input=x)
    assert fa_bench.attached_rule(other) is None and rule.model is model
    assert_bitwise(rule_grads(model, rule, x, y), want)
    rule.detach()
    assert fa_bench.attach(other, rule, seed=0, sample_input=x).model is other, (
        "the detached rule was not attached to the other model"
    )
    assert_bitwise(rule_grads(other, rule, x, y), want)


@pytest.mark.parametrize("name", CUT_RULES)
def test_rejects_two_cuts_with_same_output(name):
    """A block and its last module have the same output, and a single pattern may match both."""
    model = nn.Sequential(
        nn.Sequential(nn.Linear(4, 5), nn.ReLU()),
        nn.Sequential(nn.Linear(5, 4), nn.ReLU()),
        nn.Linear(4, 4),
        nn.ReLU(),
        nn.Linear(4, 3),
    )
    with pytest.raises(CoverageError, match=r"cut '0\.1' has the same output as cut '0'; name only one of them"):
        fa_bench.attach(model, name, cuts=["0", "0.*", "1", "3"])
    fa_bench.attach(model, name, cuts=["0", "1", "3"])


@pytest.mark.parametrize("name", [*CUT_RULES, "ddtp_linear"])
def test_logits_may_be_changed_in_place(name):
    """Changing the logits in place, for example by a temperature, gives the same gradients as changing them out of place."""
    found = []
    for change in (lambda logits: logits.mul_(0.5), lambda logits: logits * 0.5):
        model, rule, x, y = attached(name)
        logits = change(model(x))
        rule.backward(F.cross_entropy(logits, y), logits, y, loss_scale=0.5)
        found.append({key: parameter.grad for key, parameter in model.named_parameters()})
    assert_bitwise(*found)


def test_rejects_duplicate_rule_name_and_options_for_rule_object():
    model = nets.mlp()
    for call in (lambda: fa_bench.attach(model, "fa", name="kp"), lambda: fa_bench.attach(model, FA(), density=0.5)):
        with pytest.raises(fa_bench.errors.OptionError, match=r"pass the rule once|already has its options; pass them to FA"):
            call()
    assert fa_bench.attached_rule(model) is None


def test_rejects_copy_of_layer_with_feedback():
    """The copy retains the class and the feedback tensors that attaching the rule gave to the original layer."""
    model = nets.mlp()
    rule = fa_bench.attach(model, "fa", seed=0)
    other = nn.Sequential(copy.deepcopy(model.fc1), nn.Linear(5, 3))
    with pytest.raises(CoverageError, match=r"'0' is a copy of a layer that has feedback; call detach\(\) before copying"):
        fa_bench.attach(other, "fa")
    rule.detach()
    fa_bench.attach(nn.Sequential(copy.deepcopy(model.fc1).float(), nn.Linear(5, 3)), "fa")


@pytest.mark.parametrize("name", CUT_RULES)
def test_rejects_cut_before_first_layer(name):
    """An error delivered before the first layer would not train anything."""
    model = nn.Sequential(nn.Tanh(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    with pytest.raises(CoverageError, match="cut '0' has no layer with weights before it"):
        fa_bench.attach(model, name, sample_input=torch.zeros(2, 4), cuts=["0", "2", "4"])


def test_default_seed_is_zero():
    found = [fa_bench.attach(nets.mlp(), "fa", **options).feedback["fc2"]["B"] for options in ({}, {"seed": 0}, {"seed": -1})]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("given", [None, 3, FA, nn.Linear])
def test_rejects_rule_that_is_neither_name_nor_object(given):
    with pytest.raises(fa_bench.errors.OptionError, match="neither the name of a rule nor a rule object") as caught:
        fa_bench.attach(nets.mlp(), given)
    assert ("did you mean FA()?" in str(caught.value)) == (given is FA)
