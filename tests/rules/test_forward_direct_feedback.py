"""Tests of fdfa: the estimate that B learns, relations to dfa and bp, measurements, and positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fa_bench
from fa_bench.mechanisms import tangents
from fa_bench.mechanisms.second_pass import Draws
from fa_bench.metrics.meter import AlignmentMeter
from fa_bench.optim.optimizers import Optimizers
from fa_bench.optim.sgd import SGD

from . import nets
from .helpers import array, assert_bitwise, bp_grads, distance, restore, rule_grads, state_of, weights

CUTS = {"mlp_tanh": ["act1", "act2"], "mlp_relu": ["act1", "act2"], "conv": ["act1", "act2"], "one": ["act1"]}
BUILD = nets.NETS | {"one": nets.one_hidden}


def attached(net: str = "mlp_tanh", name: str = "fdfa", size: int = 4, **options: Any) -> tuple[Any, Any, Tensor, Tensor]:
    model, (x, y) = BUILD[net](), nets.batch(net, size=size)
    return model, fa_bench.attach(model, name, seed=0, sample_input=x, cuts=CUTS[net], **options), x, y


def feedback_grads(rule: Any) -> dict[str, Tensor]:
    return {cut: tensors["B"].grad.clone() for cut, tensors in rule.feedback.items()}


def clear(rule: Any) -> None:
    for parameter in rule.feedback_parameters():
        parameter.grad = None


def jacobians(net: str, x: Tensor) -> dict[str, Tensor]:
    """The mean Jacobian (C, features) of the logits with respect to the activation at each cut, computed by autograd."""
    model, found = BUILD[net](), {}
    for cut in CUTS[net]:
        captured: list[Tensor] = []
        handle = model.get_submodule(cut).register_forward_hook(lambda _, __, out, to=captured: to.append(out))
        logits = model(x)
        handle.remove()
        rows = [torch.autograd.grad(column, captured[0], retain_graph=True)[0].flatten(1).mean(0) for column in logits.sum(0)]
        found[cut] = torch.stack(rows)
    return found


def mean_estimates(rule: Any, x: Tensor, y: Tensor, draws: int) -> dict[str, Tensor]:
    """The mean of the estimate d p over noise samples. The estimate d p equals B minus the gradient of B."""
    total = {cut: torch.zeros_like(tensors["B"]) for cut, tensors in rule.feedback.items()}
    for _ in range(draws):
        clear(rule)
        rule_grads(rule.model, rule, x, y)
        for cut, tensors in rule.feedback.items():
            total[cut] += (tensors["B"].detach() - tensors["B"].grad) / draws
    return total


@pytest.mark.parametrize("method", ["forward", "difference"])
@pytest.mark.parametrize("net", ["mlp_relu", "conv"])
def test_estimate_is_unbiased_for_mean_jacobian(net: str, method: str) -> None:
    """In the mean over 600 draws for 16 samples, each of the other perturbed values adds noise of about 1/√9600 to an entry."""
    _, rule, x, y = attached(net, size=16, tangents=method)
    got, want = mean_estimates(rule, x, y, 600), jacobians(net, x)
    for cut, jacobian in want.items():
        cosine = F.cosine_similarity(got[cut].flatten(), jacobian.flatten(), dim=0)
        assert cosine > 0.97 and 0.95 < got[cut].norm() / jacobian.norm() < 1.1


def test_single_sample_jacobian_as_feedback_matches_backprop() -> None:
    model, rule, x, y = attached(size=1)
    for cut, jacobian in jacobians("mlp_tanh", x).items():
        rule.feedback[cut]["B"].data.copy_(jacobian)
    exact = bp_grads(nets.mlp(), x, y)
    for name, gradient in rule_grads(model, rule, x, y).items():
        assert gradient is not None and distance(array(gradient), array(exact[name])) < 1e-12


def test_linear_net_estimate_approximates_output_weight() -> None:
    """The only hidden layer has no nonlinearity, so the Jacobian is W_out for every sample.

    The estimate is averaged over 300 draws of 32 samples.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Identity(), nn.Linear(5, 3)).double()
    x, y = torch.randn(32, 6, dtype=torch.float64), torch.arange(32) % 3
    rule = fa_bench.attach(model, "fdfa", seed=0, cuts=["1"])
    got = mean_estimates(rule, x, y, 300)["1"]
    assert (got - model[2].weight).norm() < 0.1 * model[2].weight.norm()


def train(model: Any, rule: Any, steps: int = 5, **settings: Any) -> None:
    optimizers = Optimizers(SGD(**{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01} | settings), rule, 1)
    for step in range(steps):
        optimizers.zero_grad()
        x, y = nets.batch("mlp_tanh", seed=step)
        logits = model(x)
        rule.backward(F.cross_entropy(logits, y), logits, y)
        optimizers.step()
        rule.step()


