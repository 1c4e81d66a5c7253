"""Tests of dkp: the gradient of B, relations to other rules, B's optimizer, decay and mask, and the resulting alignment."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fa_bench
from fa_bench.metrics.angles import mean_sample_angle
from fa_bench.metrics.meter import measurement_mode
from fa_bench.optim.adam import AdamW
from fa_bench.optim.optimizers import Optimizers
from fa_bench.optim.sgd import SGD
from fa_bench.schedules.step import Step

from . import nets
from .helpers import array, arrays, assert_bitwise, assert_matches, backward, collect, distance, rule_grads, weights

CUTS = {"mlp_tanh": ["act1", "act2"], "conv": ["act1", "act2"]}


def attached(net: str = "mlp_tanh", name: str = "dkp", **options):
    model, (x, y) = nets.NETS[net](), nets.batch(net)
    return model, fa_bench.attach(model, name, seed=0, sample_input=x, cuts=CUTS[net], **options), x, y


def train(model, rule, optimizers, steps: int = 5, net: str = "mlp_tanh", batch=None):
    for step in range(steps):
        x, y = nets.batch(net, seed=step) if batch is None else batch(step)
        optimizers.zero_grad()
        logits = model(x)
        backward(rule, F.cross_entropy(logits, y), logits, y)
        optimizers.step()
        rule.step()


@pytest.mark.parametrize("net", CUTS)
def test_last_cut_feedback_gradient_matches_output_weight_gradient(net):
    model, rule, x, y = attached(net)
    grads, last = rule_grads(model, rule, x, y), "fc3" if net == "mlp_tanh" else "fc1"
    got = rule.feedback["act2"]["B"].grad
    assert got.shape == grads[f"{last}.weight"].shape
    assert distance(got, array(grads[f"{last}.weight"])) < 1e-14  # sums of the same products
    assert rule.feedback["act1"]["B"].grad.abs().max() > 0


def test_zero_b_lr_scale_matches_dfa():
    """After five steps with momentum and decay, the weights are bitwise identical to those of dfa with the same B.

    The B of dkp has not changed.
    """
    (one, dkp, x, y), (two, dfa, _, _) = attached(b_lr_scale=0.0), attached(name="dfa", b_init="kaiming_uniform")
    assert_bitwise(rule_grads(one, dkp, x, y), rule_grads(two, dfa, x, y))
    before = {cut: tensors["B"].clone() for cut, tensors in dkp.feedback.items()}
    for model, rule in ((one, dkp), (two, dfa)):
        train(model, rule, Optimizers(SGD(lr=0.1, momentum=0.9, weight_decay=0.01), rule, 1))
    assert_bitwise(weights(one), weights(two))
    assert all(torch.equal(tensors["B"], before[cut]) for cut, tensors in dkp.feedback.items())
    other, learning, _, _ = attached(b_lr_scale=1.0)
    train(other, learning, Optimizers(SGD(lr=0.1, momentum=0.9, weight_decay=0.01), learning, 1))
    assert not torch.equal(learning.feedback["act1"]["B"], before["act1"])
    assert not torch.equal(other.fc1.weight, two.fc1.weight), (
        "not even a learned B changes the updates of W, so this test proves nothing"
    )


def test_one_hidden_layer_with_equal_lr_matches_kp():
    """B and W start with different values but get equal gradients and the same decay.

    After five steps, dkp and kp have the same weights and the same B.
    """
    models, rules = [nets.one_hidden() for _ in range(2)], []
    x, _ = nets.batch("one")
    rules.append(fa_bench.attach(models[0], "dkp", seed=0, sample_input=x, cuts=["act1"], b_lr_scale=1.0))
    rules.append(fa_bench.attach(models[1], "kp", seed=0))
    with torch.no_grad():
        rules[1].feedback["fc2"]["B"].copy_(rules[0].feedback["act1"]["B"])
    for model, rule in zip(models, rules, strict=True):
        train(model, rule, Optimizers(SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.05), rule, 1), net="one")
    assert_matches(arrays(models[0]), arrays(models[1]), rel=1e-12)
    assert distance(array(rules[0].feedback["act1"]["B"]), array(rules[1].feedback["fc2"]["B"])) < 1e-12


def test_b_lr_scale_defaults_to_one_hundredth():
    for options, scale in (({}, 0.01), ({"b_lr_scale": 0.3}, 0.3)):
        rule = attached(**options)[1]
        groups = Optimizers(SGD(lr=0.2), rule, 1).optimizers[0].param_groups
        assert [group["lr"] for group in groups] == pytest.approx([0.2, 0.2 * scale])
        assert [id(p) for p in groups[1]["params"]] == [id(rule.feedback[cut]["B"]) for cut in ("act1", "act2")]


@pytest.mark.parametrize("own", [False, True])
def test_weight_decay_applies_to_feedback(own):
    """A step of plain SGD changes B to B - lr (gradient + decay B).

    The decay is that of B's own optimizer or, without such an optimizer, that of W.
    """
    model, rule, x, y = attached()
    feedback = SGD(lr=0.2, momentum=0.0, weight_decay=0.5) if own else None
    optimizers = Optimizers(SGD(lr=0.1, momentum=0.0, weight_decay=0.3), rule, 1, feedback)
    optimizers.begin_epoch(0)
    before = {cut: tensors["B"].clone() for cut, tensors in rule.feedback.items()}
    rule_grads(model, rule, x, y)
    optimizers.step()
    lr, decay = (0.2, 0.5) if own else (0.001, 0.3)
    for cut, b in before.items():
        tensor = rule.feedback[cut]["B"]
        torch.testing.assert_close(tensor, b - lr * (tensor.grad + decay * b), rtol=1e-12, atol=1e-15)


def test_feedback_optimizer_and_schedule():
    """The learning rate of B is multiplied by 0.85 after each epoch, while that of W is constant.

    The decoupled decay of AdamW uses the learning rate of B.
    """
    model, rule, x, y = attached()
    own = AdamW(lr=0.1, weight_decay=0.5, schedule=Step(step_size=1, gamma=0.85))
    optimizers = Optimizers(SGD(lr=0.1), rule, 3, own)
    rates = []
    for epoch in range(3):
        optimizers.begin_epoch(epoch)
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers.optimizers])
        rule_grads(model, rule, x, y)
        for tensors in rule.feedback.values():
            tensors["B"].grad.zero_()
        before = rule.feedback["act1"]["B"].clone()
        optimizers.step()
        torch.testing.assert_close(rule.feedback["act1"]["B"], before * (1 - rates[-1][1] * 0.5), rtol=1e-12, atol=1e-15)
    assert [rate for pair in rates for rate in pair] == pytest.approx([0.1, 0.1, 0.1, 0.085, 0.1, 0.07225])


def test_zero_init_first_trains_only_output_layer():
    model, rule, x, y = attached(b_init="zeros")
    grads = rule_grads(model, rule, x, y)
    assert all(not tensors["B"].any() and tensors["B"].grad.any() for tensors in rule.feedback.values())
    assert not grads["fc1.weight"].any() and not grads["fc2.weight"].any() and grads["fc3.weight"].any()
    Optimizers(SGD(lr=0.1), rule, 1).step()
    assert rule_grads(model, rule, x, y)["fc1.weight"].any()


def test_default_b_init_is_kaiming_uniform_over_cut_features():
    """B has the shape (10, F) and is sampled from U(±√(6/F)).

    The largest of the 40 000 entries is within 1 % of the bound, and their standard deviation is within 2 % of the expected
    value.
    """
    model = nn.Sequential(nn.Conv2d(1, 40, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4000, 10))
    rule = fa_bench.attach(model, "dkp", seed=0, cuts=["1"], sample_input=torch.zeros(2, 1, 12, 12))
    b, bound = rule.feedback["1"]["B"], math.sqrt(6 / 4000)
    assert b.shape == (10, 4000) and 0.99 * bound < b.abs().max() <= bound
    assert b.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_mask_holds_and_gradients_add_up():
    model, rule, x, y = attached("conv", density=0.4, b_lr_scale=1.0)
    kept = {cut: tensors["B"] != 0 for cut, tensors in rule.feedback.items()}
    assert 0.2 < torch.cat([mask.flatten() for mask in kept.values()]).double().mean() < 0.6
    train(model, rule, Optimizers(SGD(lr=0.1, momentum=0.9), rule, 1), steps=3, net="conv")
    for cut, tensors in rule.feedback.items():
        assert torch.equal(tensors["B"] != 0, kept[cut])
        tensors["B"].grad = None
    rule_grads(model, rule, x, y)
    once = rule.feedback["act1"]["B"].grad.clone()
    logits = model(x)
    backward(rule, F.cross_entropy(logits, y), logits, y)
    torch.testing.assert_close(rule.feedback["act1"]["B"].grad, 2 * once, rtol=1e-14, atol=0)


def test_measuring_gives_feedback_no_gradient():
    model, rule, x, y = attached()
    with measurement_mode(rule):
        logits = model(x)
        rule.deliver(F.cross_entropy(logits, y), logits, y)
    assert all(tensors["B"].grad is None for tensors in rule.feedback.values())


def test_gradients_do_not_depend_on_later_weights():
    """If delta_out is fixed, changing a later W does not change earlier gradients, including those of B."""
    model, rule, x, _ = attached()
    fixed = torch.randn(4, nets.CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def gradients():
        model.zero_grad(set_to_none=True)
        for tensors in rule.feedback.values():
            tensors["B"].grad = None
        logits = model(x)
        backward(rule, (logits * fixed).sum(), logits)
        return {f"B.{cut}": tensors["B"].grad.clone() for cut, tensors in rule.feedback.items()} | collect(model)

    before = gradients()
    with torch.no_grad():
        model.fc3.weight.mul_(-3.0).add_(0.5)
    assert_bitwise(gradients(), before)
    with torch.no_grad():
        model.fc2.weight.mul_(-3.0).add_(0.5)
    after = gradients()
    assert torch.equal(after["fc1.weight"], before["fc1.weight"]) and torch.equal(after["B.act1"], before["B.act1"])
    assert not torch.equal(after["B.act2"], before["B.act2"])


def alignment(name: str, steps: int = 300, **options) -> list[float]:
    """The mean angle between a Bᵀ and the logits at each cut, after training on three clusters."""
    torch.manual_seed(0)
    hidden = [nn.Linear(20, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 30), nn.BatchNorm1d(30), nn.ReLU()]
    model = nn.Sequential(*hidden, nn.Linear(30, 3))
    y = torch.arange(240) % 3
    x = torch.randn(3, 20)[y] + 0.5 * torch.randn(240, 20)
    rule = fa_bench.attach(model, name, seed=0, cuts=["2", "5"], b_init="kaiming_uniform", **options)
    train(model, rule, Optimizers(SGD(lr=0.05, momentum=0.9, weight_decay=1e-3), rule, 1), steps, batch=lambda step: (x, y))
    with torch.no_grad():
        first = model[:3](x)
        activations = {"2": first, "5": model[3:6](first)}
        return [mean_sample_angle(a @ rule.feedback[cut]["B"].t(), model(x)) for cut, a in activations.items()]


def test_readouts_align_with_logits():
    """At the last hidden layer, the angle between a Bᵀ and the logits falls from near 90 degrees to about 6 degrees.

    With dfa, the activations also turn towards the fixed B, but only to about 21 degrees.
    """
    before, learned, fixed = alignment("dkp", steps=0), alignment("dkp", b_lr_scale=1.0), alignment("dfa")
    assert min(before) > 70
    assert max(learned) < 15 and learned[1] < 10
    assert fixed[1] > learned[1] + 10 and fixed[0] > learned[0]
