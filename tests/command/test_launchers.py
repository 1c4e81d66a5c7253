"""Apart from training times, the report of a sweep does not depend on the launcher. Jobs of submitit survive preemption."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fa_bench.cli import main
from fa_bench.command.compose import Composer
from fa_bench.command.jobs import Task
from fa_bench.command.sweep import oversubscribed
from fa_bench.runs.train import run
from fa_bench.utils.stopping import Interrupted, interrupt_on_signals
from tests.runs.test_survival import at_step

SWEEP = [
    "-m",
    "algorithm=fa,kp",
    "seed=0,1",
    "dataset=synthetic",
    "dataset.samples=64",
    "dataset.test_samples=16",
    "architecture.widths=[8]",
    "epochs=2",
    "threads=1",
]
#: The keys of training times, which differ between sweeps.
TIMES = ("seconds", "seconds_per_epoch", "seconds_per_step")
#: Patterns of the table cells that contain such times.
SECONDS = re.compile(r"\| [\d.]+ \| [\d.]+ (?=\| 2 seeds)")
COST_ROW = re.compile(r"^(\| \w+ \| mlp \| synthetic \| .*)\| [\d.e-]+ \|$", re.MULTILINE)
needs_submitit = pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="needs hydra-submitit-launcher")
LAUNCHERS = [["joblib", "hydra.launcher.n_jobs=2"], pytest.param(["submitit_local"], marks=needs_submitit)]
#: The source of a callback that sends one signal to each run at the end of its sixth step: submitit's SIGUSR2 for seed 0, and
#: Slurm's SIGTERM for seed 1.
SIGNALLED = """
import os, signal
from pathlib import Path
import fa_bench

@fa_bench.register_callback("signalled")
class Signalled(fa_bench.Callback):
    \"\"\"Sends a signal.\"\"\"

    def on_step_end(self, trainer):
        marker = Path(f"signalled-{trainer.options.seed}")
        if trainer.progress.step == 6 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGUSR2 if trainer.options.seed == 0 else signal.SIGTERM)
"""
SIGNALLED_SWEEP = [
    "-m",
    "seed=0,1",
    "algorithm=kp",
    *SWEEP[3:],
    "batch_size=16",
    "dataset.validation=0",
    "plugins=[signalling]",
    "callbacks=[signalled]",
]


def report(folder: Path, monkeypatch: pytest.MonkeyPatch, *launcher: str) -> dict[str, Any]:
    """Run `SWEEP` and return the contents of its report's CSV, JSON, Markdown and LaTeX files, without the times."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert main([*SWEEP, *launcher]) == 0
    files: dict[str, Any] = {}
    for path in Path("outputs", "synthetic-mlp").iterdir():
        if path.suffix == ".csv":
            with path.open(newline="") as file:
                files[path.name] = [without_times(row) for row in csv.DictReader(file)]
        elif path.suffix == ".json" and path.name != "sweep.json":  # sweep.json contains the command
            files[path.name] = without_times(json.loads(path.read_bytes()))
        elif path.suffix in (".md", ".tex"):
            files[path.name] = COST_ROW.sub(r"\1", SECONDS.sub("", path.read_text()))
    return files


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def in_one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        yield report(tmp_path_factory.mktemp("one") / "basic", patch)


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda launcher: launcher[0])
def test_report_does_not_depend_on_launcher(
    launcher: list[str], in_one_process: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {"report.md", "report.csv", "report.json", "runs.csv"} <= set(in_one_process)
    name, *options = launcher
    assert report(tmp_path / name, monkeypatch, f"hydra/launcher={name}", *options) == in_one_process


@pytest.mark.parametrize(
    ("jobs", "threads", "cores", "noted"),
    [(2, 1, 2, False), (2, 2, 2, True), (4, 2, 8, False), (-1, 1, 8, False), (-1, 2, 8, True), (None, 8, 8, False)],
)
def test_more_threads_than_cores_are_noted(jobs: int | None, threads: int, cores: int, noted: bool) -> None:
    note = oversubscribed(jobs, threads, cores)
    assert bool(note) == noted and (not noted or f"{max(cores // (cores if jobs == -1 else jobs or 1), 1)}" in note)


def results_of(folder: Path) -> list[dict[str, Any]]:
    """The results, in the order of the seeds."""
    paths = sorted((folder / "outputs").rglob("result.json"), key=lambda path: path.parent)
    return [json.loads(path.read_bytes()) for path in paths]


@pytest.fixture
def uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run `SIGNALLED_SWEEP` without signals, and return its weight hashes; the test then starts in a directory without runs."""
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "signalling.py").write_text(SIGNALLED)
    monkeypatch.chdir(tmp_path / "whole")
    for seed in (0, 1):
        Path(f"signalled-{seed}").touch()
    assert main(SIGNALLED_SWEEP) == 0
    monkeypatch.chdir(tmp_path / "stopped")
    return [result["weights_hash"] for result in results_of(tmp_path / "whole")]


@needs_submitit
def test_submitit_jobs_survive_preemption(uninterrupted: list[str]) -> None:
    """submitit's signal requeues the job, which then resumes; SIGTERM ends the run, and the same command resumes it."""
    command = [*SIGNALLED_SWEEP, "hydra/launcher=submitit_local"]
    assert main(command) == 1
    assert [(result["status"], result["step"]) for result in results_of(Path())] == [("finished", 8), ("interrupted", 6)]
    assert main(command) == 0
    assert [(result["status"], result["weights_hash"]) for result in results_of(Path())] == [
        ("finished", weights) for weights in uninterrupted
    ]


def test_checkpoint_is_written_before_submitit_requeue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The handler raises an error, as submitit's handler does if a job has been requeued too often."""
    monkeypatch.chdir(tmp_path)
    called: list[bool] = []

    def refuse(number: int, frame: Any) -> None:
        called.append(any(Path("run").rglob("checkpoints/*")))
        raise RuntimeError("Job not requeued because: timed-out too many times.")

    refuse.__module__ = "submitit.core.job_environment"
    composer = Composer("config", None, [*SWEEP[3:], "algorithm=kp", "hydra.run.dir=run"])
    [(job, directory)] = composer.check(composer.expand(multirun=False))
    before = signal.signal(signal.SIGUSR2, refuse)
    try:
        at_step(1, lambda: signal.raise_signal(signal.SIGUSR2), monkeypatch)
        with pytest.raises(Interrupted) as stopped, interrupt_on_signals():
            run(job, directory)
        assert not called and Task([])._stopped(stopped.value, "[1/2] ") == 1
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert called == [True]
    assert capsys.readouterr().err == "fa-bench: [1/2] Job not requeued because: timed-out too many times.\n"


@needs_submitit
def test_slurm_launcher_config_is_composed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cfg", "hydra", "hydra/launcher=fa_bench_slurm", "hydra.launcher.partition=gpu"]) == 0
    launcher = yaml.safe_load(capsys.readouterr().out)["hydra"]["launcher"]
    assert launcher["_target_"].endswith(".SlurmLauncher") and launcher["partition"] == "gpu"
    assert (launcher["array_parallelism"], launcher["signal_delay_s"], launcher["max_num_timeout"]) == (16, 120, 5)
