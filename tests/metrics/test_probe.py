"""The measured angles agree with plain formulas, and the measurement leaves no traces."""

from __future__ import annotations

import copy
import dataclasses
import gc
import math
import re
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fa_bench
from fa_bench.errors import ConfigError, CoverageError
from fa_bench.metrics.angles import angles, norm_ratio, weight_angle
from fa_bench.metrics.meter import AlignmentMeter, Passes, measurement_mode
from fa_bench.models.resnet import ResNet20
from fa_bench.objectives.cross_entropy import CrossEntropy

RULES = [
    ("bp", {}),
    ("fa", {}),
    ("usf", {}),
    ("brsf", {}),
    ("frsf", {}),
    ("kp", {}),
    ("dfa", {}),
    ("dfa", {"form": "kernel"}),
    ("dfa", {"form": "shared"}),
    ("dkp", {}),
    ("drtp", {}),
    ("local_error", {}),
    ("predsim", {}),
    ("dgl", {}),
    ("frozen", {}),
    ("bp_fc", {}),
]
IDS = [f"{name}-{next(iter(options.values()), '')}" for name, options in RULES]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 3)).double()
    model.cut_points = model.blocks = ["1", "3"]
    return model


def batch(features: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(10, features, generator=generator).double(), torch.arange(10) % 3


def mean_angle(u: Tensor, v: Tensor) -> float:
    """The mean angle, computed sample by sample from its definition."""
    degrees = []
    for a, b in zip(u, v, strict=True):
        cosine = (a * b).sum() / (a.norm() * b.norm())
        degrees.append(math.degrees(math.acos(max(-1.0, min(1.0, cosine.item())))))
    return sum(degrees) / len(degrees)


def errors_by_hand(model: nn.Sequential, carry: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The error at the logits of `mlp` ("delta"), the errors at the activations after layers "2" and "0", which are propagated
    with the matrices (O, I) in `carry`, and the slope of the second activation ("slope")."""
    a1 = x @ model[0].weight.T + model[0].bias
    h1 = a1.tanh()
    h2 = (h1 @ model[2].weight.T + model[2].bias).sigmoid()
    z = h2 @ model[4].weight.T + model[4].bias
    delta = (z.softmax(1) - F.one_hot(y, 3)) / len(y)
    e2 = delta @ carry["4"]
    slope = h2 * (1 - h2)
    return {"delta": delta, "2": e2, "0": (e2 * slope) @ carry["2"], "slope": slope}


def test_edge_rule_delta_angles_match_formula() -> None:
    model, (x, y) = mlp(), batch()
    rule = fa_bench.attach(model, "fa", seed=0)
    got = AlignmentMeter(rule, x, y).measure()
    weights = {name: model[int(name)].weight.detach() for name in ("2", "4")}
    ours = errors_by_hand(model, {name: rule.feedback[name]["B"] for name in weights}, x, y)
    true = errors_by_hand(model, weights, x, y)
    one_step = {"2": ours["delta"] @ weights["4"], "0": (ours["2"] * ours["slope"]) @ weights["2"]}
    for layer in ("0", "2"):
        assert got["delta_angle"][layer] == pytest.approx(mean_angle(ours[layer], true[layer]), abs=1e-6)
        assert got["delta_angle_one_step"][layer] == pytest.approx(mean_angle(ours[layer], one_step[layer]), abs=1e-6)
    assert got["delta_angle"]["4"] == got["delta_angle_one_step"]["4"] == 0
    assert got["delta_angle"]["0"] > 5 and got["delta_angle"]["0"] != got["delta_angle_one_step"]["0"]


@pytest.mark.parametrize("form", ["neuron", "kernel"])
def test_direct_feedback_delta_angles_match_formula(form: str) -> None:
    model, (x, y) = mlp(), batch()
    rule = fa_bench.attach(model, "dfa", seed=0, form=form)
    got = AlignmentMeter(rule, x, y).measure()
    weights = {name: model[int(name)].weight.detach() for name in ("2", "4")}
    true = errors_by_hand(model, weights, x, y)
    first, second = (rule.feedback[cut]["B"] for cut in (("1", "3") if form == "neuron" else ("2", "4")))
    ours = {"0": true["delta"] @ first, "2": true["delta"] @ second}
    one_step = {"2": true["2"], "0": (ours["2"] * true["slope"]) @ weights["2"]}
    for layer in ("0", "2"):
        assert got["delta_angle"][layer] == pytest.approx(mean_angle(ours[layer], true[layer]), abs=1e-6)
        assert got["delta_angle_one_step"][layer] == pytest.approx(mean_angle(ours[layer], one_step[layer]), abs=1e-6)


def test_one_step_angle_is_nonzero_only_before_changed_feedback() -> None:
    """All layers except the output layer propagate the error with their true weights, so every error differs from the true one by
    a single wrong step."""
    torch.manual_seed(0)
    model = ResNet20(width=2, blocks=1).build((1, 8, 8), 3).double()
    x, y = batch(64)
    x = x.view(-1, 1, 8, 8)
    rule = fa_bench.attach(model, "fa", seed=0, sample_input=x, b_init="copy_w")
    same = AlignmentMeter(rule, x, y).measure()
    assert max(same["delta_angle"].values()) < 1e-4 and max(same["delta_angle_one_step"].values()) < 1e-4
    with torch.no_grad():
        rule.feedback["fc"]["B"].normal_(generator=torch.Generator().manual_seed(0))
    changed = AlignmentMeter(rule, x, y).measure()
    last = [layer for layer, value in changed["delta_angle_one_step"].items() if value > 1e-4]
    assert last == ["stages.layer3.0.conv2"]  # only its activation enters fc; the last steps of all others are exact
    assert all(changed["delta_angle"][layer] > 1 for layer in changed["delta_angle"] if layer != "fc")


@pytest.mark.parametrize(("name", "options"), RULES, ids=IDS)
def test_probe_has_no_side_effects(name: str, options: dict) -> None:
    torch.manual_seed(0)
    model = ResNet20(width=2, blocks=1).build((1, 8, 8), 3).double()
    model.relu = nn.Sequential(model.relu, nn.Dropout(0.5))  # runs after the stem, in every forward pass
    x, y = batch(64)
    x = x.view(-1, 1, 8, 8)
    rule = fa_bench.attach(model, name, seed=0, sample_input=x, **options)
    logits = model(x)
    rule.backward(F.cross_entropy(logits, y), logits, y)
    model.bn1.eval()
    before = copy.deepcopy((model.state_dict(), rule.state_dict()))
    trained = model.parameters()
    gradients = [(p, None if p.grad is None else p.grad.clone()) for p in trained]
    assert all(p.grad is not None for p in rule.feedback_parameters())
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    probe = AlignmentMeter(rule, x, y)
    first, second = probe.measure(), probe.measure()
    assert str(first) == str(second)
    assert torch.equal(torch.get_rng_state(), state)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[0][key]), key
    torch.testing.assert_close(rule.state_dict(), before[1], rtol=0, atol=0)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    for parameter, gradient in gradients:
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("name", ["fa", "dfa"])
def test_probe_does_not_leak_tensors(name: str) -> None:
    model, (x, y) = mlp(), batch()
    probe = AlignmentMeter(fa_bench.attach(model, name, seed=0), x, y)
    probe.measure()

    def tensors() -> int:
        gc.collect()
        return sum(type(thing) is Tensor for thing in gc.get_objects())

    before = tensors()
    for _ in range(3):
        probe.measure()
    assert tensors() == before


@pytest.mark.parametrize(("name", "options"), RULES, ids=IDS)
def test_backprop_angles_are_zero_and_metrics_list_layers(name: str, options: dict) -> None:
    model, (x, y) = mlp(), batch()
    got = AlignmentMeter(fa_bench.attach(model, name, seed=0, **options), x, y).measure()
    assert list(got["true_gradient_norm"]) == ["0", "2", "4"] and min(got["true_gradient_norm"].values()) > 0
    if name == "bp":
        for metric in ("weight_angle", "delta_angle", "delta_angle_one_step"):
            assert set(got[metric].values()) == {0.0}
        assert set(got["norm_ratio"].values()) == {1.0}
    if name == "frozen":
        assert got["weight_angle"] == {} and got["delta_angle"] == {"4": 0.0}


def test_angles_are_precise_near_0_and_180_degrees() -> None:
    u = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    v = torch.tensor([[1.0, 1e-9], [0.0, 2.0], [-3.0, 0.0], [2.0, 2.0], [1.0, 0.0]], dtype=torch.float64)
    got = angles(u, v)
    assert got[:4].tolist() == pytest.approx([math.degrees(1e-9), 90.0, 180.0, 45.0], rel=1e-9)
    assert math.isnan(got[4])


def test_sign_weight_angle_of_uniform_and_gaussian_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    uniform = torch.empty(300, 300).uniform_(-1, 1, generator=generator)
    gaussian = torch.empty(300, 300).normal_(generator=generator)
    # With 90,000 entries, the sample cosine is within 1e-3 of its expectation.
    assert weight_angle(uniform.sign(), uniform) == pytest.approx(30.0, abs=0.2)
    assert weight_angle(gaussian.sign(), gaussian) == pytest.approx(math.degrees(math.acos(math.sqrt(2 / math.pi))), abs=0.2)
    assert norm_ratio(3 * uniform, uniform) == pytest.approx(3.0) and math.isnan(norm_ratio(uniform, 0 * uniform))


@pytest.mark.parametrize("name", ["dfa", "dkp", "drtp"])
def test_output_angle_compares_feedback_readout_with_logits(name):
    """The output angle is the mean angle between a Bᵀ and z over the samples, where a is a hidden activation and z are the logits
    (Fig. 2 of the DKP paper)."""
    model = mlp()
    rule = fa_bench.attach(model, name, seed=0)
    x, y = batch()
    measured = AlignmentMeter(rule, x, y).measure()["output_angle"]
    with rule.exact():
        hidden = model[1](model[0](x))
        activations = {"0": hidden, "2": model[3](model[2](hidden))}
        logits = model(x)
    assert list(measured) == list(activations)
    for (layer, a), cut in zip(activations.items(), ["1", "3"], strict=True):
        read = torch.stack([sum(a[:, i] * row[i] for i in range(a.shape[1])) for row in rule.feedback[cut]["B"]], dim=1)
        assert measured[layer] == pytest.approx(mean_angle(read, logits), abs=1e-6)


def test_rules_without_direct_feedback_have_no_output_angle():
    for name in ("fa", "kp", "local_error"):
        rule = fa_bench.attach(mlp(), name, seed=0)
        assert AlignmentMeter(rule, *batch()).measure()["output_angle"] == {}


def test_feedback_and_output_layers_in_execution_order():
    """`feedback_layers` contains the layers whose input depends on a weight, and `output_layers` those that feed the logits, both
    in the order of execution."""
    probe = AlignmentMeter(fa_bench.attach(mlp(), "fa", seed=0), *batch())
    assert (probe.feedback_layers, probe.output_layers) == (["2", "4"], ["4"])

    class Two(nn.Module):
        """A net whose input enters two layers, and whose logits are the sum of the outputs of two layers."""

        def __init__(self) -> None:
            super().__init__()
            self.right, self.left, self.up, self.down = nn.Linear(5, 3), nn.Linear(5, 3), nn.Linear(7, 5), nn.Linear(7, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = (self.up(x) + self.down(x)).tanh()
            return self.left(h) + self.right(h)

    probe = AlignmentMeter(fa_bench.attach(Two().double(), "fa", seed=0, sample_input=batch()[0]), *batch())
    assert probe.output_layers == ["left", "right"] == probe.feedback_layers


@pytest.mark.parametrize(("name", "options"), [("fa", {}), ("dfa", {"output": "logits"}), ("dkp", {"output": "logits"})])
def test_angles_use_trained_output_of_several(name: str, options: dict[str, str]) -> None:
    """The model returns a hidden state before the logits, and only the logits are trained."""

    class Several(nn.Module):
        def __init__(self, several: bool) -> None:
            super().__init__()
            self.net, self.several, self.cut_points = mlp(), several, ["net.1", "net.3"]

        def forward(self, x: Tensor) -> Any:
            h = self.net[:4](x)
            return {"hidden": h, "logits": self.net[4](h)} if self.several else self.net[4](h)

    found = []
    for several in (True, False):
        objective = CrossEntropy(output="logits" if several else None)
        model = Several(several)
        rule = fa_bench.attach(model, name, seed=0, sample_input=batch()[0], objective=objective, **(options if several else {}))
        found.append(AlignmentMeter(rule, *batch()).measure())
    assert found[0]["delta_angle_one_step"]["net.0"] > 0 and found[0] == found[1]


@pytest.mark.parametrize("pooled", [False, True])
def test_projection_shortcut_is_feedback_layer(pooled: bool) -> None:
    """A projection carries an error, whether it has the same input as the block's first layer or, as in ResNet-D, this input
    after average pooling."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.projection = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 2, stride=2), nn.Conv2d(2, 2, 1)
            self.pool, self.fc = nn.AvgPool2d(2) if pooled else nn.Identity(), nn.Linear(2 * 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x).relu()
            return self.fc((self.conv(h) + self.projection(self.pool(h))[:, :, :2, :2]).relu().flatten(1))

    torch.manual_seed(0)
    model, x = Net(), torch.randn(6, 1, 4, 4)
    meter = AlignmentMeter(fa_bench.attach(model, "fa", seed=0, sample_input=x), x, torch.arange(6) % 3)
    assert meter.feedback_layers == ["conv", "projection", "fc"]
    errors = []
    for zeroed in (False, True):
        with torch.no_grad():
            model.projection.feedback_B.mul_(not zeroed)
        model.zero_grad()
        F.cross_entropy(model(x), torch.arange(6) % 3).backward()
        errors.append(model.stem.weight.grad.clone())
    assert not torch.allclose(*errors), "the projection's feedback should contribute to the stem's gradient"


def test_one_step_angle_with_in_place_module_after_cut() -> None:
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace), nn.Linear(6, 5), nn.ReLU(inplace), nn.Linear(5, 3))
        rule = fa_bench.attach(model, "dfa", cuts=["0", "2"])
        meter = AlignmentMeter(rule, torch.randn(8, 4), torch.arange(8) % 3, metrics=["delta_angle_one_step"])
        found.append(meter.measure()["delta_angle_one_step"])
    assert found[0] == found[1] and found[0].keys() == {"0", "2", "4"}


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention, self.head = nn.Linear(4, 6), nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        return self.head(self.attention(h, h, h)[0].mean(1))


