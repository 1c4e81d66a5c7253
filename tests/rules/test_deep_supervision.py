"""Tests of bp_deepsup: agreement with autograd, relations to bp and predsim, and the coverage report."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fa_bench
from fa_bench.metrics.meter import AlignmentMeter

from . import nets
from .helpers import array, assert_bitwise, assert_matches, backward, bp_grads, distance, rule_grads
from .registered import registered, trained_grads

CUTS = {"mlp_bn": ["act1", "act2"], "conv": ["act1", "act2"], "inplace": ["bn1", "bn2"], "residual": ["stem_bn", "b_bn"]}
BUILD = nets.NETS | {"inplace": lambda: nets.convnet(nets.inplace_relu, batch_norm=True), "residual": nets.residual}


def attached(net: str, **options: Any) -> tuple[nn.Module, Any, Tensor, Tensor]:
    model, (x, y) = BUILD[net](), nets.batch(net)
    rule = fa_bench.attach(
        model,
        "bp_deepsup",
        seed=0,
        sample_input=x,
        cuts=CUTS[net],
        **{"decoder_init": "pytorch", "allow_uncovered": True} | options,
    )
    return model, rule, x, y


def summed_loss_grads(plain: nn.Module, rule: Any, x: Tensor, y: Tensor, weight: float) -> dict[str, Tensor]:
    """The gradients of the loss plus the weighted losses of copied classifiers, computed by autograd in a plain model."""
    decoders = {cut: copy.deepcopy(rule.auxiliary_at(cut)) for cut in rule.feedback}
    captured: dict[str, Tensor] = {}
    for cut in decoders:  # a clone, because the next module may change the output in place
        plain.get_submodule(cut).register_forward_hook(lambda _, __, out, cut=cut: captured.update({cut: out}) or out.clone())
    loss = F.cross_entropy(plain(x), y)
    loss = loss + weight * sum(F.cross_entropy(decoder(captured[cut]), y) for cut, decoder in decoders.items())
    named = dict(plain.named_parameters())
    named |= {f"{cut}.{name}": p for cut, decoder in decoders.items() for name, p in decoder.named_parameters()}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize("net", CUTS)
def test_gradients_match_summed_loss(net: str) -> None:
    model, rule, x, y = attached(net, weight=0.3)
    want = summed_loss_grads(BUILD[net](), rule, x, y, 0.3)
    got = rule_grads(model, rule, x, y) | trained_grads(rule)
    assert_matches(got, {name: array(grad) for name, grad in want.items()}, rel=1e-12)
    with rule.exact():
        assert_bitwise(rule_grads(model, rule, x, y), bp_grads(BUILD[net](), x, y))


def test_classifiers_learn_only_after_trainable_layer() -> None:
    """The error of a classifier passes through the frozen layers before it.

    A classifier without trainable layers before it does not learn.
    """
    for frozen, rests in (("fc2", []), ("fc1", ["act1"])):
        model, (x, y) = nets.mlp(), nets.batch("mlp_tanh")
        model.get_submodule(frozen).requires_grad_(False)
        rule = fa_bench.attach(model, "bp_deepsup", sample_input=x, cuts=["act1", "act2"], decoder_init="pytorch")
        rule_grads(model, rule, x, y)
        learned = {cut: [one.tensor.grad is not None for one in rule.learned_at(cut)] for cut in rule.feedback}
        assert learned == {cut: [cut not in rests] * len(learned[cut]) for cut in ("act1", "act2")}


def test_zero_weight_matches_backprop() -> None:
    """With a weight of zero, the classifiers add nothing, so all gradients are bitwise identical to those of backpropagation.

    With the default weight, the gradient of the first layer differs, but that of the output layer does not.
    """
    model, rule, x, y = attached("conv", weight=0.0)
    exact = bp_grads(BUILD["conv"](), x, y)
    assert_bitwise(rule_grads(model, rule, x, y), exact)
    assert all(not grad.any() for grad in trained_grads(rule).values())
    model, rule, x, y = attached("conv")
    got = rule_grads(model, rule, x, y)
    assert distance(got["conv1.weight"], array(exact["conv1.weight"])) > 1e-2
    assert torch.equal(got["fc1.weight"], exact["fc1.weight"])


def test_classifiers_match_predsim() -> None:
    """By default, a classifier starts with zero weights and with the same bias as in predsim.

    In the first step, the gradients of the layers are therefore those of bp.
    """
    _, one, x, y = registered("conv2", "bp_deepsup")
    _, two, _, _ = registered("conv2", "predsim", loss="pred")
    for cut, tensors in one.feedback.items():
        others = two.feedback[cut]
        assert {name.removeprefix("decoder."): tuple(t.shape) for name, t in others.items()} == {
            name: tuple(t.shape) for name, t in tensors.items()
        }
        assert not tensors["out.weight"].any() and torch.equal(tensors["out.bias"], others["decoder.out.bias"])
    exact = bp_grads(two.detach(), x, y)
    assert_bitwise(rule_grads(one.model, one, x, y), exact)
    assert all(grad.any() for grad in trained_grads(one).values())


def test_classifier_size_and_init_options() -> None:
    _, rule, _, _ = registered("conv2", "bp_deepsup", decoder_size=16, decoder_init="xavier_uniform")
    assert rule.feedback["act1"]["out.weight"].shape == (3, 16) and rule.feedback["act1"]["out.weight"].any()


def test_loss_scaling_scales_all_gradients() -> None:
    model, rule, x, y = attached("mlp_bn", weight=0.5)
    model.eval()
    once = rule_grads(model, rule, x, y) | trained_grads(rule)
    model.zero_grad(set_to_none=True)
    logits = model(x)
    backward(rule, F.cross_entropy(logits, y) / 4, logits, y)
    got = {name: p.grad for name, p in model.named_parameters() if "feedback_" not in name} | trained_grads(rule)
    assert_bitwise(got, {name: grad / 4 for name, grad in once.items()})


def test_coverage_reports_weight_transport() -> None:
    model, rule, *_ = attached("mlp_bn")
    assert rule.coverage.transport == ("in all layers",) and not rule.coverage.uncovered
    assert "passes through the weight" in str(rule.coverage) and "Weight transport in all layers." in str(rule.coverage)
    assert [covered.layer for covered in rule.coverage.covered] == ["fc1", "fc2", "fc3"]
    assert torch.equal(rule.effective_feedback("fc2"), model.fc2.weight)
    model.fc1.weight.requires_grad_(False)
    pairs = rule.weight_pairs()
    assert set(pairs) == {"fc2", "fc3"} and all(torch.equal(feedback, weight) for feedback, weight in pairs.values())


def test_alignment_angles_to_backprop() -> None:
    """The angle between feedback and weights is 0.

    The errors differ from those of backpropagation because classifiers add their own errors.
    """
    _, rule, x, y = attached("mlp_bn")
    values = AlignmentMeter(rule, x, y).measure()
    assert set(values["weight_angle"]) == {"fc1", "fc2", "fc3"} and max(values["weight_angle"].values()) < 1e-3
    assert values["delta_angle"]["fc1"] > 1 and values["delta_angle"]["fc2"] > 1


def test_alignment_angles_with_cuts_at_linear_layers() -> None:
    """The angle between errors is compared with one that is computed by autograd.

    All derivatives are exact, so the one-step angles are zero.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 3
    rule = fa_bench.attach(model, "bp_deepsup", cuts=["0", "2"], weight=2.0, decoder_init="pytorch")
    values = AlignmentMeter(rule, x, y).measure()
    assert max(values["delta_angle_one_step"].values()) < 1e-6
    tensors = [x]
    for module in model:
        tensors.append(module.forward(tensors[-1]))  # without hooks
    loss = F.cross_entropy(tensors[-1], y)
    decoder = rule.feedback["2"]
    own = 2 * F.cross_entropy(F.linear(tensors[3], decoder["out.weight"], decoder["out.bias"]), y)
    want, exact = (torch.autograd.grad(total, tensors[2], retain_graph=True)[0] for total in (loss + own, loss))
    degrees = torch.rad2deg(torch.acos(F.cosine_similarity(want, exact))).mean().item()
    assert degrees > 1 and values["delta_angle"]["0"] == pytest.approx(degrees, rel=1e-6)
    assert values["delta_angle"]["2"] < 1e-3, "expected the exact error, because no classifier after cut 2 adds to it"


def test_accepts_weights_used_outside_their_layer() -> None:
    """Under bp_deepsup, as under bp, errors pass through the weights, so a weight may also be used elsewhere."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)
            self.cut_points = ["act"]

        def forward(self, x: Tensor) -> Tensor:
            a = self.act(self.fc1(x))
            return self.fc2(a + (a @ self.fc1.weight) @ self.fc1.weight.t())

    model = Tied()
    rule = fa_bench.attach(model, "bp_deepsup", seed=0)
    assert rule_grads(model, rule, torch.randn(4, 4), torch.tensor([0, 1, 2, 0]))["fc1.weight"].any()
