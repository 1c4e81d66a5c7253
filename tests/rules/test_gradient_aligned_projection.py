"""Tests of grape: rotation of B, anchor updates by backpropagation and their count, and measurements without side effects."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fa_bench
from fa_bench.metrics.meter import AlignmentMeter
from fa_bench.rules.grape import GrAPE

from . import nets
from .helpers import assert_bitwise, bp_grads, restore, rule_grads, state_of, weights


def attached(name: str = "grape", **options: Any) -> tuple[nn.Module, Any, Tensor, Tensor]:
    model, (x, y) = nets.mlp(), nets.batch("mlp")
    return model, fa_bench.attach(model, name, seed=0, sample_input=x, cuts=["act1", "act2"], **options), x, y


def test_zeros_are_refused_because_they_have_no_direction() -> None:
    with pytest.raises(fa_bench.FaBenchError, match="b_init=zeros: B cannot be turned"):
        attached(b_init="zeros")
    attached("fdfa", b_init="zeros")


def train(model: nn.Module, rule: Any, steps: int, feedback_lr: float = 0.1) -> list[tuple[dict, dict]]:
    """Train for the given number of steps and return the gradients of the weights and the exact gradients of every step."""
    groups = [{"params": rule.weight_parameters(), "lr": 0.1}, {"params": rule.feedback_parameters(), "lr": feedback_lr}]
    optimizer = torch.optim.SGD([group for group in groups if group["params"]])
    found = []
    for step in range(steps):
        x, y = nets.batch("mlp", seed=step)
        with rule.exact():
            exact = rule_grads(model, rule, x, y)
        found.append((rule_grads(model, rule, x, y), exact))
        optimizer.step()
        rule.step()
        for parameter in rule.feedback_parameters():
            parameter.grad = None
    return found


def test_cosine_gradient_is_orthogonal_to_feedback() -> None:
    """The gradient is orthogonal to B, so it rotates B. The update in an earlier version of the paper only rescales B."""
    rule, generator = GrAPE(), torch.Generator().manual_seed(0)
    b, estimate = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    leaf = b.clone().requires_grad_(True)
    (want,) = torch.autograd.grad(1 - F.cosine_similarity(leaf.flatten(), estimate.flatten(), dim=0), leaf)
    got = rule.gradient_of(b, estimate)
    assert torch.allclose(got, want, rtol=1e-12) and abs((got * b).sum()) < 1e-14 * got.norm() * b.norm()
    assert torch.allclose(rule.gradient_of(b, 7 * estimate), got)
    assert not rule.gradient_of(b, torch.zeros_like(b)).any()


def test_feedback_converges_to_direction_of_fixed_jacobian() -> None:
    rule, generator = GrAPE(), torch.Generator().manual_seed(0)
    b, jacobian = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    start, before = b.clone(), F.cosine_similarity(b.flatten(), jacobian.flatten(), dim=0)
    for _ in range(3000):
        b -= 0.05 * rule.gradient_of(b, jacobian)
    assert before < 0.5 and F.cosine_similarity(b.flatten(), jacobian.flatten(), dim=0) > 0.999
    assert 1 < b.norm() / start.norm() < 1.05


def test_anchor_updates_match_backprop() -> None:
    """With a period of 3, every third update is an anchor.

    Anchors are counted, and their count is part of the state.
    """
    model, rule, *_ = attached(anchor_period=3)
    for step, (got, exact) in enumerate(train(model, rule, 7)):
        assert torch.equal(got["fc1.weight"], exact["fc1.weight"]) == (step in (2, 5))
        assert torch.equal(got["fc3.weight"], exact["fc3.weight"])
    assert rule.counts() == {"updates_by_backpropagation": 2}
    assert rule.state_dict() == {"draws": {"seed": 0, "number": 7}, "steps": 7, "anchors": 2}
    fresh = attached(anchor_period=3)[1]
    fresh.load_state_dict(rule.state_dict())
    assert fresh.state_dict() == rule.state_dict() and fresh.counts() == rule.counts()


def test_anchor_period_one_matches_backprop() -> None:
    """With a period of 1, the weights are bitwise identical to those of bp over five steps, although B learns."""
    (one, rule, *_), (two, bp, *_) = attached(anchor_period=1), attached()
    bp.detach()
    bp = fa_bench.attach(two, "bp", seed=0)
    before = rule.feedback["act1"]["B"].detach().clone()
    train(one, rule, 5)
    train(two, bp, 5)
    assert_bitwise(weights(one), weights(two))
    assert not torch.equal(rule.feedback["act1"]["B"], before) and rule.counts() == {"updates_by_backpropagation": 5}


def test_no_anchors_and_no_learning_matches_dfa() -> None:
    (one, rule, *_), (two, dfa, *_) = attached(anchor_period=0, b_lr_scale=0.0), attached(name="dfa", b_init="normal_fan_out")
    assert all(torch.equal(rule.feedback[cut]["B"], dfa.feedback[cut]["B"]) for cut in ("act1", "act2"))
    train(one, rule, 5, feedback_lr=0.0)
    train(two, dfa, 5)
    assert_bitwise(weights(one), weights(two))
    assert rule.counts() == {"updates_by_backpropagation": 0}


def test_all_micro_batches_of_anchor_are_exact() -> None:
    """All micro-batches are exact even if evaluations and unused forward passes run between them."""
    model, rule, x, y = attached(anchor_period=1)
    other = nets.batch("mlp", seed=1)
    want = [bp_grads(nets.mlp(), *batch) for batch in ((x, y), other)]
    logits = model(x)
    model(other[0])
    with torch.no_grad():
        model.eval()(x)
    model.train()
    rule.backward(F.cross_entropy(logits, y), logits, y)
    logits = model(other[0])
    rule.backward(F.cross_entropy(logits, other[1]), logits, other[1])
    for name, parameter in weights(model).items():
        assert torch.equal(parameter.grad, want[0][name] + want[1][name])


def test_anchor_status_is_fixed_at_forward_pass() -> None:
    """A forward pass that ran as an anchor has an exact error, even if anchors are disabled before the backward pass."""
    model, rule, x, y = attached(anchor_period=1)
    logits = model(x)
    rule.anchor_period = 0
    rule.backward(F.cross_entropy(logits, y), logits, y)
    exact = bp_grads(nets.mlp(), x, y)
    assert torch.equal(model.get_parameter("fc1.weight").grad, exact["fc1.weight"])


def test_measuring_ignores_anchors() -> None:
    model, rule, x, y = attached(anchor_period=1)
    state = state_of(rule)
    values = AlignmentMeter(rule, x, y).measure()
    assert values["delta_angle"]["fc1"] > 5 and rule.state_dict() == state[0]
    restore(rule, state)
    assert_bitwise(rule_grads(model, rule, x, y), bp_grads(nets.mlp(), x, y))


@pytest.mark.parametrize(
    ("period", "where"), [(0, ()), (1, ("in every update",)), (50, ("in one of 50 updates, by exact backpropagation",))]
)
def test_coverage_reports_frequency_of_weight_transport(period: int, where: tuple[str, ...]) -> None:
    _, rule, *_ = attached(anchor_period=period)
    assert rule.coverage.transport == where
    assert "its own random numbers" in str(rule.coverage)
    assert ("Weight transport" in str(rule.coverage)) == (period > 0)


def test_feedback_options() -> None:
    rule = attached(b_lr_scale=0.3, b_init="identity")[1]
    assert rule.feedback_lr_scale == 0.3 and set(rule.feedback["act1"]["B"].unique().tolist()) == {0.0, 1.0}
    assert attached()[1].feedback_lr_scale == 1.0
