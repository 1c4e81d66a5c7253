"""Alignment metrics are measured at the right steps, and recorded in angles.jsonl."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fa_bench
from fa_bench.callbacks.base import Callback
from fa_bench.cli import main
from fa_bench.metrics.meter import AlignmentMeter
from fa_bench.report import figures
from fa_bench.runs import checkpoint
from fa_bench.runs.callbacks import Histograms, probe_interval
from fa_bench.runs.checked_json import RecordError
from fa_bench.runs.execution import Execution
from fa_bench.runs.readers import read_measurements, recorded_measurements
from fa_bench.utils.files import ANGLES, RESULT

from .test_loop import fit, load, make_model
from .test_resume_checks import stopped
from .test_survival import at_step

Capture, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch
#: A run of three epochs of four steps.
RUN = [
    "dataset=synthetic",
    "dataset.samples=64",
    "dataset.test_samples=16",
    "dataset.validation=0",
    "batch_size=16",
    "epochs=3",
    "probe_size=8",
    "architecture.widths=[8]",
    "loggers=[]",
    "algorithm=kp",
    "hydra.run.dir=run",
]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "metrics_of", lambda runs: {})


def steps(run: str = "run") -> list[int]:
    return [line["step"] for line in read_measurements(Path(run, ANGLES))]


@pytest.mark.parametrize(
    ("probe_every", "total", "interval"),
    [
        (None, 1, 1),
        (None, 39, 1),
        (None, 40, 2),
        (None, 660, 33),
        (None, 10_000, 500),
        (None, 10**6, 500),
        (0, 660, 0),
        (7, 10**6, 7),
    ],
)
def test_automatic_interval(probe_every: int | None, total: int, interval: int) -> None:
    assert probe_interval(probe_every, total) == interval


def test_automatic_interval_gives_twenty_to_forty_measurements() -> None:
    for total in range(20, 3000):
        assert total // probe_interval(None, total) in range(20, 41)


@pytest.mark.parametrize(
    ("words", "measured"),
    [
        (["probe_every=5"], [0, 5, 10, 12]),
        (["probe_every=0"], [12]),
        ([], [*range(13)]),
    ],
)
def test_every_measurement_is_recorded(words: list[str], measured: list[int]) -> None:
    assert main([*RUN, *words]) == 0
    lines, result = read_measurements(Path("run", ANGLES)), json.loads(Path("run", RESULT).read_text())
    assert [line["step"] for line in lines] == measured
    assert [line["epoch"] for line in lines] == [step / 4 for step in measured]
    assert lines[-1]["angles"] == result["angles"] and lines[0]["angles"]["weight_angle"].keys() == {"fc1", "fc2"}
    if len(lines) > 1:
        assert lines[0]["angles"]["weight_angle"] != lines[-1]["angles"]["weight_angle"]


def test_only_the_chosen_metrics_are_measured() -> None:
    assert main([*RUN, "metrics=[weight_angle]"]) == 0
    assert {key for line in read_measurements(Path("run", ANGLES)) for key in line["angles"]} == {"weight_angle"}


def test_measuring_does_not_count_as_training_time(monkeypatch: Patch) -> None:
    now = [0.0]
    measure = AlignmentMeter.measure

    def slow(meter: AlignmentMeter) -> Any:
        now[0] += 1000.0
        return measure(meter)

    monkeypatch.setattr(AlignmentMeter, "measure", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    lines = fit(fa_bench.attach(make_model(), "bp", seed=1), load(), 2, probe_every=1)
    assert now[0] == 7000.0 and lines[-1]["seconds"] == 0.0  # six steps, and the measurement before the first one


@pytest.mark.parametrize("is_compiled", [False, True])
def test_histograms_do_not_count_as_time_of_compilation(is_compiled: bool, monkeypatch: Patch) -> None:
    """Each of three steps takes two seconds and, in addition, ten seconds for the histograms."""
    now: list[float] = [0.0]

    def wait(seconds: float) -> None:
        now[0] += seconds

    class Work(Callback):
        def on_loss(self, trainer: Any, x: Any) -> None:
            wait(2.0)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(Execution, "step_compiled", lambda execution: is_compiled)
    histograms = Histograms(SimpleNamespace(histograms=lambda tensors, step: wait(10.0)), 1)  # type: ignore[arg-type]
    seen: list[tuple[float, float]] = []
    fit(
        fa_bench.attach(make_model(), "bp", seed=1),
        load(),
        1,
        callbacks_after=[Work(), histograms],
        on_step=lambda progress: seen.append((progress.seconds, progress.compile_seconds)),
    )
    assert seen == [((0.0, 2.0 * step) if is_compiled else (2.0 * step, 0.0)) for step in (1, 2, 3)]


DAMAGE = {
    "emptied": (lambda text: "", r"damaged (0 of 13 measurements found)"),
    "cut": (lambda text: text[: text[:-1].rindex("\n") + 1], r"damaged (12 of 13 measurements found)"),
    "cut in a line": (lambda text: text[:-20], r"line 13 is not a measurement"),
    "twice": (lambda text: text[: text.index("\n") + 1] + text, r"line 2: step=0 (allowed: a step after 0)"),
    "one missing": (
        lambda text: text[text.index("\n") + 1 :] + '{"step": 99, "epoch": 9, "angles": {}}\n',
        "damaged (line 13 is not the measurement at step 12)",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_record_is_reported_and_run_restarts(kind: str, monkeypatch: Patch, capsys: Capture) -> None:
    damage, said = DAMAGE[kind]
    stopped(RUN, monkeypatch)
    path = Path("run", ANGLES)
    path.write_text(damage(path.read_text()))
    capsys.readouterr()
    assert main([*RUN, "resume=true"]) == 2 and f"run/{ANGLES}: {said}" in capsys.readouterr().err
    assert main(RUN) == 0
    shown = capsys.readouterr().out
    assert f"run/{ANGLES}: {said}" in shown and "restarting" in shown and steps() == [*range(13)]


@pytest.mark.parametrize("damage", [None, lambda text: text[: text[:-1].rindex("\n") + 1], lambda text: text[:-20]])
def test_finished_run_with_incomplete_record_is_retrained(damage: Any, capsys: Capture) -> None:
    assert main(RUN) == 0
    path = Path("run", ANGLES)
    whole = path.read_bytes()
    if damage is None:
        path.unlink()
    else:
        path.write_text(damage(path.read_text()))
    assert main(RUN) == 0 and path.read_bytes() == whole and f"run/{ANGLES}: " in capsys.readouterr().out
    assert main(RUN) == 0 and "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("step", [5, 8, 12])  # within an epoch, at its end, and in the last one
def test_resumed_record_matches_uninterrupted_run(step: int, monkeypatch: Patch) -> None:
    """Lines that were written after the checkpoint, for example before the process was killed, are dropped."""
    command = [*RUN, "probe_every=5"]
    assert main([*command, "hydra.run.dir=whole"]) == 0
    at_step(step, lambda: signal.raise_signal(signal.SIGTERM), monkeypatch)
    assert main(command) == 143
    path = Path("run", ANGLES)
    path.write_text(path.read_text() + '{"step": 500, "epoch": 125.0, "angles": {}}\n')
    assert main(command) == 0 and path.read_bytes() == Path("whole", ANGLES).read_bytes()


def test_measurements_are_recorded_before_checkpoint(monkeypatch: Patch) -> None:
    """The record is written first, so that a kill at any later time leaves a record that the run can continue."""
    save, found = checkpoint.save, []

    def saving(*arguments: Any) -> None:
        found.append((arguments[4].measurements, len(steps())))
        save(*arguments)

    monkeypatch.setattr(checkpoint, "save", saving)
    assert main([*RUN, "epochs=1", "checkpoint_minutes=1e-9"]) == 0
    assert found == [(2, 2), (3, 3), (4, 4), (5, 5), (5, 5)]


LINE = {"step": 3, "epoch": 0.5, "angles": {"weight_angle": {"fc1": 90.0, "fc2": None}}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step": -1}, "step=-1"),
        ({"step": "3"}, "step='3'"),
        ({"epoch": float("inf")}, "epoch=inf"),
        ({"epoch": None}, "epoch=None"),
        ({"angles": {"weight_angle": {"fc1": "steep"}}}, r"angles.weight_angle.fc1='steep'"),
        ({"angles": [1]}, "angles=[1]"),
    ],
)
def test_malformed_measurement_is_reported(change: dict[str, Any], said: str) -> None:
    path = Path(ANGLES)
    path.write_text(f"{json.dumps(LINE | {'step': 1})}\n{json.dumps(LINE | change)}\n")
    with pytest.raises(RecordError) as caught:
        read_measurements(path)
    assert f"{ANGLES}: line 2: {said} (allowed: " in str(caught.value)


@pytest.mark.parametrize("line", ["7", "[]", "{", '{"step": 1}'])
def test_non_measurement_line_is_reported(line: str) -> None:
    Path(ANGLES).write_text(f"{line}\n")
    with pytest.raises(RecordError, match=rf"{ANGLES}: line 1 is not a measurement"):
        read_measurements(Path(ANGLES))


def test_records_of_older_runs_have_no_measurements() -> None:
    assert read_measurements(Path(ANGLES)) == [] and recorded_measurements(Path(ANGLES), 0, None) == []
    with pytest.raises(RecordError, match="missing"):
        recorded_measurements(Path(ANGLES), 1, 0)
