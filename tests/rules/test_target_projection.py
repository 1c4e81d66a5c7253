"""Tests of drtp: errors computed only from the labels, their scale, the distribution of B, and the variant that projects the sign
of the output error."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fa_bench

from . import nets
from .helpers import array, backward, distance, rule_grads


def attached(name: str = "drtp", net: str = "mlp_tanh", **options):
    model, (x, y) = nets.NETS[net](), nets.batch(net)
    return model, fa_bench.attach(model, name, seed=0, sample_input=x, cuts=["act1", "act2"], **options), x, y


def error_at(model, rule, cut: str, x, y, scale: float = 1.0) -> torch.Tensor:
    """The error that reaches the module at a cut in one backward pass."""
    seen = []
    handle = model.get_submodule(cut).register_forward_hook(
        lambda module, args, output: output.register_hook(lambda g: seen.append(g.clone())) and None, prepend=True
    )
    logits = model(x)
    handle.remove()
    backward(rule, scale * F.cross_entropy(logits, y), logits, y)
    assert len(seen) == 1
    return seen[0]


@pytest.mark.parametrize("net", ["mlp_tanh", "conv"])
def test_error_is_label_row_divided_by_batch_size(net):
    """The error is bitwise equal to B[label] / N and scales with the loss. The logits must have no effect, even if they are
    confidently right or wrong."""
    model, rule, x, y = attached(net=net)
    last = model.fc3 if net == "mlp_tanh" else model.fc1
    for cut in ("act1", "act2"):
        b = rule.feedback[cut]["B"]
        want = torch.stack([b[label] / 4 for label in y])
        assert torch.equal(error_at(model, rule, cut, x, y).flatten(1), want)
        with torch.no_grad():
            last.weight.mul_(3.0)
            last.bias.copy_(torch.tensor([40.0, -40.0, 0.0]))
        assert torch.equal(error_at(model, rule, cut, x, y, scale=1024.0).flatten(1), 1024 * want)
        other = (y + 1) % nets.CLASSES
        assert not torch.equal(error_at(model, rule, cut, x, other).flatten(1), want)


def test_error_does_not_vanish_for_learned_samples():
    norms = {}
    for name in ("drtp", "dfa"):
        model, rule, x, y = attached(name)
        x, y = x[:1], torch.tensor([2])
        with torch.no_grad():
            model.fc3.bias.copy_(torch.tensor([0.0, 0.0, 60.0]))
        norms[name] = rule_grads(model, rule, x, y)["fc1.weight"].norm().item()
    assert norms["dfa"] < 1e-12 < 1e-2 < norms["drtp"]


def test_scale_equal_to_batch_size_sums_over_batch():
    """With scale=N, the gradients of hidden layers are sums over the batch instead of means."""
    (one, plain, x, y), (two, scaled, _, _) = attached(), attached(scale=4.0)
    by_mean, by_sum = rule_grads(one, plain, x, y), rule_grads(two, scaled, x, y)
    for name in by_mean:
        assert distance(by_sum[name], array((1 if name.startswith("fc3") else 4) * by_mean[name])) < 1e-15


def test_error_sign_is_minus_one_for_label_and_plus_one_elsewhere():
    model, rule, x, y = attached(error_sign=True)
    signs = 1 - 2 * F.one_hot(y, nets.CLASSES).double()
    want = signs @ rule.feedback["act1"]["B"] / 4
    assert distance(error_at(model, rule, "act1", x, y), array(want)) < 1e-15
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()  # with error_sign, no labels are needed
    assert model.fc1.weight.grad.any()


@pytest.mark.parametrize("how", ["rule.backward", "loss.backward", "soft labels", "labels of another batch"])
def test_missing_or_invalid_labels_raise_error(how):
    model, rule, x, y = attached()
    logits = model(x)
    loss = F.cross_entropy(logits, y)
    with pytest.raises(ValueError, match=r"drtp.*rule\.backward\(loss, logits, target\)"):
        if how == "rule.backward":
            rule.backward(loss, logits)
        elif how == "loss.backward":
            loss.backward()
        else:
            rule.backward(loss, logits, F.one_hot(y, 3).double() if how == "soft labels" else y[:3])
    assert all(p.grad is None for p in model.parameters()), "some gradients were computed before the refusal"
    assert rule_grads(model, rule, x, y)["fc1.weight"].any(), "the rule no longer works after the refusal"


def test_default_b_init_is_kaiming_uniform_over_cut_features():
    """B has 10 x F entries sampled from U(±√(6/F)). The largest of the 40 000 entries lies within 1 % of the bound, and their
    mean lies within 5 standard errors of 0."""
    model = nn.Sequential(nn.Conv2d(1, 40, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4000, 10))
    rule = fa_bench.attach(model, "drtp", seed=0, cuts=["1"], sample_input=torch.zeros(2, 1, 12, 12))
    b, bound = rule.feedback["1"]["B"], math.sqrt(6 / 4000)
    assert b.shape == (10, 4000) and 0.99 * bound < b.abs().max() <= bound
    assert abs(b.mean().item()) < 5 * bound / math.sqrt(3 * 40000)
    assert not rule.feedback_parameters()


@pytest.mark.parametrize("error_sign", [False, True])
def test_empty_batch_gives_zero_gradients(error_sign):
    """The batch of a data-parallel rank, or one part of a split batch, may be empty."""
    model, rule, x, y = attached(error_sign=error_sign)
    logits = model(x[:0])
    rule.backward(F.cross_entropy(logits, y[:0], reduction="sum"), logits, y[:0])
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_float32_activation_gets_float32_error_under_autocast():
    """Under autocast, δ is computed in bfloat16, which represents 1/3 to only three digits. An activation in single precision
    must get its error in single precision."""

    class Single(nn.Module):
        def forward(self, x):
            return x.float().tanh()

    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(4, 5), Single(), nn.Linear(5, 3)), torch.randn(3, 4), torch.tensor([2, 0, 1])
    rule = fa_bench.attach(model, "drtp", seed=0, cuts=["1"])
    seen = []
    model[1].register_forward_hook(lambda module, args, output: output.register_hook(seen.append) and None, prepend=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
        loss = F.cross_entropy(logits, y)
    rule.backward(loss, logits, y)
    torch.testing.assert_close(seen[0], rule.feedback["1"]["B"][y] / 3, rtol=1e-6, atol=0)
