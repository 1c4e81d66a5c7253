"""Alarms in reports fire for values beyond declared thresholds, and for rules that do not beat a floor."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest

from fa_bench.metrics.alarm import Alarm
from fa_bench.metrics.probes.base import Probe
from fa_bench.registry.registries import PROBES
from fa_bench.report import Report, write_report
from fa_bench.report.runs import find_runs

from .by_hand import ANGLES, without_pixels, write_group, write_run


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    without_pixels(monkeypatch)


def report(folder: Path) -> Report:
    return write_report(find_runs([folder]), folder / "out")


def section(folder: Path) -> str:
    text = (folder / "out" / "report.md").read_text()
    return text.split("## Alarms")[1].split("\n## ")[0] if "## Alarms" in text else ""


def rows(folder: Path) -> list[dict[str, str]]:
    path = folder / "out" / "report_alarms.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def with_growth(folder: Path, rule: str, values: list, **changes: object) -> None:
    for seed, growth in enumerate(values):
        write_run(folder, rule, seed, 0.9, probes={"stream_growth": {"layers.0": 2.0, "layers.1": growth}}, **changes)


def test_alarm_reports_rule_layer_value_and_threshold(tmp_path: Path) -> None:
    with_growth(tmp_path, "dfa", [51.0, 400.0, 50.0])
    with_growth(tmp_path, "bp", [3.0, None])  # the value was not measured, or is not finite
    text = report(tmp_path).text
    (row,) = rows(tmp_path)
    assert (row["label"], row["quantity"], row["layer"], row["value"]) == ("dfa", "stream_growth", "layers.1", "400")
    assert (row["condition"], row["runs"]) == ("> 50", "2 of 3") and row["meaning"].startswith("The residual stream explodes")
    assert "| dfa | stream_growth | layers.1 | 400 | &gt; 50 | 2 of 3 |" in section(tmp_path)
    assert "Checked: 9 of stream_growth" in section(tmp_path)
    assert "1 alarm (stream_growth): see report.md" in text
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h2>Alarms</h2>" in page and "&gt; 50" in page


def test_gradient_below_numeric_floor_raises_alarm_and_keeps_angle(tmp_path: Path) -> None:
    angles = ANGLES | {"true_gradient_norm": {"fc1": 3e-8, "fc2": 1e-7, "fc3": 0.5}}
    write_run(tmp_path, "dfa", 0, 0.9, angles=angles)
    report(tmp_path)
    (row,) = rows(tmp_path)
    assert (row["layer"], row["value"], row["condition"]) == ("fc1", "3e-08", "< 1e-07")
    assert "delta angle is meaningless" in row["meaning"]
    assert ",fc1,delta_angle,1,30," in (tmp_path / "out" / "report_layers.csv").read_text()


@pytest.mark.parametrize("floor", ["frozen", "frozen_blocks"])
def test_rule_not_above_floor_raises_alarm(floor: str, tmp_path: Path) -> None:
    write_group(tmp_path, floor, [0.5, 0.7])
    write_group(tmp_path, "dfa", [0.7, 0.5])
    write_group(tmp_path, "fa", [0.7, 0.51])
    write_group(tmp_path, "bp", [0.9, 0.8])
    write_run(tmp_path, "kp", 0, 0.1, dataset="mnist")  # on a different task
    report(tmp_path)
    (row,) = rows(tmp_path)
    assert (row["label"], row["quantity"], row["value"]) == ("dfa", "test_accuracy", "60")
    assert row["condition"] == f"<= 60.00 of {floor}" and f"the floor {floor}" in row["meaning"]


def test_floors_are_excluded_from_alarms_and_holm_correction(tmp_path: Path) -> None:
    write_group(tmp_path, "frozen", [0.6, 0.61, 0.62])
    write_group(tmp_path, "frozen_blocks", [0.5, 0.52, 0.51])
    write_group(tmp_path, "bp", [0.9, 0.91, 0.93])
    write_group(tmp_path, "fa", [0.7, 0.73, 0.71])
    report(tmp_path)
    assert rows(tmp_path) == []
    with (tmp_path / "out" / "report.csv").open() as file:
        table = {row["label"]: row for row in csv.DictReader(file)}
    assert list(table) == ["bp", "frozen", "frozen_blocks", "fa"]
    assert table["fa"]["bp_difference_p_holm"] == table["fa"]["bp_difference_p"] != ""
    assert table["frozen_blocks"]["bp_difference_p_holm"] == "" != table["frozen_blocks"]["bp_difference_p"]


def test_report_without_alarms_lists_checked_values(tmp_path: Path) -> None:
    with_growth(tmp_path / "a", "dfa", [3.0])
    assert "alarm" not in report(tmp_path / "a").text
    assert section(tmp_path / "a").strip() == "No alarm. Values checked: 2 of stream_growth."
    assert "No alarm. Values checked" in (tmp_path / "a" / "out" / "report.html").read_text()
    write_run(tmp_path / "b", "bp", 0, 0.9)
    report(tmp_path / "b")
    assert section(tmp_path / "b") == "" and "Alarms" not in (tmp_path / "b" / "out" / "report.html").read_text()


def test_runs_that_have_not_finished_raise_no_alarm(tmp_path: Path) -> None:
    with_growth(tmp_path, "dfa", [400.0], status="diverged")
    write_run(tmp_path, "bp", 0, 0.9)
    report(tmp_path)
    assert rows(tmp_path) == [] and section(tmp_path) == ""


def test_plugin_probe_declares_alarm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(eq=False)
    class Smallest(Probe):
        """The smallest weight."""

        alarms = {"smallest": Alarm(-1, False, "A weight is very negative.")}

    write_run(tmp_path, "fa", 0, 0.9, probes={"smallest": {"fc1": -2.0, "fc2": 0.0}})
    report(tmp_path)
    assert rows(tmp_path) == [], "without its plugin, a report should not know the threshold"
    monkeypatch.setitem(PROBES._entries, "smallest", Smallest)
    report(tmp_path)
    (row,) = rows(tmp_path)
    assert (row["layer"], row["value"], row["condition"], row["meaning"]) == ("fc1", "-2", "< -1", "A weight is very negative.")


def test_floor_alarm_respects_primary_score_direction(tmp_path: Path) -> None:
    scores = [{"name": "perplexity", "title": "perplexity", "unit": "", "higher_is_better": False}]
    for rule, perplexity in (("frozen_blocks", 40.0), ("fa", 30.0), ("dfa", 40.0)):
        record = {"scores": scores, "test_perplexity": perplexity}
        write_run(tmp_path, rule, 0, None, metrics=[{"epoch": 2, **record}], **record)
    report(tmp_path)
    (row,) = rows(tmp_path)
    assert (row["label"], row["quantity"], row["condition"]) == ("dfa", "test_perplexity", ">= 40.0000 of frozen_blocks")
