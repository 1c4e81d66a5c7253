"""Tests of report.json, report.tex and runs.csv, and of what a sweep's report covers."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path

import pytest

from fa_bench.cli import main as bench
from fa_bench.config.labels import flatten, short_key
from fa_bench.report import write_report
from fa_bench.report.aggregate import over_tasks
from fa_bench.report.cli import main
from fa_bench.report.export import escape_latex, to_json, to_latex
from fa_bench.report.groups import in_order
from fa_bench.report.runs import find_runs
from fa_bench.report.table import summarise
from fa_bench.report.text import WIDTH, to_csv, to_markdown, to_text

from .by_hand import T_2, runs_in, without_pixels, write_set


@pytest.fixture(autouse=True)
def drawn_quickly(monkeypatch):
    without_pixels(monkeypatch)


def write_three(root: Path) -> None:
    for seed, (bp, fa) in enumerate([(0.97, 0.95), (0.98, 0.97), (0.99, 0.95)]):
        write_set(root, "bp", seed, bp)
        write_set(root, "fa", seed, fa, lr=1e-05)
        write_set(root, "frozen", seed, 0.5)
    write_set(root, "fa", 0, None, None, lr=2.0, status="diverged", error={"type": "Diverged", "epoch": 3, "layer": "fc1"})


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def no_constants(name: str):
    raise AssertionError(f"{name} is not JSON")


def test_json_matches_csv_with_typed_values(tmp_path):
    write_three(tmp_path)
    assert main([str(tmp_path)]) == 1
    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=no_constants)
    table = read_csv(tmp_path / "report.csv")
    assert [list(row) for row in found] == [list(row) for row in table] and len(found) == 4
    fa = next(row for row in found if row["label"] == "fa lr=1e-05")
    assert (fa["optimizer.lr"], fa["seeds"], fa["floor"], fa["algorithm"]) == (1e-05, [0, 1, 2], True, "fa")
    assert type(fa["n"]) is type(fa["bp_difference_n"]) is int and fa["n"] == 3 and fa["published"] is None
    assert fa["test_accuracy"] == pytest.approx(287 / 3) and fa["note"] is None
    # The differences are -2, -1, -4, with mean -7/3 and variance (1/9 + 16/9 + 25/9) / 2 = 7/3.
    assert (fa["bp_difference"], fa["bp_difference_ci95"]) == pytest.approx((-7 / 3, T_2 * math.sqrt(7 / 9)))
    assert fa["bp_difference_dz"] == pytest.approx(-math.sqrt(7 / 3))
    diverged = next(row for row in found if row["label"] == "fa lr=2.0")
    assert diverged["test_accuracy"] is None and diverged["seeds"] == [] and diverged["n"] == 0


def test_runs_csv_has_row_per_run(tmp_path):
    write_three(tmp_path / "runs")
    begun = write_set(tmp_path / "runs", "kp", 5, 0.9, lr=0.2)
    (begun / "result.json").unlink()
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 1
    table = read_csv(tmp_path / "out" / "runs.csv")
    assert len(table) == 11 and list(table[0])[:4] == ["directory", "label", "status", "seed"]
    by = {(row["label"], row["seed"]): row for row in table}
    fa = by["fa lr=1e-05", "1"]
    assert fa["directory"] == next((tmp_path / "runs").glob("fa-*-1")).relative_to(tmp_path).as_posix().join(["../", ""])
    want = {
        "optimizer.lr": "1e-05",
        "algorithm": "fa",
        "test_accuracy": "97",
        "val_accuracy": "90",
        "status": "finished",
        "weight_angle": "70",
        "epoch": "2",
        "epochs": "2",
        "seconds": "2",
        "seconds_per_epoch": "1",
        "reason": "",
    }
    assert {key: fa[key] for key in want} == want
    diverged = by["fa lr=2.0", "0"]
    assert (diverged["status"], diverged["reason"], diverged["test_accuracy"]) == ("diverged", "in epoch 3, first in fc1", "")
    assert by["kp", "5"]["status"] == "interrupted" and by["kp", "5"]["optimizer.lr"] == "0.2"
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--no-timings"]) == 1
    assert "seconds" not in (tmp_path / "out" / "runs.csv").read_text()


def test_latex_is_ascii_and_escaped(tmp_path):
    write_three(tmp_path)
    write_set(tmp_path, "kp", 0, 0.6, label="50 % of_A & é\\x")
    text = to_latex(summarise(in_order(runs_in(tmp_path))))
    assert text.isascii() and text.count(r"\toprule") == text.count(r"\bottomrule") == 1
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
    columns = re.search(r"\\begin{tabular}{(\w+)}", text)[1]
    assert columns == "lrrrrrl" and all(line.endswith(r" \\") and len(re.findall(r"(?<!\\)&", line)) == 6 for line in body)
    assert body[0] == r"bp & 3 & $90.00 \pm 0.00$ & $98.00 \pm 1.00$ & -- & -- & yes \\"
    assert body[3].startswith(r"fa lr=1e-05 & 3 & $90.00 \pm 0.00$ & $95.67 \pm 1.15$ & $-2.33 \pm 3.79$ & $0.12$ & yes")
    assert body[2].startswith(r"50 \% of\_A \& U+00E9\textbackslash{}x & 1 & $90.00$ & $60.00$ & $-37.00$ & -- & yes")
    assert escape_latex('a{b}~^<>|"#$[*]') == (
        r"a\{b\}\textasciitilde{}\textasciicircum{}\textless{}\textgreater{}\textbar{}''\#\${[}{*}]"
    )


def test_spread_of_one_and_two_seeds(tmp_path):
    write_set(tmp_path, "bp", 0, 0.9)
    write_set(tmp_path, "fa", 0, 0.8)
    for seed, accuracy in enumerate([0.7, 0.6]):
        write_set(tmp_path, "kp", seed, accuracy)
    frame = summarise(in_order(runs_in(tmp_path)))
    text, markdown, latex = to_text(frame), to_markdown(frame), to_latex(frame)
    assert all("± -" not in page and "nan" not in page for page in (text, markdown, latex))
    titles, kp = ([cell.strip() for cell in markdown.splitlines()[number].split("|")] for number in (0, 4))
    cells = dict(zip(titles, kp, strict=True))
    assert cells["± 95 %"] == "60.00 to 70.00" and "2 seeds: the range in place of a 95 % interval" in cells["note"]
    assert text.splitlines()[4].split()[:6] == ["kp", "90.00", "65.00", "±", "7.07", "2"]
    kp = frame.to_dict("records")[2]
    assert (kp["test_accuracy_low"], kp["test_accuracy_high"]) == (60, 70) and math.isnan(kp["test_accuracy_ci95"])


def test_terminal_table_fits_width(tmp_path):
    for rule, seed, status in (("bp", 0, "finished"), ("kp", 0, "diverged")):
        write_set(tmp_path, rule, seed, 0.9, label=f"{rule} {'a=1 ' * 8}", status=status)
    lines = to_text(summarise(in_order(runs_in(tmp_path)))).splitlines()
    assert max(map(len, lines)) <= WIDTH and "delta °" in lines[0] and "1 of 1" in lines[2]


def test_config_values_keep_types_in_csv_and_json(tmp_path):
    for number, value in enumerate([None, True, [1, 2], "a"]):
        write_set(tmp_path, "fa", 0, 0.9, config={"accumulate": value, "number": number})
    frame = summarise(in_order(runs_in(tmp_path)))
    found = {row["accumulate"] for row in csv.DictReader(to_csv(frame).splitlines())}
    assert found == {"null", "true", "[1,2]", "a"}
    typed = [row["accumulate"] for row in json.loads(to_json(frame))]
    assert all(value in typed for value in (None, True, [1, 2], "a"))


@pytest.mark.parametrize(
    ("key", "config", "want"),
    [
        ("optimizer.lr", {"optimizer": {"name": "sgd", "lr": 1}}, "lr"),
        ("optimizer.schedule.warmup", {"optimizer": {"schedule": {"warmup": 1}}}, "schedule.warmup"),
        ("algorithm.density", {"algorithm": {"density": 1}}, "density"),
        ("feedback_optimizer.lr", {"optimizer": {"lr": 1}, "feedback_optimizer": {"lr": 1}}, "feedback_optimizer.lr"),
        ("algorithm.lr", {"optimizer": {"lr": 1}, "algorithm": {"lr": 1}}, "algorithm.lr"),
        ("algorithm.scale", {"algorithm": {"scale": 1}}, "algorithm.scale"),  # the run's own option has the same name
        ("algorithm", {"algorithm": {"name": "fa"}}, "algorithm"),
        ("dataset.size", {"dataset": {"size": 3}}, "dataset.size"),
    ],
)
def test_labels_use_short_key_unless_ambiguous(key, config, want):
    assert short_key(key, flatten(config)) == want


# Over all tasks.


def test_aggregate_over_tasks_and_seeds(tmp_path):
    # fa has 50, 60 on digits (at the learning rate with the best validation accuracy) and 70, 95 on mnist. Without the lowest and
    # the highest value, the mean is (60 + 70) / 2.
    for dataset, accuracies in (("digits", (0.5, 0.6)), ("mnist", (0.7, 0.95))):
        for seed, accuracy in enumerate(accuracies):
            write_set(tmp_path, "fa", seed, accuracy, 0.8, dataset=dataset)
            write_set(tmp_path, "fa", seed, 0.99, 0.7, 0.2, dataset=dataset)
    write_set(tmp_path, "kp", 0, 0.9)
    table, left_out = over_tasks(in_order(runs_in(tmp_path)))
    (fa,) = table.to_dict("records")
    # A resample has two of (50, 60) and two of (70, 95). In ascending order, the second value of the resample is 50 with a
    # probability of 1/4 and otherwise 60, and the third is 70 with a probability of 3/4 and otherwise 95.
    assert (fa["tasks"], fa["n"], fa["iqm"], fa["mean"]) == (2, 4, 65, 68.75)
    assert (fa["iqm_low"], fa["iqm_high"]) == (60, 77.5)
    assert left_out == ["kp is not in the aggregate: no finished run in mnist, mlp"]
    report = write_report(find_runs([tmp_path]), tmp_path, aggregate=True)
    assert "warning: kp is not in the aggregate" in report.text and "## Over all tasks\n" in report.markdown.read_text()
    assert read_csv(tmp_path / "report_aggregate.csv")[0]["iqm"] == "65"


# Sweeps.

SMALL = [
    "-m",
    "dataset=synthetic",
    "dataset.samples=64",
    "dataset.test_samples=32",
    "epochs=1",
    "architecture.widths=[4]",
    "threads=1",
    "probe_every=0",
]


def test_sweep_report_covers_directory_but_table_only_own_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = Path("outputs/synthetic-mlp")
    assert bench([*SMALL, "algorithm=bp"]) == 0
    assert "earlier sweeps" not in capsys.readouterr().out
    assert {path.name for path in folder.iterdir() if path.suffix} >= {"report.md", "report.json", "report.tex", "runs.csv"}
    assert bench([*SMALL, "algorithm=fa", "optimizer.lr=0.1,0.2", "seed=0,1"]) == 0
    said = capsys.readouterr().out.split("\nrule ")[1].splitlines()
    assert [line.split()[:2] for line in said[2:4]] == [["fa", "lr=0.1"], ["fa", "lr=0.2"]] and not said[4].startswith("bp")
    assert "The report covers 1 more run of earlier sweeps in the same folder." in said
    assert len(read_csv(folder / "runs.csv")) == 5 and len(read_csv(folder / "report.csv")) == 3
    assert "Missing seeds" not in (folder / "report.md").read_text()  # the sweep of bp announced only one seed


def test_multi_collection_sweep_reports_in_output_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = [word for word in SMALL if "widths" not in word]
    assert bench([*small, "algorithm=bp", "architecture=mlp,conv2"]) == 0
    assert {path.name for path in Path("outputs").iterdir() if path.suffix == ".json"} == {
        ".report.json",
        "report.json",
        "sweep.json",
    }
    assert len(read_csv(Path("outputs/runs.csv"))) == 2 and not list(Path("outputs").glob("*/report.md"))