@pytest.mark.parametrize("name", ["bp", "kp"])
def test_attention_layers_are_measured_despite_fused_kernel(name: str) -> None:
    """In training, `bp` runs attention as a fused kernel, which calls no layers."""
    rule = fa_bench.attach(Attends(), name, sample_input=torch.randn(2, 5, 4))
    meter = AlignmentMeter(rule, torch.randn(8, 5, 4), torch.arange(8) % 3, metrics=["delta_angle"])
    assert meter.measure()["delta_angle"].keys() == {"embed", "attention.in_proj", "attention.out_proj", "head"}


def test_meter_measures_only_selected_metrics() -> None:
    rule = fa_bench.attach(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), "fa", seed=0)
    x, y = torch.randn(5, 4), torch.arange(5) % 2
    for named in (["norm_ratio"], ["weight_angle", "delta_angle"], []):
        assert list(AlignmentMeter(rule, x, y, named).measure()) == named


@pytest.mark.parametrize("value", [None, 3.0, [1.0], {"2": "x"}, {"0": 1.0, "2": None}], ids=str)
def test_rejects_metric_without_number_per_layer(value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = fa_bench.attach(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), "fa", seed=0)
    meter = AlignmentMeter(rule, torch.randn(5, 4), torch.arange(5) % 2, ["norm_ratio"])
    monkeypatch.setattr(type(meter.metrics[0]), "measure", lambda self, passes: value)
    with pytest.raises(ConfigError, match="metric norm_ratio: its measure must return a dict with a number for each layer"):
        meter.measure()


