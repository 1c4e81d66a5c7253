"""Tests of reports on incomplete sweeps, with runs that are running, were interrupted, failed, diverged, or have not begun."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from filelock import FileLock

from fa_bench.errors import RunDirectoryError
from fa_bench.report import write_report
from fa_bench.report.cli import main
from fa_bench.report.runs import find_runs
from fa_bench.report.states import current_status
from fa_bench.runs.ownership import LOCK
from fa_bench.runs.sweep import PlannedRun, find_planned_runs, read_sweep, write_sweep

from .by_hand import at_work, epoch_record, without_pixels, write_begun, write_group, write_run


@pytest.fixture(autouse=True)
def drawn_quickly(monkeypatch):
    without_pixels(monkeypatch)


def table(out: Path) -> dict[str, dict[str, str]]:
    return {row["label"]: row for row in csv.DictReader((out / "report.csv").read_text().splitlines())}


def test_run_without_result_is_excluded_from_mean(tmp_path):
    ended = write_run(tmp_path, "kp", 0, 0.9, metrics=[])
    begun = write_begun(tmp_path, "kp", 1, epochs=3)
    config = json.loads((begun / "config.yaml").read_text().split("\n", 1)[1])
    (ended / "config.yaml").write_text(json.dumps(config | {"seed": 0, "resume": True}))
    report = write_report(find_runs([tmp_path]), tmp_path)
    row = table(tmp_path)["kp"]
    assert (row["n"], row["runs"], row["status"], row["test_accuracy"]) == ("1", "2", "1 finished, 1 interrupted", "90")
    assert row["unfinished"] == "1 of 2: seed 1 interrupted after 3 of 40 epochs" and not report.complete
    kp = report.text.splitlines()[2].split()
    assert kp[:6] == ["kp", "-", "90.00", "1", "of", "2"] and kp[-4:] == ["1", "finished,", "1", "interrupted"]
    assert "Means are over the finished runs only.\nnot finished: kp seed 1: interrupted after 3 of 40" in report.text
    with at_work(begun):
        write_report(find_runs([tmp_path]), tmp_path)
    assert table(tmp_path)["kp"]["status"] == "1 finished, 1 running"


def test_group_without_results_has_row(tmp_path):
    # Runs in the folder of a group share a row; without such a folder, runs that differ only in the seed share a row.
    write_begun(tmp_path, "kp", 0, 1, folder="kp-0123abcd/seed0", scale="short")
    for rule, seed, lr in (("fa", 0, 1), ("fa", 1, 1), ("fa", 2, 2)):
        write_begun(tmp_path, rule, seed, 0, optimizer={"name": "sgd", "lr": lr})
    assert not write_report(find_runs([tmp_path]), tmp_path).complete
    rows = table(tmp_path)
    assert rows["kp"]["group"] == "kp-0123abcd" and rows["kp"]["unfinished"] == "1 of 1: seed 0 interrupted after 1 of 4 epochs"
    assert [(label, row["n"], row["runs"], row["status"], row["test_accuracy"]) for label, row in rows.items()] == [
        ("fa lr=1", "0", "2", "2 interrupted", ""),
        ("fa lr=2", "0", "1", "1 interrupted", ""),
        ("kp", "0", "1", "1 interrupted", ""),
    ]


def test_resumed_run_is_running_and_finished_run_stays_finished(tmp_path):
    taken_up = write_run(tmp_path, "fa", 0, 0.5, status="interrupted", error={"type": "KeyboardInterrupt", "message": ""})
    finished = write_run(tmp_path, "fa", 1, 0.9)
    with at_work(taken_up), at_work(finished):
        write_report(find_runs([tmp_path]), tmp_path)
    assert table(tmp_path)["fa"]["unfinished"] == "1 of 2: seed 0 running after 2 of 2 epochs"
    assert table(tmp_path)["fa"]["status"] == "1 finished, 1 running"
    write_report(find_runs([tmp_path]), tmp_path)
    assert table(tmp_path)["fa"]["unfinished"] == "1 of 2: seed 0 interrupted after 2 of 2 epochs, KeyboardInterrupt"


def test_status_query_neither_creates_nor_holds_lock(tmp_path):
    assert current_status(tmp_path, {}) == "interrupted" and not (tmp_path / LOCK).exists()
    with at_work(tmp_path):
        assert current_status(tmp_path, {}) == "running"
        assert current_status(tmp_path, {"status": "finished"}) == "finished"
    assert current_status(tmp_path, {"status": "diverged"}) == "diverged"
    with FileLock(tmp_path / LOCK, timeout=0):  # if the run were locked, this would raise an error
        pass


def test_runs_not_started_are_listed(tmp_path, capsys):
    write_group(tmp_path, "bp", [0.9], metrics=[])
    planned = [
        PlannedRun(tmp_path / "bp-0", "bp seed 0", 2),
        *(PlannedRun(tmp_path / "kp-0b" / f"seed{seed}", f"kp seed {seed}", 2) for seed in range(9)),
    ]
    write_sweep(tmp_path, ["fa-bench", "-m"], planned)
    assert main([str(tmp_path)]) == 1
    text, said = (tmp_path / "report.md").read_text(), capsys.readouterr().out
    section = text.split("## Runs that have not started\n\n")[1].split("\n\n")[0].splitlines()
    assert len(section) == 9 and section[8] == f"- kp seed 8: not started ({tmp_path.name}/kp-0b/seed8)"
    assert said.count("missing: kp seed") == 3 and "missing: 6 more runs not started" in said
    for seed in range(9):
        write_run(tmp_path / "kp-0b", "kp", seed, 0.8, metrics=[]).rename(tmp_path / "kp-0b" / f"seed{seed}")
    assert main([str(tmp_path)]) == 0 and "not started" not in (tmp_path / "report.md").read_text()


def test_obsolete_report_files_are_removed_and_others_unchanged(tmp_path):
    line = epoch_record(1, 0.5, {"weight_angle": {"fc2": 70.0}})
    write_group(tmp_path / "runs", "fa", [0.9], metrics=[line])
    other = write_run(tmp_path / "runs", "fa", 0, 0.9, dataset="mnist", group="fa-mnist", metrics=[line])
    write_report(find_runs([tmp_path / "runs"]), tmp_path)
    for name in ("report_mine.png", "report_curves-old.png", "other.png"):
        (tmp_path / name).touch()
    assert (tmp_path / "report_weight_angle-digits-mlp.png").is_file()
    (other / "result.json").unlink()
    (other / "metrics.jsonl").unlink()
    write_report(find_runs([tmp_path / "runs"]), tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {
        "report.md",
        "report.csv",
        "report_layers.csv",
        "report.png",
        "report_curves.png",
        "report_weight_angle.png",
        "report_mine.png",
        "report_curves-old.png",
        "other.png",
        ".report.json",
        "report.json",
        "report.tex",
        "runs.csv",
        "report.html",
    }


# The list of a sweep's runs.


def test_second_sweep_keeps_runs_announced_by_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("outputs", "experiment")
    first = [PlannedRun(folder / "x" / "seed0", "x seed 0", 2), PlannedRun(folder / "y", "y seed 0", 3)]
    write_sweep(folder, ["fa-bench", "a"], first)
    first = json.loads((folder / "sweep.json").read_text())
    assert first == {
        "command": ["fa-bench", "a"],
        "runs": [
            {"directory": "x/seed0", "label": "x seed 0", "epochs": 2},
            {"directory": "y", "label": "y seed 0", "epochs": 3},
        ],
    }
    again = tmp_path / "outputs" / "experiment"  # the same folder, as an absolute path
    more = [PlannedRun(again / "z", "z seed 0", 4), PlannedRun(again / "x" / "seed0", "x more", 5)]
    write_sweep(again, ["fa-bench", "b"], more)
    assert read_sweep(folder / "sweep.json") == [
        PlannedRun(folder / "x/seed0", "x more", 5),
        PlannedRun(folder / "y", "y seed 0", 3),
        PlannedRun(folder / "z", "z seed 0", 4),
    ]
    assert json.loads((folder / "sweep.json").read_text())["command"] == ["fa-bench", "b"]
    assert [path.name for path in folder.iterdir()] == ["sweep.json"]


def test_planned_runs_are_found_from_parent_and_child_directories(tmp_path):
    write_sweep(tmp_path / "a", [], [PlannedRun(tmp_path / "a" / "b" / name / "seed0", name, 1) for name in ("kp", "fa")])
    for folder, want in (
        (tmp_path, ["kp", "fa"]),
        (tmp_path / "a" / "b", ["kp", "fa"]),
        (tmp_path / "a" / "b" / "fa", ["fa"]),
        (tmp_path / "a" / "b" / "fa" / "seed0", ["fa"]),
        (tmp_path / "a" / "b" / "f", []),
    ):
        found = find_planned_runs([folder], [])
        assert [run.label for run in found] == want and all(folder in (run.directory, *run.directory.parents) for run in found)


@pytest.mark.parametrize("text", ["{", "[]", '{"runs": [{}]}', '{"runs": [{"directory": "a", "label": "b", "epochs": "c"}]}'])
def test_damaged_sweep_file_is_reported_and_unchanged(tmp_path, text):
    (tmp_path / "sweep.json").write_text(text)
    faults = []
    assert find_planned_runs([tmp_path], faults) == []
    assert re.search(r"sweep\.json: (not the list of a sweep's runs|unreadable)", str(*faults))
    with pytest.raises(RunDirectoryError, match="move it elsewhere"):
        write_sweep(tmp_path, [], [PlannedRun(tmp_path / "a", "a", 1)])
    assert (tmp_path / "sweep.json").read_text() == text


def test_missing_references_are_reported(tmp_path):
    no_floor = "missing: no run of frozen; include frozen to see whether the rules beat this floor"
    no_bp = "missing: no run of bp; include bp to compare the rules with backpropagation"

    def lines(*rules: str, folder: str) -> list[str]:
        for rule in rules:
            write_group(tmp_path / folder, rule, [0.9, 0.8])
        report = write_report(find_runs([tmp_path / folder]), tmp_path / folder)
        missing = [line for line in report.text.splitlines() if line.startswith("missing: no run of")]
        text = report.markdown.read_text()
        assert [line for line in text.splitlines() if line.startswith("- no run of")] == [f"- {line[9:]}" for line in missing]
        assert report.complete
        return missing

    assert lines("fa", folder="one") == []
    assert lines("fa", "kp", folder="two") == [no_bp, no_floor]
    assert lines("bp", "kp", folder="bp") == [no_floor]
    assert lines("frozen", "kp", folder="floor") == [no_bp]
    assert lines("bp", "frozen_blocks", folder="other floor") == []
    assert lines("bp", "frozen", "kp", folder="both") == []


def test_missing_references_are_listed_for_each_task(tmp_path):
    for rule in ("bp", "frozen", "kp"):
        write_group(tmp_path, rule, [0.9])
    for number in range(3):
        for rule in ("bp", "fa"):
            write_run(tmp_path / str(number), rule, 0, 0.9, group=f"{rule}-{number}", dataset=f"set{number}")
    write_run(tmp_path / "single", "fa", 0, 0.9, group="fa-single", dataset="single")
    text = write_report(find_runs([tmp_path]), tmp_path).text
    assert (
        "missing: no run of frozen for (set0, mlp) and 2 other tasks; include frozen to see" in text and "run of bp" not in text
    )


def test_missing_references_are_not_reported_while_runs_are_pending(tmp_path):
    write_group(tmp_path, "bp", [0.9])
    write_group(tmp_path, "fa", [0.8])
    directory = tmp_path / "frozen" / "seed0"
    directory.mkdir(parents=True)
    assert "no run of" not in write_report([*find_runs([tmp_path]), directory], tmp_path).text


def test_run_without_result_does_not_hide_note_on_weight_transport(tmp_path):
    ended = write_run(tmp_path, "dgl", 1, 0.9, metrics=[], weight_transport=["within blocks"])
    begun = write_begun(tmp_path, "dgl", 0, epochs=0)
    config = json.loads((begun / "config.yaml").read_text().split("\n", 1)[1])
    (ended / "config.yaml").write_text(json.dumps(config | {"seed": 1}))
    write_report(find_runs([tmp_path]), tmp_path)
    row = table(tmp_path)["dgl"]
    assert row["runs"] == "2" and row["note"] == "weight transport within blocks"


def test_seconds_per_epoch_are_blank_without_a_complete_epoch(tmp_path):
    write_run(tmp_path, "fa", 0, None, metrics=[], status="diverged", epoch=0, seconds=0.5)
    write_run(tmp_path, "kp", 0, 0.9, epoch=2)
    write_report(find_runs([tmp_path]), tmp_path)
    runs = csv.DictReader((tmp_path / "runs.csv").read_text().splitlines())
    assert {row["algorithm"]: row["seconds_per_epoch"] for row in runs} == {"fa": "", "kp": "1"}
