"""Tests of kp, whose feedback learns with exactly the gradient of the weights, so that W - B only decays."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fa_bench
from fa_bench.optim.muon import Muon
from fa_bench.optim.optimizers import Optimizers
from fa_bench.optim.sgd import SGD

from . import nets
from .helpers import assert_bitwise, bp_grads, copy_weights_into_feedback, layer_names, rule_grads, weights


def attached(net: str = "conv_bn", **options):
    model = nets.NETS[net]()
    return model, fa_bench.attach(model, "kp", seed=0, **options)


def train(model, rule, optimizer, steps: int, net: str = "conv_bn"):
    """Train on a new batch in each step, and yield the step number afterwards."""
    for step in range(steps):
        optimizer.zero_grad()
        for tensor in rule.feedback_parameters():
            tensor.grad = None
        rule_grads(model, rule, *nets.batch(net, seed=step))
        optimizer.step()
        rule.step()
        yield step


def differences(model, rule):
    return {name: (model.get_submodule(name).weight - rule.feedback[name]["B"]).detach().clone() for name in layer_names(model)}


def test_feedback_gradient_is_copy_of_weight_gradient():
    """The gradients of B and W have the same values but are stored in separate memory.

    An optimizer that changes gradients in place must not change the same memory twice.
    """
    model, rule = attached()
    rule_grads(model, rule, *nets.batch("conv_bn"))
    for name in layer_names(model):
        weight, feedback = model.get_submodule(name).weight, rule.feedback[name]["B"]
        assert torch.equal(weight.grad, feedback.grad) and weight.grad.abs().max() > 0
        assert weight.grad.data_ptr() != feedback.grad.data_ptr()


def test_learned_feedback_is_among_model_parameters():
    model, rule = attached()
    pointers = {tensors["B"].data_ptr() for tensors in rule.feedback.values()}
    assert {tensor.data_ptr() for tensor in rule.feedback_parameters()} == pointers
    assert len(list(rule.feedback_parameters())) == len(layer_names(model)) == 4
    weights = {p.data_ptr() for p in rule.weight_parameters()}
    assert not weights & pointers and weights | pointers == {p.data_ptr() for p in model.parameters()}
    assert all(isinstance(tensor, nn.Parameter) for tensor in rule.feedback_parameters())


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("foreach", [False, True])
def test_weight_feedback_difference_follows_linear_recursion(nesterov, foreach):
    """The difference D = W - B follows v <- m v + lambda D and D <- D - lr v, because the gradients of the task cancel exactly.

    With Nesterov momentum, the second update becomes D <- D - lr (lambda D + m v).
    """
    lr, momentum, decay = 0.1, 0.9, 0.05
    model, rule = attached()
    parameters = model.parameters()
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=decay, nesterov=nesterov, foreach=foreach)
    want = differences(model, rule)
    velocity = {name: torch.zeros_like(tensor) for name, tensor in want.items()}
    start = {name: tensor.norm() for name, tensor in want.items()}
    for _ in train(model, rule, optimizer, 12):
        for name, now in differences(model, rule).items():
            velocity[name] = momentum * velocity[name] + decay * want[name]
            want[name] = want[name] - lr * (decay * want[name] + momentum * velocity[name] if nesterov else velocity[name])
            # The entries of W and B are of order 1, D is of order 0.1, and rounding errors add up over 12 steps.
            assert (now - want[name]).norm() <= 1e-12 * start[name], name
    assert all(tensor.norm() < 0.9 * start[name] for name, tensor in want.items())


@pytest.mark.parametrize("options", [{"nesterov": True}, {"nesterov": True, "foreach": True}, {"nesterov": False}])
def test_equal_start_stays_equal_and_stays_backpropagation(options):
    """If B starts equal to W, both stay equal to the weights under BP for twenty steps."""
    model, rule = attached()
    copy_weights_into_feedback(model, rule)
    plain = nets.convnet(batch_norm=True)
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01} | options
    optimizer = torch.optim.SGD(model.parameters(), **settings)
    plain_optimizer = torch.optim.SGD(plain.parameters(), **settings)
    for step in train(model, rule, optimizer, 20):
        for p, grad in zip(plain.parameters(), bp_grads(plain, *nets.batch("conv_bn", seed=step)).values(), strict=True):
            p.grad = grad
        plain_optimizer.step()
        # bp_grads works on a copy, so the plain model's running statistics differ, but they are unused in training mode.
        assert_bitwise(weights(model), weights(plain))
        assert all(not tensor.any() for tensor in differences(model, rule).values()), f"W and B differ after step {step}"


def test_adamw_preserves_gradient_cancellation():
    """With decoupled decay, D_t is (1 - lr lambda)^t D_0, although Adam rescales each tensor by its own moments."""
    lr, decay, steps = 0.01, 0.5, 10
    model, rule = attached()
    before = differences(model, rule)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)
    list(train(model, rule, optimizer, steps))
    for name, now in differences(model, rule).items():
        # Equal gradients give bitwise identical Adam steps, and only the subtraction from W and from B rounds.
        assert (now - (1 - lr * decay) ** steps * before[name]).norm() <= 1e-12 * before[name].norm()


@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0])
def test_b_lr_scale_scales_only_feedback_step(scale):
    """The caller multiplies the learning rate of B's parameter group by b_lr_scale.

    Scaling the gradient instead would have no effect with Adam.
    """
    model, rule = attached(b_lr_scale=scale)
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in layer_names(model)}
    feedback = {name: rule.feedback[name]["B"].detach().clone() for name in layer_names(model)}
    feedback_group = {"params": list(rule.feedback_parameters()), "lr": 0.1 * rule.feedback_lr_scale}
    groups = [{"params": rule.weight_parameters()}, feedback_group]
    list(train(model, rule, torch.optim.SGD(groups, lr=0.1), 1))
    for name in layer_names(model):
        step = model.get_submodule(name).weight.detach() - weights[name]
        step_b = rule.feedback[name]["B"].detach() - feedback[name]
        # Differences of order 1e-3 between numbers of order 1 have a relative error of 1e-13, and the tolerance leaves a margin.
        assert (step_b - scale * step).abs().max() <= 1e-11 * max(1.0, scale) * step.abs().max()
        assert step.abs().max() > 0
        assert torch.equal(model.get_submodule(name).weight.grad, rule.feedback[name]["B"].grad)


def test_frozen_feedback_does_not_change():
    model, rule = attached()
    before = {name: rule.feedback[name]["B"].detach().clone() for name in layer_names(model)}
    for tensor in rule.feedback_parameters():
        tensor.requires_grad_(False)
    list(train(model, rule, torch.optim.SGD(model.parameters(), lr=0.1), 2))
    assert all(torch.equal(before[name], rule.feedback[name]["B"]) for name in before)


def test_default_feedback_differs_from_weight():
    model, rule = attached()
    for name in layer_names(model):
        assert not torch.equal(model.get_submodule(name).weight, rule.feedback[name]["B"])
    model, rule = attached(b_init="copy_w")
    for name in layer_names(model):
        assert torch.equal(model.get_submodule(name).weight, rule.feedback[name]["B"])


def test_shared_gradients_give_same_updates_as_copied_gradients():
    """The training loop updates B with W's own gradient if the optimizers' fused kernels only read gradients.

    The results are the same as with a copy of the gradient.
    """
    found = []
    for shared in (True, False):
        model = nets.mlp().float()
        x, y = nets.batch("mlp")
        rule = fa_bench.attach(model, "kp", seed=0)
        optimizers = Optimizers(SGD(lr=0.1, weight_decay=0.01, nesterov=True), rule, epochs=1)
        if shared:
            optimizers.share_gradients()
        for _ in range(3):
            optimizers.zero_grad()
            rule.backward(F.cross_entropy(model(x.float()), y))
            assert all((tensor.grad is None) == shared for tensor in rule.feedback_parameters())
            optimizers.step()
        found.append([t.clone() for t in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_removed_feedback_gradient_is_not_refilled():
    """Code that runs between the backward pass and the update may set B's gradient to None to leave B unchanged."""
    model = nets.mlp().float()
    x, y = nets.batch("mlp")
    rule = fa_bench.attach(model, "kp", seed=0)
    optimizers = Optimizers(SGD(lr=0.1), rule, epochs=1)
    optimizers.share_gradients()
    for removed in (False, True):
        before = [tensor.detach().clone() for tensor in rule.feedback_parameters()]
        optimizers.zero_grad()
        rule.backward(F.cross_entropy(model(x.float()), y))
        if removed:
            optimizers.fill_gradients()
            for tensor in rule.feedback_parameters():
                tensor.grad = None
            optimizers.clip(1.0)
        optimizers.step()
        assert all(torch.equal(a, b) == removed for a, b in zip(before, rule.feedback_parameters(), strict=True))


