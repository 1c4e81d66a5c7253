"""Hand-made run directories."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from fa_bench.report.published import Entry
from fa_bench.report.runs import find_runs, read_run
from fa_bench.runs.ownership import HOLDER, LOCK

T_2 = 4.302652729911275  # the 97.5 % quantile of Student's t with two degrees of freedom
TWO_SEEDS = "2 seeds: the range in place of a 95 % interval"  # the note of a row with two seeds
ANGLES = {
    "weight_angle": {"fc1": 89.0, "fc2": 80.0, "fc3": 60.0},
    "norm_ratio": {"fc1": 9.0, "fc2": 1.0, "fc3": 2.0},
    "delta_angle": {"fc1": 30.0, "fc2": 50.0, "fc3": 0.0},
}
#: A published number for the bp runs of the experiment a_table; the runs of `write_run` belong to this experiment.
ENTRY = Entry(
    "A Paper",
    "Table 1",
    "BP",
    "digits",
    "mlp",
    "bp",
    "test_accuracy",
    "%",
    value=98.5,
    spread=0.25,
    n=4,
    experiments=("a_table",),
)


def write_run(root: Path, rule: str, seed: int, accuracy: float | None, metrics: list | None = None, **changes) -> Path:
    """Write a run directory, and return its path; `changes` add or replace keys of the result."""
    directory = root / f"{changes.get('group', rule)}-{seed}"
    directory.mkdir(parents=True)
    result = {
        "status": "finished",
        "label": rule,
        "group": f"{rule}-0a",
        "experiment": "a_table",
        "algorithm": rule,
        "architecture": "mlp",
        "dataset": "digits",
        "optimizer": "sgd",
        "seed": seed,
        "epochs": 2,
        "test_accuracy": accuracy,
        "test_accuracy_at_best_val": accuracy,
        "angles": ANGLES,
        "feedback_layers": ["fc2", "fc3"],
        "output_layers": ["fc3"],
        "seconds": 2.0,
        "error": None,
        **changes,
    }
    (directory / "result.json").write_text(json.dumps(result))
    lines = metrics if metrics is not None else [epoch_record(1, 0.5, ANGLES), epoch_record(2, accuracy, None)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def write_set(
    root: Path,
    rule: str,
    seed: int,
    test: float | None,
    val: float | None = 0.9,
    lr: float | None = 0.1,
    config: dict | None = None,
    **changes,
) -> Path:
    """Write a run whose config has the learning rate and further options, which determine the name of its group."""
    options = {
        "algorithm": {"name": rule},
        "architecture": {"name": changes.get("architecture", "mlp")},
        "dataset": {"name": changes.get("dataset", "digits")},
        "optimizer": {"name": "sgd", **({} if lr is None else {"lr": lr})},
        "epochs": changes.get("epochs", 2),
        **(config or {}),
    }
    name = f"{rule}-{hashlib.sha256(json.dumps([options, changes.get('code_hash')]).encode()).hexdigest()[:8]}"
    directory = write_run(root, rule, seed, test, **{"val_accuracy": val, "group": name, **changes})
    directory = directory.rename(directory.with_name(f"{name}-{seed}"))
    (directory / "config.yaml").write_text("# config hash: 0a\n" + json.dumps({"seed": seed, **options}))
    return directory


@contextmanager
def at_work(directory: Path, **holder) -> Iterator[None]:
    """Lock the directory, as a running process would, while the context is open."""
    with FileLock(directory / LOCK):
        (directory / HOLDER).write_text(json.dumps({"pid": 1, "host": "here", **holder}))
        yield


def write_begun(root: Path, rule: str, seed: int, epochs: int, folder: str = "", **config) -> Path:
    """Write a run without a result that has recorded this number of epochs."""
    directory = root / (folder or f"{rule}-seed{seed}")
    directory.mkdir(parents=True)
    parts = {
        key: {"name": name}
        for key, name in (("algorithm", rule), ("architecture", "mlp"), ("dataset", "digits"), ("optimizer", "sgd"))
    }
    (directory / "config.yaml").write_text("# config hash: 0a\n" + json.dumps({"seed": seed, "epochs": 40, **parts, **config}))
    (directory / "metrics.jsonl").write_text(
        "".join(
            json.dumps(epoch_record(epoch, 0.1, None) | {"seconds": 2.0 * epoch, "train_loss": 1.5}) + "\n"
            for epoch in range(1, epochs + 1)
        )
    )
    return directory


def epoch_record(epoch: int, accuracy: float | None, angles: dict | None) -> dict:
    return {"epoch": epoch, "test_accuracy": accuracy, "angles": angles}


def write_group(root: Path, rule: str, accuracies: list, **changes) -> None:
    for seed, accuracy in enumerate(accuracies):
        write_run(root, rule, seed, accuracy, **changes)


def runs_in(root: Path) -> list:
    return [read_run(directory) for directory in find_runs([root])]


def blank(value: object) -> bool:
    return value is None or value != value


def without_pixels(monkeypatch) -> None:
    """Patch the code of reports so that figures are created but not rendered; their files are then empty."""
    from fa_bench.report import figures, plot

    monkeypatch.setattr(figures, "fix_layout", lambda figure: None)
    monkeypatch.setattr(plot, "rendered", lambda figure, form, name: b"")
    monkeypatch.setattr(figures, "inline_svg", lambda figure, name: "<svg></svg>")