def test_zero_b_lr_scale_matches_dfa() -> None:
    """The weights are bitwise identical to those of dfa, and B keeps its values despite decay and momentum."""
    one, rule, _, _ = attached(b_init="kaiming_uniform", b_lr_scale=0.0)
    two, dfa, _, _ = attached(name="dfa", b_init="kaiming_uniform")
    train(one, rule)
    train(two, dfa)
    assert_bitwise(weights(one), weights(two))
    assert all(torch.equal(rule.feedback[cut]["B"], dfa.feedback[cut]["B"]) for cut in CUTS["mlp_tanh"])
    other, learning, _, _ = attached(b_init="kaiming_uniform")
    train(other, learning)
    assert not torch.equal(other.fc1.weight, two.fc1.weight)


def test_sgd_on_feedback_is_running_mean() -> None:
    """If B is updated by SGD with rate α and no momentum, a step changes B to (1 - α) B + α J, where J is the estimate."""
    model, rule, x, y = attached(b_init="kaiming_uniform")
    before = {cut: tensors["B"].detach().clone() for cut, tensors in rule.feedback.items()}
    rule_grads(model, rule, x, y)
    estimates = {cut: before[cut] - gradient for cut, gradient in feedback_grads(rule).items()}
    torch.optim.SGD(rule.feedback_parameters(), lr=0.25).step()
    for cut, tensors in rule.feedback.items():
        want = 0.75 * before[cut] + 0.25 * estimates[cut]
        assert distance(array(tensors["B"]), array(want)) < 1e-12


def test_feedback_lr_scale() -> None:
    for options, scale in (({}, 1.0), ({"b_lr_scale": 0.3}, 0.3)):
        rule = attached(**options)[1]
        groups = Optimizers(SGD(lr=0.2), rule, 1).optimizers[0].param_groups
        assert groups[-1]["lr"] == pytest.approx(0.2 * scale) and groups[0]["lr"] == pytest.approx(0.2)


def test_zero_init_first_trains_only_output_layer() -> None:
    model, rule, x, y = attached()
    grads = rule_grads(model, rule, x, y)
    assert all(not tensors["B"].any() for tensors in rule.feedback.values())
    assert not grads["fc2.weight"].any() and grads["fc3.weight"].any()
    assert all(gradient.any() for gradient in feedback_grads(rule).values())


def test_noise_changes_every_pass_and_is_restored_from_state() -> None:
    model, rule, x, y = attached()
    state = state_of(rule)
    found = []
    for _ in range(2):
        clear(rule)
        rule_grads(model, rule, x, y)
        found.append(feedback_grads(rule))
    assert not torch.equal(found[0]["act1"], found[1]["act1"])
    restore(rule, state)
    clear(rule)
    rule_grads(model, rule, x, y)
    assert_bitwise(feedback_grads(rule), found[0])
    other = attached()[1]
    other.load_state_dict(rule.state_dict())
    assert other.state_dict() == rule.state_dict() == {"draws": {"seed": 0, "number": 1}}


def test_noise_differs_between_cuts_and_samples() -> None:
    """The cuts act1 and act2 have five and six features, respectively.

    If both cuts used the same generator state, their noise would begin with the same numbers.
    """
    _, rule, x, y = attached()
    seen: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        normal = Draws.normal
        patch.setattr(Draws, "normal", lambda draws, name, like: seen.append(normal(draws, name, like)) or seen[-1])
        rule_grads(rule.model, rule, x, y)
    assert [tuple(p.shape) for p in seen] == [(4, 5), (4, 6)]
    assert not torch.equal(seen[0].flatten()[:20], seen[1].flatten()[:20]) and not torch.equal(seen[0][0], seen[0][1])


def test_measuring_and_evaluation_have_no_side_effects() -> None:
    """Measuring changes neither the gradient of B nor the noise of the next step.

    Only the B of the last cut has a weight angle, which compares this B with the weight of the output layer.
    """
    model, rule, x, y = attached(b_init="kaiming_uniform")
    state = rule.state_dict()
    values = AlignmentMeter(rule, x, y).measure()
    assert set(values["weight_angle"]) == {"fc3"} and {"fc1", "fc2"} <= set(values["delta_angle"])
    assert rule.state_dict() == state and all(parameter.grad is None for parameter in rule.feedback_parameters())
    model.eval()
    with torch.no_grad():
        model(x)
    assert rule.state_dict() == state


def test_frozen_feedback_needs_no_further_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rule, x, y = attached(b_init="kaiming_uniform")
    for parameter in rule.feedback_parameters():
        parameter.requires_grad_(False)
    monkeypatch.setattr(tangents, "output_tangent", lambda *_: pytest.fail("frozen feedback caused a further pass"))
    assert rule_grads(model, rule, x, y)["fc1.weight"].any()


