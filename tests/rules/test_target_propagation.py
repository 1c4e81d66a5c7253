"""Tests of target propagation: the feedback learned from noise is compared with plain loops and with its fixed point."""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fa_bench
from fa_bench.errors import CoverageError, OptionError
from fa_bench.utils.sampling import seed_for

from . import nets
from .helpers import array, arrays, assert_matches, bp_grads, rule_grads
from .reference import describe, forward
from .references.target import ldrl, through_map


def noise(cut: str, number: int, like: np.ndarray, seed: int = 0) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed_for(seed, number, cut, 0))
    return torch.empty(like.shape, dtype=torch.float64).normal_(generator=generator).numpy()


def feedback_gradient(chain, params, x, cut: str, feedback: np.ndarray, sigma: float, number: int) -> np.ndarray:
    """Compute gradB[c,f] = 2/(N sigma^2) sum over n of dz[n,c] (sum over k of dz[n,k] B[k,f] - sigma eps[n,f])."""
    values, names = forward(chain, params, x), [stage.name for stage in chain]
    at = names.index(cut) + 1
    eps = noise(cut, number, values[at])
    changed = forward(chain[at:], params, values[at] + sigma * eps)[-1] - values[-1]
    flat, grad = eps.reshape(len(x), -1), np.zeros_like(feedback)
    for n, c, f in itertools.product(range(len(x)), *map(range, grad.shape)):
        missing = sum(changed[n, k] * feedback[k, f] for k in range(len(feedback))) - sigma * flat[n, f]
        grad[c, f] += 2 / (len(x) * sigma**2) * changed[n, c] * missing
    return grad


@pytest.mark.parametrize("net", ["mlp_tanh", "mlp_bn", "conv"])
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_ddtp_linear_feedback_gradient_matches_reference(net: str, density: float) -> None:
    """The test runs two passes, because the second must sample new noise. Batch normalisation uses the statistics of the
    batch."""
    plain, model = nets.NETS[net](), nets.NETS[net]()
    x, y = nets.batch(net)
    chain, sigma = describe(plain), 0.3
    cuts = nets.activation_cuts(plain)
    rule = fa_bench.attach(model, "ddtp_linear", seed=0, sample_input=x, cuts=cuts, sigma=sigma, density=density)
    for number in (1, 2):
        for tensor in rule.feedback_parameters():
            tensor.grad = None
        rule_grads(model, rule, x, y)
        got = {cut: rule.feedback[cut]["B"].grad for cut in cuts}
        assert_matches(
            got,
            {
                cut: feedback_gradient(chain, arrays(plain), array(x), cut, array(rule.feedback[cut]["B"]), sigma, number)
                for cut in cuts
            },
        )
    assert rule.state_dict() == {"draws": {"seed": 0, "number": 2}}


