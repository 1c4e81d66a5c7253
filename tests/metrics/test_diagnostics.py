"""The growth of the residual stream, the stability of gradients, the effective rank of errors and the projection angle agree with
plain loops and closed forms."""

from __future__ import annotations

import math
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fa_bench
from fa_bench.data.base import ResidentSplit
from fa_bench.errors import ConfigError
from fa_bench.metrics.alarm import Alarm
from fa_bench.metrics.meter import AlignmentMeter
from fa_bench.metrics.probes.base import Probes
from fa_bench.metrics.probes.effective_rank import EffectiveRank, last_is_features, ranks, rows
from fa_bench.metrics.probes.stability import Directions
from fa_bench.models.conv2 import Conv2
from fa_bench.models.residual_mlp import ResidualMLP
from fa_bench.models.resnet import ResNet20
from fa_bench.models.vit_mini import ViTMini
from fa_bench.objectives.cross_entropy import CrossEntropy

from .test_layer_probes import measured, mlp, random_split, subject_of


def residual(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return ResidualMLP(width=5, blocks=3, **options).build((1, 6, 6), 3)


def vit() -> nn.Module:
    torch.manual_seed(0)
    return ViTMini(width=8, heads=2, blocks=2, patch=3).build((1, 6, 6), 3)


def conv2() -> nn.Module:
    torch.manual_seed(0)
    return Conv2(channels=3, hidden=4).build((1, 8, 8), 3)


def images(size: int) -> tuple[ResidentSplit, ResidentSplit]:
    return random_split(40, size), random_split(20, size, seed=1)


# ------------------------------------------------------------------------------------------------ stream growth
def test_stream_growth_is_ratio_of_mean_norms() -> None:
    subject = subject_of(residual(), "fa")
    model, stream = subject.model, [subject.model.embed(subject.meter.x.flatten(1))]
    with torch.no_grad():
        model.layers[1].fc2.weight.mul_(100)
    for block in model.layers:
        stream.append(block(stream[-1]))
    norms = [sum(math.sqrt(sum(value**2 for value in sample)) for sample in each.tolist()) / len(each) for each in stream]
    found = measured("stream_growth", subject)["stream_growth"]
    assert list(found) == ["layers.0", "layers.1", "layers.2"]
    for number, value in enumerate(found.values()):
        assert value == pytest.approx(norms[number + 1] / norms[number], rel=1e-6)
    assert found["layers.1"] > 5 > found["layers.0"]


def test_stream_growth_averages_over_tokens() -> None:
    """The class token has a much larger norm than the other tokens, so it would dominate a norm over all tokens of a sample."""
    subject = subject_of(vit(), "bp")
    model = subject.model
    with torch.no_grad():
        model.embed.token.fill_(100.0)
        stream = [model.embed(subject.meter.x)]
        for block in model.layers:
            stream.append(block(stream[-1]))
    norms = [each.norm(dim=2).mean().item() for each in stream]
    found = measured("stream_growth", subject)["stream_growth"]
    assert list(found.values()) == pytest.approx([norms[1] / norms[0], norms[2] / norms[1]], rel=1e-6)


def test_stream_growth_between_blocks_of_mlp() -> None:
    subject = subject_of(mlp(), "fa")
    model = subject.model
    first = model.act1(model.fc1(subject.meter.x.flatten(1)))
    second = model.act2(model.fc2(first))
    found = measured("stream_growth", subject)["stream_growth"]
    assert list(found) == ["act2"], "the first block has no growth, because its input is the image"
    assert found["act2"] == pytest.approx((second.norm(dim=1).mean() / first.norm(dim=1).mean()).item(), rel=1e-6)


@pytest.mark.parametrize("rule", ["dfa", "dkp", "fdfa", "ddtp_linear", "local_error", "predsim", "ldrl", "dfc"])
@pytest.mark.parametrize("in_place", [False, True])
def test_stream_growth_does_not_depend_on_rule(rule: str, in_place: bool) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Flatten(), nn.Linear(36, 6), nn.ReLU(in_place), nn.Linear(6, 5), nn.ReLU(in_place), nn.Linear(5, 3)]
        model = nn.Sequential(*layers)
        model.cut_points = model.blocks = ["2", "4"]
        return model

    found, want = (measured("stream_growth", subject_of(net(), name))["stream_growth"] for name in (rule, "bp"))
    assert found == want and list(want) == ["4"] and want["4"] not in (0, 1)


