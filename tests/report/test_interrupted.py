"""A sweep that was interrupted and resumed has the same report as an uninterrupted one, apart from times."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from fa_bench.cli import main
from fa_bench.command.compose import Composer
from fa_bench.config.job import Job, register_schemas
from fa_bench.metrics.alignment.base import declared
from fa_bench.report import figures
from fa_bench.report.cli import main as report
from fa_bench.report.columns import COLUMNS, TIMINGS
from fa_bench.runs import loop, train
from fa_bench.runs.sweep import PlannedRun, write_sweep

GRID = ["algorithm=bp,kp", "seed=0,1", "dataset=digits", "epochs=2", "probe_every=0", "architecture.widths=[8,6]", "probe_size=8"]


def no_figures(runs: Any, out_dir: Path, name: str, selection: Any, swept: Any) -> list[figures.Picture]:
    return [figures.Picture("", [out_dir / "report.png"], "<svg></svg>")]


class Stopped(KeyboardInterrupt):
    """An interruption by the user."""


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    weight_angle = declared(["weight_angle"])
    monkeypatch.setattr(figures, "metrics_of", lambda runs: weight_angle)  # one metric is enough


@pytest.fixture
def jobs() -> dict[str, Job]:
    """The jobs of the sweep, by their path below `outputs`."""
    register_schemas()
    composer = Composer("config", None, GRID)
    return {str(place.relative_to("outputs")): job for job, place in composer.check(composer.expand(multirun=True))}


def train_all(folder: str, jobs: dict[str, Job], resume: bool = False) -> None:
    for place, job in jobs.items():
        train.run(dataclasses.replace(job, run=dataclasses.replace(job.run, resume=resume)), Path(folder, place))


def files(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def rows(folder: str) -> list[dict[str, str]]:
    return list(csv.DictReader(Path(folder, "report.csv").read_text().splitlines()))


def test_timings_are_the_columns_in_seconds() -> None:
    assert (
        [name for name in TIMINGS if "seconds" in name]
        == ["seconds", "seconds_per_epoch", "seconds_per_step"]
        == [name for name, column in COLUMNS.items() if "seconds" in column.title]
    )


def test_resumed_sweep_reports_like_uninterrupted_one(
    jobs: dict[str, Job], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_all("whole", jobs)
    evaluate, draw, calls = loop.evaluate, figures.write_figures, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2 * 2 + 2 + 2:  # in the second run's second epoch, with two evaluations per epoch
            raise Stopped
        return evaluate(*arguments)

    monkeypatch.setattr(loop, "evaluate", interrupted)
    write_sweep(Path("parts"), [], [PlannedRun(Path("parts", place), place, 2) for place in jobs])
    with pytest.raises(Stopped):
        train_all("parts", jobs)
    monkeypatch.setattr(loop, "evaluate", evaluate)

    monkeypatch.setattr(figures, "write_figures", no_figures)
    assert report(["parts", "--out", "between"]) == 1
    assert [(row["n"], row["runs"], row["status"]) for row in rows("between")] == [("1", "2", "1 finished, 1 interrupted")]
    assert Path("between/report.md").read_text().count(": not started (") == 2
    assert report(["--live", "parts"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "4 runs: 1 done, 1 interrupted, 2 waiting; none is running"

    train_all("parts", jobs, resume=True)
    for folder in ("whole", "parts"):  # with times and pictures, and then without
        monkeypatch.setattr(figures, "write_figures", draw)
        assert report([folder, "--out", f"{folder}-report"]) == 0
        monkeypatch.setattr(figures, "write_figures", no_figures)
        assert report([folder, "--out", f"{folder}-bare", "--no-timings"]) == 0
    whole, parts = files("whole-report"), files("parts-report")
    same = {"report.png", "report_curves.png", "report_weight_angle.png", "report_layers.csv"}
    others = {f"report.{ending}" for ending in ("md", "html", "csv", "json", "tex")}
    assert set(whole) == {*same, *others, "runs.csv", ".report.json"}
    assert {name for name in whole if whole[name] == parts.get(name)} >= same
    timeless = [
        [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows(f"{folder}-report")]
        for folder in ("whole", "parts")
    ]
    assert timeless[0] == timeless[1]
    bare = files("whole-bare")
    in_parts = files("parts-bare")
    assert in_parts.pop("runs.csv").replace(b"../parts/", b"../whole/") == bare.pop("runs.csv")
    assert bare == in_parts and set(bare) == {
        "report.md",
        "report.html",
        "report.csv",
        "report.json",
        "report.tex",
        "report_layers.csv",
        ".report.json",
    }
    assert b"seconds" not in bare["report.csv"] and b"| seconds" not in bare["report.md"]


def test_sweep_announces_runs_before_training_and_keeps_earlier_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    announced = []

    def stopped(*arguments: Any, **keywords: Any) -> Any:
        announced.append(json.loads(Path("outputs/digits-mlp/sweep.json").read_text()))
        raise Stopped

    monkeypatch.setattr(train, "run", stopped)
    common = ["-m", "epochs=40", "optimizer.lr=0.1,0.2"]
    assert main([*common, "algorithm=kp", "seed=0,1"]) == 130
    assert main([*common, "algorithm=fa", "seed=1", "scale=short"]) == 130
    first, second = announced
    assert first["command"] == ["fa-bench", "epochs=40", "optimizer.lr=0.1,0.2", "algorithm=kp", "seed=0,1", "-m"]
    assert [run["label"] for run in first["runs"]] == [f"kp lr={lr} seed {seed}" for lr in (0.1, 0.2) for seed in (0, 1)]
    assert all(re.fullmatch(r"kp-[0-9a-f]{8}/seed[01]", run["directory"]) and run["epochs"] == 40 for run in first["runs"])
    assert second["runs"][:4] == first["runs"]
    assert [(run["label"], run["epochs"]) for run in second["runs"][4:]] == [("fa lr=0.1 seed 1", 4), ("fa lr=0.2 seed 1", 4)]
