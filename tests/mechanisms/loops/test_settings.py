"""Rules notice optimizers that train learned feedback with unsuitable settings or leave it out, and models that share modules."""

import re
import warnings

import pytest
import torch
from torch import nn

import fa_bench
from fa_bench.errors import CoverageError, StateError
from fa_bench.optim.optimizers import Optimizers
from fa_bench.optim.sgd import SGD

from .scripts import LEARNED, attached, data, net, sgd, steps

RATE = r"should have {scale:g} times the learning rate of the weights.*rule\.parameter_groups\(lr=0\.1\)"


@pytest.mark.parametrize(("name", "scale"), [("dkp", 0.01), ("kp", 0.5), ("kp", 0.0)])
def test_single_lr_warns_if_rule_sets_b_lr_scale(name, scale):
    model, rule = attached(name, b_lr_scale=scale)
    with pytest.warns(UserWarning, match=RATE.format(scale=scale)):
        steps(model, rule, sgd(model.parameters()), 1)
    model, rule = attached(name, b_lr_scale=scale)
    before = [tensor.detach().clone() for tensor in rule.feedback_parameters()]
    steps(model, rule, sgd(rule.parameter_groups(lr=0.1)), 3)
    moved = [not torch.equal(old, new) for old, new in zip(before, rule.feedback_parameters(), strict=True)]
    assert all(moved) if scale else not any(moved)


def test_scheduler_with_single_lr_warns_and_suggests_working_fix():
    def one_step(max_lr):
        model, rule = attached("kp", b_lr_scale=0.5)
        optimizer = sgd(rule.parameter_groups(lr=0.1))
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr(optimizer), total_steps=4)
        steps(model, rule, optimizer, 1)

    mend = "one rate for each group, such as max_lr=[group['lr'] for group in optimizer.param_groups]"
    with pytest.warns(UserWarning, match=re.escape(mend)):
        one_step(lambda optimizer: 0.1)
    one_step(lambda optimizer: eval(mend.partition("max_lr=")[2], {"optimizer": optimizer}))


@pytest.mark.parametrize("name", ["dkp", "kp"])
def test_manual_update_may_omit_feedback_with_zero_lr(name):
    """Feedback with a learning rate of zero would not change anyway. With such feedback, dkp is direct feedback alignment."""
    model, rule = attached(name, b_lr_scale=0.0)
    x, y = data()
    for _ in range(3):
        model.zero_grad()
        logits = model(x)
        rule.backward(nn.functional.cross_entropy(logits, y), logits, y)
        with torch.no_grad():
            for weight in rule.weight_parameters():
                weight -= 0.1 * weight.grad
        rule.step()


@pytest.mark.parametrize("name", ["kp", "pfa", "fa", "dfa", "bp"])
def test_parameter_groups_have_equal_lr_by_default(name):
    model, rule = attached(name)
    groups = rule.parameter_groups(lr=0.2)
    assert {group["lr"] for group in groups} == {0.2}
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in model.parameters()}


