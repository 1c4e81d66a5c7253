"""The named draws of feedback: bound, deviation and shape of the distribution, on fans that differ."""

import math

import pytest
import torch
from torch import nn

import fa_bench

# name: (deviation for fans (fan_in, fan_out), whether uniform). A uniform draw ends at sqrt(3) deviations.
DRAWS = {
    "xavier_uniform": (lambda i, o: math.sqrt(2 / (i + o)), True),
    "xavier_normal": (lambda i, o: math.sqrt(2 / (i + o)), False),
    "kaiming_uniform": (lambda i, o: math.sqrt(2 / i), True),
    "kaiming_normal_fan_out": (lambda i, o: math.sqrt(2 / o), False),
    "pytorch": (lambda i, o: 1 / math.sqrt(3 * i), True),
    "normal_fan_sum": (lambda i, o: 1 / math.sqrt(i + o), False),
    "normal_fan_out": (lambda i, o: 1 / math.sqrt(o), False),
    "uniform_one": (lambda i, o: 1 / math.sqrt(3), True),
}


def check(tensor: torch.Tensor, deviation: float, uniform: bool) -> None:
    """At least 9 000 draws: standard errors of deviation 0.75 % and of mean 1 %; a normal draw passes 3 deviations 20 times."""
    assert tensor.numel() >= 9000
    assert tensor.std().item() == pytest.approx(deviation, rel=0.03)
    assert abs(tensor.mean().item()) < 0.05 * deviation
    furthest = tensor.abs().max().item() / deviation
    assert 0.97 * math.sqrt(3) < furthest <= math.sqrt(3) * (1 + 1e-6) if uniform else furthest > 3


@pytest.mark.parametrize("draw", DRAWS)
def test_edge_feedback(draw):
    """Linear 40 -> 250; convolution fans include the kernel's area."""
    model = nn.Sequential(nn.Conv2d(20, 40, (3, 5)), nn.Flatten(), nn.Linear(40, 250))
    rule = fa_bench.attach(model, "fa", seed=0, b_init=draw)
    deviation, uniform = DRAWS[draw]
    check(rule.feedback["2"]["B"], deviation(40, 250), uniform)
    if draw != "normal_fan_out":  # for convolutions no source says whether its fan counts the kernel
        check(rule.feedback["0"]["B"], deviation(20 * 15, 40 * 15), uniform)


@pytest.mark.parametrize("draw", DRAWS)
def test_direct_feedback(draw):
    """B is (classes, C H W): fan_in is the size of the cut, fan_out the number of classes (N(0, 1/classes) is normal_fan_out)."""
    model = nn.Sequential(nn.Conv2d(1, 30, 3), nn.ReLU(), nn.Flatten(), nn.Linear(30 * 30, 10))
    rule = fa_bench.attach(model, "dfa", seed=0, b_init=draw, cuts=["1"], sample_input=torch.zeros(2, 1, 8, 7))
    deviation, uniform = DRAWS[draw]
    check(rule.feedback["1"]["B"], deviation(900, 10), uniform)


@pytest.mark.parametrize("name", ["brsf", "frsf"])
@pytest.mark.parametrize("draw", DRAWS)
def test_magnitudes(name, draw):
    """|M| of the same draw: its mean square is the variance."""
    model = nn.Sequential(nn.Linear(40, 250))
    rule = fa_bench.attach(model, name, seed=0, m_init=draw)
    model(torch.zeros(2, 40))
    size = rule.effective_feedback("0").detach().square().mean().sqrt().item()
    assert size == pytest.approx(DRAWS[draw][0](40, 250), rel=0.03)


@pytest.mark.parametrize("name", ["kp", "dfa"])
def test_zeros(name):
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    rule = fa_bench.attach(model, name, seed=0, b_init="zeros", **({"cuts": ["1"]} if name == "dfa" else {}))
    assert all(not tensors["B"].any() for tensors in rule.feedback.values())
