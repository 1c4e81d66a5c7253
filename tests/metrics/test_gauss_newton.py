"""Tests of the probe that measures the angle to the Gauss-Newton step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fa_bench
from fa_bench.errors import ConfigError
from fa_bench.metrics.meter import AlignmentMeter
from fa_bench.metrics.probes.gauss_newton_angle import GaussNewtonAngle, gauss_newton, jacobian
from fa_bench.objectives.cross_entropy import CrossEntropy

X = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 0, 1])


def mlp() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def measured(model: nn.Module, rule, x: torch.Tensor = X) -> dict[str, dict[str, float]]:
    subject = SimpleNamespace(rule=rule, model=model, meter=AlignmentMeter(rule, x, Y))
    probe = GaussNewtonAngle()
    probe.require(subject)
    return probe.measure(subject)


def angle(one: torch.Tensor, two: torch.Tensor) -> float:
    return torch.rad2deg(torch.arccos(torch.cosine_similarity(one, two, dim=1))).mean().item()


def test_jacobian_and_pseudo_inverse_match_torch() -> None:
    model = mlp()
    h = X.clone().requires_grad_()
    found = jacobian(model(h), h)
    for number in range(5):
        want = torch.autograd.functional.jacobian(lambda one: model(one[None])[0], X[number])
        assert torch.allclose(found[number], want)
    delta = torch.randn(5, 3, dtype=torch.float64)
    wanted = torch.stack([torch.linalg.pinv(j) @ d for j, d in zip(found, delta, strict=True)])
    assert torch.allclose(gauss_newton(found, delta), wanted, rtol=1e-3)  # the relative damping is 1e-6
    assert (gauss_newton(torch.zeros(5, 3, 7), delta) == 0).all()


def test_damping_is_proportional_to_jacobian() -> None:
    """If J is multiplied by 1e-5, J⁺ δ becomes 1e5 times as long, so layers with small derivatives are not damped more than
    others."""
    generator = torch.Generator().manual_seed(2)
    wide, delta = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((4, 3, 7), (4, 3)))
    torch.testing.assert_close(1e-5 * gauss_newton(1e-5 * wide, delta), gauss_newton(wide, delta), rtol=1e-9, atol=0)


def test_rule_and_backprop_angles_match_reference() -> None:
    """At the activation of layer 2, J is the output layer's weight W, the error of backpropagation is δ W, and that of direct
    feedback is δ B."""
    model = mlp()
    rule = fa_bench.attach(model, "dfa", seed=0, sample_input=X, cuts=["1", "3"])
    found = measured(model, rule)
    logits = model(X).detach()
    delta = (logits.softmax(1) - nn.functional.one_hot(Y, 3)) / 5
    weight = model[4].weight.detach()
    wanted = delta @ torch.linalg.pinv(weight).t()
    assert found["gauss_newton_angle"]["2"] == pytest.approx(angle(delta @ rule.feedback["3"]["B"], wanted), abs=1e-3)
    assert found["gauss_newton_angle_bp"]["2"] == pytest.approx(angle(delta @ weight, wanted), abs=1e-3)
    assert found["gauss_newton_angle"].keys() == found["gauss_newton_angle_bp"].keys() == {"0", "2"}
    assert abs(found["gauss_newton_angle"]["0"] - found["gauss_newton_angle_bp"]["0"]) > 1
    rule.detach()
    found = measured(model, fa_bench.attach(model, "bp"))
    assert found["gauss_newton_angle"] == found["gauss_newton_angle_bp"] != {}


def test_learned_inverses_are_closer_to_gauss_newton_than_backprop() -> None:
    """Only the feedback is trained, and the weights are fixed. At layer 2, J is the same for every sample."""
    model = mlp()
    with torch.no_grad():
        model[4].weight.copy_(nn.init.orthogonal_(torch.empty(3, 8)) * torch.tensor([[0.5], [1.0], [2.0]]))
    rule = fa_bench.attach(model, "ddtp_linear", seed=0, sample_input=X, cuts=["1", "3"], sigma=0.1)
    optimizer, x, y = torch.optim.SGD(rule.feedback_parameters(), lr=0.05), X.repeat(16, 1), Y.repeat(16)
    before = measured(model, rule)
    for _ in range(300):
        optimizer.zero_grad()
        logits = model(x)
        rule.backward(nn.functional.cross_entropy(logits, y), logits, y)
        optimizer.step()
    after = measured(model, rule)
    assert after["gauss_newton_angle"]["2"] < 5 < after["gauss_newton_angle_bp"]["2"]
    assert after["gauss_newton_angle"]["2"] < before["gauss_newton_angle"]["2"] - 20


class Parts(nn.Module):
    """A net fc1 - fc2 - fc2 - fc3 with a second output that the loss does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.fc1, self.fc2, self.fc3 = nn.Linear(7, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.side1, self.side2 = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.fc1(x).tanh()
        return self.fc3(self.fc2(self.fc2(h).tanh()).tanh()), self.side2(self.side1(h).tanh())


def test_angle_only_for_unique_activations_with_error() -> None:
    """fc2 runs twice, the second time on its own activation. Neither the input of side2 nor a frozen layer's activation has an
    error."""
    rule = fa_bench.attach(Parts().double(), "bp", objective=CrossEntropy(output=0))
    assert set(measured(rule.model, rule)["gauss_newton_angle"]) == {"fc1"}
    model = mlp()
    model[0].requires_grad_(False)
    found = measured(model, fa_bench.attach(model, "fa"))
    assert set(found["gauss_newton_angle"]) == set(found["gauss_newton_angle_bp"]) == {"2"}


def test_frozen_rule_has_no_angles() -> None:
    """With `frozen`, only the classifier gets an error, whereas all layers get one with backpropagation."""
    model = mlp()
    rule = fa_bench.attach(model, "frozen")
    assert measured(model, rule) == {"gauss_newton_angle": {}, "gauss_newton_angle_bp": {}}


def test_rejects_outputs_with_positions() -> None:
    model = mlp()
    rule = fa_bench.attach(model, "bp")
    subject = SimpleNamespace(rule=rule, model=model, meter=AlignmentMeter(rule, X.view(5, 1, 7), Y.view(5, 1)))
    with pytest.raises(ConfigError, match=r"the probe needs outputs of shape \(N, C\), not \(2, 1, 3\)"):
        GaussNewtonAngle().require(subject)
