"""Tests of wm: the effect of one mirror step, the distribution of its noise, and the resulting angles."""

import math
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import fa_bench
from fa_bench.metrics.angles import weight_angle
from fa_bench.registry.options import as_plain
from fa_bench.rules.wm import WM, MirroredFeedback, Noise

from . import nets
from .helpers import array, assert_matches, distance, feedback_arrays
from .reference import describe, weighted
from .references.mirror import mirror_step, undecayed_step
from .test_contract import LAYERS


class Gain(nn.Module):
    """A module with a trainable gain that precedes the tested layer, so that an error must pass through that layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.gain


def behind_gain(layer: nn.Module, shape, dtype=torch.float64, **options):
    """Attach wm to a gain followed by `layer`, and return the layer, its pathway and the rule before the first mirror step."""
    model = nn.Sequential(OrderedDict(gain=Gain(), layer=layer)).to(dtype)
    sample = torch.zeros(shape, dtype=dtype)
    rule = fa_bench.attach(model, "wm", seed=0, sample_input=sample, **{"initial_steps": 0} | options)
    assert isinstance(model.layer.pathway, MirroredFeedback)
    return model.layer, model.layer.pathway, rule


# --- one step ------------------------------------------------------------------------------------------------------------------

STEPS = [
    {},
    {"activation": "relu", "mirror_rate": 0.3, "noise": "uniform", "sigma": 2.0},
    {"activation": "relu", "block_bias": False, "per_tap": False},
    {"activation": "tanh", "sigma": 0.1, "block_bias": False},
    {"activation": "sigmoid", "sigma": 0.5, "mirror_rate": 1.0},
    {"block_bias": False, "sigma": 0.3},
    {"mirror_decay": 0.0},
    {"mirror_decay": 0.0, "mirror_rate": 0.2, "activation": "relu", "block_bias": False},
    {"mirror_decay": 0.7, "mirror_rate": 0.4, "per_tap": False},
]


@pytest.mark.parametrize("net", ["mlp_tanh", "conv", "conv_bn"])
@pytest.mark.parametrize("options", STEPS, ids=str)
def test_mirror_steps_match_reference(net, options):
    """Two mirror steps match plain loops that use the same noise, with a new sample for each step. The nets include strides,
    padding and groups. The first layer is not mirrored, so its B keeps its initial value."""
    model, (x, _) = nets.NETS[net](), nets.batch(net)
    chain = describe(model)
    rule = fa_bench.attach(model, "wm", seed=0, sample_input=x, initial_steps=0, mirror_steps=2, mirror_batch=3, **options)
    want = {layer: tensors["B"] for layer, tensors in feedback_arrays(rule).items()}
    settings = {key.removeprefix("mirror_"): value for key, value in options.items() if key != "noise"}
    stages = {stage.name: stage for stage in chain}
    for layer in weighted(chain)[1:]:
        module = model.get_submodule(layer)
        for number in (1, 2):
            noise = array(module.pathway.noise.sample(number, module.weight))
            want[layer] = mirror_step(stages[layer], array(module.weight), array(module.bias), want[layer], noise, **settings)
    before = feedback_arrays(rule)
    rule.step()
    assert_matches({layer: tensors["B"] for layer, tensors in feedback_arrays(rule).items()}, want)
    first, *others = weighted(chain)
    assert np.array_equal(before[first]["B"], want[first])
    assert all(distance(before[layer]["B"], want[layer]) > 1e-3 for layer in others)


def test_docstring_settings_reproduce_released_code():
    """Each step must add 0.01 Σ yᵀ x to B, where x has 128 samples from U(±0.05) and y is the output of a sigmoid layer with
    biases."""
    settings = dict(pair.split("=") for pair in re.search(r"^ +(noise=uniform .*)$", WM.__doc__, re.M)[1].split())
    options = WM.from_mapping({key: yaml.safe_load(value) for key, value in settings.items()})
    torch.manual_seed(0)
    module, pathway, rule = behind_gain(nn.Linear(6, 5), (2, 6), **as_plain(options) | {"initial_steps": 0})
    want = array(module.feedback_B)
    for number in (1, 2, 3):
        noise = array(pathway.noise.sample(number, module.weight))
        assert noise.shape == (128, 6) and 0.045 < np.abs(noise).max() <= 0.05
        want = undecayed_step(array(module.weight), array(module.bias), want, noise)
        rule.step()
    # The docstring gives its numbers to only five or six digits.
    assert distance(module.feedback_B, want) < 1e-5


@pytest.mark.parametrize(("decay", "factor"), [(0.0, 8 * 0.2), (0.5, 0.4 * (1 - 0.5**8)), (None, 1 - 0.8**8)])
def test_mirror_decay_determines_feedback_scale(decay, factor, monkeypatch):
    """With noise that reveals W exactly and η = 0.2, eight steps from B = 0 lead to B = ηW Σ (1 - λ)^k. Without decay, the sum
    grows without bound."""
    module, pathway, rule = behind_gain(nn.Linear(6, 5), (2, 6), mirror_rate=0.2, mirror_decay=decay, b_init="zeros")
    axes = torch.eye(6, dtype=torch.float64).mul(math.sqrt(6))
    pathway.noise = pathway.noise._replace(batch=6)
    monkeypatch.setattr(Noise, "sample", lambda self, number, like: axes)
    for _ in range(8):
        rule.step()
    assert distance(module.feedback_B, factor * array(module.weight)) < 1e-12


def test_mirror_decay_defaults_to_mirror_rate():
    """A decay equal to the mirror rate gives a B that is bitwise identical to the one with the default decay."""
    pair = []
    for options in ({}, {"mirror_decay": 0.03}):
        torch.manual_seed(0)
        module, _, rule = behind_gain(nn.Conv2d(2, 3, 3), (1, 2, 5, 5), torch.float32, mirror_rate=0.03, **options)
        rule.step()
        pair.append(module.feedback_B)
    assert torch.equal(*pair)


# torch warns once that an even kernel with padding='same' needs a padded copy of the input.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("activation", ["linear", "relu"])
@pytest.mark.parametrize("layer", LAYERS)
def test_mean_estimate_over_white_noise_equals_weight(layer, activation, monkeypatch):
    """One step with rate 1 gives B = E[Ŵ] = W for every layer geometry.

    The step depends only on the second moments of x. Noise of ±√F along each axis in turn has exactly the second moments of white
    noise, so the test has no Monte Carlo error. ReLU's factor of 1/2 is exact because the noise is symmetric.
    """
    build, shape = LAYERS[layer]
    torch.manual_seed(0)
    module, pathway, rule = behind_gain(build(), shape, mirror_rate=1.0, activation=activation)
    size = math.prod(pathway.noise.shape)
    axes = torch.eye(size, dtype=torch.float64).mul(math.sqrt(size)).view(size, *pathway.noise.shape)
    pathway.noise = pathway.noise._replace(batch=2 * size)
    monkeypatch.setattr(Noise, "sample", lambda self, number, like: torch.cat([axes, -axes]))
    assert distance(module.feedback_B, array(module.weight)) > 0.1
    rule.step()
    # The tolerance covers the rounding of sums of a few hundred products of order 1.
    assert distance(module.feedback_B, array(module.weight)) < 1e-12


def test_mirror_uses_output_size_of_forward_pass(monkeypatch):
    """If the caller of a transposed convolution sets the output size, the positions of each kernel tap must be counted at that
    size."""

    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.up = Gain(), nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, dtype=torch.float64)

        def forward(self, x):
            return self.up(self.gain(x), output_size=[8])

    model = Sized()
    rule = fa_bench.attach(model, "wm", sample_input=torch.zeros(1, 2, 4, dtype=torch.float64), initial_steps=0, mirror_rate=1.0)
    axes = torch.eye(8, dtype=torch.float64).mul(math.sqrt(8)).view(8, 2, 4)
    pathway = model.up.pathway
    pathway.noise = pathway.noise._replace(batch=8)
    monkeypatch.setattr(Noise, "sample", lambda self, number, like: axes)
    assert pathway.positions.flatten().tolist() == [3, 4, 4]  # with the default, output_size=[7], the last tap has 3 positions
    rule.step()
    assert distance(model.up.feedback_B, array(model.up.weight)) < 1e-12


def test_single_position_count_underestimates_border_taps(monkeypatch):
    """A 3x3 kernel acts on a 4x4 map with padding 1. A side tap meets the input at 12 of the 16 positions, and a corner tap at
    only 9 of them."""
    module, pathway, rule = behind_gain(nn.Conv2d(2, 3, 3, padding=1), (1, 2, 4, 4), mirror_rate=1.0, per_tap=False)
    axes = torch.eye(32, dtype=torch.float64).mul(math.sqrt(32)).view(32, 2, 4, 4)
    pathway.noise = pathway.noise._replace(batch=32)
    monkeypatch.setattr(Noise, "sample", lambda self, number, like: axes)
    rule.step()
    shares = torch.tensor([[9, 12, 9], [12, 16, 12], [9, 12, 9]], dtype=torch.float64) / 16
    assert distance(module.feedback_B, array(module.weight * shares)) < 1e-12


def test_taps_on_padding_only_become_zero():
    """If a 3x3 kernel acts on a single pixel, only its middle entry depends on the input and propagates an error to it."""
    module, _, rule = behind_gain(nn.Conv2d(2, 3, 3, padding=1), (1, 2, 1, 1), mirror_rate=1.0)
    rule.step()
    middle = torch.zeros(3, 3, dtype=torch.bool)
    middle[1, 1] = True
    assert not module.feedback_B[:, :, ~middle].any() and module.feedback_B[:, :, middle].all()


# --- distribution of the noise -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["gaussian", "uniform"])
@pytest.mark.parametrize(("activation", "c"), [("linear", 1), ("relu", 2)])
def test_linear_estimate_variance_matches_prediction(noise, activation, c):
    """Each entry of Ŵ - W has mean 0 and, with Gaussian noise, the variance c (‖w‖² + w²) / N.

    With uniform noise, the variance is slightly smaller. The test draws ten estimates of 480 entries. The largest of 4800 normal
    samples exceeds 5.5 standard deviations in about one of 5000 runs. The root mean square of the correlated entries, in units of
    their standard deviation, is 1 to within 10 %.
    """
    torch.manual_seed(0)
    module, _, rule = behind_gain(
        nn.Linear(40, 12), (2, 40), mirror_rate=1.0, mirror_batch=1000, noise=noise, activation=activation, sigma=0.7
    )
    weight, scores = module.weight.detach(), []
    for _ in range(10):
        rule.step()
        deviation = (c * (weight.square().sum(1, keepdim=True) + weight.square()) / 1000).sqrt()
        scores.append((module.feedback_B - weight) / deviation)
    scores = torch.stack(scores)
    assert scores.abs().max() < 5.5
    assert scores.square().mean().sqrt().item() == pytest.approx(1, abs=0.1)
    assert abs(scores.mean().item()) < 5 / math.sqrt(scores.numel()) * 2  # the entries of a row are correlated
    assert (scores.mean(0).square().mean().sqrt() * math.sqrt(10)).item() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("activation", ["linear", "relu"])
def test_strided_convolution_estimate_is_unbiased(activation):
    """The mean of 40 samples is compared with W in units of its standard error. The overall scale must be correct to within 2
    %."""
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    module, _, rule = behind_gain(layer, (2, 4, 5, 6), mirror_rate=1.0, mirror_batch=200, activation=activation)
    draws = []
    for _ in range(40):
        rule.step()
        draws.append(module.feedback_B.clone())
    draws, weight = torch.stack(draws), module.weight.detach()
    error = draws.std(0) / math.sqrt(40)
    assert ((draws.mean(0) - weight) / error).abs().max() < 5  # 108 entries, Student's t with 39 degrees of freedom
    slope = (draws.mean(0) * weight).sum((0, 1)) / weight.square().sum((0, 1))
    assert (slope - 1).abs().max() < 0.06, "the scale of some tap is wrong"
    assert ((draws.mean(0) * weight).sum() / weight.square().sum()).item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("noise", ["gaussian", "uniform"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_noise_shape_distribution_and_dtype(noise, dtype):
    module, pathway, _ = behind_gain(nn.Conv2d(2, 3, 3), (1, 2, 20, 10), dtype, noise=noise, sigma=0.5, mirror_batch=50)
    x = pathway.noise.sample(1, module.weight)
    assert x.shape == (50, 2, 20, 10) and x.dtype == dtype
    # With 20 000 numbers, the standard errors are 0.0035 for the mean and 0.5 % for the deviation.
    # bfloat16 has only 8 bits of precision.
    assert abs(x.double().mean().item()) < 0.015
    assert x.double().std().item() == pytest.approx(0.5, rel=0.02)
    furthest = x.double().abs().max().item() / 0.5
    assert 1.7 < furthest < math.sqrt(3) * 1.01 if noise == "uniform" else furthest > 3


# --- convergence ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("activation", "predicted"), [("linear", 8.08), ("relu", 11.35)])
def test_steady_state_angle_of_linear_layer(activation, predicted):
    """Starting from B = W, the angle between B and W grows to arctan √(η/(2-η) c (F+1)/N) to within half a degree, for F = 512, N
    = 128 and η = 0.01."""
    c = {"linear": 1, "relu": 2}[activation]
    assert math.degrees(math.atan(math.sqrt(0.01 / 1.99 * c * 513 / 128))) == pytest.approx(predicted, abs=0.01)
    torch.manual_seed(0)
    # After 300 steps, the variance has reached 1 - 0.99^600 = 99.8 % of its limit. The test averages five angles of one run.
    module, _, rule = behind_gain(
        nn.Linear(512, 24, bias=False),
        (2, 512),
        torch.float32,
        b_init="copy_w",
        mirror_rate=0.01,
        initial_steps=300,
        mirror_steps=40,
        activation=activation,
    )
    angles = []
    for _ in range(5):
        angles.append(weight_angle(module.feedback_B, module.weight.detach()))
        rule.step()
    assert np.mean(angles) == pytest.approx(predicted, abs=0.5)


def test_steady_state_angle_of_convolution_decreases_with_positions():
    """A 1x1 convolution on a 6x6 map has n_pos = 36 positions, and no two of them share an input. The test uses η = 0.2, N = 2
    and F = 64."""
    torch.manual_seed(0)
    module, _, rule = behind_gain(
        nn.Conv2d(64, 32, 1), (1, 64, 6, 6), torch.float32, b_init="copy_w", mirror_rate=0.2, mirror_batch=2, initial_steps=30
    )
    angles = []
    for _ in range(40):
        angles.append(weight_angle(module.feedback_B, module.weight.detach()))
        rule.step()
    predicted = math.degrees(math.atan(math.sqrt(0.2 / 1.8 * 65 / (2 * 36))))
    assert np.mean(angles) == pytest.approx(predicted, abs=0.5)


def test_initial_feedback_decays_at_mirror_rate():
    """For two initial values and the same noise, the difference between the feedback tensors shrinks by a factor of 1 - η in each
    step."""
    pair = []
    for init in ("xavier_uniform", "copy_w"):
        torch.manual_seed(0)
        module, _, rule = behind_gain(nn.Linear(6, 5), (2, 6), b_init=init, mirror_rate=0.2)
        pair.append((module, rule, module.feedback_B.clone()))
    for _, rule, _ in pair:
        for _ in range(8):
            rule.step()
    before, after = pair[0][2] - pair[1][2], pair[0][0].feedback_B - pair[1][0].feedback_B
    assert distance(after, array(0.8**8 * before)) < 1e-12


def test_unblocked_bias_scales_each_row():
    """With ReLU and Gaussian noise, an unblocked bias b scales its row by 2 Φ(b / (σ ‖w‖)). A blocked bias has no effect, nor
    does an unblocked bias with a linear activation."""
    factors = {}
    for activation, blocked in (("relu", True), ("relu", False), ("linear", False)):
        torch.manual_seed(0)
        layer = nn.Linear(10, 4)
        with torch.no_grad():
            layer.bias.copy_(torch.tensor([-1.5, -0.3, 0.0, 0.8]) * 0.5 * layer.weight.norm(dim=1))
        module, _, rule = behind_gain(
            layer, (2, 10), mirror_rate=1.0, mirror_batch=200_000, sigma=0.5, activation=activation, block_bias=blocked
        )
        rule.step()
        weight = module.weight.detach()
        factors[activation, blocked] = (module.feedback_B * weight).sum(1) / weight.square().sum(1)
    # The standard error of a row's factor is √(c · 2 / N) = 0.5 %, or more if the bias adds to the noise.
    want = torch.tensor([2 * 0.5 * (1 + math.erf(b / math.sqrt(2))) for b in (-1.5, -0.3, 0.0, 0.8)], dtype=torch.float64)
    assert (factors["relu", False] - want).abs().max() < 0.02
    assert (factors["relu", True] - 1).abs().max() < 0.02
    assert (factors["linear", False] - 1).abs().max() < 0.02


@pytest.mark.parametrize(("activation", "sigma", "slack"), [("tanh", 0.05, 0.01), ("sigmoid", 0.3, 0.03)])
def test_small_noise_uses_activation_slope_at_zero(activation, sigma, slack):
    """The slope at zero is 1 for tanh and 1/4 for sigmoid. With σ = 2, the mean slope is smaller, so B is too small."""
    for deviation, small in ((sigma, True), (2.0, False)):
        torch.manual_seed(0)
        layer = nn.Linear(10, 40)
        module, _, rule = behind_gain(
            layer, (2, 10), mirror_rate=1.0, mirror_batch=100_000, sigma=deviation, activation=activation
        )
        rule.step()
        weight = module.weight.detach()
        factor = ((module.feedback_B * weight).sum() / weight.square().sum()).item()
        assert factor == pytest.approx(1, abs=slack) if small else factor < 0.9


def test_mirror_follows_weights_in_training():
    """wm and fa start from the same feedback. During training, the feedback of wm's mirrored layers approaches the weights and
    follows them as they change, while the feedback of fa does not."""
    results = {}
    for name, options in (("fa", {}), ("wm", {"mirror_rate": 0.05, "initial_steps": 100})):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 3))
        rule = fa_bench.attach(model, name, seed=0, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        start = model[2].weight.detach().clone()
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(64, 12, generator=generator)
        y = (x[:, :3]).argmax(1)
        for _ in range(60):
            optimizer.zero_grad()
            logits = model(x)
            rule.backward(nn.functional.cross_entropy(logits, y), logits, y)
            optimizer.step()
            rule.step()
        assert weight_angle(start, model[2].weight.detach()) > 15, "the weights hardly moved"
        results[name] = {path: weight_angle(*pair) for path, pair in rule.weight_pairs().items()}
    assert all(results["wm"][path] < 15 < results["fa"][path] for path in ("2", "4"))
    assert results["wm"]["0"] > 60, "the first layer was mirrored"


def test_freeze_random_skips_mirror_step():
    model = nets.mlp()
    rule = fa_bench.attach(model, "wm", seed=0, initial_steps=0, sample_input=nets.batch("mlp")[0])
    before = model.fc2.feedback_B.clone()
    rule.mode.freeze_random = True
    rule.step()
    assert torch.equal(model.fc2.feedback_B, before) and rule.state_dict()["fc2"]["draws"] == 0
    rule.mode.freeze_random = False
    rule.step()
    assert not torch.equal(model.fc2.feedback_B, before)