def test_loss_scaling_scales_feedback_gradient() -> None:
    """With the same noise, half the loss gives half the gradient, as micro-batches require.

    An explicit scale gives the same result as an inferred one.
    """
    model, rule, x, y = attached(b_init="kaiming_uniform")
    state = state_of(rule)
    rule_grads(model, rule, x, y)
    once = feedback_grads(rule)
    for loss_scale in (None, 0.5):
        restore(rule, state)
        clear(rule)
        logits = model(x)
        rule.backward(F.cross_entropy(logits, y) / 2, logits, y, loss_scale)
        assert_bitwise(feedback_grads(rule), {cut: gradient / 2 for cut, gradient in once.items()})


# --- positions ----------------------------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """A net whose tokens affect each other after the last cut.

    With `pool`, there is one output for all tokens.
    """

    def __init__(self, pool: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.act, self.mix, self.act2 = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh()
        self.fc2 = nn.Linear(4, 3)
        self.pool, self.cut_points = pool, ["act", "act2"]

    def forward(self, x: Tensor) -> Tensor:
        a = self.act2(self.mix(self.act(self.fc1(x))))
        return self.fc2((a + a.mean(1, keepdim=True)).mean(1) if self.pool else a + a.mean(1, keepdim=True))


@pytest.mark.parametrize("pool", [False, True])
def test_positions_count_as_samples(pool: bool) -> None:
    """B, of shape (C, F), tends to the mean Jacobian between corresponding positions.

    If the output has no positions, B tends to the mean Jacobian over all positions of the cut.
    """
    model = Tokens(pool).double()
    x = torch.randn(8, 5, 3, dtype=torch.float64)
    y = torch.arange(8) % 3 if pool else torch.arange(40).view(8, 5) % 3
    options = {"positions": "shared"} if pool else {}
    rule = fa_bench.attach(model, "fdfa", seed=0, sample_input=x, **options)
    total = {cut: torch.zeros(3, 4, dtype=torch.float64) for cut in ("act", "act2")}
    for _ in range(400):
        clear(rule)
        logits = model(x)
        rule.backward(F.cross_entropy(logits if pool else logits.transpose(1, 2), y), logits, y, 1.0)
        for cut in total:
            total[cut] -= rule.feedback[cut]["B"].grad / 400
    with rule.exact():
        captured = {}
        for cut in total:
            model.get_submodule(cut).register_forward_hook(lambda _, __, out, cut=cut: captured.update({cut: out}))
        logits = model(x)
        for cut, got in total.items():
            rows = []
            for c in range(3):
                parts = [(logits[:, c], slice(None))] if pool else [(logits[:, t, c], t) for t in range(5)]
                of_parts = [
                    torch.autograd.grad(part.sum(), captured[cut], retain_graph=True)[0][:, at].flatten(0, -2).mean(0)
                    for part, at in parts
                ]
                rows.append(torch.stack(of_parts).mean(0))
            want = torch.stack(rows)
            assert (got - want).norm() < 0.15 * want.norm(), cut


@pytest.mark.parametrize(("of_output", "of_cut"), [(4, 2), (2, 4), (3, 3)])
def test_estimate_averages_over_corresponding_positions(of_output: int, of_cut: int) -> None:
    """The estimate is the mean of d p over samples and pairs of corresponding positions.

    There are as many pairs as positions on the finer axis.
    """
    rule = fa_bench.attach(Tokens().double(), "fdfa", seed=0, sample_input=torch.zeros(2, 5, 3, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    d = torch.randn(2, of_output, 3, generator=generator, dtype=torch.float64)
    p = torch.randn(2, of_cut, 4, generator=generator, dtype=torch.float64)
    rule._pass = {"act": p}, d
    finer, want = max(of_output, of_cut), torch.zeros(3, 4, dtype=torch.float64)
    for n in range(2):
        for t in range(finer):
            want += torch.outer(d[n, t * of_output // finer], p[n, t * of_cut // finer]) / (2 * finer)
    assert torch.allclose(rule.estimate("act"), want)


@pytest.mark.parametrize("options", [{"b_lr_scale": -1.0}, {"tangents": "exact"}], ids=str)
def test_options_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(fa_bench.errors.OptionError, match=next(iter(options))):
        attached(**options)


def test_estimate_sums_half_precision_in_float32() -> None:
    """In half precision, the sum of 512 products of 40 000 each would overflow, although their mean would not."""
    _, rule, _, _ = attached("one")
    wide = torch.full((512, 5), 200.0, dtype=torch.float16)
    rule.noise_and_tangent = lambda: ({"act1": wide}, wide[:, :3])
    assert torch.equal(rule.estimate("act1"), torch.full((3, 5), 40_000.0))


@pytest.mark.parametrize("name", ["fdfa", "grape"])
def test_attach_accepts_single_sample_with_batch_norm(name: str) -> None:
    model = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    rule = fa_bench.attach(model, name, sample_input=torch.zeros(1, 7), cuts=["2"])
    assert model.training and set(rule.feedback) == {"2"}
