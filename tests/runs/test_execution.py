"""Tests of how a run is compiled, of its precision and of its memory format."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo

import fa_bench
from fa_bench.cli import main
from fa_bench.config.job import RunOptions
from fa_bench.errors import ConfigError
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.runs import callbacks, execution
from fa_bench.runs.callbacks import Display
from fa_bench.runs.execution import Execution
from fa_bench.runs.hashes import state_hash
from fa_bench.runs.loop import Progress
from tests.versions import needs_compiler

CPU = torch.device("cpu")
SMALL = [
    "dataset=synthetic",
    "dataset.samples=200",
    "dataset.validation=40",
    "architecture.widths=[8]",
    "batch_size=30",
    "epochs=2",
    "threads=1",
    "device=cpu",
    "probe_every=2",
    "loggers=[]",
    "drop_last=false",
]


def trained(directory: Path, *overrides: str) -> dict[str, Any]:
    """The result of a small run with 6 batches per epoch, the last one of 10 images."""
    assert main([*SMALL, *overrides, f"output_dir={directory}"]) == 0
    return json.loads(next(directory.rglob("result.json")).read_text())


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Record the shapes of the batches that compiled code processes, and use PyTorch's own operations instead of compiled
    kernels."""
    shapes: list[tuple[int, ...]] = []
    compile_model = torch.compile

    def compiled(function: Callable[..., Any], *, dynamic: bool, options: dict[str, Any]) -> Callable[..., Any]:
        assert dynamic is False and options == {"fallback_random": True}

        def call(x: torch.Tensor, y: torch.Tensor) -> Any:
            shapes.append(tuple(x.shape))
            return graph(x, y)

        graph: Any = compile_model(function, dynamic=False, fullgraph=True, backend="aot_eager")
        return call

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(execution, "_no_compiler", lambda: "")
    return shapes


@needs_compiler
@pytest.mark.parametrize("algorithm", ["kp", "dkp", "drtp", "brsf", "predsim"])
def test_compiled_run_has_same_results(algorithm: str, tmp_path: Path, traced: list[tuple[int, ...]]) -> None:
    """Neither measuring angles between steps nor training on the smaller last batch uses the graph or compiles another one."""
    plain = trained(tmp_path / "plain", f"algorithm={algorithm}")
    assert not traced
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = trained(tmp_path / "compiled", f"algorithm={algorithm}", "compile=true")
    assert {shape[0] for shape in traced} == {30} and len(traced) == 2 * 5
    same = ("weights_hash", "feedback_hash", "optimizer_hash", "batches_hash", "angles", "test_accuracy")
    assert {key: plain[key] for key in same} == {key: compiled[key] for key in same}
    assert compiled["compile_seconds"] > 0 and plain["compile_seconds"] is None
    assert compiled["config_hash"] != plain["config_hash"]


@needs_compiler
def test_micro_batches_of_both_sizes_are_compiled(tmp_path: Path, traced: list[tuple[int, ...]]) -> None:
    plain = trained(tmp_path / "plain", "algorithm=fa", "accumulate=4")
    compiled = trained(tmp_path / "compiled", "algorithm=fa", "accumulate=4", "compile=true")
    assert {shape[0] for shape in traced} == {7, 8}
    assert compiled["weights_hash"] == plain["weights_hash"]


@needs_compiler
def test_compiled_model_has_same_dropout_and_is_deterministic() -> None:
    """Outputs are compared with a tolerance, because the fused kernels of PyTorch's Inductor compute in a different order, which
    causes relative errors of about 1e-7."""
    if execution._no_compiler():
        pytest.skip("no C++ compiler")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 50), torch.nn.ReLU(), torch.nn.Dropout(0.5), torch.nn.Linear(50, 3))
    x, y = torch.randn(6, 4), torch.zeros(6)

    def forward(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return model(x)

    compiled = Execution(RunOptions(compile=True, batch_size=6), CPU).forward(forward, model, 1)
    outputs = []
    for call in (forward, compiled, compiled):
        torch.manual_seed(1)
        outputs.append(call(x, y))
    assert torch.equal(outputs[1], outputs[2])
    assert torch.allclose(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)


def test_bf16_keeps_weights_in_fp32(tmp_path: Path) -> None:
    plain, half = (trained(tmp_path / precision, "algorithm=kp", f"precision={precision}") for precision in ("fp32", "bf16"))
    assert half["weights_hash"] != plain["weights_hash"] and half["initial_weights_hash"] == plain["initial_weights_hash"]
    # bf16 has a precision of 8 bits, so errors of about 1 % are expected.
    losses = [
        json.loads(next((tmp_path / name).rglob("metrics.jsonl")).read_text().splitlines()[0])["train_loss"]
        for name in ("fp32", "bf16")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[0] != losses[1]
    checkpoint = torch.load(next((tmp_path / "bf16").rglob("last.pt")), weights_only=True)
    assert {tensor.dtype for tensor in checkpoint["model"].values() if tensor.is_floating_point()} == {torch.float32}


def test_channels_last_changes_only_memory_format() -> None:
    plain = torch.nn.Conv2d(3, 4, 3)
    assert state_hash(Execution(RunOptions(channels_last=True), CPU).placed(copy.deepcopy(plain)).state_dict()) == state_hash(
        plain.state_dict()
    )
    conv = Execution(RunOptions(channels_last=True), CPU).placed(torch.nn.Conv2d(3, 4, 3))
    assert conv.get_parameter("weight").is_contiguous(memory_format=torch.channels_last)
    fa_bench.attach(conv, "kp")
    assert conv.get_parameter("feedback_B").is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "tf32"}, "precision=tf32: cpu devices"),
        ({"graphs": True, "compile": True}, "graphs=true: .* cpu"),
    ],
)
def test_options_unsupported_by_device_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Execution(RunOptions(**options), CPU)


