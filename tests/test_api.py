"""Tests of the functions that correspond to the commands: their arguments, results and messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fa_bench
from fa_bench.api import _arguments
from fa_bench.errors import ConfigError, CoverageError, FaBenchError, OptionError
from fa_bench.runs.loop import Trainer

SMALL = [
    "dataset=synthetic",
    "dataset.samples=64",
    "dataset.test_samples=16",
    "architecture.widths=[8]",
    "epochs=1",
    "loggers=[]",
    "threads=1",
]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("bp,fa", "bp,fa"),
        (["bp", "fa"], "bp,fa"),
        (range(2), "0,1"),
        (np.arange(2), "0,1"),
        (np.array([0.5, 1e-3]), "0.5,0.001"),
        (torch.tensor([1, 2]), "1,2"),
        (np.int64(3), "3"),
        ([np.bool_(True), None], "true,null"),
        ([[8, 4], (2,)], "[8,4],[2]"),
        (Path("o/x"), "o/x"),
        (Path("2024"), '"2024"'),
        (Path("a,b c"), '"a,b c"'),
        ([[]], "[]"),
        (1e-5, "1e-05"),
    ],
    ids=str,
)
def test_python_values_are_converted_to_overrides(value: Any, text: str) -> None:
    assert _arguments("run", ["seed=0"], {"key": value}) == ["seed=0", f"key={text}"]


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        ([["algorithm=bp"]], {}, r"\['algorithm=bp'\] is not an override .* unpack it: fa_bench.run\(\*\['algorithm=bp'\]\)$"),
        ([{"seed": 0}], {}, r"unpack it: fa_bench.run\(\*\*\{'seed': 0\}\)$"),
        ([Path("seed=0")], {}, r"is not an override \(a string such as 'seed=0'\)$"),
        (["-m"], {}, r"^-m: fa_bench.run accepts no flags"),
        ([], {"seed": []}, r"seed=\[\] is a sweep without values"),
        ([], {"algorithm": {"bp"}}, r"set is not an allowed type .*; pass a list$"),
        ([], {"optimizer": {"lr": 0.1}}, r"pass its keys one by one: \*\*\{'optimizer.lr': 0.1\}$"),
        ([], {"seed": [object()]}, r"seed=<object .*>: object is not an allowed type"),
        ([], {"algoritm": "bp"}, r"^algoritm: unknown key; did you mean 'algorithm'\?"),
        ([], {"probes": ["readout"]}, r"^probes=\['readout'\] is a sweep; .* pass probes=\[\['readout'\]\]$"),
        ([], {"architecture.widths": [8, 8]}, r"pass \*\*\{'architecture.widths': \[\[8, 8\]\]\}$"),
    ],
)
def test_invalid_overrides_are_rejected_before_run(overrides: list, options: dict, message: str) -> None:
    with pytest.raises((ConfigError, OptionError), match=message):
        fa_bench.run(*overrides, **options)
    assert not list(Path().iterdir())


def test_suggested_fixes_work() -> None:
    [run] = fa_bench.run(*SMALL, metrics=[["norm_ratio"]], **{"architecture.widths": [[8, 8]]})
    assert run.config["architecture.widths"] == [8, 8] and list(run.quantities) == ["norm_ratio"]


def test_second_call_returns_same_runs_without_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = fa_bench.run(*SMALL, algorithm="fa", output_dir=Path("a, b"))
    monkeypatch.setattr(Trainer, "fit", lambda *args: pytest.fail("trained again"))
    assert fa_bench.run(*SMALL, algorithm="fa", output_dir="'a, b'") == first
    [run] = first
    accuracy = f"{run.result['test_accuracy']:.2%}"
    assert repr(run) == f"<Run fa seed 0: finished, test accuracy {accuracy}; {run.directory}>"
    assert run.directory.parts[0] == "a, b" and "Traceback" not in capsys.readouterr().err


def test_error_found_by_run_raises_without_output(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CoverageError, match="cuts=nope: the model has no module"):
        fa_bench.run(*SMALL, "algorithm.cuts=[nope]", algorithm="dfa")
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_failed_run_is_returned_with_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(Trainer, "fit", fail)
    [run] = fa_bench.run(*SMALL, algorithm="fa")
    assert not run.finished and repr(run) == f"<Run fa seed 0: failed; {run.directory}>"
    error = capsys.readouterr().err
    log = Path(error.split("(traceback: ")[1].rstrip(")\n"))
    assert error.startswith("fa-bench: failed: RuntimeError: boom") and "boom" in log.read_text()


def test_tune_rejects_invalid_overrides() -> None:
    with pytest.raises(FaBenchError, match=r"unpack it: fa_bench.tune\(\*\["):
        fa_bench.tune(["algorithm=bp"])  # type: ignore[arg-type]
