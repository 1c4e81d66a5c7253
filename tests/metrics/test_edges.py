"""Tests of metrics that have little or nothing to measure: zero norms, one class, one sample, an incomplete last batch, or no
samples."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fa_bench
from fa_bench.cli import main
from fa_bench.config.job import RunOptions
from fa_bench.data.base import ArrayDataset, ResidentSplit, Splits, some
from fa_bench.errors import DataError, OptionError
from fa_bench.mechanisms.rule import INPUT, OUTPUT
from fa_bench.metrics.angles import NORM_FLOOR, angles, mean_sample_angle, norm_ratio, weight_angle
from fa_bench.metrics.evaluation import evaluate
from fa_bench.metrics.meter import AlignmentMeter, Passes
from fa_bench.models.mlp import MLP
from fa_bench.models.resnet import ResNet20
from fa_bench.objectives.cross_entropy import CrossEntropy
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.runs.batches import check_batches, fixed_batch

CPU = torch.device("cpu")


def split(count: int, classes: int = 3) -> ResidentSplit:
    images = torch.from_numpy(np.random.default_rng(count).integers(0, 256, (count, 1, 4, 4), dtype=np.uint8))
    return ResidentSplit(images, torch.arange(count) % classes, [0.5], [0.5], False, CPU)


def net(batch_norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return MLP(widths=[6, 6], batch_norm=batch_norm).build((1, 4, 4), 3)


def batch(count: int, classes: int = 3) -> tuple[Tensor, Tensor]:
    return next(split(count, classes).batches(count))


# ------------------------------------------------------------------------------------------------ angles
def test_angles_are_nan_only_below_norm_floor() -> None:
    e = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    for u, v in ((0 * e, e), (e, 0 * e), (0 * e, 0 * e), (0.9 * NORM_FLOOR * e, e)):
        assert math.isnan(angles(u, v).item()) and math.isnan(weight_angle(u, v)) and math.isnan(mean_sample_angle(u, v))
    assert angles(2 * NORM_FLOOR * e, -e).item() == 180
    assert weight_angle(1e30 * e, 1e-10 * e) == 0  # squares do not overflow or underflow, although they would in float32
    assert angles(torch.full((1, 2), 1e30), torch.full((1, 2), -1e30)).item() == 180


def test_norm_ratio_of_zero_weight_or_feedback() -> None:
    one, none = torch.ones(2, 3), torch.zeros(2, 3)
    assert math.isnan(norm_ratio(one, none)) and math.isnan(norm_ratio(none, none)) and norm_ratio(none, one) == 0


def test_mean_sample_angle_ignores_undefined_angles() -> None:
    u = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    v = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    assert mean_sample_angle(u, v) == pytest.approx(45.0)
    assert math.isnan(mean_sample_angle(u[:0], v[:0]))
    assert mean_sample_angle(u[:1], v[:1]) == pytest.approx(90.0)


def test_angle_with_nonfinite_values_is_nan() -> None:
    for bad in (math.nan, math.inf):
        assert math.isnan(weight_angle(torch.tensor([bad, 1.0]), torch.ones(2)))


# ------------------------------------------------------------------------------------------------ the probe
def test_true_gradient_norm_excludes_rule_gradients() -> None:
    """The rule's own gradients, which the probe computes first, are not added to the true gradient."""
    for name in ("bp", "fa", "dfa", "frozen"):
        (x, y), model = batch(10), net()
        F.cross_entropy(model(x), y).backward()
        expected = {layer: model.get_submodule(layer).weight.grad.norm().item() for layer in ("fc1", "fc2", "fc3")}
        found = AlignmentMeter(fa_bench.attach(model, name, seed=0, sample_input=x), x, y).measure()["true_gradient_norm"]
        assert found == pytest.approx(expected, rel=1e-5), name