def test_stream_growth_of_in_place_block() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(3.0))

        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(self.gain)

    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 6), Block(), nn.Linear(6, 3))
    model.blocks = ["2"]
    assert measured("stream_growth", subject_of(model, "bp"))["stream_growth"]["2"] == pytest.approx(3, rel=1e-6)


def test_stream_growth_of_resnet_starts_after_stem() -> None:
    torch.manual_seed(0)
    subject = subject_of(ResNet20(width=2, blocks=1).build((1, 6, 6), 3), "fa")
    found = measured("stream_growth", subject)["stream_growth"]
    assert list(found) == ["stages.layer1.0", "stages.layer2.0", "stages.layer3.0"]
    assert all(value > 0 for value in found.values())


def test_stream_growth_zero_input_is_nan_and_missing_blocks_raise() -> None:
    model = residual()
    with torch.no_grad():
        model.embed.weight.zero_()
        model.embed.bias.zero_()
    found = measured("stream_growth", subject_of(model, "bp"))["stream_growth"]
    assert math.isnan(found["layers.0"]) and found["layers.1"] > 0
    plain = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    with pytest.raises(ConfigError, match=r"probes=\[stream_growth\]: Sequential declares no blocks; .*residual_mlp"):
        Probes(["stream_growth"], 0, subject_of(plain, "bp"))


# ------------------------------------------------------------------------------------------------ stability
def test_mean_cosine_is_the_mean_over_all_pairs() -> None:
    vectors, seen = np.random.default_rng(0).normal(size=(5, 3, 4)) + 1, Directions()
    for vector in vectors:
        seen.add(torch.from_numpy(vector))
    flat = [vector.ravel() / np.linalg.norm(vector) for vector in vectors]
    cosines = [flat[i] @ flat[j] for i in range(5) for j in range(i)]
    assert seen.mean_cosine == pytest.approx(np.mean(cosines), rel=1e-12)
    seen.add(torch.zeros(3, 4))
    seen.add(torch.full((3, 4), math.nan))
    assert seen.count == 5, "tensors without a direction were counted"
    one = Directions()
    one.add(torch.ones(2))
    assert math.isnan(one.mean_cosine) and math.isnan(Directions().mean_cosine)


