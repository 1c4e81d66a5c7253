"""Tests that need a GPU and are skipped without one. `scripts/gpu_check.py` performs more checks and writes a page about them."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import fa_bench
from fa_bench.cli import main
from fa_bench.optim.optimizers import Optimizers
from fa_bench.optim.sgd import SGD
from fa_bench.registry.registries import ALGORITHMS
from tests.rules.nets import convnet
from tests.versions import needs_compiler

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SCRIPTS = Path(__file__).parents[2] / "scripts"
SMALL = [
    "dataset=synthetic",
    "dataset.samples=200",
    "dataset.validation=40",
    "architecture=conv2",
    "architecture.channels=4",
    "architecture.hidden=16",
    "batch_size=32",
    "epochs=2",
    "threads=1",
    "loggers=[]",
    "probe_every=0",
    "device=cuda",
]
SHORT = {"wm": ["algorithm.initial_steps=2", "algorithm.mirror_batch=8"]}
#: Rules for which conv2 has too few activations to share.
DEEP = {"asap", "asfp", "asfp_lc"}
#: A program that trains a run and interrupts it after the first epoch.
INTERRUPTED = """
import sys
import fa_bench.runs.loop as loop
from fa_bench.cli import main

train = loop.Trainer._epoch

def epoch(self):
    if self.progress.epoch:
        raise KeyboardInterrupt
    train(self)

loop.Trainer._epoch = epoch
sys.exit(main(sys.argv[1:]))
"""
FEW = ["fa", "kp", "brsf", "dfa", "predsim"]


def trained(folder: Path, rule: str, *overrides: str) -> dict[str, Any]:
    """The result and the last epoch's record of a small run, in one dict."""
    net = ["architecture=mlp", "~architecture.channels", "~architecture.hidden"] if rule in DEEP else []
    settings = [each for each in SMALL if not net or not each.startswith("architecture")] + net[:1]
    assert main([*settings, f"algorithm={rule}", *SHORT.get(rule, []), *overrides, f"output_dir={folder}"]) == 0
    result = json.loads(next(folder.rglob("result.json")).read_text())
    line = next(folder.rglob("metrics.jsonl")).read_text().splitlines()[-1]
    return {**json.loads(line), **result}


def step(rule_name: str, compiled: bool) -> dict[str, torch.Tensor]:
    """The gradients of two steps of a convolutional net on the GPU, copied to the CPU."""
    model: Any = convnet(dtype=torch.float32).to("cuda")
    model.cut_points = model.blocks = ["act1", "act2"]
    torch.manual_seed(0)
    x, y = torch.randn(8, 2, 6, 7).to("cuda"), torch.randint(3, (8,)).to("cuda")
    rule = fa_bench.attach(model, rule_name, seed=0, sample_input=x[:2])
    optimizers = Optimizers(SGD(lr=0.1), rule, epochs=1)
    forward = torch.compile(model, dynamic=False) if compiled else model
    gradients = {}
    for number in range(2):
        optimizers.zero_grad()
        logits = forward(x)
        rule.backward(F.cross_entropy(logits, y), logits, y, 1.0)
        gradients |= {
            f"{name}, step {number}": weight.grad.double().cpu()
            for name, weight in model.named_parameters()
            if weight.grad is not None
        }
        optimizers.step()
        rule.step()
    return gradients


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("net", ["mlp", "convnet"])
@pytest.mark.parametrize("rule", ALGORITHMS)
def test_gradients_and_weights_match_cpu(rule: str, net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPU and CPU agree up to rounding in float64. In float32, the tolerance is at least ten times the CPU's own rounding error;
    see `scripts/gpu/equality.py`."""
    monkeypatch.syspath_prepend(SCRIPTS)
    cells, passed = importlib.import_module("gpu.equality").compared(rule, net, "cuda")
    assert passed, cells


@needs_compiler
@pytest.mark.parametrize("rule", FEW)
def test_compiled_gradients_match_eager(rule: str) -> None:
    expected, given = step(rule, compiled=False), step(rule, compiled=True)
    for name, gradient in expected.items():
        torch.testing.assert_close(given[name], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", ALGORITHMS)
def test_every_rule_trains(rule: str, tmp_path: Path) -> None:
    result = trained(tmp_path, rule)
    assert result["status"] == "finished" and result["device"].startswith("cuda") and result["peak_memory_bytes"] > 0


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["compile=true"], marks=needs_compiler),
        pytest.param(["compile=true", "graphs=true"], marks=needs_compiler),
        ["precision=bf16"],
        ["precision=tf32"],
        ["channels_last=true"],
        pytest.param(["compile=true", "graphs=true", "accumulate=2"], marks=needs_compiler),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("rule", FEW)
def test_options_change_loss_only_by_rounding(rule: str, overrides: list[str], tmp_path: Path) -> None:
    """bf16 has 8 bits of precision and TF32 has 11, so relative errors of about 1e-2 and 1e-3 are expected after ten updates."""
    reference = trained(tmp_path / "plain", rule, *[each for each in overrides if each.startswith("accumulate")])
    result = trained(tmp_path / "option", rule, *overrides)
    tolerance = 0.15 if "precision=bf16" in overrides else 3e-2 if "precision=tf32" in overrides else 5e-3
    assert result["train_loss"] == pytest.approx(reference["train_loss"], rel=tolerance)


@pytest.mark.parametrize("overrides", [[], pytest.param(["compile=true"], marks=needs_compiler)], ids=["eager", "compiled"])
@pytest.mark.parametrize("rule", FEW)
def test_deterministic_runs_are_bitwise_identical(rule: str, overrides: list[str], tmp_path: Path) -> None:
    """Deterministic runs are identical even after a run in the same process that was not deterministic."""
    trained(tmp_path / "before", rule, *overrides)
    first, second = (trained(tmp_path / name, rule, "deterministic=true", *overrides) for name in ("a", "b"))
    for key in ("weights_hash", "feedback_hash", "optimizer_hash"):
        assert first[key] == second[key], key


@pytest.mark.parametrize("rule", ["kp", "dkp", "brsf"])
def test_gpu_run_resumes_on_cpu(rule: str, tmp_path: Path) -> None:
    """With device=auto, a run has the same config hash with and without a GPU, and its checkpoint can be read on either
    device."""
    settings = [each for each in SMALL if not each.startswith("device")] + [f"algorithm={rule}", f"output_dir={tmp_path}"]
    subprocess.run([sys.executable, "-c", INTERRUPTED, *settings], check=False, timeout=300)
    begun = json.loads(next(tmp_path.rglob("result.json")).read_text())
    assert begun["epoch"] == 1 and begun["device"].startswith("cuda")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-m", "fa_bench", *settings, "resume=true"], check=True, timeout=300, env=environment)
    resumed = json.loads(next(tmp_path.rglob("result.json")).read_text())
    assert resumed["status"] == "finished" and resumed["epoch"] == 2 and resumed["device"].startswith("cpu")