def test_metric_values_are_converted_to_float(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = fa_bench.attach(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), "fa", seed=0)
    meter = AlignmentMeter(rule, torch.randn(5, 4), torch.arange(5) % 2, ["norm_ratio"])
    monkeypatch.setattr(type(meter.metrics[0]), "measure", lambda self, passes: {"0": 3, "2": np.float64(0.5)})
    found = meter.measure()["norm_ratio"]
    assert found == {"0": 3.0, "2": 0.5} and [type(value) for value in found.values()] == [float, float]


SHARED = [
    (name, {"match": "random", "linear": "share"} | ({"cuts": ["1"]} if name == "asfp_lc" else {}))
    for name in ("asap", "asfp", "asfp_lc")
]


@pytest.mark.parametrize(("name", "options"), [*RULES, *SHARED, ("forward_alignment", {}), ("pfa", {}), ("mixed", {})], ids=str)
def test_measured_gradients_match_training(name: str, options: dict) -> None:
    """Measured gradients equal those of training, even with shared activations. brsf is an exception: it is measured with its
    current magnitudes, but trained with new ones."""
    x, y = batch()
    rule = fa_bench.attach(mlp(), name, seed=0, sample_input=x, **options)
    with measurement_mode(rule):
        measured = dict(Passes(AlignmentMeter(rule, x, y)).gradients)
    logits = rule.model(x)
    rule.backward(F.cross_entropy(logits, y), logits, y)
    trained = {path: rule.model.get_submodule(path).weight.grad for path in measured}
    assert {path for path, gradient in measured.items() if gradient is None} == {p for p, g in trained.items() if g is None}
    for path, gradient in measured.items():
        if gradient is not None and (name != "brsf" or path == "4"):
            torch.testing.assert_close(gradient, trained[path], rtol=1e-12, atol=1e-15)