@pytest.mark.parametrize(("rule", "options"), [("bp", {}), ("fa", {}), ("dfa", {}), ("f3", {"samples": 50})])
def test_stability_is_mean_cosine_of_batch_gradients(rule: str, options: dict[str, Any]) -> None:
    """The gradients of f3 use the stored errors of the batch's own samples."""
    subject = subject_of(mlp(), rule, train=random_split(50), **options)
    if rule == "f3":
        errors = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
        subject.rule.load_state_dict({"errors": errors, "seen": torch.ones(50, dtype=torch.bool)})
    found = measured("stability", subject)["stability"]
    model, order = subject.model, torch.randperm(50, generator=torch.Generator().manual_seed(0))
    data = subject.training.subset(order)
    x, y = (torch.cat(parts) for parts in zip(*data.batches(50), strict=True))
    gradients: dict[str, list[Tensor]] = {"fc1": [], "fc2": [], "fc3": []}
    for start in range(0, 48, 6):  # eight batches of 50 // 8 = 6 images; the run's batch size is 8
        batch, labels = x[start : start + 6], y[start : start + 6]
        model.zero_grad()
        logits = model(batch)
        subject.rule.backward(F.cross_entropy(logits, labels), logits, labels, indices=order[start : start + 6])
        for layer, seen in gradients.items():
            seen.append(model.get_submodule(layer).weight.grad.flatten().double())
    for layer, seen in gradients.items():
        cosines = [F.cosine_similarity(seen[i], seen[j], dim=0).item() for i in range(8) for j in range(i)]
        assert found[layer] == pytest.approx(np.mean(cosines), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", ["stability", "gradient_norm", "effective_rank"])
def test_probes_use_trained_output(name: str) -> None:
    class TwoOutputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.net(x)
            return logits.flip(1) ** 2, logits

    found = measured(name, subject_of(TwoOutputs(), "bp", objective=CrossEntropy(output=1)))
    want = measured(name, subject_of(mlp(), "bp"))
    assert found == {quantity: {f"net.{layer}": value for layer, value in values.items()} for quantity, values in want.items()}


def test_stability_of_equal_batches_and_frozen_layers() -> None:
    data = random_split(64)
    data.images[:], data.labels[:] = data.images[:1], 1
    found = measured("stability", subject_of(mlp(), "bp", train=data))["stability"]
    assert list(found.values()) == pytest.approx([1.0] * 3, abs=1e-6)
    frozen = measured("stability", subject_of(mlp(), "frozen"))["stability"]
    assert math.isnan(frozen["fc1"]) and not math.isnan(frozen["fc3"])


# ------------------------------------------------------------------------------------------------ effective rank
def test_effective_rank_of_known_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    outer = torch.outer(torch.randn(20, generator=generator), torch.randn(7, generator=generator)).double()
    assert ranks(outer) == pytest.approx((1, 1), rel=1e-6)
    for scale in (1.0, 1e-30):
        assert ranks(scale * torch.eye(6)) == pytest.approx((6, 6), rel=1e-6)
    assert ranks(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(
        (math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)), 10 / 9), rel=1e-6
    )
    assert all(math.isnan(value) for value in (*ranks(torch.zeros(3, 2)), *ranks(torch.full((3, 2), math.inf))))


def test_effective_rank_of_rule_and_backprop_errors() -> None:
    subject = subject_of(mlp(activation="identity"), "fa")
    found = measured("effective_rank", subject)
    model, x, y = subject.model, subject.meter.x, subject.meter.y
    assert list(found) == ["effective_rank", "effective_rank_bp", "effective_rank_stable"]
    assert [list(layers) for layers in found.values()] == [["fc1", "fc2", "fc3"]] * 3
    logits = model(x).detach().requires_grad_()
    F.cross_entropy(logits, y).backward()
    error = logits.grad
    feedback = {layer: tensors["B"].detach() for layer, tensors in subject.rule.feedback.items()}
    for key, weight in (
        ("effective_rank", feedback),
        ("effective_rank_bp", dict((layer, model.get_submodule(layer).weight.detach()) for layer in ("fc2", "fc3"))),
    ):
        at_fc2 = error @ weight["fc3"]
        for layer, expected in (("fc3", error), ("fc2", at_fc2), ("fc1", at_fc2 @ weight["fc2"])):
            values = np.linalg.svd(expected.double().numpy(), compute_uv=False)
            shares = values[values > 0] / values.sum()
            assert found[key][layer] == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-4)
    # Each row of the error at the logits sums to zero, so there are at most two directions, and propagating the error to earlier
    # layers adds none.
    assert max(found["effective_rank"].values()) <= 2.001