def test_layers_without_error_have_nan_angles_and_zero_norms() -> None:
    model, (x, y) = net(), batch(10)
    with torch.no_grad():
        model.fc3.weight.zero_()
    found = AlignmentMeter(fa_bench.attach(model, "fa", seed=0), x, y).measure()
    assert math.isnan(found["weight_angle"]["fc3"]) and math.isnan(found["norm_ratio"]["fc3"])
    assert [math.isnan(found["delta_angle"][layer]) for layer in ("fc1", "fc2", "fc3")] == [True, True, False]
    assert found["true_gradient_norm"]["fc1"] == found["true_gradient_norm"]["fc2"] == 0 < found["true_gradient_norm"]["fc3"]


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_single_class_and_single_sample_batches(name: str) -> None:
    for count, classes in ((6, 1), (1, 1)):
        x, y = batch(count, classes)
        model = net()
        # The other auxiliary nets of dgl use batch normalisation, which is tested below.
        options = {"dgl": {"auxiliary_net": "linear"}, "f3": {"samples": 6}}.get(name, {})
        rule = fa_bench.attach(model, name, seed=0, sample_input=x[:2], **options)
        found = AlignmentMeter(rule, x, y, indices=torch.arange(count)).measure()
        assert all(value > 0 for value in found["true_gradient_norm"].values())
        assert not any(math.isinf(value) for layers in found.values() for value in layers.values())
        assert all(math.isnan(angle) or 0 <= angle <= 180 for angle in found["delta_angle"].values())
        logits = model(x)
        rule.backward(F.cross_entropy(logits, y), logits, y, indices=torch.arange(count))
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_fixed_batch_is_sampled_if_data_are_sorted_by_class() -> None:
    images = torch.arange(90, dtype=torch.uint8).view(90, 1, 1, 1)
    for labels, first in ((torch.arange(90) % 9, True), (torch.arange(90) // 10, False), (torch.zeros(90).long(), False)):
        train = ResidentSplit(images, labels, [0.5], [0.5], False, CPU)
        splits = Splits(train, None, train, [str(c) for c in range(9)], (1, 1, 1), "")
        x, y, indices = fixed_batch(splits, 20)
        assert torch.allclose(images[indices].float() * 2 / 255 - 1, x) and torch.equal(labels[indices], y)
        assert len(x) == len(y) == 20 and torch.equal(x, next(train.batches(20))[0]) == first
        assert torch.equal(x, fixed_batch(splits, 20)[0])
        assert len(y.unique()) > 4 or not labels.any()
        assert len(fixed_batch(splits, 500)[1]) == 90 and len(fixed_batch(splits, 1)[1]) == 1


@pytest.mark.parametrize(
    ("per_class", "size", "first"),
    [
        (10, 50, True),  # five of nine classes
        (10, 40, False),  # four of nine
        (10, 3, False),  # one of the three classes that three images could contain
        (10, 2, True),  # one of two
        (100, 900, True),  # all images are used, so nothing is sampled
    ],
    ids=str,
)
def test_fixed_batch_matches_documentation(per_class: int, size: int, first: bool) -> None:
    """The batch consists of the first images or, if they contain fewer than half of the possible classes, of a sample of all
    images with a fixed seed."""
    labels = torch.arange(9).repeat_interleave(per_class)
    images = (torch.arange(len(labels)) % 256).to(torch.uint8).view(-1, 1, 1, 1)
    train = ResidentSplit(images, labels, [0.5], [0.5], False, CPU)
    splits = Splits(train, None, train, [str(c) for c in range(9)], (1, 1, 1), "")
    x, y, _ = fixed_batch(splits, size)
    want_x, want_y = next((train if first else some(train, size)).batches(size))
    assert torch.equal(x, want_x) and torch.equal(y, want_y)
    assert first == torch.equal(y, labels[:size])


# ------------------------------------------------------------------------------------------------ batches of one
@dataclasses.dataclass
class Case:
    """A run with `images` training images, and the expected message if batch normalisation cannot work with them."""

    images: int
    options: dict
    said: str | None


WHY = ", for which batch normalisation has no statistics"
CASES = [
    Case(
        33,
        {"batch_size": 8, "drop_last": False},
        f"drop_last=false leaves a last batch of one image{WHY} (33 training images in batches of 8); "
        "use drop_last=true or another batch_size",
    ),
    Case(33, {"batch_size": 8, "drop_last": True}, None),
    Case(34, {"batch_size": 8, "drop_last": False}, None),
    Case(33, {"batch_size": 1}, f"batch_size=1 makes batches of one image (33 for training){WHY}; use 2 or more"),
    Case(
        1, {"batch_size": 8, "drop_last": True}, f"batch_size=8 makes batches of one image (1 for training){WHY}; use 2 or more"
    ),
    Case(33, {"batch_size": 8, "probe_size": 1}, f"probe_size=1 makes a probe batch of one image{WHY}; use 2 or more"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_batch_norm_rejects_batch_of_one_before_training(case: Case) -> None:
    splits = Splits(split(case.images), None, split(4), ["a", "b", "c"], (1, 4, 4), "")
    check_batches(fa_bench.attach(net(), "fa", seed=0), splits, RunOptions(**case.options))
    small_maps = ResNet20(width=2, blocks=1).build((1, 4, 4), 3)  # maps of one pixel in the last stage
    large_maps = ResNet20(width=2, blocks=1).build((1, 16, 16), 3)
    for model, fails in ((net(batch_norm=True), True), (small_maps, True), (large_maps, False)):
        if model is large_maps:
            splits = dataclasses.replace(
                splits,
                train=ResidentSplit(
                    torch.zeros(case.images, 1, 16, 16, dtype=torch.uint8), splits.train.labels, [0.5], [0.5], False, CPU
                ),
            )
        rule = fa_bench.attach(model, "fa", seed=0, sample_input=next(splits.train.batches(2))[0])
        before = {key: value.clone() for key, value in model.state_dict().items()}
        if fails and case.said:
            with pytest.raises(OptionError) as refused:
                check_batches(rule, splits, RunOptions(**case.options))
            assert str(refused.value) == case.said
        else:
            check_batches(rule, splits, RunOptions(**case.options))
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_batch_norm_in_auxiliary_nets_rejects_batch_of_one() -> None:
    splits = Splits(split(33), None, split(4), ["a", "b", "c"], (1, 4, 4), "")
    rule = fa_bench.attach(net(), "dgl", seed=0, sample_input=next(splits.train.batches(2))[0])
    with pytest.raises(OptionError, match="drop_last=false"):
        check_batches(rule, splits, RunOptions(batch_size=8, drop_last=False))


def test_last_batch_of_one_is_rejected_only_with_batch_norm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = [
        "dataset=synthetic",
        "dataset.samples=33",
        "dataset.test_samples=9",
        "dataset.validation=0",
        "batch_size=8",
        "drop_last=false",
        "epochs=1",
        "probe_size=8",
        "architecture.widths=[6,6]",
        "hydra.run.dir=run",
    ]
    assert main([*command, "architecture.batch_norm=true"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fa-bench: drop_last=false leaves a last batch of one image") and len(said.splitlines()) == 1
    assert not Path("run").exists()
    assert main(command) == 0
    line = json.loads(Path("run/metrics.jsonl").read_text())
    assert line["step"] == 5 and 0 <= line["train_accuracy"] <= 1
    assert (33 * line["train_accuracy"]) == pytest.approx(round(33 * line["train_accuracy"]))  # all 33 images count equally


# ------------------------------------------------------------------------------------------------ evaluation
def test_evaluation_counts_every_sample_once() -> None:
    model, data = net(batch_norm=True), split(513)  # with batches of 512, the last one has one sample
    loss, accuracy = evaluate(model, CrossEntropy(), data, 8).values()
    x, y = next(data.batches(513))
    model.eval()
    with torch.no_grad():
        logits = model(x)
    assert loss == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
    assert accuracy == (logits.argmax(1) == y).sum().item() / 513


def test_evaluation_of_one_class_one_sample_and_none() -> None:
    model = net()
    with torch.no_grad():
        model.fc3.bias.copy_(torch.tensor([100.0, 0.0, 0.0]))
    assert evaluate(model, CrossEntropy(), split(7, classes=1), 4) == {"loss": 0.0, "accuracy": 1.0}
    assert evaluate(model, CrossEntropy(), split(1), 4) == {"loss": 0.0, "accuracy": 1.0}
    assert evaluate(model, CrossEntropy(), split(0), 4) == evaluate(model, CrossEntropy(), None, 4) == {}


def test_evaluation_restores_module_modes_even_on_error() -> None:
    model = net(batch_norm=True).train()
    model.bn1.eval()
    modes = [module.training for module in model.modules()]
    evaluate(model, CrossEntropy(), split(5), 4)
    assert [module.training for module in model.modules()] == modes
    broken = ResidentSplit(torch.zeros(3, 1, 5, 5, dtype=torch.uint8), torch.zeros(3, dtype=torch.long), [0.5], [0.5], False, CPU)
    with pytest.raises(RuntimeError):
        evaluate(model, CrossEntropy(), broken, 4)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize(("train", "test", "said"), [(0, 5, "training"), (5, 0, "test")])
def test_empty_split_error_names_split(train: int, test: int, said: str) -> None:
    @dataclasses.dataclass(eq=False)
    class Empty(ArrayDataset):
        def arrays(self, data_dir):
            parts = [(np.zeros((n, 1, 4, 4), np.uint8), np.zeros(n, np.int64)) for n in (train, test)]
            return *parts[0], *parts[1], ["a"]

    Empty.name = "empty"
    with pytest.raises(DataError, match=f"^dataset=empty: there are no {said} images"):
        Empty(validation=0).load(Path("nowhere"), CPU)


class CrossAttention(nn.Module):
    """A net whose attention projects queries and keys with different rows of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.out = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        key = self.key(x).tanh()
        return self.out(self.attention(self.query(x).tanh(), key, key)[0].mean(1))


def test_one_step_error_uses_weight_rows_of_each_call() -> None:
    torch.manual_seed(0)
    model, x, y = CrossAttention().double(), torch.randn(5, 6, 4, dtype=torch.float64), torch.arange(5) % 3
    passes = Passes(AlignmentMeter(fa_bench.attach(model, "fa", sample_input=x), x, y))
    weight, point = model.attention.in_proj_weight.detach(), ("attention.in_proj", INPUT)
    # The first rows of the weight are those of the queries. Keys and values have the same input, so the error of this input is
    # the sum of their errors.
    (before, *_), (after, *_) = passes.delivered.calls[point], passes.delivered.calls["attention.in_proj", OUTPUT]
    assert before.rows == slice(0, 8) and after.error is not None
    exact = (after.error @ weight[:8]).movedim(1, 0)
    found = passes.one_step[point]
    torch.testing.assert_close(found.reshape(5, -1)[:, : exact[0].numel()], exact.reshape(5, -1))
