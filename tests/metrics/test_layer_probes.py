"""Layer probes agree with closed forms and plain autograd, find the known properties of small nets, and restore everything that
they change."""

from __future__ import annotations

import copy
import math
import random
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fa_bench
from fa_bench.data.base import ResidentSplit, Splits
from fa_bench.errors import ConfigError
from fa_bench.mechanisms.blocks import blocks_of
from fa_bench.metrics.meter import AlignmentMeter, measurement_mode
from fa_bench.metrics.probes import base, readout
from fa_bench.metrics.probes.base import Probe, Probes, Subject, state_restored
from fa_bench.metrics.probes.depth_utility import estimate_running_statistics
from fa_bench.metrics.probes.gradient_norm import norms_and_errors
from fa_bench.models.conv2 import Conv2
from fa_bench.models.lstm import LSTM
from fa_bench.models.mlp import MLP
from fa_bench.models.resnet import ResNet20
from fa_bench.registry.registries import PROBES

CPU = torch.device("cpu")


def split(images: Tensor, labels: Tensor) -> ResidentSplit:
    return ResidentSplit(images.to(torch.uint8), labels, [0.5], [0.5], False, CPU)


def random_split(count: int, size: int = 6, classes: int = 3, seed: int = 0) -> ResidentSplit:
    generator = torch.Generator().manual_seed(seed)
    return split(torch.randint(0, 256, (count, 1, size, size), generator=generator), torch.arange(count) % classes)


def subject_of(
    model: nn.Module,
    name: str = "fa",
    train: ResidentSplit | None = None,
    test: ResidentSplit | None = None,
    validation: ResidentSplit | None = None,
    probe_size: int = 10,
    **options: object,
) -> Subject:
    train, test = train or random_split(40), test or random_split(20, seed=1)
    x, y = next(train.batches(probe_size))
    rule = fa_bench.attach(model, name, seed=0, sample_input=x[:2], **options)
    splits = Splits(train, validation, test, ["a", "b", "c"], tuple(x.shape[1:]), "")
    return Subject(rule, splits, AlignmentMeter(rule, x, y), batch_size=8)


def mlp(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return MLP(widths=[6, 6], **options).build((1, 6, 6), 3)


def measured(name: str, subject: Subject) -> dict[str, dict[str, float]]:
    return Probes([name], 0, subject).measure(0)


# ------------------------------------------------------------------------------------------------ readout
def test_readout_matches_closed_form_ridge_regression() -> None:
    generator = np.random.default_rng(0)
    for samples, features in ((50, 6), (6, 50)):  # the second has fewer samples than features
        x, labels = 3 * generator.standard_normal((samples, features)) + 1, generator.integers(0, 4, samples)
        got = readout.fit(x, labels, classes=5)  # class 4 does not occur
        centred, targets = x - x.mean(0), np.eye(5)[labels]
        strength = 0.01 * samples * x.var(0).mean()
        weight = np.linalg.solve(centred.T @ centred + strength * np.eye(features), centred.T @ (targets - targets.mean(0)))
        np.testing.assert_allclose(got.weight, weight, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(got.bias, targets.mean(0) - x.mean(0) @ weight, rtol=1e-8, atol=1e-10)
        scaled = readout.fit(1e-4 * x, labels, classes=5)
        np.testing.assert_allclose(1e-4 * scaled.weight, got.weight, rtol=1e-6, atol=1e-10)


def test_readout_detects_classes_separable_only_after_layer() -> None:
    """Bright and dark images form one class, and grey images the other. The classes are linearly separable by the distance of the
    brightness from grey, but not by the brightness."""
    grey = torch.arange(0, 256, 4)
    images, labels = grey.view(-1, 1, 1, 1), ((grey - 128).abs() > 64).long()
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 3))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0], [-1.0]]))
    found = measured("readout", subject_of(model, train=split(images, labels), test=split(images, labels)))["readout"]
    assert list(found) == ["input", "1", "3"]
    assert found["1"] > 0.95 and 0.4 < found["input"] < 0.7


