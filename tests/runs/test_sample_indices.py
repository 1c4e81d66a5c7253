"""Tests of runs with a rule that stores an error for every training sample: sample indices, the number of samples, and the errors
in checkpoints."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import fa_bench
from fa_bench.cli import main
from fa_bench.config.job import RunOptions
from fa_bench.data.base import Splits
from fa_bench.data.splits import ResidentSplit
from fa_bench.errors import OptionError
from fa_bench.metrics.meter import AlignmentMeter
from fa_bench.metrics.probes.base import Subject
from fa_bench.metrics.probes.gradient_norm import GradientNorm
from fa_bench.metrics.probes.stability import Stability
from fa_bench.runs.batches import check_batches, check_indices, fixed_batch
from fa_bench.runs.callbacks import StopOnSignal

BASE = [
    "dataset=synthetic",
    "dataset.samples=50",
    "dataset.test_samples=20",
    "dataset.validation=10",
    "architecture.widths=[8,8]",
]
RUN = [
    *BASE,
    "algorithm=f3",
    "batch_size=9",
    "drop_last=false",
    "epochs=3",
    "loggers=[]",
    "threads=1",
    "probe_every=4",
    "probe_size=8",
]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def result(folder: str) -> dict[str, Any]:
    return json.loads(Path(folder, "result.json").read_text())


def hashes(folder: str) -> list[str]:
    return [result(folder)[key] for key in ("weights_hash", "feedback_hash", "batches_hash")]


@pytest.mark.parametrize("step", [3, 6, 8], ids=["first epoch", "second", "within the second"])
def test_resumed_run_restores_sample_errors(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights and the rule's state, which contains the errors, have the same hashes. In both variants of the test, the last
    batch of an epoch is incomplete; it is either dropped or used."""
    for number, more in enumerate(([], ["drop_last=true", "accumulate=2", "algorithm.information=delayed_error_one_hot"])):
        assert main([*RUN, *more, f"hydra.run.dir=whole{number}"]) == 0
        on_step = StopOnSignal.on_step_end

        def stopping(callback: Any, trainer: Any, on_step: Any = on_step) -> None:
            if trainer.progress.step == step:
                signal.raise_signal(signal.SIGTERM)
            on_step(callback, trainer)

        with monkeypatch.context() as patch:
            patch.setattr(StopOnSignal, "on_step_end", stopping)
            assert main([*RUN, *more, f"hydra.run.dir=run{number}"]) == 143
        assert main([*RUN, *more, f"hydra.run.dir=run{number}", "resume=true"]) == 0
        assert hashes(f"run{number}") == hashes(f"whole{number}")


def test_checkpoint_has_error_of_every_trained_sample() -> None:
    """Of 40 samples in batches of 9, the last 4 are dropped in the only epoch."""
    assert main([*RUN, "epochs=1", "drop_last=true", "hydra.run.dir=run"]) == 0
    state = torch.load("run/checkpoints/last.pt", weights_only=True)
    assert state["rule"]["errors"].shape == (40, 10) and state["rule"]["seen"].sum() == 36
    assert "feedback_errors" not in state["model"] and "errors" not in state["model"]


def test_micro_batches_receive_their_sample_indices() -> None:
    """The second error of every sample depends on its first one, so equal errors show that micro-batches used the right
    indices."""
    states = []
    for count in (1, 3):
        assert main([*RUN, "epochs=2", f"accumulate={count}", f"hydra.run.dir=run{count}"]) == 0
        states.append(torch.load(f"run{count}/checkpoints/last.pt", weights_only=True)["rule"])
    assert all(state["seen"].all() for state in states)
    torch.testing.assert_close(states[0]["errors"], states[1]["errors"], rtol=1e-3, atol=1e-5)


def test_measurements_and_probes_do_not_change_results() -> None:
    for folder, more in (
        ("plain", ["probe_every=0"]),
        ("measured", ["probe_every=1", "probes=[gradient_norm,stability,depth_utility]", "probes_epochs=1"]),
    ):
        assert main([*RUN, *more, f"hydra.run.dir={folder}"]) == 0
    assert hashes("plain") == hashes("measured")
    probes = result("measured")["probes"]
    assert all(value > 0 for value in probes["gradient_norm_update"].values()) and probes["stability"]


def test_seed_determines_shuffling() -> None:
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert main([*RUN, f"seed={seed}", f"hydra.run.dir={folder}"]) == 0
    assert hashes("a") == hashes("b") and hashes("a") != hashes("c")


def test_all_samples_have_indices_without_shuffling() -> None:
    """After an epoch without shuffling, every sample has an error."""
    assert main([*RUN, "shuffle=false", "epochs=1", "hydra.run.dir=run"]) == 0
    assert torch.load("run/checkpoints/last.pt", weights_only=True)["rule"]["seen"].all()


