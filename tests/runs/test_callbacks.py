"""The callbacks of every run are tested one at a time: when they act, and with which arguments."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fa_bench
from fa_bench.config.job import RunOptions
from fa_bench.runs import callbacks
from fa_bench.runs.callbacks import LINE_EVERY, Alignment, Checkpoints, Display, Histograms
from fa_bench.runs.divergence import CHECK_EVERY, Diverged, Divergence
from fa_bench.runs.loop import Progress
from fa_bench.runs.parallel import World

OLD, NEW = {"weight_angle": {"fc": 1.0}}, {"weight_angle": {"fc": 2.0}}


def trainer(epochs: int = 3, stop: Any = None, **progress: Any) -> Any:
    """A trainer whose run has this progress; it has four batches per epoch, but no data."""
    return SimpleNamespace(
        progress=Progress(**progress),
        options=RunOptions(epochs=epochs),
        stop_request=stop,
        splits=SimpleNamespace(train=SimpleNamespace(steps=lambda *_: 4)),
        world=World(),
    )


@pytest.mark.parametrize("stopped", [None, {"reason": "enough", "callback": "c"}], ids=["to the end", "stopped"])
@pytest.mark.parametrize(("probed", "angles"), [(5, OLD), (4, OLD), (5, None), (4, None), (None, None), (5, {})])
def test_fit_end_records_angles_of_last_step(stopped: Any, probed: int | None, angles: Any) -> None:
    """A run that is stopped records the angles as a measurement. A run that was resumed after its end has the angles only in its
    result."""
    recorded: list[Any] = []
    of_run = trainer(step=5, probed=probed, angles=angles, stopped=stopped)
    Alignment(SimpleNamespace(measure=lambda: NEW), 2, lambda *values: recorded.append(values)).on_fit_end(of_run)  # type: ignore[arg-type]
    is_current = probed == 5
    assert of_run.progress.angles == (OLD if is_current and angles else NEW)
    is_measured = stopped is not None and not is_current
    assert recorded == ([(5, NEW)] if is_measured else []) and of_run.progress.probed == (5 if is_measured else probed)


@pytest.mark.parametrize(
    ("hook", "every", "epoch", "step", "probed", "measures"),
    [
        ("on_fit_start", 2, 0, 0, None, True),
        ("on_fit_start", 0, 0, 0, None, False),
        ("on_fit_start", 2, 0, 0, 0, False),
        ("on_step_end", 2, 0, 4, 2, True),
        ("on_step_end", 2, 0, 5, 4, False),
        ("on_step_end", 0, 0, 4, None, False),
        ("on_batches_end", 5, 2, 12, 10, True),
        ("on_batches_end", 4, 2, 12, 12, False),
        ("on_batches_end", 5, 1, 8, 5, False),
    ],
)
def test_angle_measurement_schedule(hook: str, every: int, epoch: int, step: int, probed: int | None, measures: bool) -> None:
    of_run, recorded = trainer(epoch=epoch, step=step, probed=probed), []
    alignment = Alignment(SimpleNamespace(measure=lambda: NEW), every, lambda *values: recorded.append(values))  # type: ignore[arg-type]
    getattr(alignment, hook)(of_run)
    assert recorded == ([(step, NEW)] if measures else [])
    assert (of_run.progress.angles, of_run.progress.probed) == ((NEW, step) if measures else (None, probed))


def test_histograms_do_not_count_as_training_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[set[str], int]] = []
    rule = fa_bench.attach(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "kp")
    times = iter([100.0, 103.0] * 4)
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: next(times))
    histograms = Histograms(SimpleNamespace(histograms=lambda tensors, step: seen.append((set(tensors), step))), 3)  # type: ignore[arg-type]
    of_run = trainer(seconds=20.0)
    of_run.rule = rule
    for of_run.progress.step in range(5):
        histograms.on_gradients(of_run)
    assert [step for _, step in seen] == [0, 3] and all(seen[0][0]) and of_run.progress.seconds == 20.0 - 2 * 3.0


@pytest.mark.parametrize(
    ("every", "epoch", "stop", "saves"),
    [
        (2, 2, None, True),
        (2, 1, None, False),
        (2, 3, None, True),
        (5, 1, {"reason": "x"}, True),
        (5, 2, None, False),
        (1, 1, None, True),
    ],
)
def test_checkpoints_follow_epoch_interval_and_include_last(every: int, epoch: int, stop: Any, saves: bool) -> None:
    saved: list[bool] = []
    Checkpoints(lambda: saved.append(True), every, 0.0).on_epoch_end(trainer(stop=stop, epoch=epoch), {})
    assert saved == [True] * saves


def test_checkpoint_minutes_count_from_last_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint may have been saved within an epoch or at its end."""
    saved, now = [], [0.0]
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now[0])
    checkpoints = Checkpoints(lambda: saved.append(now[0]), 1, 1.0)
    checkpoints.on_fit_start(trainer())
    for now[0] in (59.0, 60.0, 61.0, 120.0, 122.0):
        checkpoints.on_step_end(trainer())
    assert saved == [61.0, 122.0]
    now[0] = 150.0
    checkpoints.on_epoch_end(trainer(epoch=1), {})
    for now[0] in (205.0, 211.0):
        checkpoints.on_step_end(trainer())
    assert saved == [61.0, 122.0, 150.0, 211.0]


