"""Tests of FA: the gradients that B affects, the initial values of B, and residual networks."""

import math

import pytest
import torch
from torch import nn

import fa_bench

from . import nets
from .helpers import (
    REL,
    array,
    assert_bitwise,
    assert_matches,
    bp_grads,
    collect,
    distance,
    fa_surrogate,
    layer_names,
    rule_grads,
)


def attached(**options):
    model = nets.mlp()
    return model, fa_bench.attach(model, "fa", seed=0, **options)


def test_feedback_affects_only_earlier_layers():
    """B_1 does not affect the gradients of the layers, B_2 affects only those of fc1, and B_3 affects those of fc1 and fc2."""
    x, y = nets.batch("mlp")
    for layer, touched in {"fc1": set(), "fc2": {"fc1"}, "fc3": {"fc1", "fc2"}}.items():
        model, rule = attached()
        before = rule_grads(model, rule, x, y)
        with torch.no_grad():
            rule.feedback[layer]["B"].add_(1.0)
        after = rule_grads(model, rule, x, y)
        assert {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])} == touched


def test_network_input_gradient_uses_first_layer_feedback():
    model, rule = attached()
    x, y = nets.batch("mlp")
    x.requires_grad_()
    grads = rule_grads(model, rule, x, y)
    # fc1's bias gradient is the sum of its error g over the batch, so the summed input error equals this gradient times B_1.
    assert distance(array(x.grad.sum(0)), array(grads["fc1.bias"] @ rule.feedback["fc1"]["B"])) < REL


def test_effective_feedback_is_b_with_weight_shape():
    for net in ("mlp_tanh", "conv"):
        model = nets.NETS[net]()
        rule = fa_bench.attach(model, "fa", seed=0)
        assert set(rule.feedback) == set(layer_names(model)), "expected feedback in every weighted layer, including the first"
        for name in layer_names(model):
            assert torch.equal(rule.effective_feedback(name), rule.feedback[name]["B"])
            assert rule.feedback[name]["B"].shape == model.get_submodule(name).weight.shape


def test_feedback_is_not_learned():
    model, rule = attached()
    rule_grads(model, rule, *nets.batch("mlp"))
    assert list(rule.feedback_parameters()) == []
    assert all(tensors["B"].grad is None for tensors in rule.feedback.values())


def test_default_init_is_xavier_uniform_and_independent():
    """The largest entry of a 200x100 matrix is within 3 % of the bound and does not exceed it.

    The standard deviation of 20 000 entries has a standard error of 0.3 %, and the tolerance is 3 %.
    """
    torch.manual_seed(0)  # the same seed as the rule's: B must not equal W
    model = nn.Sequential(nn.Linear(100, 200), nn.Linear(200, 100), nn.Linear(100, 200), nn.Conv2d(20, 30, (3, 5)))
    for layer in model:
        nn.init.xavier_uniform_(layer.weight)
    rule = fa_bench.attach(model, "fa", seed=0)
    tensors = [rule.feedback[str(i)]["B"] for i in range(4)]
    for tensor, fans in zip(tensors, (300, 300, 300, 50 * 15), strict=True):
        bound = math.sqrt(6 / fans)
        assert 0.97 * bound < tensor.abs().max().item() <= bound
        assert tensor.std().item() == pytest.approx(math.sqrt(2 / fans), rel=0.03)
    pairs = [(tensors[0], model[0].weight), (tensors[2], model[2].weight), (tensors[0], tensors[2]), (tensors[0], tensors[1].T)]
    for one, other in pairs:
        cosine = torch.cosine_similarity(one.flatten(), other.detach().flatten(), dim=0)
        assert abs(cosine.item()) < 0.05  # 7 standard errors of 1/sqrt(20 000)


def test_copy_w_starts_as_backpropagation_then_stays():
    model, rule = attached(b_init="copy_w")
    plain, (x, y) = nets.mlp(), nets.batch("mlp")
    assert_bitwise(rule_grads(model, rule, x, y), bp_grads(plain, x, y))
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    rule.step()
    for name in layer_names(plain):
        assert torch.equal(rule.feedback[name]["B"], plain.get_submodule(name).weight), "B is no longer the initial W"
        assert not torch.equal(rule.feedback[name]["B"], model.get_submodule(name).weight)
    moved = {name: rule.feedback[name]["B"].clone() for name in layer_names(plain)}
    now = nets.mlp()
    now.load_state_dict({name: p.detach() for name, p in model.named_parameters()})
    assert_matches(rule_grads(model, rule, x, y), fa_surrogate(now, moved, x, y))


