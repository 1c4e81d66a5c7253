"""With ``import fa_bench`` as its only import from the project, a user's module can add a component of every kind. The components
can then be chosen on the command line, and appear in the help and the records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fa_bench
from fa_bench.cli import main
from fa_bench.registry import registries

SCHEDULE = '''
@fa_bench.register_schedule("inverse")
@dataclasses.dataclass(eq=False)
class Inverse(fa_bench.Schedule):
    """lr / (1 + slope t)."""

    slope: float = fa_bench.option(1.0, "slope", minimum=0)

    def rate(self, lr, done, total):
        return lr / (1 + self.slope * done)
'''
PLUGIN = (
    '''
import dataclasses

import numpy as np
import torch
from torch import nn

import fa_bench


@fa_bench.register_rule("halved")
@dataclasses.dataclass(eq=False)
class Halved(fa_bench.EdgeRule):
    """Errors through half the weight."""

    factor: float = fa_bench.option(0.5, "factor of the weight", above=0)

    def pathway(self, layer):
        layer.put("B", layer.module.weight.detach() * self.factor)
        return fa_bench.FixedFeedback()


@fa_bench.register_architecture("tiny")
@dataclasses.dataclass(eq=False)
class Tiny(fa_bench.Architecture):
    """One hidden layer."""

    units: int = fa_bench.option(6, "neurons", minimum=1)

    def make(self, input_shape, classes):
        c, h, w = input_shape
        return nn.Sequential(nn.Flatten(), nn.Linear(c * h * w, self.units), nn.Tanh(), nn.Linear(self.units, classes))


@fa_bench.register_dataset("stripes")
@dataclasses.dataclass(eq=False)
class Stripes(fa_bench.ArrayDataset):
    """Horizontal and vertical stripes."""

    def arrays(self, data_dir):
        rng = np.random.default_rng(0)
        y = np.arange(60) % 2
        rows = rng.integers(0, 256, (60, 4, 1), dtype=np.uint8).repeat(4, 2)
        x = np.where(y[:, None, None] == 0, rows, rows.transpose(0, 2, 1))
        return x[:48], y[:48], x[48:], y[48:], ["horizontal", "vertical"]


@fa_bench.register_objective("hinge")
@dataclasses.dataclass(eq=False)
class Hinge(fa_bench.Objective):
    """Multi-class hinge loss."""

    margin: float = fa_bench.option(1.0, "margin", above=0)

    def loss(self, outputs, target, reduction="mean"):
        return nn.functional.multi_margin_loss(outputs, target, margin=self.margin, reduction=reduction)


'''
    + SCHEDULE
    + '''

@fa_bench.register_optimizer("signs")
@dataclasses.dataclass(eq=False)
class Signs(fa_bench.OptimizerOptions):
    """Resilient propagation."""

    def build(self, groups):
        return torch.optim.Rprop(groups, lr=self.lr)


@fa_bench.register_metric("update_angle")
@dataclasses.dataclass(eq=False)
class UpdateAngle(fa_bench.Metric):
    """Angle between the rule's weight gradient and the exact one."""

    title, unit = "update angle", "°"

    def measure(self, passes):
        found = {}
        for layer, gradient in passes.gradients.items():
            exact = passes.exact_gradients[layer]
            cosine = nn.functional.cosine_similarity(gradient.flatten(), exact.flatten(), dim=0)
            found[layer] = torch.rad2deg(torch.acos(cosine.clamp(-1, 1))).item()
        return found


@fa_bench.register_callback("counting")
@dataclasses.dataclass(eq=False)
class Counting(fa_bench.Callback):
    """Counts steps, including those before an interruption."""

    count: int = 0

    def on_step_end(self, trainer):
        self.count += 1

    def on_epoch_end(self, trainer, metrics):
        metrics["counted"] = self.count

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state.get("count", 0)


@fa_bench.register_logger("lines")
@dataclasses.dataclass(eq=False)
class Lines(fa_bench.Logger):
    """Prints every tag."""

    def open(self, directory, job, step):
        self.tags = set()

    def scalars(self, values, step):
        self.tags |= set(values)

    def finish(self, status, numbers, step):
        print("tags", " ".join(sorted(self.tags)))
