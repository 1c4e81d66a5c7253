"""Tests of predicted and measured costs in a report."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from fa_bench.report import write_report
from fa_bench.report.columns import TIMINGS
from fa_bench.report.runs import find_runs
from fa_bench.report.table import summarise
from tests.report.by_hand import blank, runs_in, without_pixels, write_set

BP = {"multiplications": 100, "forward": 40, "backward": 60, "feedback": 0, "bytes_moved": 1000, "peak_memory": 5000}
OWN = {
    "batch": 64,
    "multiplications": 150,
    "forward": 40,
    "backward": 60,
    "feedback": 50,
    "bytes_moved": 3000,
    "peak_memory": 5500,
    "bp": BP,
}
CPU, GPU = "cpu (x86_64, 1 threads)", "cuda (A GPU)"


def put(root: Path, rule: str, seed: int, seconds: float, threads: int = 1, device: str = CPU, **changes) -> None:
    cost = OWN if rule != "bp" else {"batch": 64, **BP, "bp": BP}
    write_set(
        root,
        rule,
        seed,
        0.9,
        **{
            "config": {"batch_size": 64, "threads": threads},
            "seconds": seconds,
            "step": 10,
            "device": device,
            "cost": cost,
            "peak_memory_bytes": 7000,
            **changes,
        },
    )


def rows(root: Path) -> dict[str, dict]:
    return {row["label"]: row for row in summarise(runs_in(root)).to_dict("records")}


def test_predicted_and_measured_cost_are_reported(tmp_path: Path) -> None:
    for seed, (bp, kp) in enumerate([(1.0, 2.0), (2.0, 3.0), (9.0, 99.0)]):
        put(tmp_path, "bp", seed, bp)
        put(tmp_path, "kp", seed, kp)
    kp, bp = rows(tmp_path)["kp"], rows(tmp_path)["bp"]
    assert [kp[name] for name in ("multiplications", "bytes_moved", "predicted_memory")] == [150, 3000, 5500]
    assert [kp[f"{name}_ratio"] for name in ("multiplications", "bytes_moved", "predicted_memory")] == [1.5, 3, 1.1]
    assert (kp["seconds_per_step"], kp["time_ratio"]) == pytest.approx((0.3, 1.5))
    assert bp["time_ratio"] == bp["multiplications_ratio"] == 1
    assert blank(kp["peak_memory"]) and "energy_wh" not in kp  # peak memory on a CPU is that of the whole process


@pytest.mark.parametrize(
    "changes",
    [
        {"threads": 2},
        {"device": "cpu (arm, 1 threads)"},
        {"status": "failed"},
        {"config": {"batch_size": 32, "threads": 1}},
        {"architecture": "conv2"},
    ],
)
def test_times_are_compared_with_bp_only_in_same_setting(tmp_path: Path, changes: dict) -> None:
    put(tmp_path, "bp", 0, 1.0, **changes)
    put(tmp_path, "kp", 0, 2.0)
    row = next(row for label, row in rows(tmp_path).items() if label.startswith("kp"))
    assert blank(row["time_ratio"]) and row["multiplications_ratio"] == 1.5


def test_gpu_memory_and_energy_are_reported(tmp_path: Path) -> None:
    for seed, energy in enumerate([0.5, 1.5]):
        put(tmp_path, "kp", seed, 2.0, device=GPU, energy_wh=energy, energy_counters=["package-0", "gpu"])
    row = rows(tmp_path)["kp"]
    assert (row["peak_memory"], row["energy_wh"], row["energy_counters"]) == (7000, 1, "package-0 gpu")


def test_report_has_cost_table_only_with_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_pixels(monkeypatch)
    put(tmp_path / "runs", "bp", 0, 1.0)
    put(tmp_path / "runs", "kp", 0, 2.0, energy_wh=1.0, energy_counters=["package-0"])
    put(tmp_path / "old", "kp", 0, 2.0, cost=None)
    write_report(find_runs([tmp_path / "runs"]), tmp_path / "with")
    summary, costs = (tmp_path / "with" / "report.md").read_text().split("## Cost\n\n")
    assert "multiplications per step" not in summary and "| kp | mlp | digits | 150 | 1.50 | 3e+03 | 3.00 | 5.5e+03 |" in costs
    assert json.loads((tmp_path / "with" / "report.json").read_text())[1]["time_ratio"] == 2
    assert "of bp&#x27;s (measured)" in (tmp_path / "with" / "report.html").read_text().replace("&#39;", "&#x27;")
    write_report(find_runs([tmp_path / "runs"]), tmp_path / "bare", timings=False)
    row = next(csv.DictReader((tmp_path / "bare" / "report.csv").read_text().splitlines()))
    assert row["multiplications_ratio"] == "1" and not row.keys() & {*TIMINGS} and "energy_wh" in TIMINGS
    assert "measured)" not in (tmp_path / "bare" / "report.md").read_text()
    write_report(find_runs([tmp_path / "old"]), tmp_path / "without")
    assert "## Cost" not in (tmp_path / "without" / "report.md").read_text()
