"""The measurement of angles handles dropout, normalisation and the model's mode as specified, and changes none of them."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

import fa_bench
from fa_bench.data.base import ResidentSplit
from fa_bench.mechanisms.contexts import without_side_effects
from fa_bench.metrics.angles import NORM_FLOOR, angles, mean_sample_angle, norm_ratio
from fa_bench.metrics.evaluation import evaluate
from fa_bench.metrics.meter import AlignmentMeter
from fa_bench.metrics.probes.base import state_restored
from fa_bench.objectives.cross_entropy import CrossEntropy
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.runs.hashes import state_hash
from tests.rules import nets
from tests.rules.helpers import QUICK


class FunctionalDropout(nn.Module):
    """Calls dropout functions with rates that are stored in a layer and in attributes, like the attention modules of other
    packages."""

    def __init__(self, *attributes: str) -> None:
        super().__init__()
        self.layer = nn.Dropout(0.5)
        self.attributes = attributes
        for attribute in attributes:
            setattr(self, attribute, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        for rate in (self.layer.p, *(getattr(self, attribute) for attribute in self.attributes)):
            x = F.dropout(x, rate) if self.training and rate else x
        return x


NOISE = {
    "Dropout": lambda: nn.Dropout(0.5),
    "functional": lambda: FunctionalDropout("drop_prob", "dropout_rate"),
    "AlphaDropout": lambda: nn.AlphaDropout(0.5),
    "StochasticDepth": lambda: StochasticDepth(0.5, "row"),
    "none": nn.Identity,
}
SHARING = {"match": "random", "linear": "share"}
OPTIONS = QUICK | {"asap": SHARING, "asfp": SHARING, "asfp_lc": SHARING}
RULES = sorted(ALGORITHMS)


def net(noise: str = "none") -> nn.Sequential:
    """A net with normalisation, and with the given kind of noise before each of the last two layers."""
    torch.manual_seed(0)
    model = nn.Sequential(
        OrderedDict(
            fc1=nn.Linear(7, 6),
            bn1=nn.BatchNorm1d(6),
            act1=nn.Tanh(),
            noise1=NOISE[noise](),
            fc2=nn.Linear(6, 5),
            bn2=nn.BatchNorm1d(5),
            act2=nn.Tanh(),
            noise2=NOISE[noise](),
            fc3=nn.Linear(5, 3),
        )
    ).double()
    model.cut_points = model.blocks = ["act1", "act2"]
    return model


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(10, 7, generator=generator, dtype=torch.float64), torch.arange(10) % 3


def attached(name: str, noise: str = "none") -> tuple[nn.Sequential, Any]:
    model = net(noise)
    return model, fa_bench.attach(model, name, seed=0, sample_input=batch()[0], **OPTIONS.get(name, {}))


def measured(rule: Any) -> str:
    return str(AlignmentMeter(rule, *batch(), indices=torch.arange(len(batch()[1]))).measure())


@pytest.mark.parametrize("noise", [noise for noise in NOISE if noise != "none"])
@pytest.mark.parametrize("name", RULES)
def test_dropout_is_off_while_angles_are_measured(name: str, noise: str) -> None:
    """The angles equal those of the model without dropout, and the global generator is not used."""
    model, rule = attached(name, noise)
    state = torch.get_rng_state()
    assert measured(rule) == measured(attached(name)[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["bp", "dfa"])
def test_unknown_noise_is_the_same_in_all_passes(name: str) -> None:
    """A module with unknown noise stays active but repeats its noise. Training samples noise as it would without the
    measurement."""
    torch.manual_seed(0)
    model = net()
    model.noise1 = FunctionalDropout("rate_of_another_name")
    rule = fa_bench.attach(model, name, seed=0, sample_input=batch()[0])
    state, values = torch.get_rng_state(), AlignmentMeter(rule, *batch(), indices=torch.arange(len(batch()[1]))).measure()
    assert torch.equal(torch.get_rng_state(), state)
    assert str(values) == measured(rule) != measured(attached(name)[1])
    assert name != "bp" or not any(values["delta_angle"].values())


class Drops(nn.Module):
    """Stores a dropout rate in an attribute, like attention modules of other packages."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        setattr(self, name, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, getattr(self, self.name))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.MultiheadAttention(6, 2, dropout=0.5),
        lambda: nn.LSTM(6, 6, 2, dropout=0.5),
        lambda: Drops("dropout_p"),
        lambda: Drops("attention_dropout"),
    ],
)
def test_dropout_attributes_are_zeroed_and_restored(make: Any) -> None:
    torch.manual_seed(0)
    module, x = make(), torch.randn(3, 2, 6)

    def called() -> Tensor:
        y = module(x, x, x) if isinstance(module, nn.MultiheadAttention) else module(x)
        return y[0] if isinstance(y, tuple) else y

    with without_side_effects(module):
        during = called()
    assert not torch.equal(called(), during)  # the masks are random again
    for name in ("dropout", "dropout_p", "attention_dropout"):
        if hasattr(module, name):
            assert getattr(module, name) == 0.5
            setattr(module, name, 0.0)
    assert torch.equal(called(), during)