'''
)
COMMAND = [
    "plugins=[every_kind]",
    "algorithm=halved",
    "algorithm.factor=0.25",
    "architecture=tiny",
    "architecture.units=5",
    "dataset=stripes",
    "objective=hinge",
    "objective.margin=0.5",
    "optimizer=signs",
    "optimizer.lr=0.01",
    "optimizer.schedule.name=inverse",
    "optimizer.schedule.slope=2",
    "callbacks=[counting]",
    "loggers=[lines,tensorboard]",
    "batch_size=8",
    "threads=1",
    "epochs=3",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("every_kind.py").write_text(PLUGIN)
    yield tmp_path
    names = {"halved", "tiny", "stripes", "hinge", "inverse", "signs", "update_angle", "counting", "lines"}
    for registry in (*registries.GROUPS, *registries.NAMED):
        for name in names & set(registry):
            registry.drop(name)
    __import__("sys").modules.pop("every_kind", None)


def test_plugin_components_work_from_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-m", *COMMAND, "seed=0,1"]) == 0
    said = capsys.readouterr().out
    assert "tags accuracy/test" in said and "update_angle/1" in said and "update angle (°)" in said
    (run,) = Path("outputs").rglob("seed0")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == pytest.approx([0.01, 0.01 / 3, 0.01 / 5])
    assert [line["counted"] for line in lines] == [5, 10, 15]
    result = json.loads((run / "result.json").read_text())
    assert {result[key] for key in ("algorithm", "architecture", "dataset", "objective", "optimizer")} == {
        "halved",
        "tiny",
        "stripes",
        "hinge",
        "signs",
    }
    angle = result["angles"]["update_angle"]
    assert angle["3"] == pytest.approx(0, abs=0.1) and angle["1"] > 1
    assert result["angles"]["norm_ratio"]["3"] > 0
    (report,) = Path("outputs").rglob("report.md")
    assert "update angle (°)" in report.read_text() and list(report.parent.glob("report_update_angle*.png"))
    events = EventAccumulator(str(run)).Reload()
    assert "update_angle/1" in events.Tags()["scalars"]
    assert fa_bench.load_results("outputs")["update_angle"].notna().all()


def test_plugin_components_are_listed_in_help(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {
        "algorithm": "Errors through half the weight",
        "architecture": "One hidden layer",
        "dataset": "Horizontal and",
        "objective": "Multi-class hinge",
        "optimizer": "Resilient",
        "schedule": "slope=1.0",
        "metric": "weight gradient",
        "callback": "Counts steps",
        "logger": "Prints every tag",
    }
    for kind, words in kinds.items():
        assert main(["--help", kind, "plugins=[every_kind]"]) == 0
        assert words in capsys.readouterr().out, kind
    assert main(["--help", "objective=hinge", "plugins=[every_kind]"]) == 0
    assert "objective.margin=1.0" in capsys.readouterr().out


def test_callback_state_survives_resume(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fa_bench.runs.callbacks import StopOnSignal
    from fa_bench.utils.stopping import Interrupted

    with monkeypatch.context() as patch:

        def stop(callback, trainer) -> None:
            if trainer.progress.step == 7:
                raise Interrupted(2)

        patch.setattr(StopOnSignal, "on_step_end", stop)
        assert main([*COMMAND, "hydra.run.dir=run"]) == 130
    assert main([*COMMAND, "hydra.run.dir=run"]) == 0
    assert [json.loads(line)["counted"] for line in Path("run/metrics.jsonl").read_text().splitlines()] == [5, 10, 15]


def test_public_api_is_complete() -> None:
    assert set(dir(fa_bench)) == set(fa_bench.__all__)
    assert all(getattr(fa_bench, name) is not None for name in fa_bench.__all__)
    wanted = {
        "attach",
        "Rule",
        "EdgeRule",
        "CutRule",
        "register_rule",
        "register_dataset",
        "register_architecture",
        "register_optimizer",
        "register_objective",
        "register_schedule",
        "register_metric",
        "option",
        "run",
        "load_results",
    }
    assert wanted <= set(fa_bench.__all__)
    assert (Path(fa_bench.__file__).parent / "py.typed").exists()