def test_text_windows_are_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["dataset=text", "algorithm=f3", "architecture=lstm", "objective=token_cross_entropy", "epochs=1"]
    assert main([*command, "hydra.run.dir=run"]) == 2
    error = capsys.readouterr().err
    assert (
        "algorithm=f3 stores an error for every training sample, but the samples of dataset=text change in every epoch" in error
    )
    assert not Path("run").exists()


def splits_of(kind: type[ResidentSplit] = ResidentSplit, count: int = 30) -> Splits:
    images = torch.randint(256, (count, 1, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    split = kind(images, torch.arange(count) % 3, [0.5], [0.5], False, CPU)
    return Splits(split, None, split, ["a", "b", "c"], (1, 4, 4), "")


def test_plugin_stream_is_rejected() -> None:
    class Stream(ResidentSplit):
        def batches(self, batch_size: int, **how: Any) -> Any:
            return super().batches(batch_size, **how)

    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    x = torch.zeros(2, 1, 4, 4)
    rule = fa_bench.attach(model, "f3", samples=30, cuts=["2"], sample_input=x)
    check_indices(rule, splits_of(), "mystream")
    with pytest.raises(OptionError, match=r"=f3 stores an error.*dataset=mystream.*use a rule such as dfa"):
        check_indices(rule, splits_of(Stream), "mystream")
    current = rule.detach() and fa_bench.attach(model, "f3", information="current_error", cuts=["2"], sample_input=x)
    check_indices(current, splits_of(Stream), "mystream")


def test_too_few_samples_are_refused_before_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "algorithm.samples=39", "hydra.run.dir=run"]) == 2
    assert "algorithm.samples=39: there are 40 training samples; use null, or 40 or more" in capsys.readouterr().err
    assert main([*RUN, "algorithm.samples=40", "hydra.run.dir=given"]) == 0 and main([*RUN, "hydra.run.dir=known"]) == 0
    assert hashes("given")[0] == hashes("known")[0]


def test_dry_run_reports_memory_of_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "--dry-run"]) == 0
    assert "most recent error of each of 40 training samples takes 1.64 kB" in capsys.readouterr().out  # 40 x (10 x 4 + 1) B


def subject(size: int) -> tuple[Subject, Any]:
    splits = splits_of()
    x, y, indices = fixed_batch(splits, size)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    rule = fa_bench.attach(model, "f3", samples=30, cuts=["2"], sample_input=x[:2])
    return Subject(rule, splits, AlignmentMeter(rule, x, y, indices=indices), batch_size=5), rule


def load_errors(rule: Any, of: Any) -> None:
    rule.load_state_dict({"errors": torch.stack([of(index) for index in range(30)]), "seen": torch.ones(30, dtype=torch.bool)})


@pytest.mark.parametrize("probe", [GradientNorm(), Stability()], ids=["gradient_norm", "stability"])
def test_probes_use_errors_of_their_samples(probe: Any) -> None:
    """If f3 stores the current error of every sample, the probe returns the same values as for dfa. If the errors are shifted by
    one sample, the values differ."""
    values = []
    for shift in (0, 1):
        measured, rule = subject(8)
        with torch.no_grad():
            x, y = next(measured.splits.train.batches(30))
            errors = rule.model(x).softmax(1) - torch.nn.functional.one_hot(y, 3)
        load_errors(rule, lambda index, errors=errors, shift=shift: errors[(index + shift) % 30])
        values.append(probe.measure(measured))
    measured, rule = subject(8)
    x, y, _ = fixed_batch(measured.splits, 8)
    rule = fa_bench.attach(rule.detach(), "dfa", cuts=["2"], sample_input=x[:2], b_init="pytorch")
    wanted = probe.measure(dataclasses.replace(measured, rule=rule, meter=AlignmentMeter(rule, x, y)))
    name = "gradient_norm_update" if "gradient_norm_update" in wanted else "stability"
    assert values[0][name] == pytest.approx(wanted[name], rel=1e-5)
    assert values[1][name]["1"] != pytest.approx(wanted[name]["1"], rel=1e-3)


def test_fixed_batch_returns_sample_indices() -> None:
    splits = splits_of()
    splits.train.labels.copy_(torch.arange(30) // 10)
    x, y, indices = fixed_batch(splits, 6)
    assert indices.tolist() != list(range(6)) and torch.equal(splits.train.labels[indices], y)
    assert torch.equal(torch.stack([next(splits.train.subset(indices[n : n + 1]).batches(1))[0][0] for n in range(6)]), x)


def test_single_sample_batch_check_passes_index() -> None:
    """The check of single-sample batches runs a trial pass, which needs an index."""
    measured, rule = subject(1)
    check_batches(rule, measured.splits, RunOptions(batch_size=1, probe_size=1))
    assert not rule.state_dict()["seen"].any()