def all_that_may_change(model: nn.Module, rule: Any) -> dict[str, Any]:
    """Hashes of everything that a measurement must leave unchanged."""
    trained = {id(t): t for t in [*model.parameters(), *rule.feedback_parameters()]}.values()
    parts = {
        **model.state_dict(),
        "feedback": rule.feedback,
        "rule": rule.state_dict(),
        "random": torch.get_rng_state(),
        "gradients": [t.grad for t in trained],
        "requires_grad": [t.requires_grad for t in trained],
        "training": [module.training for module in model.modules()],
        "running statistics": [module.track_running_stats for module in model.modules() if isinstance(module, nn.BatchNorm1d)],
    }
    return {name: state_hash(part) for name, part in parts.items()}


@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
@pytest.mark.parametrize("name", RULES)
def test_measurement_restores_all_state(name: str, mode: str) -> None:
    """A measurement restores each module's mode, the running statistics, the gradients and the random state. In this test, only
    some parameters have a gradient."""
    model, rule = attached(name, "Dropout")
    logits = model(batch(1)[0])
    rule.backward(F.cross_entropy(logits, batch(1)[1]), logits, batch(1)[1], indices=torch.arange(len(logits)))
    model.fc2.weight.grad = None
    model.train(mode == "train")
    if mode == "mixed":
        model.bn1.train()
        model.act2.train()
    before = all_that_may_change(model, rule)
    AlignmentMeter(rule, *batch(), indices=torch.arange(len(batch()[1]))).measure()
    assert all_that_may_change(model, rule) == before


@pytest.mark.parametrize("name", RULES)
def test_measurement_does_not_change_training(name: str) -> None:
    """Sampling, mirroring and learning of feedback are suspended only during a measurement."""
    found = []
    for measures in (False, True):
        model, rule = attached(name)
        optimizer = torch.optim.SGD(rule.parameter_groups(lr=0.1))
        for seed in range(3):
            if measures:
                AlignmentMeter(rule, *batch(), indices=torch.arange(len(batch()[1]))).measure()
            optimizer.zero_grad()
            logits = model(batch(seed)[0])
            rule.backward(F.cross_entropy(logits, batch(seed)[1]), logits, batch(seed)[1], indices=torch.arange(len(logits)))
            optimizer.step()
            rule.step()
        found.append(state_hash([model.state_dict(), rule.feedback, rule.state_dict()]))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["bp", "dfa"])
def test_model_stays_in_eval_mode_after_measurement(name: str) -> None:
    model, rule = attached(name, "Dropout")
    model.eval()
    AlignmentMeter(rule, *batch(), indices=torch.arange(len(batch()[1]))).measure()
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", RULES)
def test_angles_do_not_depend_on_training_mode(name: str) -> None:
    """During a measurement, normalisation uses the statistics of the batch in both modes, not the running ones."""
    found = []
    for training in (True, False):
        model, rule = attached(name)
        model.bn1.running_mean.fill_(3.0)
        model.train(training)
        found.append(measured(rule))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["bp", "kp", "dfa"])
