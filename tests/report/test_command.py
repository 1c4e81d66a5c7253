"""Tests of whole reports, written by the command or by `write_report`."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fa_bench.errors import DataError
from fa_bench.report import write_report
from fa_bench.report.cli import main
from fa_bench.report.columns import COLUMNS
from fa_bench.report.cost import ENERGY
from fa_bench.report.runs import find_runs
from fa_bench.runs.sweep import PlannedRun, write_sweep
from fa_bench.utils.files import atomic

from .by_hand import epoch_record, write_group, write_run


def rows(folder: Path, name: str = "report") -> dict[str, dict[str, str]]:
    return {row["label"]: row for row in csv.DictReader((folder / f"{name}.csv").read_text().splitlines())}


def without_directory(runs: bytes) -> list[str]:
    return [line.partition(",")[2] for line in runs.decode().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_report_of_two_directories_matches_hand_computation(tmp_path, capsys):
    # bp has 97, 98, 99, with mean 98, std sqrt((1 + 0 + 1) / 2) = 1 and t(2) = 4.302652730, so the half width is 4.302652730 /
    # sqrt 3 = 2.484137712.
    # fa has 96, 97, 99, with mean 292 / 3 = 97.33333333. The deviations are -4/3, -1/3, 5/3, and half the sum of their squares,
    # 16/9 + 1/9 + 25/9 = 42/9, is 7/3. So std is sqrt(7/3) = 1.527525232, and the half width is 4.302652730 x sqrt(7/3) / sqrt 3
    # = 4.302652730 x sqrt 7 / 3 = 3.794583034.
    # The paired differences are 96-97, 97-98, 99-99 = -1, -1, 0, with mean -2/3. The deviations are -1/3, -1/3, 2/3, and half the
    # sum of their squares, 6/9, is 1/3. So the half width is 4.302652730 x sqrt(1/3) / sqrt 3 = 4.302652730 / 3 = 1.434217577.
    # frozen has 90, 91, 92, with mean 91, which is below fa's. The runs take 2 s for 2 epochs. The mean angles are (80 + 60) / 2
    # and (30 + 50) / 2, and the mean ratio is (1 + 2) / 2.
    write_group(tmp_path / "first", "bp", [0.97, 0.98, 0.99], metrics=[])
    write_group(tmp_path / "second", "fa", [0.96, 0.97, 0.99], metrics=[])
    write_group(tmp_path / "second", "frozen", [0.90, 0.91, 0.92], metrics=[])
    assert main([str(tmp_path / "second"), str(tmp_path / "first"), "--out", str(tmp_path / "out")]) == 0
    table = rows(tmp_path / "out")
    assert list(table) == ["bp", "frozen", "fa"] and list(table["fa"]) == [name for name in COLUMNS if name not in ENERGY]
    want = {
        "n": "3",
        "seeds": "0 1 2",
        "runs": "3",
        "status": "3 finished",
        "unfinished": "",
        "test_accuracy": "97.33333333",
        "test_accuracy_std": "1.527525232",
        "test_accuracy_ci95": "3.794583034",
        "test_accuracy_at_best_val": "97.33333333",
        "test_accuracy_at_best_val_std": "1.527525232",
        "test_accuracy_at_best_val_ci95": "3.794583034",
        "bp_difference": "-0.6666666667",
        "bp_difference_ci95": "1.434217577",
        "bp_difference_n": "3",
        "floor_accuracy": "91",
        "floor": "True",
        "weight_angle": "70",
        "delta_angle": "40",
        "norm_ratio": "1.5",
        "seconds": "2",
        "seconds_per_epoch": "1",
        "published": "",
        "note": "",
    }
    assert {key: table["fa"][key] for key in want} == want
    bp = table["bp"]
    assert (bp["test_accuracy"], bp["test_accuracy_std"], bp["test_accuracy_ci95"]) == ("98", "1", "2.484137712")
    assert bp["bp_difference"] == "" and "-0.67 | 1.43 | 3" in (tmp_path / "out" / "report.md").read_text()
    layers = csv.DictReader((tmp_path / "out" / "report_layers.csv").read_text().splitlines())
    assert [row["mean"] for row in layers if row["label"] == "fa" and row["quantity"] == "weight_angle"] == ["89", "80", "60"]
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"report: {tmp_path / 'out' / 'report.md'}",
        f"curves: {tmp_path / 'out' / 'report.png'}",
    ]


def test_report_bytes_do_not_depend_on_order_or_location(tmp_path):
    runs = tmp_path / "here" / "runs"
    line = epoch_record(1, 0.5, {"weight_angle": {"fc2": 70.0}})
    write_group(runs / "a", "bp", [0.97, 0.98, 0.99], metrics=[line])
    write_group(runs / "b", "fa", [0.95, None], metrics=[line])
    write_group(runs / "c", "kp", [None], status="diverged", metrics=[])
    for number, rule in enumerate(["bp", "fa"]):  # each rule gets a second group with the same label
        run = write_run(runs / "c", rule, 1, 0.9, group=f"{rule}-lr", metrics=[])
        again = shutil.copytree(run, runs / "f" / run.name)  # a duplicate seed: which copy counts must not depend on its folder
        (again / "result.json").write_text((again / "result.json").read_text().replace("0.9", "0.8"))
        (run / "config.yaml").write_text(json.dumps({"seed": 1, "optimizer": {"name": "sgd", "lr": number}}))
    (runs / "d" / "e").mkdir(parents=True)
    (runs / "d" / "e" / "metrics.jsonl").write_text('{"epoch": 1}\n')
    elsewhere = shutil.copytree(runs, tmp_path / "there" / "runs")
    (elsewhere / "f").rename(elsewhere / "Z")
    assert main([str(runs / name) for name in "abcdf"] + ["--out", str(tmp_path / "one")]) == 1
    assert main([str(elsewhere / name) for name in "dcZab"] + ["--out", str(tmp_path / "two")]) == 1
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    runs_one, runs_two = (without_directory(folder.pop("runs.csv")) for folder in (one, two))
    assert runs_one == runs_two and len(runs_one) == 1 + 10
    assert one == two and set(one) == {
        "report.md",
        "report.html",
        "report.csv",
        "report.json",
        "report.tex",
        "report_layers.csv",
        "report.png",
        "report_curves.png",
        "report_weight_angle.png",
        ".report.json",
    }
    assert "1 run with a repeated seed not counted" in one["report.csv"].decode()


def test_report_of_partial_sweep_lists_missing_runs(tmp_path, capsys):
    of = {"experiment": "pfa_fig2", "dataset": "mnist", "metrics": [epoch_record(1, 0.5, None)]}
    write_group(tmp_path / "runs", "bp", [0.97, 0.98, 0.99], **of)
    write_run(tmp_path / "runs", "fa", 0, 0.95, **of)
    write_run(
        tmp_path / "runs",
        "fa",
        1,
        None,
        status="diverged",
        **of,
        error={"type": "Diverged", "message": "not finite in epoch 3\nat length"},
    )
    started = tmp_path / "runs" / "pfa_fig2" / "kp-0a" / "seed4"
    started.mkdir(parents=True)
    (started / "config.yaml").write_text(
        "# config hash: 0a\n" + json.dumps({"seed": 4, "epochs": 40, "algorithm": {"name": "kp"}})
    )
    (started / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n')
    write_sweep(
        tmp_path / "runs",
        [],
        [  # seed 2 is not missing for fa, because no sweep announced it
            PlannedRun(tmp_path / "runs" / f"fa-{seed}", f"fa seed {seed}", 2) for seed in (0, 1)
        ],
    )
    write_run(tmp_path / "runs" / "fa", "fa", 5, 0.9, **of)
    planned = [PlannedRun(tmp_path / "runs" / "fa" / f"seed{seed}", f"fa seed {seed}", 2) for seed in (3,)]
    write_sweep(tmp_path / "runs", [], planned)
    assert main([str(tmp_path / "runs")]) == 1
    text = (tmp_path / "runs" / "report.md").read_text()
    assert "- kp seed 4: interrupted after 2 of 40 epochs, no result.json (pfa_fig2/kp-0a/seed4)\n" in text
    assert "- fa seed 1: diverged after 1 of 2 epochs, Diverged: not finite in epoch 3 (" in text
    assert "- fa: no finished run with seed 1, 3\n" in text and "bp: no finished" not in text
    without_run = text.split("## Published rows without a finished run")[1]
    assert "- pfa_o: Li and Benna 2024, Fig. 2a, last epoch (MNIST, 784-512-512-10)\n" in without_run
    assert "- bp:" not in without_run and "DKP" not in without_run
    said = capsys.readouterr().out
    assert "not finished: kp seed 4" in said and "missing: fa: no finished run with seed 1, 3" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the following arguments are required: DIR; see fa-bench-report --help"),
        (["nowhere"], "nowhere: no such directory"),
        (["."], ".: no runs found"),
        ([".", "--to", "x"], "unrecognized arguments: --to x; see fa-bench-report --help"),
        (["runs", "--out", "file"], "file: cannot be written (File exists)"),
        (["broken"], "broken/result.json: not a run's result: it lacks label, group, algorithm, seed"),
        (["unended"], "nothing to report: no result.json in unended"),
    ],
)
def test_errors_are_single_line(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    if words != ["."]:
        write_run(tmp_path / "runs", "fa", 0, 0.9)
        for name, file in (("broken", "result.json"), ("unended", "metrics.jsonl")):
            Path(name).mkdir()
            Path(name, file).write_text('{"status": "finished", "epoch": 1}')
        Path("file").touch()
    assert main(words) == 2
    assert capsys.readouterr().err == f"fa-bench-report: {said}\n"


def test_help_lists_exit_codes(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert "--out DIR" in said and "exit code: 0" in said


def test_report_without_runs_raises(tmp_path):
    with pytest.raises(DataError, match="nothing to report"):
        write_report([tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_failed_atomic_write_keeps_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_reading_runs_avoids_slow_imports_and_reports_avoid_pyplot(tmp_path):
    run = write_run(tmp_path, "fa", 0, 0.9, metrics=[])
    script = """
import sys
from pathlib import Path
from fa_bench.report import write_report
from fa_bench.report.runs import read_run
import fa_bench.report.cli
assert not {"pandas", "matplotlib", "scipy", "torch"} & set(sys.modules), "reading runs imports a slow module"
write_report([Path(sys.argv[1])], Path(sys.argv[1]))
assert not {"matplotlib.pyplot", "torch"} & set(sys.modules), "a report imports pyplot or torch"
"""
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-W", "error", "-c", script, str(run)], check=True, cwd=root)
    assert len(find_runs([tmp_path])) == 1