def test_readout_of_input_ignores_in_place_changes() -> None:
    def floor(in_place: bool) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(nn.ReLU(in_place), nn.Flatten(), nn.Linear(36, 5), nn.Linear(5, 3))
        return measured("readout", subject_of(model, "bp"))["readout"]["input"]

    assert floor(True) == floor(False)


def test_readout_uses_input_of_next_layer() -> None:
    """The readout uses a layer's activation after ReLU and pooling, and the logits for the last layer."""
    torch.manual_seed(0)
    model = Conv2(channels=3, hidden=4).build((1, 6, 6), 3)
    subject = subject_of(model)
    seen = next(iter(readout._activations(subject, subject.splits.test, readout.activation_points(subject.meter.trace))))[0]
    x, _ = next(subject.splits.test.batches(20))
    with torch.no_grad():
        first = model.act1(model.bn1(model.conv1(x)))
        pooled = model.pool(model.act2(model.bn2(model.conv2(first))))
        np.testing.assert_allclose(seen["conv2"], first.flatten(1), atol=1e-6)
        np.testing.assert_allclose(seen["fc1"], pooled.flatten(1), atol=1e-6)
        np.testing.assert_allclose(seen[""], model(x), atol=1e-6)
    assert readout.activation_points(subject.meter.trace) == {"conv1": "conv2", "conv2": "fc1", "fc1": "fc2", "fc2": ""}


def test_readout_averages_attention_input_over_positions() -> None:
    """The features of the input to attention are on the last axis, as for a linear layer, and positions are averaged."""

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc, self.attn, self.head = nn.Linear(6, 8), nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.fc(x.squeeze(1)).relu()
            return self.head(self.attn(h, h, h)[0].mean(1))

    subject = subject_of(Attends())
    points = readout.activation_points(subject.meter.trace)
    assert points["fc"] == "attn.in_proj"
    ((seen, _),) = readout._activations(subject, subject.splits.test, points)
    x, _ = next(subject.splits.test.batches(20))
    with torch.no_grad():
        np.testing.assert_allclose(seen["attn.in_proj"], subject.model.fc(x.squeeze(1)).relu().mean(1), atol=1e-6)


def test_readout_is_test_accuracy_of_layer_classifier() -> None:
    """The input images and the logits have a classifier, too. The seven test images form one batch, and so do the thirty-one
    training images."""
    torch.manual_seed(1)
    subject = subject_of(mlp(), train=random_split(31), test=random_split(7, seed=1))
    points = readout.activation_points(subject.meter.trace)
    ((train, labels),) = readout._activations(subject, subject.splits.train, points)
    ((test, wanted),) = readout._activations(subject, subject.splits.test, points)
    found = measured("readout", subject)["readout"]
    assert list(found) == ["input", "fc1", "fc2", "fc3"]
    for layer, accuracy in found.items():
        point = readout.MODEL_INPUT if layer == "input" else points[layer]
        assert accuracy == (readout.fit(train[point], labels, 3).classify(test[point]) == wanted).mean() > 0


def test_bounded_limits_number_of_features() -> None:
    x = torch.arange(2 * 8 * 16 * 16.0).view(2, 8, 16, 16)  # 2048 numbers are too many, so one side is halved
    torch.testing.assert_close(readout.bounded(x), F.avg_pool2d(x, (2, 1)).flatten(1))
    assert readout.bounded(torch.ones(2, 3, 5, 5)).shape == (2, 75)
    flat = torch.arange(4096.0).view(1, -1)
    torch.testing.assert_close(readout.bounded(flat), flat.view(1, 1024, 4).mean(2))
    tokens = torch.rand(2, 7, 9)
    torch.testing.assert_close(readout.bounded(tokens, features_last=True), tokens.mean(1))
    integers = torch.arange(4096).view(2, 2048)
    torch.testing.assert_close(readout.bounded(integers), integers.view(2, 1024, 2).float().mean(2))