def test_second_pass_does_not_affect_masks_statistics_or_rng() -> None:
    """The noisy pass reuses the dropout masks of the first pass and affects neither the running statistics nor the global
    generator."""

    def build() -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(7, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).double()

    plain, model = build(), build()
    x, y = nets.batch("mlp_tanh")
    rule = fa_bench.attach(model, "ddtp_linear", sample_input=x, cuts=["2"], sigma=0.3)
    torch.manual_seed(5)
    plain(x)
    want = torch.get_rng_state()
    torch.manual_seed(5)
    mask = model[3](torch.ones(4, 6, dtype=torch.float64))
    torch.manual_seed(5)
    rule_grads(model, rule, x, y)
    assert torch.equal(torch.get_rng_state(), want)
    assert torch.equal(model[1].running_mean, plain[1].running_mean) and model[1].num_batches_tracked == 1
    eps = torch.from_numpy(noise("2", 1, np.zeros((4, 6))))
    change = F.linear(0.3 * eps * mask, model[4].weight)
    feedback = rule.feedback["2"]["B"]
    want = 2 / (4 * 0.09) * change.t() @ (change @ feedback - 0.3 * eps)
    assert torch.allclose(feedback.grad, want, rtol=1e-9)


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_feedback_converges_to_damped_pseudo_inverse(damping: float) -> None:
    """The Jacobian J has singular values from 0.7 to 1.4. The average over 300 steps of 256 noisy samples has a relative error
    of about 1 / (300 * 256)^(1/2) = 0.4 %."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 6), nn.Identity(), nn.Linear(6, 4), nn.Linear(4, 3)).double()
    with torch.no_grad():
        for layer in (model[2], model[3]):
            nn.init.orthogonal_(layer.weight)
        model[3].weight.mul_(torch.tensor([[0.7], [1.0], [1.4]]))
    jacobian = (model[3].weight @ model[2].weight).detach()
    rule = fa_bench.attach(
        model, "ddtp_linear", sample_input=torch.zeros(2, 7).double(), cuts=["1"], allow_uncovered=True, sigma=1.0
    )
    optimizer = torch.optim.SGD(rule.feedback_parameters(), lr=0.05, weight_decay=damping)
    for parameter in rule.weight_parameters():
        parameter.requires_grad_(False)
    model[0].weight.requires_grad_(True)
    x, mean, steps = torch.zeros(256, 7).double(), 0.0, 600
    for step in range(steps):
        optimizer.zero_grad()
        logits = model(x)
        rule.backward(F.cross_entropy(logits, torch.zeros(256, dtype=torch.long)))
        optimizer.step()
        if step >= steps // 2:
            mean = mean + rule.feedback["1"]["B"].detach() / (steps - steps // 2)
    want = torch.linalg.solve(jacobian @ jacobian.t() + damping / 2 * torch.eye(3).double(), jacobian)
    assert ((mean - want).norm() / want.norm()).item() < 0.03


@pytest.mark.parametrize("name", ["ddtp_linear", "ldrl", "dfc"])
def test_loss_scaling_scales_feedback_gradients(name: str) -> None:
    """A gradient scaler later divides all gradients by the loss scale, so the gradients of feedback must contain this factor as
    well."""
    found = []
    for factor in (1.0, 1024.0, 0.3):
        model, (x, y) = nets.NETS["mlp_tanh"](), nets.batch("mlp_tanh")
        rule = fa_bench.attach(model, name, seed=0, sample_input=x, cuts=["act1", "act2"])
        logits = model(x)
        rule.backward(factor * F.cross_entropy(logits, y), logits, y)
        found.append({name: p.grad / factor for name, p in model.named_parameters()})
    for other in found[1:]:
        assert_matches(other, found[0])


# ------------------------------------------------------------------------------------------------ maps of blocks
def map_gradient(chain, params, x, cut: str, above: str, weight: np.ndarray, sigma: float, number: int) -> np.ndarray:
    """Compute, entry by entry, the gradient of the mean over n of (-2 sigma eps . g(f(h + sigma eps) - f(h)) + |g(sigma eps')|^2)
    / sigma^2 with respect to g."""
    values, names = forward(chain, params, x), [stage.name for stage in chain]
    start, end = names.index(cut) + 1, names.index(above) + 1 if above else len(names)
    h, eps = values[start], noise(cut, number, values[start])
    change = forward(chain[start:end], params, h + sigma * eps)[-1] - values[end]
    other, grad = noise(f"{cut}, above", number, change), np.zeros_like(weight)
    of_other = through_map(weight, other, h.shape[1:])
    for at in np.ndindex(weight.shape):
        unit = np.zeros_like(weight)
        unit[at] = 1.0
        of_unit = through_map(unit, other, h.shape[1:])
        grad[at] = 2 * (of_other * of_unit).sum() - 2 / sigma * (eps * through_map(unit, change, h.shape[1:])).sum()
    return grad / len(x)


def pooled() -> nn.Sequential:
    """A network with two convolutions, whose outputs differ in size, and two fully connected layers."""
    torch.manual_seed(3)
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(2, 2, 3, padding=1),
            act1=nn.Tanh(),
            conv2=nn.Conv2d(2, 3, 3, stride=2, padding=1),
            act2=nn.Tanh(),
            flat=nn.Flatten(),
            fc1=nn.Linear(36, 5),
            act3=nn.Tanh(),
            fc2=nn.Linear(5, 3),
        )
    ).double()


@pytest.mark.parametrize("net", ["mlp_bn", "pooled"])
def test_ldrl_map_gradients_match_reference(net: str) -> None:
    build = pooled if net == "pooled" else nets.NETS[net]
    plain, model, (x, y) = build(), build(), nets.batch("conv" if net == "pooled" else net)
    chain, sigma, cuts = describe(plain), 0.3, nets.activation_cuts(plain)
    rule = fa_bench.attach(model, "ldrl", seed=0, sample_input=x, cuts=cuts, sigma=sigma)
    for number in (1, 2):
        for tensor in rule.feedback_parameters():
            tensor.grad = None
        weights = {cut: array(rule.feedback[cut]["map.weight"]) for cut in cuts}
        got = rule_grads(model, rule, x, y)
        want = ldrl(chain, arrays(plain), {cut: {"map.weight": weight} for cut, weight in weights.items()}, array(x), y.numpy())
        assert_matches(got, want)
        assert_matches(
            {cut: rule.feedback[cut]["map.weight"].grad for cut in cuts},
            {
                cut: map_gradient(chain, arrays(plain), array(x), cut, above, weights[cut], sigma, number)
                for cut, above in zip(cuts, [*cuts[1:], ""], strict=True)
            },
        )
    assert {cut: weight.ndim for cut, weight in weights.items()} == (
        {"act1": 4, "act2": 2, "act3": 2} if net == "pooled" else {"act1": 2, "act2": 2}
    )


def test_ldrl_errors_reach_flat_blocks_below_maps() -> None:
    low, (x, y) = nn.Sequential(nn.Linear(7, 12), nn.Tanh()).double(), nets.batch("mlp_tanh")
    model = nn.Sequential(
        OrderedDict(
            low=copy.deepcopy(low),
            map=nn.Sequential(nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 4, 1), nn.Tanh()),
            out=nn.Sequential(nn.Flatten(), nn.Linear(16, 3)),
        )
    ).double()
    rule = fa_bench.attach(model, "ldrl", sample_input=x, cuts=["low", "map"])
    got = rule_grads(model, rule, x, y)
    delta = (model(x).detach().softmax(1) - F.one_hot(y, 3)) / len(y)
    error = delta @ rule.feedback["map"]["map.weight"].t() @ rule.feedback["low"]["map.weight"].t()
    low(x).backward(error.detach())
    assert_matches({"0.weight": got["low.0.weight"]}, {"0.weight": low[0].weight.grad})


def linear_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 6), nn.Identity(), nn.Linear(6, 4), nn.Identity(), nn.Linear(4, 3)).double()


def test_ldrl_transposed_weights_as_maps_match_backprop() -> None:
    model, (x, y) = linear_net(), nets.batch("mlp_tanh")
    want = bp_grads(model, x, y)
    rule = fa_bench.attach(model, "ldrl", sample_input=x, cuts=["1", "3"])
    for cut, layer in (("1", "2"), ("3", "4")):
        with torch.no_grad():
            rule.feedback[cut]["map.weight"].copy_(model.get_submodule(layer).weight.t())
    assert_matches(rule_grads(model, rule, x, y), want)


def test_ldrl_maps_converge_to_transposed_weights() -> None:
    """The average over 200 steps of 256 noisy samples has an error of about 1 / (200 * 256)^(1/2) = 0.004 in each entry, and the
    entries are of size 0.3."""
    model = linear_net()
    rule = fa_bench.attach(model, "ldrl", sample_input=torch.zeros(2, 7).double(), cuts=["1", "3"], sigma=0.5)
    optimizer = torch.optim.SGD(rule.feedback_parameters(), lr=0.05)
    x, mean, steps = torch.zeros(256, 7).double(), {"1": 0.0, "3": 0.0}, 300
    for step in range(steps):
        optimizer.zero_grad()
        rule.backward(F.cross_entropy(model(x), torch.zeros(256, dtype=torch.long)))
        optimizer.step()
        if step >= 100:
            mean = {cut: total + rule.feedback[cut]["map.weight"].detach() / 200 for cut, total in mean.items()}
    for cut, layer in (("1", "2"), ("3", "4")):
        want = model.get_submodule(layer).weight.t()
        assert ((mean[cut] - want).norm() / want.norm()).item() < 0.03


def test_ldrl_coverage_and_rejection_of_positions() -> None:
    model, (x, y) = nets.NETS["mlp_tanh"](), nets.batch("mlp_tanh")
    rule = fa_bench.attach(model, "ldrl", sample_input=x, cuts=["act2"], b_lr_scale=0.5)
    assert rule.coverage.transport == ("within blocks",) and "Each sample has its own random numbers" in str(rule.coverage)
    assert [group["lr"] for group in rule.parameter_groups(0.1)] == [0.1, 0.05]
    calls = []
    model.fc3.register_forward_hook(lambda *_: calls.append(1))
    rule_grads(model, rule, x, y)
    assert len(calls) == 3, "expected the first pass, one with noise at act2, and one without noise"
    with pytest.raises(CoverageError, match=r"needs outputs of shape \(N, C\)"):
        fa_bench.attach(nets.NETS["mlp_tanh"](), "ldrl", sample_input=x[:, None].repeat(1, 2, 1), cuts=["act2"])


@pytest.mark.parametrize("name", ["ddtp_linear", "ldrl"])
def test_noise_changes_every_pass_and_is_restored_from_state(name: str) -> None:
    def pass_of(rule, model):
        rule_grads(model, rule, *nets.batch("mlp_tanh"))
        return [tensor.grad.clone() for tensor in rule.feedback_parameters()]

    def attached(seed: int = 0):
        model, (x, _) = nets.NETS["mlp_tanh"](), nets.batch("mlp_tanh")
        return fa_bench.attach(model, name, seed=seed, sample_input=x, cuts=["act1", "act2"]), model

    rule, model = attached()
    first, saved, state = pass_of(rule, model), rule.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    second = pass_of(rule, model)
    assert not any(torch.equal(*pair) for pair in zip(first, second, strict=True))
    with rule.exact():
        F.cross_entropy(model(nets.batch("mlp_tanh")[0]), nets.batch("mlp_tanh")[1]).backward()
    assert rule.state_dict()["draws"]["number"] == 2
    other, model = attached(seed=7)
    model.load_state_dict(state)
    other.load_state_dict(saved)
    assert all(torch.equal(*pair) for pair in zip(second, pass_of(other, model), strict=True))


def test_frozen_feedback_needs_no_extra_pass() -> None:
    model, (x, y) = nets.NETS["mlp_tanh"](), nets.batch("mlp_tanh")
    rule = fa_bench.attach(model, "ddtp_linear", seed=0, sample_input=x, cuts=["act1", "act2"])
    calls = []
    model.fc3.register_forward_hook(lambda *_: calls.append(1))
    rule_grads(model, rule, x, y)
    assert len(calls) == 3, "expected one forward pass, and one for each cut"
    rule.feedback["act1"]["B"].requires_grad_(False)
    rule_grads(model, rule, x, y)
    assert len(calls) == 5


def test_tokens_with_error_at_match_flattened_samples() -> None:
    """Positions act as a second batch axis. If every layer acts on each position separately, tokens are treated like samples,
    except that sums are still divided by the number N of samples."""

    def build() -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Linear(4, 3)).double()

    x = torch.randn(4, 2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.randint(3, (4, 2), generator=torch.Generator().manual_seed(1))
    model = build()
    rule = fa_bench.attach(
        model, "ddtp_linear", seed=0, sample_input=x, cuts=["1", "3"], error_at="4", sigma=0.2, objective="token_cross_entropy"
    )
    logits = model(x)
    rule.backward(F.cross_entropy(logits.flatten(0, 1), y.flatten()), logits, y)
    for cut, above in (("1", [2, 3, 4]), ("3", [4])):
        h = nn.Sequential(*build()[: int(cut) + 1])(x).detach()
        tail = nn.Sequential(*[build()[number] for number in above])
        eps = 0.2 * torch.from_numpy(noise(cut, 1, h.numpy()))
        change = (tail(h + eps) - tail(h)).detach().flatten(0, 1)
        feedback = rule.feedback[cut]["B"].detach()
        assert feedback.shape == (4, h.shape[-1])
        want = 2 / (4 * 0.04) * change.t() @ (change @ feedback - eps.flatten(0, 1))
        assert torch.allclose(rule.feedback[cut]["B"].grad, want, rtol=1e-9)


def test_ddtp_linear_learns_at_cut_that_error_at_names() -> None:
    model, (x, y) = nets.mlp(), nets.batch("mlp_tanh")
    rule = fa_bench.attach(
        model, "ddtp_linear", seed=0, sample_input=x, cuts=["act1", "act2"], error_at="act2", sigma=0.2, b_init="zeros"
    )
    rule_grads(model, rule, x, y)
    eps = 0.2 * torch.from_numpy(noise("act2", 1, nets.mlp()[:4](x).detach().numpy()))
    assert torch.allclose(rule.feedback["act2"]["B"].grad, -2 / (len(x) * 0.04) * eps.t() @ eps, rtol=1e-9)


def test_coverage_text_and_default_options() -> None:
    x, _ = nets.batch("mlp_tanh")
    rule = fa_bench.attach(nets.NETS["mlp_tanh"](), "ddtp_linear", sample_input=x, cuts=["act1", "act2"], b_lr_scale=0.5)
    assert "Each sample has its own random numbers" in str(rule.coverage)
    assert rule.readouts() == {} and rule.weight_pairs() == {}
    assert [group["lr"] for group in rule.parameter_groups(0.1)] == [0.1, 0.05]
    assert rule.sigma == 0.1
    with pytest.raises(OptionError, match="sigma"):
        fa_bench.attach(nets.NETS["mlp_tanh"](), "ddtp_linear", sigma=0.0)