def test_evaluation_restores_the_mode_of_every_module(name: str) -> None:
    model = nn.Sequential(OrderedDict(flat=nn.Flatten(), **dict(net("Dropout").float().named_children())))
    model.cut_points = ["act1", "act2"]
    fa_bench.attach(model, name, seed=0, sample_input=torch.zeros(2, 7, 1, 1))
    model.bn2.eval()
    images = torch.randint(256, (9, 7, 1, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    split = ResidentSplit(images, torch.arange(9) % 3, [0.5], [0.5], False, torch.device("cpu"))
    before, state = {key: tensor.clone() for key, tensor in model.state_dict().items()}, torch.get_rng_state()
    assert evaluate(model, CrossEntropy(), split, 4) == evaluate(model, CrossEntropy(), split, 4)
    assert [name for name, module in model.named_modules() if not module.training] == ["bn2"]
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


class Merges(nn.Module):
    """Has a different factor in evaluation mode, which it sets only in `train`, like modules that merge weights into others."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0

    def train(self, mode: bool = True) -> Any:
        self.factor = 1.0 if mode else 2.0
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_calls_overridden_train(training: bool) -> None:
    images = torch.randint(256, (9, 3, 1, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    split = ResidentSplit(images, torch.arange(9) % 3, [0.5], [0.5], False, torch.device("cpu"))
    model = nn.Sequential(nn.Flatten(), Merges()).train(training)
    x, y = next(split.batches(9))
    loss = evaluate(model, CrossEntropy(), split, 4)["loss"]
    # The sums are computed in float32 and in a different order.
    assert loss == pytest.approx(F.cross_entropy(2 * x.flatten(1), y).item(), rel=1e-5)
    assert model[1].factor == (1.0 if training else 2.0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["bp", "kp", "dfa", "fdfa"])
def test_attach_and_measurement_restore_modules_overriding_train(name: str, training: bool) -> None:
    model = net()
    model.noise1, model.noise2 = Merges(), Merges()
    model.train(training)
    model.noise2.train(not training)
    rule = fa_bench.attach(model, name, seed=0, sample_input=batch()[0])
    for what in ("attach", "metrics", "probes"):
        if what == "metrics":
            assert measured(rule) == measured(attached(name)[1]), "not measured in training mode, with a factor of one"
        elif what == "probes":
            with state_restored(rule):
                model.eval()
        assert (model.noise1.factor, model.noise2.factor) == ((1.0, 2.0) if training else (2.0, 1.0)), what
        assert [model.noise1.training, model.noise2.training, model.training] == [training, not training, training], what


def test_user_frozen_weights_stay_frozen() -> None:
    """Tracing the model requires gradients of all weights, but frozen weights must be frozen again afterwards."""
    model = net()
    model.fc1.requires_grad_(False)
    rule = fa_bench.attach(model, "kp", seed=0, sample_input=batch()[0])
    for _ in range(2):
        assert not model.fc1.weight.requires_grad and not model.fc1.bias.requires_grad and model.fc2.weight.requires_grad
        AlignmentMeter(rule, *batch(), indices=torch.arange(len(batch()[1]))).measure()
        assert model.fc1.weight.grad is None


# --- measured quantities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_true_gradient_norms_match_backprop(name: str) -> None:
    """The norms depend neither on the rule nor on what ``.grad`` contains."""
    model, rule = attached(name)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 5.0)
    got = AlignmentMeter(rule, *batch(), indices=torch.arange(len(batch()[1]))).measure()["true_gradient_norm"]
    plain, (x, y) = net(), batch()
    F.cross_entropy(plain(x), y).backward()
    want = {path: plain.get_submodule(path).weight.grad.norm().item() for path in ("fc1", "fc2", "fc3")}
    # Both computations perform the same float64 operations, but in a different order.
    assert got == pytest.approx(want, rel=1e-9)


def test_one_step_error_includes_all_layers_with_same_input() -> None:
    """Only the projection shortcut propagates a wrong error; the convolution parallel to it propagates the true one. The error at
    the input of both layers is therefore wrong only in its last step."""
    model, (x, y) = nets.residual(), nets.batch("residual")
    rule = fa_bench.attach(model, "fa", seed=0, sample_input=x, b_init="copy_w")
    with torch.no_grad():
        rule.feedback["down"]["B"].normal_(generator=torch.Generator().manual_seed(0))
    got = AlignmentMeter(rule, x, y).measure()
    assert got["delta_angle"]["a2"] > 1
    assert got["delta_angle_one_step"]["a2"] == pytest.approx(got["delta_angle"]["a2"], abs=1e-6)
    # At the layer below, the last step is correct again.
    assert got["delta_angle"]["a1"] > 1 and got["delta_angle_one_step"]["a1"] < 1e-6


# --- angles -------------------------------------------------------------------------------------------------------------------


def test_undefined_sample_angles_are_excluded_from_mean() -> None:
    """If one of the two vectors of a sample is zero, for example because of dead units, the sample has no angle. The other two
    samples have angles of 90 and 0 degrees."""
    u = torch.tensor([[1.0, 0.0], [0.0, 0.0], [2.0, 0.0], [1.0, 1.0]])
    v = torch.tensor([[0.0, 3.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    assert mean_sample_angle(u, v) == pytest.approx(45.0)
    assert math.isnan(mean_sample_angle(u[1:2], v[1:2]))


def test_samples_are_flattened_one_by_one() -> None:
    """Maps of shape (N, C, H, W) have one angle per sample, computed over all entries of the sample."""
    u, v = torch.zeros(2, 2, 1, 2), torch.zeros(2, 2, 1, 2)
    u[0, 0, 0, 0] = v[0, 1, 0, 1] = 1.0  # orthogonal
    u[1, 0, 0, 0] = v[1, 0, 0, 0] = 100.0  # identical; large numbers count no more than small ones
    assert mean_sample_angle(u, v) == pytest.approx(45.0)


def test_norm_floor_applies_to_either_vector() -> None:
    tiny = 0.5 * NORM_FLOOR
    u, v = torch.tensor([[tiny, 0.0], [1.0, 0.0], [1e-9, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, tiny], [0.0, 1e-9]])
    got = angles(u, v)
    assert got[:2].isnan().all() and got[2].item() == pytest.approx(90.0)
    assert got.dtype == torch.float64


def test_norm_ratio_uses_double_precision_frobenius_norms() -> None:
    """The ratio is correct for entries whose squares do not fit in float32."""
    ones = torch.ones(3, 4, 2)
    assert norm_ratio(2 * ones, ones) == pytest.approx(2.0)
    assert norm_ratio(1e-30 * ones, ones) == pytest.approx(1e-30)
    assert norm_ratio(ones, 4 * ones[:1]) == pytest.approx(math.sqrt(24) / (4 * math.sqrt(8)))


def test_user_frozen_weights_have_nan_true_gradient_norm() -> None:
    model, _ = attached("bp")
    fa_bench.attached_rule(model).detach()
    model.fc2.weight.requires_grad_(False)
    norms = AlignmentMeter(fa_bench.attach(model, "fa", seed=0), *batch()).measure()["true_gradient_norm"]
    assert list(norms) == ["fc1", "fc2", "fc3"] and math.isnan(norms["fc2"]) and norms["fc1"] > 0 < norms["fc3"]


def test_metrics_list_layers_in_execution_order() -> None:
    """The model defines its output layer first."""
    (x, y), model = nets.batch("residual"), nets.residual()
    found = AlignmentMeter(fa_bench.attach(model, "fa", seed=0, sample_input=x), x, y).measure()
    order = ["stem", "a1", "a2", "b1", "down", "head"]
    for metric in ("weight_angle", "norm_ratio", "delta_angle", "delta_angle_one_step", "true_gradient_norm"):
        assert found[metric] and list(found[metric]) == [layer for layer in order if layer in found[metric]]


@pytest.mark.parametrize("kind", [nn.InstanceNorm1d, nn.BatchNorm1d])
def test_measurement_does_not_change_running_statistics(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 3), kind(3, track_running_stats=True), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3))
    x = torch.randn(5, 2, 6)
    rule = fa_bench.attach(model, "fa", seed=0, sample_input=x)
    model(3 * x + 1)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    AlignmentMeter(rule, x, torch.arange(5) % 3).measure()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    model(x)
    assert not torch.equal(model[1].running_mean, before["1.running_mean"]), "training should change the statistics again"


def test_measures_outputs_with_positions_with_default_objective() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    rule = fa_bench.attach(model, "fa", seed=0)
    x, y = torch.randn(2, 5, 4), torch.arange(10).view(2, 5) % 3
    y[:, :2] = -100
    angles = AlignmentMeter(rule, x, y).measure()["delta_angle"]
    flat = AlignmentMeter(rule, x[:, 2:].flatten(0, 1), y[:, 2:].flatten()).measure()["true_gradient_norm"]
    assert angles["0"] > 0 and AlignmentMeter(rule, x, y).measure()["true_gradient_norm"] == pytest.approx(flat)