def test_graphs_require_compile() -> None:
    with pytest.raises(ConfigError, match="graphs=true needs compile=true"):
        Execution(RunOptions(graphs=True), torch.device("cuda"))


def test_compile_without_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "too_old_to_compile", lambda: "")
    monkeypatch.setattr(execution, "_no_compiler", lambda: "no g++ here")
    with pytest.raises(ConfigError, match=r"compile=true needs a C.* compiler.*no g\+\+ here.*compile=false"):
        Execution(RunOptions(compile=True), CPU)


@pytest.mark.parametrize(
    ("version", "refused"), [("2.12.1+cpu", True), ("2.13.0", False), ("3.0.0a0+git1", False), ("1.14", True)]
)
def test_compile_requires_recent_torch(version: str, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "_no_compiler", lambda: "")
    monkeypatch.setattr(torch, "__version__", version)
    message = r"compile=true: .* requires torch 2\.13 or later, not .*compile=false"
    with pytest.raises(ConfigError, match=message) if refused else nullcontext():
        Execution(RunOptions(compile=True), CPU)
    assert execution._pays(torch.nn.Conv2d(1, 1, 1), CPU, 9999)[0] is not refused


@pytest.mark.parametrize(
    ("model", "device", "steps", "compiler", "wanted"),
    [
        (torch.nn.Conv2d(1, 1, 1), "cpu", 2000, "", True),
        (torch.nn.Conv2d(1, 1, 1), "cpu", 1999, "", False),
        (torch.nn.Linear(1, 1), "cpu", 9999, "", False),
        (torch.nn.Conv2d(1, 1, 1), "cuda", 9999, "", False),
        (torch.nn.Conv2d(1, 1, 1), "cpu", 9999, "none", False),
    ],
)
def test_compile_auto_follows_measured_benefit(
    model: torch.nn.Module,
    device: str,
    steps: int,
    compiler: str,
    wanted: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(execution, "too_old_to_compile", lambda: "")
    monkeypatch.setattr(execution, "_no_compiler", lambda: compiler)
    assert execution._pays(model, torch.device(device), steps)[0] is wanted
    with caplog.at_level("INFO", "fa_bench"):
        Execution(RunOptions(compile="auto"), torch.device("meta")).forward(lambda x, y: None, model, steps)
    assert "compile=auto: off (not measured on meta)" in caplog.text


def test_auto_uses_channels_last_for_convolutions_on_cpu() -> None:
    for layer, wanted in ((torch.nn.Conv2d(3, 4, 3), True), (torch.nn.Linear(3, 4), False)):
        chosen = Execution(RunOptions(channels_last="auto"), CPU)
        chosen.placed(layer)
        assert chosen._channels_last is wanted


def test_tf32_is_limited_to_context() -> None:
    with execution._tf32():
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == "highest"


def test_remaining_time_excludes_compilation(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Only compilation since the run was resumed is subtracted, not earlier compilation."""
    progress, clock = Progress(compile_seconds=20.0), iter([0.0, 100.0])
    trainer: Any = SimpleNamespace(
        options=RunOptions(epochs=2), progress=progress, splits=SimpleNamespace(train=SimpleNamespace(steps=lambda size, drop: 1))
    )
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: next(clock))
    display = Display("run", later_epochs=3)
    display.on_fit_start(trainer)
    progress.epoch, progress.compile_seconds = 1, 90.0
    with caplog.at_level("INFO", "fa_bench"):
        display.on_epoch_end(trainer, {"train_loss": 1.0, "val_accuracy": 0.5, "test_accuracy": 0.5})
    display.close()
    assert "30 s per epoch; about 2 min remaining" in caplog.text  # 30 s for each of four epochs


def test_rule_with_second_forward_pass_is_not_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """compile=true is refused before training. With compile=auto, the run explains why it is not compiled although compilation
    would be worthwhile."""
    monkeypatch.setattr(execution, "_pays", lambda *_: (True, ""))
    pepita = ["algorithm=pepita", "optimizer.lr=0.01"]
    assert main([*SMALL, *pepita, "compile=true", f"output_dir={tmp_path / 'one'}"]) == 2
    assert "compile=true is not possible with algorithm=pepita, which runs the model again" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.pt"))
    trained(tmp_path / "two", *pepita, "compile=auto")
    log = next((tmp_path / "two").rglob("run.log")).read_text()
    assert "compile=auto: off (the rule runs the model again)" in log


def test_evaluation_uses_predict_of_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only evaluations use the prediction; the training loss is computed from the model's output."""
    rule = ALGORITHMS["forward_forward"]
    monkeypatch.setattr(rule, "predict", lambda self, x: torch.zeros(len(x), 10))
    trained(tmp_path, "algorithm=forward_forward", "architecture.widths=[8,8]", "optimizer.lr=1e-3", "epochs=1")
    [line] = map(json.loads, next(tmp_path.rglob("metrics.jsonl")).read_text().splitlines())
    assert [line["test_loss"], line["val_loss"]] == pytest.approx([math.log(10)] * 2, rel=1e-6)
    assert line["train_loss"] != pytest.approx(math.log(10), rel=1e-3)
