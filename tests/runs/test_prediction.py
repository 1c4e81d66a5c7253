"""A run's result contains the predicted cost."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from fa_bench.cli import main
from fa_bench.runs import outcome, prediction
from fa_bench.utils.files import RESULT

from .test_survival import at_step

WORDS = [
    "dataset=synthetic",
    "dataset.samples=80",
    "dataset.test_samples=16",
    "batch_size=16",
    "epochs=1",
    "probe_size=8",
    "architecture.widths=[8,6]",
    "algorithm=wm",
    "algorithm.initial_steps=2",
    "device=cpu",
    "threads=1",
]


def result(folder: str) -> dict:
    assert main([*WORDS, f"hydra.run.dir={folder}"]) == 0
    return json.loads(Path(folder, RESULT).read_text())


def test_recording_cost_does_not_change_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prediction, "_KNOWN", {})
    predicted = result("predicted")
    products = 8 * 64 + 6 * 8 + 10 * 6
    assert predicted["cost"]["batch"] == 16 and predicted["cost"]["forward"] == 16 * products
    assert predicted["cost"]["feedback"] > 0 == predicted["cost"]["bp"]["feedback"]
    monkeypatch.setattr(outcome, "predicted_cost", lambda *_: None)
    without = result("without")
    keys = ("weights_hash", "feedback_hash", "optimizer_hash", "batches_hash", "test_accuracy", "angles")
    assert without["cost"] is None and [predicted[key] for key in keys] == [without[key] for key in keys]


def test_failed_cost_prediction_is_logged_and_leaves_cost_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        torch.rand(3)
        raise ValueError("no random samples")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prediction, "_KNOWN", {})
    monkeypatch.setattr(prediction, "step_costs_of", fails)
    assert result("run")["cost"] is None
    assert "cost of a step not predicted: no random samples" in Path("run/run.log").read_text()


def test_resumed_run_records_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prediction, "_KNOWN", {})
    at_step(2, lambda: signal.raise_signal(signal.SIGTERM), monkeypatch)
    assert main([*WORDS, "hydra.run.dir=run"]) == 143
    interrupted = json.loads(Path("run", RESULT).read_text())
    assert (interrupted["status"], interrupted["cost"]) == ("interrupted", None)
    resumed = result("run")
    assert resumed["status"] == "finished" and resumed["cost"] == result("whole")["cost"] and resumed["cost"]["forward"] > 0
