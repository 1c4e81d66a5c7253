"""Objectives for classes and for numbers agree with their formulas, written with loops, and work in runs from the command
line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from fa_bench.cli import main
from fa_bench.objectives.base import Objective
from fa_bench.objectives.cross_entropy import CrossEntropy
from fa_bench.objectives.mse import MSE
from fa_bench.objectives.sigmoid_ce import SigmoidCE
from fa_bench.registry.registries import OBJECTIVES

OUTPUTS = torch.tensor([[0.5, -1.0, 2.0], [0.1, 0.2, -0.3], [3.0, 0.0, 1.0], [-2.0, 1.5, 0.7]], dtype=torch.float64)
LABELS = torch.tensor([2, 0, 1, 1])
VALUES = torch.tensor([[0.2, 0.9, 0.0], [1.0, 0.5, 0.3], [0.0, 0.1, 0.6], [0.7, 0.7, 1.0]])


def cross_entropy(z: list[float], t: list[float]) -> float:
    total = sum(math.exp(value) for value in z)
    return -sum(target * math.log(math.exp(value) / total) for value, target in zip(z, t, strict=True))


def squared(z: list[float], t: list[float]) -> float:
    return sum((value - target) ** 2 for value, target in zip(z, t, strict=True)) / 2


def sigmoid(z: list[float], t: list[float]) -> float:
    p = [1 / (1 + math.exp(-value)) for value in z]
    return -sum(target * math.log(q) + (1 - target) * math.log(1 - q) for q, target in zip(p, t, strict=True))


def rows(smoothing: float = 0.0) -> list[list[float]]:
    return [[(1 - smoothing) * (k == label) + smoothing / 3 for k in range(3)] for label in LABELS.tolist()]


CASES = [
    (CrossEntropy(), LABELS, cross_entropy, rows()),
    (CrossEntropy(label_smoothing=0.3), LABELS, cross_entropy, rows(0.3)),
    (MSE(), LABELS, squared, rows()),
    (MSE(), VALUES, squared, VALUES.tolist()),
    (SigmoidCE(), LABELS, sigmoid, rows()),
    (SigmoidCE(), VALUES, sigmoid, VALUES.tolist()),
]


@pytest.mark.parametrize(("objective", "target", "formula", "targets"), CASES)
def test_loss_matches_formula(objective: Objective, target: torch.Tensor, formula, targets) -> None:
    wanted = [formula(z, t) for z, t in zip(OUTPUTS.tolist(), targets, strict=True)]
    # The targets have the precision of float32; everything else is float64.
    assert objective.loss(OUTPUTS, target, "none").tolist() == pytest.approx(wanted, rel=1e-6)
    assert objective.loss(OUTPUTS, target, "sum").item() == pytest.approx(sum(wanted), rel=1e-6)
    assert objective.loss(OUTPUTS, target).item() == pytest.approx(sum(wanted) / 4, rel=1e-6)
    assert objective.loss(OUTPUTS.float(), target).dtype == torch.float32


@pytest.mark.parametrize(("objective", "output"), [(MSE(), lambda z: z), (SigmoidCE(), torch.sigmoid)])
def test_output_gradient_is_output_minus_target(objective: Objective, output) -> None:
    leaf = OUTPUTS.clone().requires_grad_(True)
    objective.loss(leaf, VALUES, "sum").backward()
    torch.testing.assert_close(leaf.grad, output(OUTPUTS) - VALUES, rtol=1e-6, atol=1e-6)


def test_correct_compares_largest_output_with_label() -> None:
    for name in OBJECTIVES:
        assert OBJECTIVES[name]().correct(OUTPUTS, LABELS).tolist() == [True, False, False, True]
    assert MSE().correct(OUTPUTS, VALUES) is None


def test_cross_entropy_rejects_label_minus_100() -> None:
    """The label -100, which torch's cross-entropy skips silently, raises an error."""
    with pytest.raises(IndexError):
        CrossEntropy().loss(OUTPUTS, torch.tensor([0, -100, 1, 2]))


RUN = [
    "dataset=synthetic",
    "dataset.samples=64",
    "dataset.test_samples=16",
    "architecture.widths=[8]",
    "epochs=2",
    "threads=1",
    "hydra.run.dir=run",
]


@pytest.mark.parametrize("objective", ["mse", "sigmoid_ce", "cross_entropy"])
def test_run_uses_configured_objective(objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The learning rate is so small that the weights hardly change, so the recorded losses are those of the untrained model."""
    monkeypatch.chdir(tmp_path)
    assert main([*RUN, f"objective={objective}", "optimizer.lr=1e-12"]) == 0
    first, last = (json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines())
    assert first["test_loss"] == pytest.approx(last["test_loss"], rel=1e-6)
    # The ten outputs of an untrained model are about 0, so the three losses are about 1/2, 10 log 2 and log 10.
    expected = {"mse": 0.5, "sigmoid_ce": 10 * math.log(2), "cross_entropy": math.log(10)}[objective]
    assert expected * 0.8 < first["test_loss"] < expected + 1
    assert json.loads(Path("run/result.json").read_text())["objective"] == objective


def test_label_smoothing_reaches_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hashes = set()
    for smoothing in ("0.0", "0.2"):
        assert main([*RUN, f"objective.label_smoothing={smoothing}", f"hydra.run.dir=run{smoothing}"]) == 0
        hashes.add(json.loads(Path(f"run{smoothing}/result.json").read_text())["weights_hash"])
    assert len(hashes) == 2


PLUGIN = '''
import numpy as np
import fa_bench


@fa_bench.register_dataset("plane")
class Plane(fa_bench.ArrayDataset):
    """Brightness and contrast of noise images."""

    targets = "values"

    def arrays(self, data_dir):
        rng = np.random.default_rng(0)
        x = rng.integers(0, 256, (80, 4, 4), dtype=np.uint8)
        y = np.stack([x.mean((1, 2)) / 255, x.std((1, 2)) / 255], 1)
        return x[:64], y[:64], x[64:], y[64:], ["brightness", "contrast"]
'''


def test_run_with_numeric_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A plugin's dataset has numbers as targets. A run on this dataset can be trained with mse and records R² instead of
    accuracies; an objective for classes refuses the dataset before training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("plane_data.py").write_text(PLUGIN)
    command = ["plugins=[plane_data]", "dataset=plane", "architecture.widths=[16]", "epochs=8", "threads=1", "hydra.run.dir=run"]
    assert main([*command, "algorithm=fa"]) == 2
    assert "objective=cross_entropy requires classes as targets" in (said := capsys.readouterr().err) and "mse" in said
    assert main([*command, "objective=mse", "algorithm=fa"]) == 0
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert "test_accuracy" not in lines[-1]
    assert lines[-1]["train_loss"] < lines[0]["train_loss"] / 2
