"""The report of a sweep does not depend on the launcher: the same files whether its jobs run in one process or in several."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fa_bench.cli import main
from fa_bench.command.sweep import oversubscribed

SWEEP = ["-m", "algorithm=fa,kp", "seed=0,1", "dataset=synthetic", "dataset.samples=64", "dataset.test_samples=16",
         "architecture.widths=[8]", "epochs=2", "threads=1"]
#: The times of the training, which no two sweeps share: keys, and the last columns of a row of the table.
TIMES = ("seconds", "seconds_per_epoch")
SECONDS = re.compile(r"\| [\d.]+ \| [\d.]+ (?=\| 2 seeds)")
LAUNCHERS = [
    ["joblib", "hydra.launcher.n_jobs=2"],
    pytest.param(["submitit_local"], marks=pytest.mark.skipif(importlib.util.find_spec("submitit") is None,
                                                              reason="needs hydra-submitit-launcher")),
]


def report(folder: Path, monkeypatch: pytest.MonkeyPatch, *launcher: str) -> dict[str, Any]:
    """The files of the report of `SWEEP` and what it is made of, without the times."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert main([*SWEEP, *launcher]) == 0
    files: dict[str, Any] = {}
    for path in Path("outputs", "synthetic-mlp").iterdir():
        if path.suffix == ".csv":
            with path.open(newline="") as file:
                files[path.name] = [without_times(row) for row in csv.DictReader(file)]
        elif path.suffix == ".json" and path.name != "sweep.json":  # which has the command
            files[path.name] = without_times(json.loads(path.read_bytes()))
        elif path.suffix in (".md", ".tex"):
            files[path.name] = SECONDS.sub("", path.read_text())
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
def test_the_report_is_that_of_one_process(
    launcher: list[str], in_one_process: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {"report.md", "report.csv", "report.json", "runs.csv"} <= set(in_one_process)
    name, *options = launcher
    assert report(tmp_path / name, monkeypatch, f"hydra/launcher={name}", *options) == in_one_process


@pytest.mark.parametrize(("jobs", "threads", "cores", "noted"), [
    (2, 1, 2, False), (2, 2, 2, True), (4, 2, 8, False), (-1, 1, 8, False), (-1, 2, 8, True), (None, 8, 8, False)])
def test_more_threads_than_cores_are_noted(jobs: int | None, threads: int, cores: int, noted: bool) -> None:
    note = oversubscribed(jobs, threads, cores)
    assert bool(note) == noted and (not noted or f"{max(cores // (cores if jobs == -1 else jobs or 1), 1)}" in note)
