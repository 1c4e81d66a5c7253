"""Before a run is resumed, its records, checkpoints and data are checked, and errors name what does not match."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fa_bench.cli import main
from fa_bench.runs import loop
from fa_bench.utils.files import METRICS, RESULT

Capture, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch
RUN = [
    "dataset=synthetic",
    "dataset.samples=64",
    "dataset.test_samples=16",
    "batch_size=16",
    "epochs=3",
    "probe_size=8",
    "architecture.widths=[8]",
    "hydra.run.dir=run",
]
LAST = "run/checkpoints/last.pt"
TIMES = ("seconds", "peak_memory_bytes", "energy_wh")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)


def lines(run: str = "run") -> list[dict[str, Any]]:
    return [
        {key: value for key, value in json.loads(line).items() if key not in TIMES}
        for line in Path(run, METRICS).read_text().splitlines()
    ]


def stopped(command: list[str], monkeypatch: Patch) -> None:
    """Stop a command during an evaluation in its last epoch."""
    evaluate, calls = loop.evaluate, []

    def stopping(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:  # two evaluations in each of three epochs, or one in each of five
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", stopping)
        assert main(command) == 143


def test_run_resumes_by_default_and_restarts_on_request(monkeypatch: Patch, capsys: Capture) -> None:
    assert main([*RUN, "hydra.run.dir=whole"]) == 0
    stopped(RUN, monkeypatch)
    assert "Interrupted. Checkpoint saved; rerun the same command to resume" in capsys.readouterr().err
    assert main(RUN) == 0
    said = capsys.readouterr().out
    assert "resuming after epoch 2" in said and "epoch 1/3" not in said and lines() == lines("whole")
    assert main(RUN) == 0 and "is already finished; nothing to do" in capsys.readouterr().out
    stopped([*RUN, "resume=false"], monkeypatch)
    assert "rerun the same command without resume=false to resume" in capsys.readouterr().err
    assert main([*RUN, "resume=false"]) == 0
    assert "epoch 1/3" in capsys.readouterr().out and lines() == lines("whole")


def second(change: Callable[[dict[str, Any]], Any]) -> Callable[[list[str]], list[str]]:
    """Return a function that changes the record of the second epoch."""

    def changed(found: list[str]) -> list[str]:
        record = json.loads(found[1])
        change(record)
        return [found[0], json.dumps(record), *found[2:]]

    return changed


DAMAGE: dict[str, tuple[Callable[[list[str]], list[str]], str]] = {
    "emptied": (lambda found: [], "0 of 2 epochs"),
    "cut": (lambda found: found[:1], "1 of 2 epochs"),
    "cut in a line": (lambda found: [found[0], found[1][:40]], "line 2"),
    "an array": (lambda found: [found[0], "[1]"], "line 2"),
    "text": (second(lambda record: record.update(test_accuracy="high")), "line 2"),
    "deep": (lambda found: ["[" * 10**5], "line 1"),
    "twice": (lambda found: [found[0], *found], "line 2"),
    "no loss": (second(lambda record: record.pop("train_loss")), "line 2"),
    "bytes": (lambda found: ["\x00" * 9, *found[1:]], "line 1"),
    "a number": (lambda found: ["7", *found[1:]], "line 1"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_metrics_are_reported_and_run_restarts(kind: str, monkeypatch: Patch, capsys: Capture) -> None:
    damage, named = DAMAGE[kind]
    stopped(RUN, monkeypatch)
    path = Path("run", METRICS)
    path.write_text("".join(f"{line}\n" for line in damage(path.read_text().splitlines())))
    before = path.read_bytes()
    capsys.readouterr()
    assert main([*RUN, "resume=true"]) == 2 and path.read_bytes() == before
    said = capsys.readouterr().err.strip()
    assert f"run/{METRICS}: damaged ({named}" in said and "pass resume=false to restart" in said and len(said.splitlines()) == 1
    assert main(RUN) == 0
    said = capsys.readouterr().out
    assert f"run/{METRICS}: damaged ({named}" in said and "restarting" in said
    assert [line["epoch"] for line in lines()] == [1, 2, 3] and "epoch 1/3" in said


def test_finished_run_without_metrics_is_retrained(capsys: Capture) -> None:
    assert main(RUN) == 0
    whole = lines()
    Path("run", METRICS).unlink()
    assert main(RUN) == 0 and lines() == whole and f"{METRICS}: missing" in capsys.readouterr().out


@pytest.mark.parametrize("extra", [4, 10**18])
def test_finished_run_with_extra_records_is_retrained(extra: int, capsys: Capture) -> None:
    assert main(RUN) == 0
    original = lines()
    path = Path("run", METRICS)
    path.write_text(path.read_text() + json.dumps({**original[-1], "epoch": extra}) + "\n")
    assert main(RUN) == 0 and lines() == original
    assert main(RUN) == 0 and "damaged" not in capsys.readouterr().out


def test_text_in_place_of_result_number_is_corrected() -> None:
    assert main(RUN) == 0
    path = Path("run", RESULT)
    path.write_text(json.dumps({**json.loads(path.read_text()), "test_accuracy": "high"}))
    assert main(RUN) == 0 and isinstance(json.loads(path.read_text())["test_accuracy"], float)


FORGED = {
    "epoch": [-1, 4, 1.5, "2", True],
    "batch": [-1, 99, None],
    "step": [7, -8, None],
    "samples": ["x"],
    "measurements": [-1, "x"],
    "seconds": [None, -1.0],
    "best_epoch": [3, 0.5],
    "best_val": [float("nan"), "x"],
    "loss_sum": [1.0],
    "angles": [3, {"weight_angle": 1}, {"weight_angle": {"fc1": "x"}}],
    "batches_hash": [None, "zz"],
    "diverged": [
        {},
        3,
        *(
            {"epoch": 1, "step": 2, "layer": None, "message": "m"} | forged
            for forged in ({"layer": 3}, {"message": 4}, {"epoch": "1"})
        ),
    ],
    "stopped": [{}, {"reason": 1, "callback": None}, {"reason": "r", "callback": 1}],
    "probed": [1000],
    "more": [1],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in FORGED.items() for value in values])
def test_forged_progress_error_names_checkpoint(key: str, value: Any, interrupted: Path, capsys: Capture) -> None:
    shutil.copytree(interrupted, "run")
    Path("run/checkpoints/previous.pt").unlink()
    state = torch.load(LAST, weights_only=True)
    state["progress"][key] = value
    torch.save(state, LAST)
    assert main([*RUN, "resume=true"]) == 2
    said = capsys.readouterr().err.strip()
    assert f"{LAST}: not a checkpoint of this run (" in said and key in said and len(said.splitlines()) == 1


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was stopped within an epoch."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        stopped(RUN, patch)
    return folder / "run"


def images(shade: int) -> None:
    for split in ("train", "test"):
        for label in (0, 1):
            folder = Path("images", split, f"class{label}")
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(4):
                pixels = np.full((8, 8, 3), 10 * number + 60 * label + shade, np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")


FOLDER = [
    "dataset=image_folder",
    "data_dir=images",
    "dataset.size=8",
    "dataset.validation=0",
    "batch_size=4",
    "epochs=5",
    "probe_size=2",
    "architecture.widths=[8]",
]


def test_changed_images_are_detected_on_resume(monkeypatch: Patch, capsys: Capture) -> None:
    images(0)
    command = [*FOLDER, "hydra.run.dir=run"]
    stopped(command, monkeypatch)
    images(9)
    capsys.readouterr()
    assert main([*command, "resume=true"]) == 2
    said = capsys.readouterr().err.strip()
    assert f"{LAST}: trained on different data" in said and len(said.splitlines()) == 1
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "trained on different data" in said and "restarting" in said and "epoch 1/5" in said


def test_changed_images_retrain_finished_sweep(capsys: Capture) -> None:
    images(0)
    sweep = ["-m", *FOLDER, "epochs=1", "seed=0,1", "output_dir=out"]
    assert main(sweep) == 0
    hashes = {json.loads(path.read_text())["data_hash"] for path in Path("out").rglob(RESULT)}
    assert main(sweep) == 0 and capsys.readouterr().out.count("is already finished; nothing to do") == 2
    images(9)
    assert main(sweep) == 0
    said = capsys.readouterr().out
    assert said.count("was trained on different data (hash") == 2 and "is already finished" not in said
    now = {json.loads(path.read_text())["data_hash"] for path in Path("out").rglob(RESULT)}
    assert len(now) == 1 and now != hashes
    shutil.rmtree("images")
    assert main(sweep) == 0 and capsys.readouterr().out.count("nothing to do; its data could not be compared (") == 2


def test_result_of_interrupted_run_matches_last_epoch(monkeypatch: Patch) -> None:
    """The run is stopped before the end of the third epoch, so its accuracies and angles are those of the second."""
    stopped([*RUN, "probe_every=4"], monkeypatch)
    result, last = json.loads(Path("run", RESULT).read_text()), lines()[-1]
    assert result["status"] == "interrupted" and last["epoch"] == result["epoch"] == 2 and last["angles"]
    for key in ("test_accuracy", "val_accuracy", "train_accuracy", "angles"):
        assert result[key] == last[key], key