def test_layer_feeding_output_and_others_is_output_layer() -> None:
    class Ladder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.fc3 = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc2(self.fc1(x).relu())
            return y + self.fc3(y.relu())

    rule = fa_bench.attach(Ladder(), "fa", seed=0)
    assert AlignmentMeter(rule, torch.randn(3, 4), torch.arange(3)).output_layers == ["fc2", "fc3"]


class TwoHeads(nn.Module):
    """Returns two outputs in training mode and, by default, also in evaluation mode."""

    def __init__(self, in_evaluation: bool = True) -> None:
        super().__init__()
        self.fc1, self.act, self.aux, self.head = nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), nn.Linear(6, 3)
        self.in_evaluation = in_evaluation

    def forward(self, x: Tensor) -> Any:
        h = self.act(self.fc1(x))
        outputs = {"aux": self.aux(h), "logits": self.head(h)}
        return outputs if self.training or self.in_evaluation else outputs["logits"]


@pytest.mark.parametrize("name", ["bp", "fa", "kp"])
@pytest.mark.parametrize("in_evaluation", [True, False])
def test_several_outputs_require_objective_output(name: str, in_evaluation: bool) -> None:
    torch.manual_seed(0)
    model, x, y = TwoHeads(in_evaluation), torch.randn(8, 4), torch.arange(8) % 3
    rule = fa_bench.attach(model, name, seed=0, objective=CrossEntropy(label_smoothing=0.1))
    with pytest.raises(CoverageError, match="measured by the loss of one output, but this model returns aux, logits") as caught:
        meter = AlignmentMeter(rule, x, y)
        assert not in_evaluation, "not refused before the measurement"
        meter.measure()
    suggested, of_class = re.search(r"objective=(.*), with (CrossEntropy from .*)$", str(caught.value)).groups()  # type: ignore[union-attr]
    assert suggested == "CrossEntropy(output='aux', label_smoothing=0.1)"
    namespace: dict[str, Any] = {}
    kind, module = of_class.split(" from ")
    exec(f"from {module} import {kind}\nobjective = {suggested}", namespace)
    rule.detach()
    torch.manual_seed(0)
    model = TwoHeads(in_evaluation)
    rule = fa_bench.attach(model, name, seed=0, objective=dataclasses.replace(namespace["objective"], output="logits"))
    found = AlignmentMeter(rule, x, y).measure()["delta_angle"]
    plain = nn.Sequential(OrderedDict(fc1=model.fc1, act=model.act, head=model.head))
    rule.detach()
    rule = fa_bench.attach(plain, name, seed=0, objective=CrossEntropy(label_smoothing=0.1))
    want = AlignmentMeter(rule, x, y).measure()["delta_angle"]
    assert {layer: found[layer] for layer in want} == want