def test_density_is_fraction_of_nonzero_entries():
    model = nn.Sequential(nn.Linear(100, 200))
    for density in (0.1, 0.5, 0.9):
        rule = fa_bench.attach(model, "fa", seed=0, density=density)
        kept = (rule.effective_feedback("0") != 0).float().mean().item()
        assert kept == pytest.approx(density, abs=0.02)  # 20 000 draws: 5 standard errors of at most 0.0036
        largest = rule.effective_feedback("0").abs().max().item()
        assert 0.97 * math.sqrt(6 / 300) < largest <= math.sqrt(6 / 300), "the mask rescales the remaining entries"
        rule.detach()
    rule = fa_bench.attach(model, "fa", seed=0)
    assert (rule.effective_feedback("0") != 0).all()


def test_residual_network_with_projection_equals_surrogate():
    """Errors pass through identity shortcuts unchanged and through the projection with its own feedback.

    BatchNorm is differentiated exactly.
    """
    plain, model, (x, y) = nets.residual(), nets.residual(), nets.batch("residual")
    rule = fa_bench.attach(model, "fa", seed=0, sample_input=x)
    feedback = {name: rule.feedback[name]["B"] for name in layer_names(plain)}
    assert_matches(rule_grads(model, rule, x, y), fa_surrogate(plain, feedback, x, y))
    for name in layer_names(plain):
        if name != "head":
            exact = bp_grads(plain, x, y)[f"{name}.weight"]
            assert distance(model.get_submodule(name).weight.grad, exact) > 1e-2


def test_layer_used_twice_and_frozen_layer():
    """The gradient of a layer that is called twice is the sum over both calls.

    A layer that the user froze gets no gradient, but still propagates the error through B.
    """

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(7, 7), nn.Linear(7, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))

    torch.manual_seed(0)
    plain, (x, y) = Twice().double(), nets.batch("mlp")
    model = Twice().double()
    model.load_state_dict(plain.state_dict())
    rule = fa_bench.attach(model, "fa", seed=0)
    feedback = {name: rule.feedback[name]["B"] for name in ("inner", "head")}
    assert_matches(rule_grads(model, rule, x, y), fa_surrogate(plain, feedback, x, y))

    model, plain = nets.mlp(), nets.mlp()
    for net in (model, plain):
        net.fc2.requires_grad_(False)
    rule = fa_bench.attach(model, "fa", seed=0)
    got = rule_grads(model, rule, *nets.batch("mlp"))
    assert got["fc2.weight"] is None and got["fc2.bias"] is None
    want = fa_surrogate(plain, {layer: tensors["B"] for layer, tensors in rule.feedback.items()}, x, y)
    assert_matches(got, {key: grad for key, grad in want.items() if grad is not None})


def test_feedback_follows_model_dtype():
    """Feedback is part of the model, so .double() after attach converts it, and `rule.feedback` has the converted tensors."""
    model = nets.mlp(dtype=torch.float32)
    rule = fa_bench.attach(model, "fa", seed=0)
    model.double()
    assert all(tensors["B"].dtype == torch.float64 for tensors in rule.feedback.values())
    plain, (x, y) = nets.mlp(dtype=torch.float32).double(), nets.batch("mlp")
    rule.feedback["fc2"]["B"].data.mul_(2.0)
    assert_matches(rule_grads(model, rule, x, y), fa_surrogate(plain, {k: v["B"] for k, v in rule.feedback.items()}, x, y))
    assert collect(model)["fc1.weight"].dtype == torch.float64


def test_linear_b_init_applies_only_to_linear_layers():
    """With more than 1,000 uniform entries, the largest is almost certainly within 3 % of the bound."""
    model = nn.Sequential(nn.Conv2d(4, 40, 3), nn.Flatten(), nn.Linear(40, 50))
    rule = fa_bench.attach(model, "fa", seed=0, b_init="pytorch", linear_b_init="uniform_one")
    largest = {path: tensors["B"].abs().max().item() for path, tensors in rule.feedback.items()}
    assert largest == {"0": pytest.approx(1 / 6, rel=0.03), "2": pytest.approx(1, rel=0.03)}
    assert largest["0"] <= 1 / 6 and largest["2"] <= 1
