"""Tests of the GPU check on the CPU: its budget, its page, parts that fail, and its comparisons."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(name="gpu")
def gpu_(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """A function that imports a module of the script by name. After the test, the modules are removed from `sys.modules`."""
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])
    before = {*sys.modules}
    yield importlib.import_module
    for name in {*sys.modules} - before:
        if name.partition(".")[0] in ("gpu", "gpu_check", "bench_step"):
            del sys.modules[name]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_time_budget_is_shared_and_unfit_parts_are_skipped(gpu: Callable[[str], Any]) -> None:
    parts, page, clock = gpu("gpu.parts"), gpu("gpu.page"), Clock()
    chosen = [
        parts.Part("a", "A", None, 1, 5),
        parts.Part("b", "B", None, 1, 5),
        parts.Part("c", "C", None, 2, 60),
        parts.Part("d", "D", None, 1, 5),
    ]
    sections = [page.Section(part.name, part.title) for part in chosen]
    granted: list[tuple[str, float]] = []

    def run_one(part: Any, section: Any, until: float) -> None:
        granted.append((part.name, until - clock.now))
        clock.now += {"a": 20, "b": 0, "d": 1}[part.name]
        section.status = page.PASSED
        if part.name == "b":
            raise OSError("no such program")

    parts.run_all(chosen, sections, clock.now + 103, run_one, lambda: None, clock)
    # Part a gets a fifth of 100 s and uses all of it. Part b gets a quarter of the remaining 80 s and uses none of it. Part c
    # needs more than its two thirds of 80 s.
    assert granted == [("a", 20.0), ("b", 20.0), ("d", 80.0)]
    assert sections[1].status == page.ERROR and sections[1].error == "OSError: no such program"
    assert sections[2].status == page.SKIPPED and sections[2].budget == pytest.approx(80 * 2 / 3)
    assert sections[0].status == sections[3].status == page.PASSED and sections[3].seconds == 1


def test_skipped_part_is_reported_on_page(gpu: Callable[[str], Any]) -> None:
    parts, page = gpu("gpu.parts"), gpu("gpu.page")
    section, ran = page.Section("a", "A"), []
    parts.run_all([parts.Part("a", "A", None, 1, 30)], [section], 20.0, lambda *_: ran.append(1), lambda: None, lambda: 0.0)
    assert not ran and section.status == page.SKIPPED
    assert "Skipped: its share of the time was 17 s, but it needs 30 s." in page.markdown({}, [section])


def test_page_reports_every_miss(gpu: Callable[[str], Any], tmp_path: Path) -> None:
    page = gpu("gpu.page")
    section = page.Section("a", "Part A", columns=["rule", "value", "result"], missing=["kp", "dfa"], notes=["Tolerance 1."])
    section.add("fa", "a|b\nc", passed=True)
    section.add("kp", 3, passed=False)
    section.add("dfa", "-")
    section.end()
    page.write_page(tmp_path, {"device": "D"}, [section, page.Section("b", "Part B")])
    text = (tmp_path / "gpu_check.md").read_text()
    assert "- device: D" in text and "| Part A | FAILED | 2 | 1 | - | - |" in text and "| Part B | not started | 0 | 0 |" in text
    assert "| fa | a\\|b c | pass |" in text and "| kp | 3 | **FAIL** |" in text and "| dfa | - |  |" in text
    assert "Not run, for lack of time: kp, dfa." in text and "Tolerance 1." in text
    assert json.loads((tmp_path / "gpu_check.json").read_text())["sections"][0]["misses"] == 1
    section.error = "RuntimeError: CUDA\nline 2"
    section.end()
    assert "## Part A: ERROR" in page.markdown({}, [section]) and "    line 2" in page.markdown({}, [section])


CHILD = """
import sys, time, pathlib
sys.path.insert(0, {scripts!r})
from gpu.page import Section
section = Section("a", "A", path=pathlib.Path({file!r}))
section.add("row", passed=True)
{rest}
"""


@pytest.mark.parametrize(
    ("rest", "seconds", "error"),
    [
        ("section.end()", 60.0, ""),
        ("print('boom'); sys.exit(3)", 60.0, "the process ended with code 3; its last lines:\nboom"),
        ("import os; os.abort()", 60.0, "the process ended with code -6"),
        ("time.sleep(60)", 2.5, ""),
    ],
)
def test_failing_crashing_or_hanging_part_keeps_rows(
    rest: str, seconds: float, error: str, gpu: Callable[[str], Any], tmp_path: Path
) -> None:
    parts, page, changes = gpu("gpu.parts"), gpu("gpu.page"), []
    file, log, section = tmp_path / "section.json", tmp_path / "log", page.Section("a", "A")
    code = CHILD.format(scripts=str(SCRIPTS), file=str(file), rest=rest)
    parts.run_in_process([sys.executable, "-c", code], section, file, log, time.time() + seconds, lambda: changes.append(1))
    assert section.rows == [["row", "pass"]]
    assert section.error.startswith(error) and bool(section.error) == bool(error)
    assert section.status == (page.ERROR if error else page.OUT_OF_TIME if seconds < 60 else page.PASSED)
    assert bool(section.notes) == (section.status == page.OUT_OF_TIME)


def test_part_error_is_recorded(gpu: Callable[[str], Any], tmp_path: Path) -> None:
    parts, page = gpu("gpu.parts"), gpu("gpu.page")

    def run(context: Any, section: Any) -> None:
        section.add("first", passed=True)
        raise ValueError("no kernel")

    section = page.Section("a", "A", path=tmp_path / "a.json")
    parts.run_here(parts.Part("a", "A", run, 1, 1), parts.Context("cpu", tmp_path, tmp_path, 0.0), section)
    saved = json.loads((tmp_path / "a.json").read_text())
    assert saved["status"] == "ERROR" and saved["error"].startswith("ValueError: no kernel\n(test_gpu_check.py, line ")
    assert saved["rows"] == [["first", "pass"]]


@pytest.fixture(name="context")
def context_(gpu: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    return gpu("gpu.parts").Context("cpu", tmp_path, tmp_path, time.time() + 600)


def test_cpu_equality_is_exact_and_differences_are_detected(
    gpu: Callable[[str], Any], context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    equality, page = gpu("gpu.equality"), gpu("gpu.page")
    monkeypatch.setattr(equality, "ALGORITHMS", ["kp", "wm", "asap"])
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    section = page.Section("equality", "Equality")
    equality.run(context, section)
    assert [row[:2] for row in section.rows] == [[net, rule] for net in ("mlp", "convnet") for rule in ("kp", "wm", "asap")]
    assert (section.checks, section.misses) == (6, 0) and all(cell == "0.0e+00 (-)" for row in section.rows for cell in row[2:6])
    one = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([1e-9])}
    assert equality.largest_difference({**one, "a": torch.tensor([1.0, 2.002])}, one) == (pytest.approx(1e-3, rel=1e-3), "a")
    assert equality.largest_difference({**one, "b": torch.tensor([201e-9])}, one) == (pytest.approx(1e-3, rel=1e-3), "b")
    assert equality.largest_difference({**one, "a": torch.tensor([1.0, torch.nan])}, one) == (float("inf"), "a")
    assert equality.largest_difference({"a": one["a"]}, one) == (float("inf"), "b")


def test_noise_is_sampled_on_the_cpu(gpu: Callable[[str], Any]) -> None:
    """Noise can be sampled for devices without a generator, such as meta. For every dtype, the numbers are sampled in float64."""
    sampled_on_cpu, before = gpu("gpu.noise").sampled_on_cpu, (torch.Tensor.normal_, torch.Tensor.uniform_)
    with sampled_on_cpu():
        wide, narrow = (
            torch.empty(5, dtype=dtype).normal_(1.0, 2.0, generator=torch.Generator().manual_seed(3))
            for dtype in (torch.float64, torch.float32)
        )
        torch.empty(2, device="meta").uniform_(generator=torch.Generator())
        generator = torch.Generator().manual_seed(3)
        first, second = (torch.empty(5).normal_(mean=1.0, std=2.0, generator=generator) for _ in range(2))
        torch.manual_seed(0)
        usual = torch.empty(4).normal_()
    assert (torch.Tensor.normal_, torch.Tensor.uniform_) == before
    expected = torch.empty(5, dtype=torch.float64).normal_(1.0, 2.0, generator=torch.Generator().manual_seed(3))
    assert torch.equal(wide, expected) and torch.equal(narrow, expected.float()) and torch.equal(first, narrow)
    assert not torch.equal(second, first)
    torch.manual_seed(0)
    assert torch.equal(usual, torch.empty(4).normal_())


@pytest.mark.parametrize("rule", ["node_perturbation", "wm", "f3", "forward_gradient"])
def test_equality_tolerates_only_cpu_rounding(rule: str, gpu: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    equality = gpu("gpu.equality")
    trained, scale = equality.trained, 0.0

    def on_device(name: str, net: str, dtype: torch.dtype, device: str) -> Any:
        gradients, state = trained(name, net, dtype, "cpu")
        return {key: value * (1 + scale * (device == "gpu")) for key, value in gradients.items()}, state

    monkeypatch.setattr(equality, "trained", on_device)
    assert equality.compared(rule, "mlp", "gpu")[1]
    scale = 1e-8  # too much for float64, and too little to be seen in float32
    assert not equality.compared(rule, "mlp", "gpu")[1]
    monkeypatch.setitem(equality.TOLERANCES, torch.float64, 1.0)
    assert equality.compared(rule, "mlp", "gpu")[1]
    scale = 0.01
    assert not equality.compared(rule, "mlp", "gpu")[1]


def test_old_torch_compiles_nothing(gpu: Callable[[str], Any], context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, options, page = gpu("gpu.jobs"), gpu("gpu.options"), gpu("gpu.page")
    monkeypatch.setattr(jobs, "too_old_to_compile", lambda: "torch 1 is old")
    result = dict.fromkeys(("train_loss", "test_loss", "seconds"), 1.0) | dict.fromkeys(("compile_seconds", *options.HASHES))
    monkeypatch.setattr(options, "train", lambda context, *overrides: result)
    for part in (options.run, options.determinism):
        part(context, section := page.Section("part", "Part"))
        assert section.notes[-1] == "Nothing was compiled: torch 1 is old." and not section.misses
        assert section.rows and not any("compile" in row[0] or "graphs" in row[0] for row in section.rows)
    modes, steps = set(), gpu("gpu.steps")
    monkeypatch.setattr(steps, "measure", lambda context, section, mode, *others: modes.add(mode))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    steps.run(context, section := page.Section("steps", "Steps"))
    assert modes == {"eager"} and section.notes[-1] == "Nothing was compiled: torch 1 is old."


def test_options_are_compared_with_the_plain_run(
    gpu: Callable[[str], Any], context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, page, calls = gpu("gpu.options"), gpu("gpu.page"), []

    def train(context: Any, *overrides: str) -> dict[str, Any]:
        calls.append(overrides)
        if "compile=true" in overrides and "algorithm=kp" in overrides:
            raise options.RunFailed("no compiler")
        loss = 1.2 if "precision=bf16" in overrides else 1.001 if "compile=true" in overrides else 1.0
        return {"train_loss": loss, "test_loss": 1.0, "seconds": 0.5, "compile_seconds": None}

    monkeypatch.setattr(options, "train", train)
    monkeypatch.setattr(options, "RULES", {"fa": "conv2", "kp": "conv2"})
    monkeypatch.setattr(options, "SOME", {})
    section = page.Section("options", "Options")
    options.run(context, section)
    rows = {(row[0], row[1]): row for row in section.rows}
    assert rows["compile", "fa"][-1] == "pass" and rows["compile", "fa"][5:7] == ["1.0e-03", "0.002"]
    assert rows["bf16", "fa"][-1] == "**FAIL**" and rows["compile", "kp"][3] == "no compiler"
    assert rows["again", "kp"][-1] == "pass" and not {"tf32", "graphs"} & {row[0] for row in section.rows}  # not on a CPU
    context.deadline = time.time() + 20  # no time to compile
    section = page.Section("options", "Options")
    options.run(context, section)
    assert "compile fa" in section.missing and "bf16 kp" not in section.missing


def test_differing_hashes_fail_determinism(gpu: Callable[[str], Any], context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options, page, runs = gpu("gpu.options"), gpu("gpu.page"), []

    def train(context: Any, *overrides: str) -> dict[str, Any]:
        runs.append(overrides)
        assert "deterministic=true" in overrides
        different = len(runs) if "algorithm=kp" in overrides else 0
        return {"weights_hash": "w", "feedback_hash": f"f{different}", "optimizer_hash": "o"}

    monkeypatch.setattr(options, "train", train)
    monkeypatch.setattr(options, "DETERMINISTIC", ["fa", "kp"])
    section = page.Section("determinism", "Determinism")
    options.determinism(context, section)
    assert [row[-1] for row in section.rows] == ["pass", "**FAIL**"] * 2
    assert [row[0] for row in section.rows] == ["eager", "eager", "compiled", "compiled"]


def test_train_job_returns_result_or_raises(gpu: Callable[[str], Any], context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = gpu("gpu.jobs")
    small = ["dataset=synthetic", "architecture.widths=[4]", "epochs=1", "scale=smoke", "threads=1"]
    result = jobs.train(context, *small)
    assert result["train_loss"] > 0 and len(result["weights_hash"]) == 16
    with pytest.raises(jobs.RunFailed, match=r"OptionError: algorithm\.density"):
        jobs.train(context, *small, "algorithm.density=7")


def test_images_are_converted_and_epochs_double_within_budget(
    gpu: Callable[[str], Any], context: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    training, page, epochs = gpu("gpu.training"), gpu("gpu.page"), []
    section = page.Section("cifar", "CIFAR")
    training.cifar(context, section)
    assert not section.rows and "contains neither" in section.notes[0]
    for number, part in enumerate(("train", "test")):
        for label in ("cat", "dog"):
            (tmp_path / part / label).mkdir(parents=True)
            Image.new("RGB", (4, 4), (255 * (label == "dog"), 0, number)).save(tmp_path / part / label / "0.png")
    now = [0.0]
    monkeypatch.setattr(training, "time", SimpleNamespace(time=lambda: now[0]))
    monkeypatch.setattr(type(context), "left", lambda self: 200 - now[0])

    def train(context: Any, *overrides: str) -> dict[str, Any]:
        count = next(int(each.partition("=")[2]) for each in overrides if each.startswith("epochs="))
        epochs.append(count)
        now[0] += 5 * count
        return {"test_accuracy": 0.5, "train_loss": 1.0, "seconds": 1.0, "peak_memory_bytes": 2_000_000}

    monkeypatch.setattr(training, "train", train)
    training.cifar(context, section := page.Section("cifar", "CIFAR"))
    assert epochs == [1] * 8 + [2] * 8 and section.rows[8] == ["resnet20", "bp", "2", "50.00", "1.0000", "1.0", "2"]
    assert section.notes[0].startswith("CIFAR-10 (JPEG)") and not section.missing
    with np.load(tmp_path / "cifar10.npz") as file:
        assert file["x_train"].shape == (2, 3, 4, 4) and file["y_test"].tolist() == [0, 1]
        assert file["x_train"][:, 0, 0, 0].tolist() == [0, 255] and file["x_test"][0, 2].max() == 1


def test_rates_together_are_positive(gpu: Callable[[str], Any], context: Any) -> None:
    assert all(rate > 0 for rate in gpu("gpu.steps").rates_together(1, context, seconds=0.1))


def test_gpu_check_command(gpu: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script, given = gpu("gpu_check"), ["--data-dir", str(tmp_path), "--output-dir", str(tmp_path / "out"), "--device", "cpu"]
    with pytest.raises(SystemExit):
        script.main([*given, "--only", "equality,stepps"])
    assert "'stepps' is not a part (allowed: equality, options, determinism, steps" in capsys.readouterr().err
    assert script.main([*given, "--only", "pfa_fig2,cifar", "--minutes", "1"]) == 0
    text = (tmp_path / "out" / "gpu_check.md").read_text()
    assert "contains no folder MNIST" in text and f"command: python scripts/gpu_check.py --data-dir {tmp_path}" in text
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"gpu_check.md", "gpu_check.json", "gpu_check.log"}