def test_weight_decay_only_on_weights_warns_for_kp():
    """Parameters are often grouped by name, with decay only for those named ``weight``, so that feedback_B has no decay."""
    for name, warned in (("kp", True), ("pfa", False)):
        model, rule = attached(name)
        decays = [p for key, p in model.named_parameters() if key.endswith("weight")]
        rest = [p for key, p in model.named_parameters() if not key.endswith("weight")]
        optimizer = torch.optim.SGD([{"params": decays, "weight_decay": 0.01}, {"params": rest}], lr=0.1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            steps(model, rule, optimizer, 2)
        assert any("same weight decay" in str(warning.message) for warning in caught) == warned


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("fused", [False, True])
def test_second_optimizer_without_feedback_raises(name, fused):
    model, rule = attached(name)
    steps(model, rule, torch.optim.SGD(model.parameters(), lr=0.1, fused=fused), 2)
    with pytest.raises(StateError, match="the weights were updated, but the learned feedback"):
        steps(model, rule, torch.optim.SGD(rule.weight_parameters(), lr=0.1, fused=fused), 4)


@pytest.mark.parametrize("order", ["weights first", "feedback first"])
def test_feedback_optimizer_continues_with_new_weight_optimizer(order):
    model, rule = attached("kp")
    feedback = sgd(rule.feedback_parameters())
    for _ in range(2):
        weights = sgd(rule.weight_parameters())

        class Both:
            zero_grad = staticmethod(model.zero_grad)

            @staticmethod
            def step(weights=weights):
                for optimizer in (weights, feedback) if order == "weights first" else (feedback, weights):
                    optimizer.step()

        steps(model, rule, Both, 4)


def test_coverage_reports_tied_weights():
    model = net()
    model[4] = nn.Linear(16, 16).double()
    model[4].weight = model[2].weight
    text = str(fa_bench.attach(model, "kp").coverage)
    assert "'2' shares its weight with 4" in text
    assert "shares its weight" not in str(attached("kp")[1].coverage)
    fixed = net()
    fixed[4] = nn.Linear(16, 16).double()
    fixed[4].weight = fixed[2].weight
    assert "shares its weight" not in str(fa_bench.attach(fixed, "fa").coverage), (
        "a shared weight is noted although the feedback is fixed"
    )
    assert "each micro-batch has its own M" in str(attached("brsf")[1].coverage)


@pytest.mark.parametrize("how", ["tied", "outside"])
def test_runner_updates_feedback_of_shared_weight_by_own_gradient(how):
    """The gradient of a weight that is used twice is the sum over both uses, and the runner's fused step must not pass this sum
    to B."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)
            self.b2 = nn.Linear(16, 16)
            if how == "tied":
                self.b2.weight = self.b.weight

        def forward(self, x):
            h = torch.relu(self.b(torch.relu(self.a(x))))
            return self.c(torch.relu(self.b2(h) if how == "tied" else h @ self.b.weight.t()))

    torch.manual_seed(0)
    model = Twice().double()
    rule = fa_bench.attach(model, "kp", allow_uncovered=True)
    x, y = data()
    optimizers = Optimizers(SGD(lr=0.1, momentum=0.0, weight_decay=0.0), rule, epochs=1)
    optimizers.share_gradients()  # the training loop makes the same call
    logits = model(x)
    rule.backward(nn.functional.cross_entropy(logits, y), logits, y)
    before, own = model.b.feedback_B.detach().clone(), model.b.feedback_B.grad.clone()
    assert not torch.allclose(own, model.b.weight.grad)
    optimizers.step()
    torch.testing.assert_close(model.b.feedback_B.detach(), before - 0.1 * own)


@pytest.mark.parametrize("first", ["fa", "kp", "dfa", "dkp", "bp"])
@pytest.mark.parametrize("second", ["fa", "kp", "dfa", "bp"])
def test_attach_rejects_second_model_with_shared_modules(first, second):
    """The second model is refused before anything changes, so the first model can still be trained."""
    shared = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
    models = [nn.Sequential(shared, nn.Linear(16, 3)).double() for _ in range(2)]
    options = {"cuts": ["0"]} if first in ("dfa", "dkp") else {}
    rule = fa_bench.attach(models[0], first, **options)
    kinds = [type(module) for module in models[0].modules()]
    for other in (models[1], shared):
        with pytest.raises(CoverageError, match=rf"part of another model with the rule '{first}'"):
            fa_bench.attach(other, second, **({"cuts": ["0"]} if second == "dfa" else {}))
    assert [type(module) for module in models[0].modules()] == kinds
    steps(models[0], rule, sgd(rule.parameter_groups(lr=0.1)), 2)
    rule.detach()
    fa_bench.attach(models[1], second, **({"cuts": ["0"]} if second == "dfa" else {}))


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_complex_weights_are_not_covered():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).to(torch.complex64)
    with pytest.raises(CoverageError, match="covers no layer"):
        fa_bench.attach(model, "fa")


def test_empty_batch_with_extra_dimensions():
    model, _ = attached("kp")
    assert model(data(2)[0][:0].reshape(0, 1, 8).expand(0, 7, 8)).shape == (0, 7, 3)


@pytest.mark.parametrize(("factor", "warned"), [(1.0, False), (1 + 1e-9, False), (0.95, True), (1.01, True), (0.0, True)])
def test_lr_deviation_warns_unless_due_to_rounding(factor, warned):
    model, rule = attached("kp")
    optimizer = sgd([{"params": rule.weight_parameters()}, {"params": rule.feedback_parameters(), "lr": 0.1 * factor}])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps(model, rule, optimizer, 1)
    assert any("times the learning rate of the weights" in str(warning.message) for warning in caught) == warned


@pytest.mark.parametrize("name", ["kp", "dkp"])
def test_gradients_below_rounding_do_not_raise(name):
    """In a net that has learned its data, for example, the gradients are so small that adding them would not change any
    weight."""
    for scale, fault in ((1e-13, False), (1.0, True)):
        model, rule = attached(name)
        x, y = data()
        logits = model(x)
        rule.backward(scale * nn.functional.cross_entropy(logits, y), logits, y)
        assert all(tensor.grad.any() for tensor in rule.feedback_parameters())
        with torch.no_grad():
            for weight in rule.weight_parameters():
                weight.mul_(1.01)
        if fault:
            with pytest.raises(StateError, match="but the learned feedback"):
                rule.step()
        else:
            rule.step()


@pytest.mark.parametrize(("of_weights", "of_feedback"), [(0.01, 0.0), (0.0, 0.01), (0.01, 0.02), (0.02, 0.02)])
def test_different_weight_decay_of_feedback_warns(of_weights, of_feedback):
    model, rule = attached("kp")
    groups = [
        {"params": rule.weight_parameters(), "weight_decay": of_weights},
        {"params": rule.feedback_parameters(), "weight_decay": of_feedback},
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps(model, rule, torch.optim.SGD(groups, lr=0.1), 1)
    assert any("same weight decay" in str(warning.message) for warning in caught) == (of_weights != of_feedback)


class SignDescent(torch.optim.Optimizer):
    """An optimizer without a learning rate."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    tensor.sub_(tensor.grad.sign(), alpha=0.01)


@pytest.mark.parametrize("name", LEARNED)
def test_optimizer_without_lr_gives_no_warning(name):
    """Warnings are errors in this test, so an optimizer without learning rates must cause none."""
    model, rule = attached(name)
    steps(model, rule, SignDescent(model.parameters()), 2)