def test_error_rows_of_feature_maps_and_tokens() -> None:
    conv, tokens = subject_of(conv2(), "dfa", *images(8)), subject_of(vit(), "fa")
    for subject, layer, shape, expected in (
        (conv, "conv1", (10, 3, 8, 8), (640, 3)),
        (conv, "conv2", (10, 3, 4, 4), (160, 3)),  # delivered as a map, before flattening
        (conv, "conv2", (10, 48), (10, 48)),
        (tokens, "embed.patches", (10, 5, 8), (50, 8)),
        (tokens, "layers.0.fc1", (10, 5, 32), (50, 32)),
    ):
        error = torch.zeros(shape)
        last = last_is_features(error, subject.model, subject.meter.trace, layer)
        assert tuple(rows(error, last).shape) == expected, layer
    error = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        rows(error, features_last=False), torch.stack([error[n, :, i, j] for n in range(2) for i in range(4) for j in range(4)])
    )


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


@pytest.mark.parametrize("kind", ["pixels", "tokens"])
def test_effective_rank_of_pixel_and_token_logits(kind: str) -> None:
    """The classes are the second axis of maps (N, C, H, W), and the last axis of tokens (N, T, C)."""
    torch.manual_seed(0)
    x = torch.randn(2, 2, 4, 5) if kind == "pixels" else torch.randn(2, 2, 7)
    conv: Any = nn.Conv2d if kind == "pixels" else nn.Conv1d
    model = nn.Sequential(conv(2, 4, 1), nn.Tanh(), conv(4, 3, 1), *([] if kind == "pixels" else [Transposed()]))
    rule = fa_bench.attach(model, "bp")
    y = torch.randint(3, (2, *x.shape[2:]))
    subject: Any = SimpleNamespace(rule=rule, model=model, meter=AlignmentMeter(rule, x, y))
    logits = model(x)
    rows_of_classes = logits.movedim(1 if kind == "pixels" else 2, -1).flatten(0, -2).detach()
    delta = rows_of_classes.softmax(1) - nn.functional.one_hot(y.flatten(), 3)
    assert EffectiveRank().measure(subject)["effective_rank"]["2"] == pytest.approx(ranks(delta)[0], rel=1e-4)


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_effective_rank_uses_errors_as_delivered_by_rule(rule: str) -> None:
    found = measured("effective_rank", subject_of(conv2(), rule, *images(8)))
    assert list(found["effective_rank"]) == ["conv1", "conv2", "fc1", "fc2"]
    assert 1 < found["effective_rank"]["conv1"] <= 3
    # With fa, the error of conv2 is delivered after flattening, with one row per sample; with dfa, it is delivered at the
    # pooling, with one row per position.
    assert 1 < found["effective_rank"]["conv2"] <= (10 if rule == "fa" else 3)
    assert found["effective_rank"]["fc2"] == pytest.approx(found["effective_rank_bp"]["fc2"], rel=1e-6)
    assert found["effective_rank"]["fc1"] != pytest.approx(found["effective_rank_bp"]["fc1"], rel=1e-3)


# ------------------------------------------------------------------------------------------------ projection angle
def test_projection_angle_matches_loop_reference() -> None:
    subject = subject_of(mlp(activation="tanh"), "fa")
    found = measured("projection_angle", subject)
    model, h = subject.model, subject.meter.x.flatten(1)
    assert list(found) == ["projection_angle"] and list(found["projection_angle"]) == ["fc1", "fc2", "fc3"]
    for layer in ("fc1", "fc2", "fc3"):
        weight, feedback = model.get_submodule(layer).weight.detach(), subject.rule.feedback[layer]["B"]
        angles = []
        for x in h.double().detach().numpy():
            one, two = weight.double().numpy() @ x, feedback.double().numpy() @ x
            angles.append(math.degrees(math.acos(one @ two / np.linalg.norm(one) / np.linalg.norm(two))))
        assert found["projection_angle"][layer] == pytest.approx(np.mean(angles), rel=1e-4)
        h = torch.tanh(model.get_submodule(layer)(h))


