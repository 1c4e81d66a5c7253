"""Options of plugin components work like all other options, and mistakes in them give clear error messages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .test_plugin_of_every_kind import SCHEDULE

ROOT = Path(__file__).parents[2]
SMALL = [
    "dataset=synthetic",
    "dataset.samples=64",
    "dataset.test_samples=16",
    "architecture.widths=[8]",
    "epochs=2",
    "batch_size=16",
    "device=cpu",
    "output_dir=out",
]
PLUGIN = (
    """
import dataclasses
import fa_bench
"""
    + SCHEDULE
    + '''

@fa_bench.register_callback("counting")
@dataclasses.dataclass(eq=False)
class Counting(fa_bench.Callback):
    """Counts steps."""
    every: int = fa_bench.option(1, "steps in a unit", minimum=1)
    count: int = 0

    def on_step_end(self, trainer):
        self.count += 1

    def on_epoch_end(self, trainer, metrics):
        metrics["counted"] = self.count // self.every

@fa_bench.register_metric("bare")
@dataclasses.dataclass(eq=False)
class Bare(fa_bench.Metric):
    """Returns no mapping."""
    title = "bare"

    def measure(self, passes):
        return 0.5
'''
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "mine.py").write_text(PLUGIN)
    return tmp_path


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a separate process, in which no test has registered any components."""
    return subprocess.run([sys.executable, "-m", "fa_bench", *words], capture_output=True, text=True)


def test_plugin_schedule_and_callback_options(folder: Path) -> None:
    ran = run(
        *SMALL,
        "plugins=[mine]",
        "metrics=[]",
        "optimizer.schedule.name=inverse",
        "optimizer.schedule.slope=0.5",
        "optimizer.lr=0.3",
        "callbacks=['counting:every=2']",
    )
    assert ran.returncode == 0, ran.stderr
    (path,) = folder.rglob("metrics.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["lr"] for line in lines] == pytest.approx([0.3, 0.2])
    assert [line["counted"] for line in lines] == [1, 3]  # 57 training images: three batches of 16 per epoch


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("callbacks=['counting:evry=2']", ["callbacks.counting.evry", "'every'"]),
        ("callbacks=['counting:every=0']", ["callbacks.counting.every=0", ">= 1"]),
        ("callbacks=[counting,'counting:every=2']", ["callbacks", "lists counting twice"]),
        ("callbacks=['countin:every=2']", ["callbacks=countin:every=2", "'counting'"]),
        ("callbacks=counting", ["callbacks='counting' is not a list", "callbacks=[counting]"]),
        ("metrics=weight_angle", ["metrics='weight_angle' is not a list", "metrics=[weight_angle]"]),
        ("plugins=mine", ["plugins='mine' is not a list", "plugins=[mine]"]),
        ("optimizer.schedule.name=step", ["optimizer.schedule.step_size: is required", "optimizer.schedule.step_size=30"]),
        ("learning_rate=0.1", ["learning_rate", "'optimizer.lr'"]),
        ("algorithm=unheard", ["algorithm=unheard: no such algorithm", "plugins=[MODULE]"]),
        ("metrics=[bare]", ["metric bare", "must return a dict with a number for each layer, not 0.5"]),
    ],
)
def test_plugin_option_mistakes_give_single_line_error(folder: Path, word: str, parts: list[str]) -> None:
    ran = run(*SMALL, "plugins=[mine]", word)
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1, ran.stderr
    assert not [part for part in parts if part not in ran.stderr], ran.stderr


def test_help_shows_callback_option_syntax() -> None:
    assert "counting:every=1" in run("--help", "callback", "plugins=[mine]").stdout
    assert "none registered" in run("--help", "callback").stdout
    assert "callback=counting: Counts steps." in run("--help", "callback=counting", "plugins=[mine]").stdout
    assert run("--help", "callback=unheard", "plugins=[mine]").returncode == 2