def test_readout_of_constant_or_nonfinite_features() -> None:
    labels = np.array([2, 2, 0, 2])
    same = readout.fit(np.ones((4, 3), np.float32), labels, 3)
    assert same.classify(np.random.default_rng(0).normal(size=(5, 3))).tolist() == [2] * 5  # the most frequent class
    assert readout.fit(np.full((4, 3), np.nan), labels, 3).void
    one_class = readout.fit(np.random.default_rng(0).normal(size=(6, 3)), np.ones(6, int), 3)
    assert one_class.classify(np.random.default_rng(1).normal(size=(4, 3))).tolist() == [1] * 4
    one_sample = readout.fit(np.ones((1, 3)), np.array([1]), 3)
    assert one_sample.classify(np.zeros((2, 3))).tolist() == [1, 1]
    model = mlp()
    with torch.no_grad():
        model.fc2.weight.fill_(math.inf)
    found = measured("readout", subject_of(model))["readout"]
    assert math.isnan(found["fc2"]) and found["fc1"] >= 0


def test_probes_prefer_validation_split_and_limit_images(monkeypatch: pytest.MonkeyPatch) -> None:
    empty, held = random_split(0), random_split(12, seed=2)
    for validation, images in ((held, 12), (empty, 20), (None, 20)):
        assert len(subject_of(mlp(), validation=validation).scored) == images
    monkeypatch.setattr(base, "TRAINING_IMAGES", 10)
    monkeypatch.setattr(base, "SCORED_IMAGES", 5)
    subject = subject_of(mlp())
    assert len(subject.training) == 10 and len(subject.scored) == 5
    assert torch.equal(subject.training.labels, subject.training.labels)  # selected again at each access
    assert all(0 <= value <= 1 for layers in measured("readout", subject).values() for value in layers.values())


# ------------------------------------------------------------------------------------------------ gradient norm
def test_gradient_norms_match_autograd() -> None:
    subject = subject_of(mlp(batch_norm=True), "fa")
    found = measured("gradient_norm", subject)
    assert list(found) == ["gradient_norm", "gradient_norm_update", "gradient_norm_floor"]
    model, x, y = subject.model, subject.meter.x, subject.meter.y
    model.train()
    for quantity, exact in (("gradient_norm", True), ("gradient_norm_update", False)):
        model.zero_grad()
        with subject.rule.exact() if exact else torch.enable_grad():
            F.cross_entropy(model(x), y).backward()
        for layer in ("fc1", "fc2", "fc3"):
            norm = model.get_submodule(layer).weight.grad.norm().item()
            assert found[quantity][layer] == pytest.approx(norm, rel=1e-5)
    assert found["gradient_norm_update"]["fc1"] != pytest.approx(found["gradient_norm"]["fc1"], rel=1e-2)
    model.zero_grad()
    true = AlignmentMeter(subject.rule, x, y).measure()["true_gradient_norm"]
    assert found["gradient_norm"] == pytest.approx(true, rel=1e-6)