def test_gradients_are_shared_only_with_read_only_optimizers():
    """Muon is not fused, so B gets its own gradient under Muon, even if W's optimizer is fused."""
    for of_feedback, is_shared in ((SGD(lr=0.1), True), (Muon(lr=0.1), False)):
        model, (x, y) = nets.mlp().float(), nets.batch("mlp")
        rule = fa_bench.attach(model, "kp", seed=0)
        Optimizers(SGD(lr=0.1), rule, 1, of_feedback).share_gradients()
        rule.backward(F.cross_entropy(model(x.float()), y))
        assert all((tensor.grad is None) == is_shared for tensor in rule.feedback_parameters())


def test_clipping_scales_shared_gradients_once():
    """After clipping, W and B have separate gradients, and the joint norm of all gradients is the requested one."""
    model, (x, y) = nets.mlp().float(), nets.batch("mlp")
    rule = fa_bench.attach(model, "kp", seed=0)
    optimizers = Optimizers(SGD(lr=0.1), rule, epochs=1)
    optimizers.share_gradients()
    rule.backward(F.cross_entropy(model(x.float()), y))
    optimizers.clip(1e-3)
    norm = torch.stack([tensor.grad.norm() for tensor in optimizers.trained()]).norm().item()
    assert norm == pytest.approx(1e-3, rel=1e-2)
    assert torch.equal(model.fc1.weight.grad, model.fc1.feedback_B.grad)
