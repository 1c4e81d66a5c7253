"""Tests of modules that change an activation in place after it has left a cut or a layer.

Every rule, metric and probe must give the same results as for a net without in-place modules. Without protection, a tensor stored
by a hook would be overwritten with the result of the next module.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fa_bench
from fa_bench.data.splits import ArraySplit, Splits
from fa_bench.errors import CoverageError
from fa_bench.mechanisms.cut.energy import EnergyRule
from fa_bench.mechanisms.cut.rule import CutRule
from fa_bench.metrics.meter import AlignmentMeter
from fa_bench.metrics.probes.base import Probes, Subject
from fa_bench.registry.registries import ALGORITHMS, METRICS, PROBES

from .helpers import QUICK

INPUTS, CLASSES, SAMPLES = 7, 4, 16
#: Cuts before in-place operations: nonlinearities, an addition, and dropout, which is active only in training.
CUTS = ["norm1", "norm2", "fc3", "norm4"]
OPTIONS: dict[str, dict[str, Any]] = QUICK | {"f3": {"samples": SAMPLES}, "frozen_blocks": {"blocks": ["norm1"]}}
#: Rules with options under which they store other tensors than by default.
FORMS = [
    ("ddtp_linear", {"error_at": "norm4", "cuts": CUTS[:-1]}),
    ("dkp", {"error_at": "norm4", "cuts": CUTS[:-1]}),
    ("fdfa", {"tangents": "difference"}),
    ("dfc", {"feedback_weights": "jacobian"}),
    ("forward_forward", {"full_gradient": False}),
    ("dfa", {"form": "kernel"}),
]


class Net(nn.Module):
    """A net in which either all or none of the operations after the cuts work in place, with the same results."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.fc1, self.norm1, self.act1 = nn.Linear(INPUTS, 6), nn.LayerNorm(6), nn.LeakyReLU(0.3, in_place)
        self.fc2, self.norm2, self.act2 = nn.Linear(6, 6), nn.LayerNorm(6), nn.LeakyReLU(0.2, in_place)
        self.fc3, self.act3 = nn.Linear(6, 6), nn.LeakyReLU(0.1, in_place)
        self.fc4, self.norm4, self.drop4 = nn.Linear(6, 6), nn.LayerNorm(6), nn.Dropout(0.4, in_place)
        self.fc5 = nn.Linear(6, CLASSES)
        self.cut_points = self.blocks = CUTS

    def forward(self, x: Tensor) -> Tensor:
        h = self.act1(self.norm1(self.fc1(x)))
        y = self.norm2(self.fc2(h))
        if self.in_place:
            y += h
        else:
            y = y + h
        y = self.act3(self.fc3(self.act2(y)))
        return self.fc5(self.drop4(self.norm4(self.fc4(y))))


def attached(
    in_place: bool, name: str, options: dict[str, Any], net: type[nn.Module] = Net
) -> tuple[nn.Module, fa_bench.Rule, Tensor, Tensor]:
    torch.manual_seed(0)
    model = net(in_place).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, INPUTS, generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    given: dict[str, Any] = OPTIONS.get(name, {}) | options
    return model, fa_bench.attach(model, name, seed=0, sample_input=x[:3], **given), x, y


def step(model: nn.Module, rule: fa_bench.Rule, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The gradients and the outputs of a training pass, and a prediction after it."""
    torch.manual_seed(2)  # the masks of dropout
    logits = model(x)
    rule.backward(F.cross_entropy(logits, y), logits, y, indices=torch.arange(SAMPLES))
    found = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    return found | {"(logits)": logits.detach().clone(), "(prediction)": rule.predict(x).detach()}


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in sorted(ALGORITHMS)), *FORMS], ids=str)
def test_training_step_is_identical_with_inplace_modules(name: str, options: dict[str, Any]) -> None:
    plain, in_place = (step(*attached(works, name, options)) for works in (False, True))
    assert plain.keys() == in_place.keys()
    # Both nets apply the same operations to the same values.
    assert {key for key, value in plain.items() if not torch.equal(value, in_place[key])} == set()


class Frozen(nn.Module):
    """A net with a frozen layer. Plain PyTorch also allows in-place changes of the input of such a layer after the call."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.fc1, self.frozen, self.fc2, self.fc3 = (
            nn.Linear(INPUTS, 6),
            nn.Linear(6, 6),
            nn.Linear(6, 6),
            nn.Linear(6, CLASSES),
        )
        self.act = nn.Tanh()
        self.frozen.requires_grad_(False)
        self.cut_points = ["act"]

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        y = self.frozen(h)
        if self.in_place:
            h += y
        else:
            h = h + y
        return self.fc3(self.act(self.fc2(h)))


@pytest.mark.parametrize("name", ["bp", "forward_alignment"])
def test_training_step_unaffected_by_inplace_change_of_frozen_input(name: str) -> None:
    plain, in_place = (step(*attached(works, name, {}, Frozen)) for works in (False, True))
    assert plain.keys() == in_place.keys() and all(torch.equal(value, in_place[key]) for key, value in plain.items())


