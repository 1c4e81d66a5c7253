"""The probe of rules that minimise an energy measures how close the states are to equilibrium, and how much the gradients differ
from those of backpropagation."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fa_bench
from fa_bench.errors import ConfigError
from fa_bench.metrics.meter import AlignmentMeter
from fa_bench.metrics.probes.energy import LOSS, Energy
from fa_bench.objectives.mse import MSE

from ..rules.test_pass_rules import X, Y, exact, learn, mlp
from ..rules.test_predictive_coding import RULES, attach, cosines, deep, ratios


def measured(rule: Any) -> dict[str, dict[str, float]]:
    subject: Any = SimpleNamespace(rule=rule, model=rule.model, meter=AlignmentMeter(rule, X, Y))
    probe = Energy()
    probe.require(subject)
    return probe.measure(subject)


@pytest.mark.parametrize("name", RULES)
def test_energy_probe_before_settling(name: str) -> None:
    found = measured(attach(name, steps=5, rate=1e-4))
    assert list(found) == ["energy", "energy_gradient", "energy_cosine", "energy_ratio"]
    assert list(found["energy"]) == ["1", "3", "5", LOSS] and list(found["energy_gradient"]) == ["1", "3", "5"]
    assert list(found["energy_ratio"]) == list(found["energy_cosine"]) == ["0", "2", "4", "6"]
    with torch.no_grad():
        assert found["energy"][LOSS] == pytest.approx(F.cross_entropy(deep()(X), Y).item(), rel=1e-3)
    assert all(0.999 < value <= 1 for value in found["energy_gradient"].values())
    assert all(value > 0.9999 for value in found["energy_cosine"].values())
    got, want = learn(attach(name, steps=5, rate=1e-4)), exact(deep())
    assert list(found["energy_ratio"].values()) == pytest.approx(ratios(got, want))
    alarm = Energy.alarms["energy_gradient"]
    assert all(alarm.fires(value) for value in (*found["energy_gradient"].values(), 0.91)) and not alarm.fires(0.89)


@pytest.mark.parametrize("name", RULES)
def test_energy_probe_at_equilibrium_matches_closed_form(name: str) -> None:
    """When the states have settled, the parts of the energy equal their closed form."""
    model = deep(nn.Identity, bias=False)
    rule = fa_bench.attach(copy.deepcopy(model), name, objective=MSE(), steps=400, rate=0.3)
    state = copy.deepcopy(rule.model.state_dict())
    found = measured(rule)
    assert max(found["energy_gradient"].values()) < 1e-6
    weights = [model.get_submodule(path).weight.detach() for path in ("0", "2", "4", "6")]
    products = [weights[3] @ weights[2] @ weights[1], weights[3] @ weights[2], weights[3]]
    spread = torch.eye(3, dtype=torch.float64) + sum(p @ p.t() for p in products)
    left = (X @ weights[0].t() @ products[0].t() - F.one_hot(Y, 3)) @ torch.linalg.inv(spread)
    for cut, product in zip(("1", "3", "5"), products, strict=True):
        assert found["energy"][cut] == pytest.approx((left @ product).square().sum().item() / 2 / 5)
    assert found["energy"][LOSS] == pytest.approx(left.square().sum().item() / 2 / 5)
    assert rule._observed is None and all(torch.equal(value, state[key]) for key, value in rule.model.state_dict().items())
    assert all(parameter.grad is None for parameter in rule.model.parameters())
    cosines_found = list(found["energy_cosine"].values())
    assert cosines_found == pytest.approx(cosines(learn(rule), exact(model, objective=MSE())))
    assert max(cosines_found) < 0.9999


def test_frozen_layer_has_nan_cosine_and_ratio() -> None:
    found = measured(attach("epc", freeze_stem=True))
    assert math.isnan(found["energy_cosine"]["0"]) and math.isnan(found["energy_ratio"]["0"])
    assert found["energy"]["1"] > 0 and found["energy_cosine"]["2"] > 0


def test_energy_probe_works_under_no_grad() -> None:
    want = measured(attach("epc", steps=3))
    with torch.no_grad():
        assert measured(attach("epc", steps=3)) == want


def test_energy_probe_rejects_other_rules() -> None:
    with pytest.raises(ConfigError, match="rule 'bp' has no energy; rules that have one: epc, pc"):
        measured(fa_bench.attach(mlp(8, 7), "bp"))


def test_zero_gradient_has_nan_cosine() -> None:
    """A single update of the states changes only the last state, so earlier layers have no gradient and no direction."""
    found = measured(attach("pc", steps=1))
    assert math.isnan(found["energy_cosine"]["0"]) and found["energy_ratio"]["0"] == 0
    assert found["energy_cosine"]["4"] == pytest.approx(1)


def test_layers_are_in_execution_order_without_unused_layers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out, self.unused, self.first = nn.Linear(8, 3), nn.Linear(2, 2), nn.Linear(6, 8)
            self.act, self.blocks = nn.Tanh(), ["act"]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.act(self.first(x)))

    found = measured(fa_bench.attach(Net().double(), "epc", sample_input=X))
    assert list(found["energy_cosine"]) == list(found["energy_ratio"]) == ["first", "out"]