def shown(monkeypatch: pytest.MonkeyPatch, times: list[float], epoch: int = 0, **options: Any) -> tuple[Display, list[Any]]:
    """A display whose run has had epochs after `epoch` that ended at `times`, and the lines that it logged, with their levels."""
    now, lines = [0.0], []
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(callbacks.log, "log", lambda level, text, *values: lines.append((level, text % values)))
    monkeypatch.setattr(callbacks.log, "info", lambda text, *values: lines.append((logging.INFO, text % values)))
    display, of_run = Display("fa", **{"later_epochs": 0, **options}), trainer(epochs=4, epoch=epoch, step=4 * epoch)
    display.on_fit_start(of_run)
    metrics = {"train_loss": 1.0, "val_accuracy": None, "test_accuracy": 0.25}
    for of_run.progress.epoch, now[0] in enumerate(times, start=epoch + 1):
        display.on_step_end(of_run)
        display.on_epoch_end(of_run, metrics)
    return display, lines


def test_log_lines_without_terminal_are_throttled(monkeypatch: pytest.MonkeyPatch) -> None:
    display, lines = shown(monkeypatch, [0.0, LINE_EVERY - 1, LINE_EVERY, LINE_EVERY + 1])
    display.close()
    assert [level for level, _ in lines] == [logging.INFO, logging.DEBUG, logging.INFO, logging.INFO]
    assert lines[0][1] == "fa epoch 1/4  train loss 1.0000  test 25.00%"


def test_later_sweep_run_logs_one_line_unless_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(times: list[float]) -> list[str]:
        _, lines = shown(monkeypatch, times, later_epochs=8, brief=True)
        return [text.split("  ")[0] for level, text in lines if level == logging.INFO]

    assert said([1, 2, 3, 4]) == ["fa epoch 4/4"]
    assert said([LINE_EVERY, LINE_EVERY + 1, 3 * LINE_EVERY, 3 * LINE_EVERY + 1]) == [
        "fa epoch 1/4",
        "fa: 10 s per epoch; about 2 min remaining",
        "fa epoch 3/4",
        "fa epoch 4/4",
    ]


def test_progress_bar_counts_steps_of_whole_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a resume, the bar starts at the number of steps that are already done."""
    made: list[dict[str, Any]] = []

    class Bar:
        disable, closed, steps = False, False, 0

        def __init__(self, **values: Any) -> None:
            made.append(values)

        def update(self) -> None:
            self.steps += 1

        def set_postfix_str(self, text: str, refresh: bool) -> None:
            self.text = text

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr(callbacks, "tqdm", Bar)
    display, lines = shown(monkeypatch, [30.0, 60.0], epoch=1)
    bar: Any = display._bar
    assert (made[0]["total"], made[0]["initial"], made[0]["desc"], made[0]["disable"]) == (16, 4, "fa", None)
    assert bar.steps == 2 and bar.text == "train loss 1.0000  test 25.00%"
    assert {level for level, _ in lines} == {logging.DEBUG}, "a line repeats the numbers of the bar"
    display.close()
    assert bar.closed
    Display("fa", 0).close()


class Values(nn.Module):
    """A model with a parameter that claims to be on the given device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def parameters(self, recurse: bool = True) -> Any:
        return iter([SimpleNamespace(device=torch.device(self.device))])


@pytest.mark.parametrize(
    ("device", "step", "looks"),
    [
        ("cpu", 0, True),
        ("cpu", 7, True),
        ("cuda", 0, True),
        ("cuda", 7, False),
        ("cuda", CHECK_EVERY - 1, False),
        ("cuda", CHECK_EVERY, True),
        ("cuda", CHECK_EVERY + 1, False),
    ],
)
@pytest.mark.parametrize("proceed", [False, True])
def test_loss_check_interval_per_device(
    device: str, step: int, looks: bool, proceed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an accelerator, a check waits for the device, so checks are rare. Only the first divergence is recorded."""
    monkeypatch.setattr("fa_bench.runs.divergence.first_nonfinite", lambda rule, x: "fc1" if x is None else "fc2")
    of_run, divergence = trainer(epoch=1, step=step, loss_sum=torch.tensor(math.nan)), Divergence(proceed)
    of_run.model, of_run.rule = Values(device), None
    divergence.on_fit_start(of_run)
    if looks and not proceed:
        with pytest.raises(Diverged, match=rf"not finite in epoch 2 at step {step} \(first in fc2\)"):
            divergence.on_loss(of_run, torch.zeros(1))
    else:
        divergence.on_loss(of_run, torch.zeros(1))
    assert (of_run.progress.diverged or {}).get("step") == (step if looks else None)
    if of_run.progress.diverged is not None:
        before = dict(of_run.progress.diverged)
        of_run.progress.step += CHECK_EVERY
        divergence.on_loss(of_run, torch.zeros(1))
        assert of_run.progress.diverged == before and before["layer"] == "fc2" and before["epoch"] == 2
