"""Tests of callbacks that end a run early: when the stop takes effect, what is recorded, and when training continues
afterwards."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fa_bench
from fa_bench.callbacks.base import Callback
from fa_bench.cli import main
from fa_bench.command.compose import Composer
from fa_bench.command.dry_run import describe
from fa_bench.config.job import Job
from fa_bench.registry.options import option
from fa_bench.registry.registries import CALLBACKS
from fa_bench.report import figures
from fa_bench.report.live import Watcher
from fa_bench.runs.loop import Trainer
from fa_bench.runs.train import run
from fa_bench.utils.files import CONFIG
from fa_bench.utils.stopping import Interrupted

from .test_loop import fit, load, make_model
from .test_survival import LAST, at_step, recorded

Capture, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch
#: A run of four epochs of five steps.
COMMON = [
    "dataset=synthetic",
    "dataset.samples=80",
    "dataset.test_samples=16",
    "dataset.validation=0",
    "batch_size=16",
    "epochs=4",
    "probe_size=8",
    "architecture.widths=[8,6]",
    "probe_every=3",
    "algorithm=kp",
    "loggers=[]",
]
RUN = [*COMMON, "hydra.run.dir=run"]
STOPPED = ["callbacks=['halt:step=7']"]


class Halt(Callback):
    """Requests a stop in the given hook at the given step."""

    def __init__(self, hook: str, step: int, reason: str = "enough") -> None:
        def ask(trainer: Trainer, *_: Any) -> None:
            if trainer.progress.step == step:
                trainer.stop(reason)

        # The hook is set on a separate class, because a trainer calls only the hooks that a class overrides.
        self.__class__ = type("Halt", (Halt,), {hook: lambda self, *arguments: ask(*arguments)})


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: Patch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "metrics_of", lambda runs: {})

    @fa_bench.register_callback("halt")
    @dataclasses.dataclass(eq=False)
    class Configured(Callback):
        """Requests a stop at a configured step."""

        step: int = option(7, "step")

        def on_step_end(self, trainer: Trainer) -> None:
            if trainer.progress.step == self.step:
                trainer.stop("val flat")

    yield
    CALLBACKS.drop("halt")


def job_of(words: list[str]) -> Job:
    composer = Composer("config", None, words)
    [(job, _)] = composer.check(composer.expand(multirun=False))
    return job


@pytest.mark.parametrize(
    ("hook", "step", "trained"),
    [
        ("on_fit_start", 0, 0),
        ("on_epoch_start", 3, 2),
        ("on_step_end", 3, 1),
        ("on_gradients", 4, 2),
        ("on_batches_end", 6, 2),
        ("on_epoch_end", 6, 2),
        ("on_epoch_end", 9, 3),
        ("on_fit_end", 9, 3),
    ],
)
def test_stop_waits_for_end_of_epoch(hook: str, step: int, trained: int) -> None:
    """Training of three epochs of three steps stops at the end of the epoch in which the stop was requested, and does not begin
    if it was requested before the first epoch."""
    splits = load()
    whole = fit(fa_bench.attach(make_model(), "bp", seed=1), splits, 3)
    ended: list[int] = []

    class Ends(Callback):
        def on_fit_end(self, trainer: Trainer) -> None:
            ended.append(trainer.progress.epoch)

    lines = fit(fa_bench.attach(make_model(), "bp", seed=1), splits, 3, callbacks_after=[Halt(hook, step), Ends()])
    assert [line["test_loss"] for line in lines] == [line["test_loss"] for line in whole[:trained]] and ended == [trained]


@pytest.mark.parametrize("reason", ["", " ", None, 3])
def test_stop_requires_reason(reason: Any) -> None:
    with pytest.raises(ValueError, match=r"trainer\.stop\(.*\): pass the reason as text"):
        fit(fa_bench.attach(make_model(), "bp", seed=1), load(), 1, callbacks_after=[Halt("on_step_end", 1, reason)])


def test_run_stopped_by_configured_callback(capsys: Capture) -> None:
    assert main([*RUN, "hydra.run.dir=whole"]) == 0
    assert main([*RUN, *STOPPED, "probes=[readout]"]) == 0
    said = capsys.readouterr().out
    assert "stopped after 2 of 4 epochs, val flat: test accuracy" in said
    result, lines = recorded("run")
    assert (result["status"], result["epoch"], result["step"]) == ("stopped", 2, 10)
    assert result["error"] == {"type": "Stopped", "message": "val flat", "epoch": 2, "step": 10, "callback": "halt"}
    assert lines == recorded("whole")[1][:2] and result["test_accuracy"] == lines[-1]["test_accuracy"]
    assert result["angles"]["weight_angle"] and result["probes"] and result["weights_hash"]
    assert torch.load(LAST, weights_only=True)["progress"]["epoch"] == 2

    # The run is not trained again, even without a checkpoint, unless this is requested.
    for words in ([], ["resume=true"]):
        assert main([*RUN, *STOPPED, *words]) == 0
        assert "was stopped (val flat); nothing to do" in capsys.readouterr().out
    Path(LAST).unlink()
    assert main([*RUN, *STOPPED]) == 0 and "nothing to do" in capsys.readouterr().out
    assert describe(Path("run"), job_of([*RUN, *STOPPED])) == "stopped: after 2 of 4 epochs, val flat"
    assert main([*RUN, *STOPPED, "resume=false"]) == 0
    assert "resuming" not in capsys.readouterr().out and recorded("run")[1] == lines
    assert recorded("run")[0]["weights_hash"] == result["weights_hash"]


def test_probes_can_be_added_to_stopped_run() -> None:
    assert main([*RUN, *STOPPED, "probes=[readout]", "hydra.run.dir=probed"]) == 0
    assert main([*RUN, *STOPPED]) == 0 and recorded("run")[0]["probes"] == {}
    assert main([*RUN, *STOPPED, "probes=[readout]"]) == 0 and recorded("run") == recorded("probed")


@pytest.mark.parametrize("step", [8, 10])  # after the request at step 7, within the epoch and at its end
def test_stop_request_survives_interrupt(step: int, monkeypatch: Patch) -> None:
    assert main([*RUN, *STOPPED, "hydra.run.dir=whole"]) == 0
    at_step(step, lambda: signal.raise_signal(signal.SIGTERM), monkeypatch)
    assert main([*RUN, *STOPPED]) == 143 and main([*RUN, *STOPPED]) == 0
    assert recorded("run") == recorded("whole") and recorded("run")[0]["status"] == "stopped"


def test_stop_request_in_last_epoch_has_no_effect() -> None:
    assert main([*RUN, "callbacks=['halt:step=17']"]) == 0 and recorded("run")[0]["status"] == "finished"
    assert recorded("run")[0]["error"] is None


@pytest.mark.parametrize("words", [[], ["checkpoint_epochs=3"]])  # a stop writes a checkpoint whenever it happens
def test_run_stopped_by_external_callback_can_be_resumed(words: list[str], capsys: Capture) -> None:
    assert main([*RUN, *words, "hydra.run.dir=whole"]) == 0
    job = job_of([*RUN, *words])
    for number, halt in enumerate([Halt("on_epoch_end", 5), Halt("on_step_end", 12)], start=1):
        result = run(job, Path("run"), callbacks=[halt])
        epochs = (1, 3)[number - 1]
        assert (result["status"], result["epoch"], result["error"]["callback"]) == ("stopped", epochs, None)
        assert result["error"]["message"] == "enough" and result["angles"]["weight_angle"]
        assert torch.load(LAST, weights_only=True)["progress"]["epoch"] == epochs
        # The stopped runs also measure at their last steps, 5 and 15, but only steps at which an uninterrupted run measures are
        # recorded.
        assert json.loads(recorded("run")[0]["measurements"][-1])["step"] == (3, 15)[number - 1]
    capsys.readouterr()
    assert main([*RUN, *words]) == 0 and "resuming after epoch 3" in capsys.readouterr().out
    assert recorded("run") == recorded("whole")


def test_checkpoint_contains_callback_state_after_epoch() -> None:
    """The checkpoint is written after all callbacks have seen the end of the epoch."""

    @fa_bench.register_callback("counts")
    @dataclasses.dataclass(eq=False)
    class Counts(Callback):
        """Counts epochs, and stops the run after the third."""

        count = 0

        def on_epoch_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
            self.count += 1
            if self.count == 3:
                trainer.stop("three")

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count}

    try:
        assert main([*RUN, "callbacks=[counts]"]) == 0
    finally:
        CALLBACKS.drop("counts")
    state = torch.load(LAST, weights_only=True)
    assert state["callbacks"]["counts"] == {"count": 3} and state["progress"]["stopped"]["reason"] == "three"


def test_callback_may_evaluate() -> None:
    """A stop is attributed to the callback that requested it, even if it has called `evaluate`. A signal during this evaluation
    interrupts the run only after the callback has returned."""
    signals: list[int] = []

    @fa_bench.register_callback("evaluates")
    @dataclasses.dataclass(eq=False)
    class Evaluates(Callback):
        """Evaluates the model, and stops the run after the third epoch."""

        def on_epoch_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
            if trainer.progress.epoch in signals:
                signals.clear()
                signal.raise_signal(signal.SIGTERM)
            assert trainer.evaluate(trainer.splits.test)["loss"] == metrics["test_loss"]
            if trainer.progress.epoch == 3:
                trainer.stop("three")

    try:
        assert main([*RUN, "callbacks=[evaluates]", "hydra.run.dir=whole"]) == 0
        assert recorded("whole")[0]["error"]["callback"] == "evaluates"
        signals.append(2)
        assert main([*RUN, "callbacks=[evaluates]"]) == 143 and not signals
        assert main([*RUN, "callbacks=[evaluates]", "resume=true"]) == 0
        assert recorded("run") == recorded("whole")
        assert main([*RUN, "hydra.run.dir=of_other"]) == 0
        result = run(job_of([*RUN, "hydra.run.dir=external"]), Path("external"), callbacks=[Evaluates()])
        assert (result["status"], result["error"]["callback"]) == ("stopped", None)
        assert run(job_of([*RUN, "hydra.run.dir=external"]), Path("external"))["status"] == "finished"
        assert recorded("external") == recorded("of_other")
    finally:
        CALLBACKS.drop("evaluates")


def test_configured_callback_overrides_external_one() -> None:
    job = job_of([*RUN, *STOPPED])
    result = run(job, Path("run"), callbacks=[Halt("on_step_end", 6)])
    assert result["error"]["callback"] == "halt" and result["error"]["message"] == "val flat"
    assert run(job, Path("run"))["epoch"] == 2  # not resumed


def test_external_callbacks_are_not_recorded() -> None:
    class Watching(Callback):
        def on_step_end(self, trainer: Trainer) -> None:
            seen.append(trainer.progress.step)

        def state_dict(self) -> dict[str, Any]:
            return {"seen": seen}

    seen: list[int] = []
    job = job_of(RUN)
    run(job, Path("run"), callbacks=[Watching()])
    run(job, Path("other"))
    assert seen == list(range(1, 21)) and recorded("run") == recorded("other")
    assert torch.load(LAST, weights_only=True)["callbacks"] == {}
    assert Path("run", CONFIG).read_bytes() == Path("other", CONFIG).read_bytes()


def test_run_stopped_before_first_epoch_can_be_resumed() -> None:
    job = job_of(RUN)
    result = run(job, Path("run"), callbacks=[Halt("on_fit_start", 0)])
    assert (result["status"], result["epoch"], result["test_accuracy"]) == ("stopped", 0, None)
    assert run(job, Path("run"))["status"] == "finished" and run(job, Path("whole"))["status"] == "finished"
    assert recorded("run") == recorded("whole")


def test_sweep_with_stopped_runs_succeeds_and_reports_them(capsys: Capture) -> None:
    command = ["-m", *COMMON, *STOPPED, "seed=0,1", "hydra.sweep.dir=sweep", "hydra.sweep.subdir=seed${seed}"]
    assert main(command) == 0
    text = Path("sweep/report.md").read_text()
    assert "2 stopped" in text and "stopped after 2 of 4 epochs, val flat" in text
    assert [(line.state, line.remark) for line in Watcher([Path("sweep")]).look(0.0)] == [("stopped", "val flat")] * 2
    assert main(command) == 0 and capsys.readouterr().out.count("nothing to do") == 2


def test_signal_after_external_stop_request_is_interrupt(monkeypatch: Patch) -> None:
    at_step(8, lambda: signal.raise_signal(signal.SIGTERM), monkeypatch)
    with pytest.raises(Interrupted):
        run(job_of(RUN), Path("run"), callbacks=[Halt("on_step_end", 7)])
    assert json.loads(Path("run/result.json").read_text())["status"] == "interrupted"
    assert run(job_of(RUN), Path("run"))["status"] == "finished"