@pytest.mark.parametrize("samples", [2, 10, 16, 37])
def test_gradient_norm_floor_matches_formula(samples: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    x, y = torch.randn(samples, 4, dtype=torch.float64), torch.arange(samples) % 3
    (norm,), (floor,) = norms_and_errors(F.cross_entropy(x @ weight.t(), y, reduction="none"), [weight])
    groups, dealt = min(16, samples), torch.randperm(samples, generator=torch.Generator().manual_seed(0))
    x, y = x[dealt], y[dealt]
    gradients = [torch.autograd.grad(F.cross_entropy(x[k::groups] @ weight.t(), y[k::groups]), weight)[0] for k in range(groups)]
    shares = [len(y[k::groups]) / samples for k in range(groups)]
    whole = torch.autograd.grad(F.cross_entropy(x @ weight.t(), y), weight)[0]
    squares = sum(share**2 * (g - whole).square().sum() for share, g in zip(shares, gradients, strict=True))
    assert norm == pytest.approx(whole.norm().item(), rel=1e-9)
    assert floor == pytest.approx(math.sqrt(squares / (1 - sum(share**2 for share in shares))), rel=1e-6)


def test_gradient_norm_floor_matches_norm_of_pure_noise() -> None:
    """For gradients of independent samples with mean zero, the squares of the norm and of the floor agree on average over many
    draws, even in unequal groups."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.zeros(30, dtype=torch.float64, requires_grad=True)
    norms, floors = [], []
    for _ in range(100):
        noise = torch.randn(23, 30, generator=generator, dtype=torch.float64)
        (norm,), (floor,) = norms_and_errors(noise @ weight, [weight])
        norms.append(norm**2)
        floors.append(floor**2)
    # The relative standard deviation of ‖g‖² is √(2/30), and that of its mean over 100 draws is 0.026. The gradients below repeat
    # with a period that divides the number of groups, as the classes of a dataset may.
    turns = torch.randn(4, 30, generator=generator, dtype=torch.float64).repeat(40, 1)
    _, (floor,) = norms_and_errors(turns @ weight, [weight])
    spread = (turns - turns.mean(0)).square().sum() / 159 / 160
    # With only a few directions, 16 groups give a relative standard deviation of about √(2/15) / 2.
    assert floor == pytest.approx(spread.sqrt().item(), rel=0.4)
    assert np.mean(floors) == pytest.approx(np.mean(norms), rel=0.1) == pytest.approx(30 / 23, rel=0.1)


def test_equal_samples_have_negligible_gradient_norm_floor() -> None:
    """For identical samples, rounding may leave a variance below zero, which must not cause an error."""
    for samples in range(2, 60):
        generator = torch.Generator().manual_seed(samples)
        weight = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
        x = torch.randn(1, 4, generator=generator, dtype=torch.float64).expand(samples, 4)
        losses = F.cross_entropy(x @ weight.t(), torch.zeros(samples, dtype=torch.long), reduction="none")
        (norm,), (floor,) = norms_and_errors(losses, [weight])
        assert norm > 0 and floor < 1e-6 * norm


def test_gradient_norm_of_zero_gradients_and_single_sample() -> None:
    model = mlp()
    with torch.no_grad():
        model.fc3.weight.zero_()
    found = measured("gradient_norm", subject_of(model, "bp"))
    for quantity in found:
        assert found[quantity]["fc1"] == found[quantity]["fc2"] == 0
        assert found[quantity]["fc3"] > 0
    alone = measured("gradient_norm", subject_of(mlp(), probe_size=1))
    assert all(math.isnan(value) for value in alone["gradient_norm_floor"].values())
    assert all(value > 0 for value in alone["gradient_norm"].values())


def test_unused_weight_has_zero_gradient_norm() -> None:
    weight, other = (torch.ones(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    x = torch.arange(15, dtype=torch.float64).view(5, 3)
    norms, floors = norms_and_errors(x @ weight, [weight, other])
    assert norms == [pytest.approx(x.mean(0).norm().item()), 0] and floors[0] > 0 == floors[1]


def test_frozen_rule_has_gradient_norm_but_no_update() -> None:
    found = measured("gradient_norm", subject_of(mlp(), "frozen"))
    assert found["gradient_norm"]["fc1"] > 0 and found["gradient_norm_update"]["fc1"] == 0
    assert found["gradient_norm_update"]["fc3"] == pytest.approx(found["gradient_norm"]["fc3"])


# ------------------------------------------------------------------------------------------------ depth utility
def test_blocks_contain_modules_between_their_ends() -> None:
    torch.manual_seed(0)
    x = torch.zeros(2, 1, 8, 8)
    found = blocks_of(Conv2(channels=3, hidden=4).build((1, 8, 8), 3), x)
    assert {block: sorted({name.split(".")[0] for name in names}) for block, names in found.items()} == {
        "act1": ["bn1", "conv1"],
        "pool": ["bn2", "conv2"],
        "act3": ["bn3", "fc1"],
    }
    net = ResNet20(width=2, blocks=1).build((1, 8, 8), 3)
    found = blocks_of(net, x)
    assert list(found) == ["relu", "stages.layer1.0", "stages.layer2.0", "stages.layer3.0"]
    assert {name for names in found.values() for name in names} == {
        name for name, _ in net.named_parameters() if not name.startswith("fc.")
    }


@pytest.mark.parametrize("name", ["kp", "dkp", "predsim"])
def test_blocks_of_attached_model_match_plain_model(name: str) -> None:
    """Learned feedback is not part of the blocks. Otherwise, the learned feedback at a cut without a preceding layer in its block
    would form a separate block."""
    model = Conv2(channels=3, hidden=4).build((1, 6, 6), 3)
    model.cut_points = model.blocks = ["act1", "act2", "pool", "act3"]
    x = torch.rand(4, 1, 6, 6)
    plain = blocks_of(model, x)
    assert list(plain) == ["act1", "act2", "act3"]  # there is nothing between act2 and the pooling
    fa_bench.attach(model, name, seed=0, sample_input=x, **({} if name == "kp" else {"cuts": ["act1", "pool", "act3"]}))
    assert blocks_of(model, x) == plain


def test_depth_utility_is_accuracy_lost_without_block_training() -> None:
    """The class says whether an image is brighter than average. The first block initially removes the brightness, and is trained
    to preserve it."""
    grey = torch.arange(0, 256, 8)
    data = split(grey.view(-1, 1, 1, 1), (grey > 127).long())
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 1), nn.Identity(), nn.Linear(1, 1), nn.Identity(), nn.Linear(1, 3))
    model.blocks = ["2", "4"]
    with torch.no_grad():
        for layer, weight in ((1, [[0.0]]), (3, [[1.0]]), (5, [[-99.0], [99.0], [0.0]])):
            model[layer].weight.copy_(torch.tensor(weight))
            model[layer].bias.zero_()
        model[5].bias.copy_(torch.tensor([0.1, 0.0, -9.0]))
    probes = Probes(["depth_utility"], 0, subject_of(model, train=data, test=data))
    with torch.no_grad():
        model[1].weight.fill_(1.0)
    # With the initial weights of the first block, all images are assigned to class 0, which is correct for half of them. The
    # second block is still the identity that it was initially.
    assert probes.measure(0) == {"depth_utility": {"2": 0.5, "4": 0.0}}
    assert model[1].weight.item() == 1.0


def test_depth_utility_uses_rule_predict() -> None:
    subject = subject_of(mlp())
    probes, asked = Probes(["depth_utility"], 0, subject), []
    subject.rule.predict = lambda x: asked.append(len(x)) or torch.eye(3)[torch.arange(len(x)) % 3]  # every prediction is right
    with torch.no_grad():
        subject.model.fc1.weight.add_(1.0)
    assert set(probes.measure(0)["depth_utility"].values()) == {0.0}
    assert asked == [20, 20, 20]


def test_depth_utility_uses_output_of_rule() -> None:
    class TwoOutputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()
            self.cut_points = self.blocks = ["net.act1", "net.act2"]

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.net(x)
            return -logits, logits

    def utility(model: nn.Module, **options: object) -> list[float]:
        probes = Probes(["depth_utility"], 0, subject_of(model, "dfa", **options))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("fc2.weight"):
                    parameter.mul_(-3)
        return list(probes.measure(0)["depth_utility"].values())

    want = utility(mlp())
    assert utility(TwoOutputs(), output=1) == want and any(want)


@pytest.mark.parametrize("net", ["mlp", "resnet"])
def test_depth_utility_of_untrained_blocks_is_zero(net: str) -> None:
    torch.manual_seed(0)
    model = mlp(batch_norm=True) if net == "mlp" else ResNet20(width=2, blocks=1).build((1, 6, 6), 3)
    subject = subject_of(model, "frozen")
    probes = Probes(["depth_utility"], 0, subject)
    model.train()
    model(5 * subject.meter.x + 1)  # changes the running statistics
    with torch.no_grad():
        (model.fc3 if net == "mlp" else model.fc).weight.normal_()
    assert set(probes.measure(0)["depth_utility"].values()) == {0.0}


def test_depth_utility_reestimates_running_statistics() -> None:
    from fa_bench.metrics.evaluation import evaluate
    from fa_bench.objectives.cross_entropy import CrossEntropy

    subject = subject_of(mlp(batch_norm=True), "bp", train=random_split(60), test=random_split(200, seed=1))
    probes, model = Probes(["depth_utility"], 0, subject), subject.model
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
        model.bn1.running_mean.fill_(50.0)  # far from the true means
    found = probes.measure(0)["depth_utility"]

    def accuracy(reset: list[str]) -> float:
        net = copy.deepcopy(model)
        net.load_state_dict({name: subject.initial[name] for name in reset}, strict=False)
        estimate_running_statistics(net, subject.training, subject.batch_size)
        return evaluate(net, CrossEntropy(), subject.scored, 8)["accuracy"]

    whole = accuracy([])
    for block, layers in (("act1", ("fc1", "bn1")), ("act2", ("fc2", "bn2"))):
        expected = whole - accuracy([f"{layer}.{name}" for layer in layers for name in ("weight", "bias")])
        assert found[block] == expected != 0


def test_running_statistics_are_the_mean_over_the_batches() -> None:
    model, data = mlp(batch_norm=True), random_split(24)
    estimate_running_statistics(model, data, 8)
    inputs = torch.stack([model.fc1(x.flatten(1)) for x, _ in data.batches(8)])
    torch.testing.assert_close(model.bn1.running_mean, inputs.mean(1).mean(0))
    torch.testing.assert_close(model.bn1.running_var, inputs.var(1).mean(0))
    assert model.bn1.momentum == 0.1 and not model.training


def test_depth_utility_rejects_model_without_blocks() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    with pytest.raises(ConfigError, match=r"^probes=\[depth_utility\]: Sequential declares no blocks .* architecture=mlp"):
        Probes(["depth_utility"], 0, subject_of(model, "bp"))
    model = mlp()
    del model.blocks  # blocks may also be given by cut points
    assert list(measured("depth_utility", subject_of(model))["depth_utility"]) == ["act1", "act2"]


# ------------------------------------------------------------------------------------------------ no trace
class Vandal(Probe):
    """A probe that changes everything it can."""

    name = "vandal"

    def measure(self, subject: Subject) -> dict[str, dict[str, float]]:
        model = subject.model
        model.train()
        logits = model(subject.meter.x)
        subject.rule.deliver(F.cross_entropy(logits, subject.meter.y), logits, subject.meter.y)
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers(), *subject.rule.feedback_parameters()]:
                tensor.requires_grad_(False).add_(1)
        torch.rand(3), np.random.rand(3), random.random()
        return {"vandal": {"fc1": 1.0}}


@pytest.mark.parametrize("name", ["brsf", "kp", "wm", "pfa", "asap", "dfa", "dgl", "epc", "pc"])
def test_probe_side_effects_are_undone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROBES._entries, "vandal", Vandal)
    subject = subject_of(mlp(batch_norm=True), name)
    rule, model, x, y = subject.rule, subject.model, subject.meter.x, subject.meter.y
    rule.backward(F.cross_entropy(logits := model(x), y), logits, y)
    model.bn1.eval()
    before = copy.deepcopy((model.state_dict(), rule.state_dict(), rule.feedback))
    trained = list(model.parameters())
    gradients = [None if p.grad is None else p.grad.clone() for p in trained]
    flags, modes = [p.requires_grad for p in trained], [module.training for module in model.modules()]
    drawn = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    fitting = [probe for probe in PROBES if probe != "energy" or name in ("epc", "pc")]
    Probes(["vandal", *fitting], 0, subject).measure(0)
    torch.testing.assert_close((model.state_dict(), rule.state_dict(), rule.feedback), before, rtol=0, atol=0)
    assert [p.requires_grad for p in trained] == flags and [module.training for module in model.modules()] == modes
    for parameter, gradient in zip(trained, gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)
    assert torch.equal(torch.get_rng_state(), drawn[0]) and random.getstate() == drawn[2]
    assert np.random.get_state()[1].tolist() == drawn[1]


def test_state_restored_keeps_pending_brsf_sample() -> None:
    """brsf samples its feedback only when the feedback is read. If a sample is pending when the state is saved, the restored
    values must be those of the pending sample, not of an earlier one."""
    drawn = []
    for probed in (True, False):
        subject = subject_of(mlp(), "brsf")
        subject.model.train()(subject.meter.x)
        if probed:
            with state_restored(subject.rule):
                assert subject.rule.feedback
        drawn.append([subject.rule.feedback[layer]["M"].clone() for layer in ("fc1", "fc2", "fc3")])
    assert all(torch.equal(one, other) for one, other in zip(*drawn, strict=True))


def test_state_is_restored_after_failed_probe() -> None:
    subject = subject_of(mlp())
    before = copy.deepcopy(subject.model.state_dict())
    with pytest.raises(KeyboardInterrupt), state_restored(subject.rule), torch.no_grad():
        subject.model.fc1.weight.zero_()
        raise KeyboardInterrupt
    torch.testing.assert_close(subject.model.state_dict(), before, rtol=0, atol=0)


def test_running_statistics_use_full_batches_without_dropout() -> None:
    """Of 25 images in batches of 8, the last image is left out, because normalisation does not support a batch of one. The
    dropout before the normalisation is switched off."""
    model, data = mlp(batch_norm=True), random_split(25)
    plain = copy.deepcopy(model)
    model.fc1 = nn.Sequential(model.fc1, nn.Dropout(0.5))
    estimate_running_statistics(model, data, 8)
    estimate_running_statistics(plain, split(data.images[:24], data.labels[:24]), 8)
    torch.testing.assert_close(model.bn1.running_mean, plain.bn1.running_mean)
    torch.testing.assert_close(model.bn2.running_var, plain.bn2.running_var)


def test_module_list_called_blocks_does_not_declare_blocks() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.cut_points = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), ["blocks.0"]

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[1](self.blocks[0](x).relu())

    assert blocks_of(Net(), torch.zeros(2, 4)) == {"blocks.0": ["blocks.0.weight", "blocks.0.bias"]}


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_bounded_averages_maps_of_any_dimension(dims: int) -> None:
    """A sample has 1536 numbers, so pairs of neighbours along the first spatial axis are averaged."""
    sides = {1: [192], 2: [12, 16], 3: [12, 4, 4]}[dims]
    x = torch.rand(2, 8, *sides, generator=torch.Generator().manual_seed(0))
    assert x[0].numel() == 1536
    torch.testing.assert_close(readout.bounded(x), x.unflatten(2, (sides[0] // 2, 2)).mean(3).flatten(1))


def test_nested_measurements_freeze_random_until_outermost_ends() -> None:
    """Measurements can be nested, because a probe may itself measure angles."""
    subject = subject_of(mlp(batch_norm=True), "brsf")
    rule, mode = subject.rule, subject.rule.mode
    for outer in (state_restored, measurement_mode):
        with outer(rule):
            for inner in (state_restored, measurement_mode):
                with inner(rule):
                    assert mode.freeze_random
                assert mode.freeze_random
        assert not mode.freeze_random


def test_probes_are_due_at_epoch_interval() -> None:
    for every, epochs in ((0, []), (1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (4, [4])):
        probes = Probes(["gradient_norm"], every, subject_of(mlp()))
        assert [epoch for epoch in range(1, 7) if probes.due(epoch)] == epochs
        assert not any(Probes([], every, subject_of(mlp())).due(epoch) for epoch in range(1, 7))


def test_probes_are_measured_once_per_update() -> None:
    subject = subject_of(mlp(), "bp")
    probes = Probes(["gradient_norm", "gradient_norm"], 0, subject)
    assert len(probes.probes) == 1
    first = probes.measure(0)
    with torch.no_grad():
        subject.model.fc1.weight.mul_(2)
    assert probes.measure(0) is first
    assert probes.measure(1)["gradient_norm"]["fc3"] != first["gradient_norm"]["fc3"]


def test_readout_of_images_is_renamed_if_first_layer_is_called_input() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(flat=nn.Flatten(), input=nn.Linear(36, 6), act=nn.ReLU(), out=nn.Linear(6, 3)))
    subject = subject_of(model)
    found = measured("readout", subject)["readout"]
    assert list(found) == ["(input)", "input", "out"]
    other = nn.Sequential(OrderedDict(zip(("flat", "fc", "act", "out"), model, strict=True)))
    subject.rule.detach()
    assert list(measured("readout", subject_of(other))["readout"].values()) == list(found.values())


def test_readout_of_images_is_renamed_if_hidden_layer_is_called_input() -> None:
    found = []
    for name in ("input", "fc2"):
        torch.manual_seed(0)
        layers = {
            "flat": nn.Flatten(),
            "fc1": nn.Linear(36, 6),
            "act1": nn.ReLU(),
            name: nn.Linear(6, 5),
            "act2": nn.ReLU(),
            "out": nn.Linear(5, 3),
        }
        found.append(measured("readout", subject_of(nn.Sequential(OrderedDict(layers))))["readout"])
    assert list(found[0]) == ["(input)", "fc1", "input", "out"] and list(found[1]) == ["input", "fc1", "fc2", "out"]
    assert list(found[0].values()) == list(found[1].values())


def test_probes_use_at_most_2000_training_and_10000_scored_images() -> None:
    """The documented numbers of images are upper limits."""
    subject = subject_of(mlp(), train=random_split(2001), test=random_split(10_001))
    assert (len(subject.training), len(subject.scored)) == (2000, 10_000)


def test_readout_uses_sequence_mean_and_first_run_of_layer() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again, self.out = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x.flatten(1, 2)).tanh()  # six rows of six pixels each are a sequence
            return self.out(self.again(self.again(h).tanh()).mean(1))

    torch.manual_seed(0)
    subject = subject_of(Twice())
    points = readout.activation_points(subject.meter.trace)
    seen = next(iter(readout._activations(subject, subject.splits.test, points)))[0]
    x, _ = next(subject.splits.test.batches(20))
    with torch.no_grad():
        np.testing.assert_allclose(seen["again"], subject.model.first(x.flatten(1, 2)).tanh().mean(1), atol=1e-6)


def test_readout_of_recurrent_layer_uses_last_state() -> None:
    """The first input of the recurrent weight is the initial state, which is zero, so the readout uses its last input, which is
    the state before the last."""
    torch.manual_seed(0)
    subject = subject_of(LSTM(width=8).build((1, 6, 6), 3))
    model: nn.Module = subject.model
    layer = "rnn.hh_l0"
    seen = next(iter(readout._activations(subject, subject.splits.test, {layer: layer})))[0]
    x, _ = next(subject.splits.test.batches(20))
    with torch.no_grad():
        before_last = model.rnn(model.read(x)[:, :-1])[0][:, -1]
    np.testing.assert_allclose(seen[layer], before_last, atol=1e-6)


def test_user_frozen_weights_have_gradient_norm_but_no_update() -> None:
    found = []
    for frozen in (False, True):
        model = mlp()
        model.fc1.weight.requires_grad_(not frozen)
        found.append(measured("gradient_norm", subject_of(model)))
        assert model.fc1.weight.requires_grad != frozen
    assert found[1]["gradient_norm"] == pytest.approx(found[0]["gradient_norm"]) and found[1]["gradient_norm_update"]["fc1"] == 0
    assert found[1]["gradient_norm_floor"] == pytest.approx(found[0]["gradient_norm_floor"])


@pytest.mark.parametrize(
    ("name", "y", "message"),
    [
        ("readout", torch.zeros(10, 4, dtype=torch.long), "one class per sample, .* one class per position"),
        ("readout", torch.zeros(10, 3), "one class per sample, .* numbers"),
    ],
)
def test_readout_rejects_unsupported_targets_before_training(name: str, y: Tensor, message: str) -> None:
    subject = subject_of(nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, 3)))
    subject.meter.y = y
    with pytest.raises(ConfigError, match=rf"probes=\[{name}\]: .*{message}"):
        Probes([name], 0, subject)