class ChangesInput(nn.Module):
    """A net that changes its input either in place or out of place."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2, self.in_place = nn.Linear(INPUTS, 6), nn.ReLU(), nn.Linear(6, CLASSES), in_place
        self.cut_points = self.blocks = ["act"]

    def forward(self, x: Tensor) -> Tensor:
        if self.in_place:
            x += 0.5
        else:
            x = x + 0.5
        return self.fc2(self.act(self.fc1(x)))


def measured(in_place: bool, name: str, options: dict[str, Any], net: type[nn.Module] = Net) -> dict[str, dict[str, float]]:
    """The values of all metrics and of the applicable probes for a model after one training step."""
    model, rule, x, y = attached(in_place, name, options, net)
    step(model, rule, x.clone(), y)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=0.1)
                parameter.grad = None
    split = ArraySplit(x, y, x.device)
    splits = Splits(split, None, split, [str(number) for number in range(CLASSES)], (INPUTS,), "")
    meter = AlignmentMeter(rule, x, y, METRICS, torch.arange(SAMPLES))
    found = meter.measure()
    # The gradient norm cannot be measured for a frozen weight if the input of its layer is changed in place.
    cannot = {"energy": not isinstance(rule, EnergyRule), "gradient_norm": net is Frozen}
    wanted = [probe for probe in PROBES if not cannot.get(probe)]
    found |= Probes(wanted, 0, Subject(rule, splits, meter, batch_size=4)).measure(1)
    return found


@pytest.mark.parametrize(
    ("name", "options", "net"),
    [
        *((name, {}, Net) for name in sorted(ALGORITHMS)),
        *((name, options, Net) for name, options in FORMS),
        *((name, {}, Frozen) for name in ("bp", "forward_alignment")),
        *((name, {}, ChangesInput) for name in ("bp", "fa", "dkp")),
    ],
    ids=str,
)
def test_metrics_and_probes_are_identical_with_inplace_modules(name: str, options: dict[str, Any], net: type[nn.Module]) -> None:
    plain, in_place = (measured(works, name, options, net) for works in (False, True))
    assert plain.keys() == in_place.keys()
    for quantity, values in plain.items():
        assert values.keys() == in_place[quantity].keys(), quantity
        for layer, value in values.items():
            other = in_place[quantity][layer]
            # Both nets apply the same operations to the same values, which may be NaN.
            assert value == other or (math.isnan(value) and math.isnan(other)), (quantity, layer)


class Blocks(nn.Module):
    """A net with cuts at modules that need their output to compute their derivative.

    In-place changes of the outputs of such cuts are allowed only under rules whose errors do not pass through the cuts.
    """

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.block1, self.act1 = nn.Sequential(nn.Linear(INPUTS, 6), nn.Sigmoid()), nn.LeakyReLU(0.3, in_place)
        self.block2 = nn.Sequential(nn.Linear(6, 6), nn.Sigmoid())
        self.head, self.in_place = nn.Linear(6, CLASSES), in_place

    def forward(self, x: Tensor) -> Tensor:
        y = self.block2(self.act1(self.block1(x)))
        if self.in_place:
            y -= 0.5
        else:
            y = y - 0.5
        return self.head(y)


CUTTING = [name for name, rule in sorted(ALGORITHMS.items()) if issubclass(rule, CutRule) and not rule.crosses]
#: Rules that use no cuts or need more modules than this net has.
WITHOUT = {"weight_perturbation", "dgl", "asfp_lc"}


@pytest.mark.parametrize("name", [name for name in CUTTING if name not in WITHOUT])
def test_accepts_inplace_module_after_cut_that_saves_its_output(name: str) -> None:
    plain, in_place = (step(*attached(works, name, {"cuts": ["block1", "block2"]}, Blocks)) for works in (False, True))
    assert plain.keys() == in_place.keys() and all(torch.equal(value, in_place[key]) for key, value in plain.items())


class InTraining(nn.Module):
    """A module that works in place only in training mode, so that the pass in `attach` does not reveal it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2) if self.training else x * 2


@pytest.mark.parametrize("name", ["dkp", "predsim", "pepita"])
def test_rejects_inplace_change_of_cut_only_in_training(name: str) -> None:
    model = nn.Sequential(nn.Linear(INPUTS, 6), InTraining(), nn.Linear(6, CLASSES))
    rule = fa_bench.attach(model, name, cuts=["0"])
    message = "cut '0': its output was changed in place in a training pass"
    with pytest.raises(CoverageError, match=message):
        model(torch.randn(SAMPLES, INPUTS))
    rule.detach()
    # A rule that does not need the activation still learns.
    rule, y = fa_bench.attach(model, "dfa", cuts=["0"]), torch.arange(SAMPLES) % CLASSES
    logits = model(torch.randn(SAMPLES, INPUTS))
    rule.backward(F.cross_entropy(logits, y), logits, y)
