"""Tests of mean curves over the seeds for TensorBoard, which are read back with TensorBoard's own readers."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.hparams import api_pb2, metadata

from fa_bench.errors import RunDirectoryError
from fa_bench.report.cli import main
from fa_bench.report.mean_curves import EVENTS, FOLDER, RECORD, check_mean_curves, write_mean_curves
from fa_bench.report.runs import find_runs

from .by_hand import write_run

CONFIG = """\
# config hash: 0a
loggers: [tensorboard]
seed: {seed}
epochs: 2
batch_size: 64
algorithm: {{name: {rule}}}
architecture: {{name: mlp}}
dataset: {{name: digits}}
optimizer: {{name: sgd, lr: {lr}, weight_decay: 0.0}}
"""


def put(
    root: Path, rule: str, seed: int, accuracy: float, lr: float = 0.1, loggers: str = "[tensorboard]", **changes: Any
) -> Path:
    """Write a run of two epochs of three steps, measured at steps 0, 4 and 6."""
    lines = [
        {
            "epoch": epoch,
            "step": 3 * epoch,
            "train_loss": 1 - accuracy,
            "test_accuracy": accuracy / (3 - epoch),
            "lr": lr,
            "angles": None,
        }
        for epoch in (1, 2)
    ]
    group = f"{rule}-{int(1000 * lr)}"
    directory = write_run(root, rule, seed, accuracy, lines, **{"group": group, "epoch": 2, "step": 6, **changes})
    (directory / "config.yaml").write_text(CONFIG.format(rule=rule, seed=seed, lr=lr).replace("[tensorboard]", loggers))
    measured = [
        {"step": step, "epoch": step / 3, "angles": {"weight_angle": {"fc1": 90 - seed * step, "fc2": None}}}
        for step in (0, 4, 6)
    ]
    (directory / "angles.jsonl").write_text("".join(json.dumps(line) + "\n" for line in measured))
    return directory


def write(root: Path) -> list[str]:
    return write_mean_curves(find_runs([root]), root)


def groups(root: Path) -> set[str]:
    return {path.name for path in (root / FOLDER).iterdir() if path.is_dir()}


def test_curves_are_means_over_the_finished_runs(tmp_path: Path) -> None:
    for seed, accuracy in enumerate((0.5, 0.7, 0.9)):
        put(tmp_path, "kp", seed, accuracy)
    put(tmp_path, "kp", 3, 0.1, status="stopped")
    put(tmp_path, "fa", 0, 0.4)
    assert write(tmp_path) == [f"mean curves: tensorboard --logdir {tmp_path / FOLDER}"]
    assert groups(tmp_path) == {"kp (mean of 3 seeds)", "fa (seed 0)"}
    curves = EventAccumulator(str(tmp_path / FOLDER / "kp (mean of 3 seeds)")).Reload()

    def points(tag: str) -> list[tuple[int, float]]:
        return [(event.step, round(event.value, 5)) for event in curves.Scalars(tag)]

    assert points("accuracy/test") == [(3, 0.35), (6, 0.7)] and points("std/accuracy/test") == [(3, 0.1), (6, 0.2)]
    assert points("loss/train") == [(3, 0.3), (6, 0.3)] and points("final/test_accuracy") == [(6, 0.7)]
    assert points("weight_angle/fc1") == [(0, 90.0), (4, 86.0), (6, 84.0)]
    assert points("std/weight_angle/fc1") == [(0, 0.0), (4, 4.0), (6, 6.0)]
    assert "weight_angle/fc2" not in curves.Tags()["scalars"]
    single = EventAccumulator(str(tmp_path / FOLDER / "fa (seed 0)")).Reload().Tags()["scalars"]
    assert "accuracy/test" in single and not any(tag.startswith("std/") for tag in single)


def test_table_has_differing_keys_and_final_results(tmp_path: Path) -> None:
    for lr in (0.1, 0.2):
        for seed in (0, 1):
            put(tmp_path, "kp", seed, 0.5 + lr, lr)
    write(tmp_path)
    assert groups(tmp_path) == {"kp lr=0.1 (mean of 2 seeds)", "kp lr=0.2 (mean of 2 seeds)"}
    runs = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / FOLDER)).Reload()
    found = runs.PluginRunToTagToContent(metadata.PLUGIN_NAME)
    assert found.keys() == groups(tmp_path)
    for name, tags in found.items():
        experiment = metadata.parse_experiment_plugin_data(tags[metadata.EXPERIMENT_TAG])
        session = metadata.parse_session_start_info_plugin_data(tags[metadata.SESSION_START_INFO_TAG])
        end = metadata.parse_session_end_info_plugin_data(tags[metadata.SESSION_END_INFO_TAG])
        lr = session.hparams["optimizer.lr"].number_value
        assert session.group_name == name == f"kp lr={lr} (mean of 2 seeds)" and session.hparams["seeds"].number_value == 2
        assert end.status == api_pb2.STATUS_SUCCESS
        assert {"optimizer.lr", "seeds"} <= {info.name for info in experiment.hparam_infos if info.differs}
        metrics = [info.name.tag for info in experiment.metric_infos]
        assert metrics[:4] == [
            "final/test_accuracy",
            "std/final/test_accuracy",
            "final/test_accuracy_at_best_val",
            "std/final/test_accuracy_at_best_val",
        ]
        assert math.isclose(runs.GetAccumulator(name).Scalars("final/test_accuracy")[-1].value, 0.5 + lr, rel_tol=1e-6)


def test_output_is_reproducible_and_not_rewritten_if_unchanged(tmp_path: Path) -> None:
    for root in (tmp_path / "a", tmp_path / "b"):
        for seed in (0, 1) if root.name == "a" else (1, 0):
            put(root, "kp", seed, 0.5, seconds=float(seed))
        write(root)
    files = [root / FOLDER / "kp (mean of 2 seeds)" / EVENTS for root in (tmp_path / "a", tmp_path / "b")]
    assert files[0].read_bytes() == files[1].read_bytes()
    before = files[0].stat().st_ino
    write(tmp_path / "a")
    assert files[0].stat().st_ino == before


def test_obsolete_groups_are_removed(tmp_path: Path) -> None:
    put(tmp_path, "kp", 0, 0.5)
    write(tmp_path)
    (tmp_path / FOLDER / "kp (seed 0)" / "notes.txt").write_text("mine")
    put(tmp_path, "kp", 1, 0.5)
    write(tmp_path)
    assert not (tmp_path / FOLDER / "kp (seed 0)" / EVENTS).exists()
    assert (tmp_path / FOLDER / "kp (seed 0)" / "notes.txt").exists()  # this file is not fa_bench's
    assert json.loads((tmp_path / FOLDER / RECORD).read_text()) == ["kp (mean of 2 seeds)"]


def test_directory_names_are_safe_and_distinct(tmp_path: Path) -> None:
    for number, label in enumerate(["a/b", "a:b", "../x", "long " * 60]):
        put(tmp_path, "kp", 0, 0.5, label=label, group=f"kp-{number}")
    write(tmp_path)
    assert len(groups(tmp_path)) == 4 and all(len(name) <= 130 for name in groups(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {FOLDER, *(f"kp-{number}-0" for number in range(4))}
    write(tmp_path)


def test_nothing_is_written_without_logger_or_finished_run(tmp_path: Path) -> None:
    put(tmp_path, "kp", 0, 0.5, loggers="[csv]")
    put(tmp_path, "fa", 0, 0.5, status="failed")
    assert write(tmp_path) == [] and not (tmp_path / FOLDER).exists()


def test_run_with_damaged_record_is_excluded(tmp_path: Path) -> None:
    put(tmp_path, "kp", 0, 0.5)
    (put(tmp_path, "kp", 1, 0.7) / "angles.jsonl").write_text("{")
    lines = write(tmp_path)
    assert "not in the mean curves: " in lines[0] and "angles.jsonl: line 1" in lines[0] and groups(tmp_path) == {"kp (seed 0)"}


FOREIGN = {
    "a file": lambda folder: folder.write_text("mine"),
    "a link": lambda folder: folder.symlink_to(folder.parent),
    "a folder of others": lambda folder: (folder.mkdir(), (folder / "a.txt").write_text("mine")),
    "no record": lambda folder: (folder.mkdir(), (folder / RECORD).write_text('{"a": 1}')),
    "names elsewhere": lambda folder: (folder.mkdir(), (folder / RECORD).write_text('["../kp (seed 0)"]')),
    "parent": lambda folder: (folder.mkdir(), (folder / RECORD).write_text('[".."]')),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files_are_rejected(kind: str, tmp_path: Path) -> None:
    put(tmp_path, "kp", 0, 0.5)
    FOREIGN[kind](tmp_path / FOLDER)
    for act in (lambda: check_mean_curves(tmp_path), lambda: write(tmp_path)):
        with pytest.raises(RunDirectoryError, match=r"tensorboard.*move"):
            act()


@pytest.mark.parametrize("recorded", [True, False])
def test_foreign_directory_is_not_written_to(recorded: bool, tmp_path: Path) -> None:
    put(tmp_path, "kp", 0, 0.5)
    put(tmp_path, "fa", 0, 0.5)
    (tmp_path / FOLDER).mkdir()
    (tmp_path / "elsewhere").mkdir()
    names = ["fa (seed 0)", *["kp (seed 0)"] * recorded]
    (tmp_path / FOLDER / RECORD).write_text(json.dumps(names))
    if recorded:
        os.symlink(tmp_path / "elsewhere", tmp_path / FOLDER / "kp (seed 0)")
    else:
        (tmp_path / FOLDER / "kp (seed 0)").mkdir()
    with pytest.raises(RunDirectoryError, match=r"kp \(seed 0\): not written by fa_bench"):
        write(tmp_path)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_tensorboard_flag_writes_mean_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "kp", 0, 0.5)
    assert main([str(tmp_path), "--tensorboard", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / FOLDER / "kp (seed 0)" / EVENTS).exists()
    assert f"mean curves: tensorboard --logdir {tmp_path / 'out' / FOLDER}" in capsys.readouterr().out
    assert main([str(tmp_path), "--tensorboard", "--live"]) == 2