def test_projection_angle_ignores_unseen_input_directions() -> None:
    subject = subject_of(mlp(), "fa")
    feedback, weight = subject.rule.feedback["fc1"]["B"], subject.model.fc1.weight
    with torch.no_grad():
        x = subject.meter.x.flatten(1)
        unseen = torch.linalg.svd(x.double())[2][len(x) :].float()  # these directions do not occur in any input
        feedback.copy_(2 * weight + 5 * torch.ones(len(weight), 1) @ unseen.sum(0, keepdim=True))
    assert measured("projection_angle", subject)["projection_angle"]["fc1"] < 0.1


@pytest.mark.parametrize(
    ("rule", "layers"),
    [
        ("bp", ["conv1", "conv2", "fc1", "fc2"]),
        ("kp", ["conv1", "conv2", "fc1", "fc2"]),
        ("dfa", ["fc2"]),
        ("frozen", []),
    ],
)
def test_projection_angle_only_for_weight_shaped_feedback(rule: str, layers: list[str]) -> None:
    subject = subject_of(conv2(), rule, *images(8))
    found = measured("projection_angle", subject)["projection_angle"]
    assert list(found) == layers
    if rule == "bp":
        assert max(found.values()) == 0
    if rule == "kp":
        layer, x = subject.model.conv1, subject.meter.x
        outputs = [
            F.conv2d(x, kernel, None, layer.stride, layer.padding).flatten(1).double()
            for kernel in (layer.weight.detach(), subject.rule.feedback["conv1"]["B"].detach())
        ]
        assert found["conv1"] == pytest.approx(torch.rad2deg(torch.acos(F.cosine_similarity(*outputs))).mean().item(), rel=1e-4)
        assert found["conv1"] > 20


def test_projection_angle_omits_attention_layers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.out = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(36, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = x.flatten(1, 2)
            return self.out(self.attention(h, h, h, need_weights=False)[0].flatten(1))

    assert list(measured("projection_angle", subject_of(Net(), "fa", *images(6)))["projection_angle"]) == ["out"]


# ------------------------------------------------------------------------------------------------ alarms
def test_alarms_fire_only_beyond_threshold() -> None:
    above, below = Alarm(50, True, ""), Alarm(1e-7, False, "")
    assert [above.fires(value) for value in (49, 50, 50.1, math.inf, math.nan)] == [False, False, True, True, False]
    assert [below.fires(value) for value in (1e-6, 1e-7, 9e-8, 0, math.nan)] == [False, False, True, True, False]
    assert (above.condition, below.condition) == ("> 50", "< 1e-07")


def test_exploding_stream_triggers_growth_and_gradient_alarms() -> None:
    """The final normalisation divides the error by the norm of the stream, so the gradients of the fc2 layers vanish. At fc1 and
    embed, the large weights of fc2 multiply the error."""
    from fa_bench.metrics.alignment.metrics import TrueGradientNorm
    from fa_bench.metrics.probes.stream_growth import StreamGrowth

    model = residual()
    with torch.no_grad():
        for block in model.layers:
            block.fc2.weight.mul_(1e9)
    subject = subject_of(model, "dfa")
    growth = measured("stream_growth", subject)["stream_growth"]
    norms = subject.meter.measure()["true_gradient_norm"]
    grows = {layer for layer, value in growth.items() if StreamGrowth.alarms["stream_growth"].fires(value)}
    vanish = {layer for layer, value in norms.items() if TrueGradientNorm.alarms["true_gradient_norm"].fires(value)}
    assert "layers.0" in grows
    assert vanish == {f"layers.{number}.fc2" for number in range(3)}, "only the gradients of the fc2 layers should vanish"
    assert subject.meter.measure()["delta_angle"]["layers.1.fc2"] > 0, "the angle is not recorded"


def test_stability_and_effective_rank_of_single_layer() -> None:
    subject = subject_of(nn.Sequential(OrderedDict(flat=nn.Flatten(), fc=nn.Linear(36, 3))), "bp")
    assert list(measured("stability", subject)["stability"]) == ["fc"]
    assert list(measured("effective_rank", subject)["effective_rank"]) == ["fc"]
