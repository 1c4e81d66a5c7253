"""The measurements of runs are read from their records and appear in data frames."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

import fa_bench
from fa_bench.report.runs import read_run
from fa_bench.runs.checked_json import RecordError

from .by_hand import runs_in, write_run

LINES = [
    {"step": 0, "epoch": 0.0, "angles": {"weight_angle": {"fc1": 90.0, "fc2": 89.0}}},
    {"step": 3, "epoch": 0.75, "angles": {"weight_angle": {"fc1": None, "fc2": 80.0}, "norm_ratio": {"fc2": 2.0}}},
]


def write_measured(root: Path, rule: str, seed: int, lines: list) -> Path:
    directory = write_run(root, rule, seed, 0.9)
    (directory / "angles.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def test_measurements_of_a_run(tmp_path: Path) -> None:
    write_measured(tmp_path, "fa", 0, LINES)
    write_run(tmp_path, "kp", 0, 0.9)
    assert [run.measurements for run in runs_in(tmp_path)] == [LINES, []]


def test_measurements_are_read_lazily(tmp_path: Path) -> None:
    directory = write_measured(tmp_path, "fa", 0, ["damaged"])
    run = read_run(directory)
    assert run is not None
    with pytest.raises(RecordError, match=r"angles\.jsonl: line 1 is not a measurement"):
        _ = run.measurements


def test_measurements_data_frame(tmp_path: Path) -> None:
    path = str(write_measured(tmp_path, "fa", 1, LINES))
    write_run(tmp_path, "bp", 0, 0.9)
    frame = fa_bench.load_results(tmp_path, angles=True)
    expected = pd.DataFrame(
        [
            (path, "fa", 1, 0, 0.0, "weight_angle", "fc1", 90.0),
            (path, "fa", 1, 0, 0.0, "weight_angle", "fc2", 89.0),
            (path, "fa", 1, 3, 0.75, "weight_angle", "fc1", float("nan")),
            (path, "fa", 1, 3, 0.75, "weight_angle", "fc2", 80.0),
            (path, "fa", 1, 3, 0.75, "norm_ratio", "fc2", 2.0),
        ],
        columns=["directory", "label", "seed", "step", "epoch", "metric", "layer", "value"],
    )
    pd.testing.assert_frame_equal(frame, expected)
    with pytest.raises(ValueError, match="choose one of them"):
        fa_bench.load_results(tmp_path, curves=True, angles=True)


def test_data_frame_without_measurements_has_columns(tmp_path: Path) -> None:
    write_run(tmp_path, "bp", 0, 0.9)
    assert list(fa_bench.load_results(tmp_path, angles=True)) == [
        "directory",
        "label",
        "seed",
        "step",
        "epoch",
        "metric",
        "layer",
        "value",
    ]


def test_damaged_record_is_skipped_with_warning(tmp_path: Path) -> None:
    write_measured(tmp_path, "fa", 0, LINES)
    write_measured(tmp_path, "fa", 1, [LINES[1], LINES[0]])
    with pytest.warns(UserWarning, match=r"skipped: .*angles\.jsonl: line 2: step=0 \(allowed: a step after 3\)"):
        assert set(fa_bench.load_results(tmp_path, angles=True)["seed"]) == {0}
