"""In whole runs from the command line, every rule and optimizer trains, records are complete, and a resumed run is bitwise
identical."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fa_bench.cli import main
from fa_bench.registry.registries import ALGORITHMS, OPTIMIZERS
from fa_bench.report import figures
from fa_bench.runs import loop
from fa_bench.utils.files import METRICS, RESULT

ROOT = Path(__file__).resolve().parents[2]
TINY = ["dataset=synthetic", "dataset.samples=80", "dataset.test_samples=16", "batch_size=16", "epochs=1", "probe_size=8"]
MLP = [*TINY, "architecture.widths=[8,6]"]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "metrics_of", lambda runs: {})  # a report's figures take seconds and have their own tests


def result_in(folder: Path | str) -> dict[str, Any]:
    return json.loads((Path(folder) / RESULT).read_text())


def lines_in(folder: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (Path(folder) / METRICS).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.mark.parametrize(
    "architecture",
    [
        ["architecture=mlp", "architecture.widths=[8,8]"],
        ["architecture=conv2", "architecture.channels=4", "architecture.hidden=8"],
        ["architecture=resnet20", "architecture.width=2", "architecture.blocks=1", "dataset.channels=3"],
    ],
    ids=["mlp", "conv2", "resnet20"],
)
@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_every_rule_trains_on_every_architecture(
    algorithm: str, architecture: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*TINY, f"algorithm={algorithm}", *architecture, "hydra.run.dir=run"]
    if main(command) != 0:  # follow the error's suggestion
        assert "Pass algorithm.linear=share" in capsys.readouterr().err and not Path("run").exists()
        assert main([*command, "algorithm.linear=share"]) == 0
    result = result_in("run")
    assert result["status"] == "finished" and result["step"] == 4
    assert result["angles"]["delta_angle"][result["output_layers"][0]] == 0


def test_torchvision_model_trains_on_small_images() -> None:
    common = [*TINY, "dataset.size=32", "batch_size=40", "architecture=torchvision", "architecture.model=resnet18"]
    assert main([*common, "algorithm=kp", "hydra.run.dir=run"]) == 0
    assert len(result_in("run")["angles"]["weight_angle"]) == 21


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize(
    "schedule",
    [
        "name=constant",
        "name=step step_size=1",
        "name=multistep milestones=[1] gamma=0.5",
        "name=cosine min_lr=0.001",
    ],
)
def test_optimizers_and_schedules_set_learning_rate(optimizer: str, schedule: str) -> None:
    words = [f"optimizer.schedule.{word}" for word in schedule.split()]
    assert main([*MLP, "epochs=2", f"optimizer={optimizer}", "optimizer.lr=0.01", *words, "hydra.run.dir=run"]) == 0
    second = {"constant": 0.01, "step": 0.001, "multistep": 0.005, "cosine": 0.0055}[schedule.split()[0][5:]]
    assert [line["lr"] for line in lines_in("run")] == pytest.approx([0.01, second])


def test_default_fa_run_exceeds_90_percent_on_digits() -> None:
    assert main(["hydra.run.dir=run"]) == 0
    result = result_in("run")
    assert result["algorithm"] == "fa" and result["dataset"] == "digits" and result["test_accuracy"] > 0.9


def test_records_are_complete() -> None:
    assert main([*MLP, "epochs=3", "probe_every=4", "hydra.run.dir=run"]) == 0
    result = result_in("run")
    assert result["status"] == "finished" and result["error"] is None and result["epoch"] == 3
    assert result["data_hash"] and result["config_hash"] and result["versions"]["torch"] and result["peak_memory_bytes"] > 0
    last = lines_in("run")[-1]
    assert result["test_accuracy"] == last["test_accuracy"] and result["angles"] == last["angles"]
    best = max(lines_in("run"), key=lambda line: line["val_accuracy"])
    assert result["test_accuracy_at_best_val"] == best["test_accuracy"]
    assert result["best_epoch"] == best["epoch"]
    assert set(result["angles"]) == {
        "weight_angle",
        "norm_ratio",
        "delta_angle",
        "delta_angle_one_step",
        "true_gradient_norm",
        "output_angle",
    }
    events = EventAccumulator("run").Reload()
    tags = set(events.Tags()["scalars"])
    assert {
        "loss/train",
        "accuracy/val",
        "accuracy/test",
        "lr",
        "weight_angle/fc2",
        "delta_angle/fc1",
        "norm_ratio/fc3",
        "true_gradient_norm/fc1",
    } <= tags
    assert [event.step for event in events.Scalars("accuracy/test")] == [4, 8, 12]
    assert [event.step for event in events.Scalars("weight_angle/fc2")] == [0, 4, 8, 12]
    state = torch.load("run/checkpoints/last.pt", weights_only=True)
    assert state["progress"]["epoch"] == 3 and "fc2.feedback_B" in state["model"]
    assert "algorithm:" in Path("run/config.yaml").read_text() and "epoch 3/3" in Path("run/run.log").read_text()


def test_without_validation_no_best_epoch_is_selected() -> None:
    assert main([*MLP, "dataset.validation=0", "hydra.run.dir=run"]) == 0
    result = result_in("run")
    assert result["step"] == 5 and result["val_accuracy"] is None and result["test_accuracy_at_best_val"] is None


class Stopped(KeyboardInterrupt):
    """An interruption by the user."""


@pytest.mark.parametrize(
    "rule",
    [
        ["algorithm=fa"],
        ["algorithm=brsf"],
        ["algorithm=kp", "optimizer@feedback_optimizer=adam"],
        ["algorithm=dfa", "optimizer.schedule.name=cosine", "architecture.batch_norm=true"],
    ],
    ids=["fa", "brsf", "kp with adam on B", "dfa"],
)
def test_resume_is_bitwise_identical(rule: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    command = [*MLP, *rule, "epochs=4", "probe_every=3"]
    assert main([*command, "hydra.run.dir=whole"]) == 0

    evaluate = loop.evaluate
    calls = []

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:  # in the third epoch, with two evaluations per epoch
            raise Stopped
        return evaluate(*arguments)

    monkeypatch.setattr(loop, "evaluate", interrupted)
    assert main([*command, "hydra.run.dir=parts"]) == 130
    assert result_in("parts")["status"] == "interrupted" and len(lines_in("parts")) == 2
    monkeypatch.setattr(loop, "evaluate", evaluate)
    assert main([*command, "hydra.run.dir=parts", "resume=true"]) == 0

    whole, parts = (torch.load(f"{name}/checkpoints/last.pt", weights_only=True) for name in ("whole", "parts"))
    for key in whole["model"]:
        assert torch.equal(whole["model"][key], parts["model"][key]), key
    assert str(whole["optimizers"]) == str(parts["optimizers"]) and whole["rule"] == parts["rule"]
    assert lines_in("whole") == lines_in("parts")
    assert result_in("whole")["angles"] == result_in("parts")["angles"]


@pytest.mark.parametrize("grid", [False, True])
def test_resuming_finished_run_changes_nothing(grid: bool, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*MLP, "algorithm=kp", "epochs=2", "resume=true", *(["-m"] if grid else [])]
    assert main(command) == 0
    assert "already finished" not in capsys.readouterr().out
    run = next(Path("outputs").rglob(RESULT)).parent
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file()}
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "already finished; nothing to do" in said and "epoch 1/2" not in said
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file()} == before
    (run / RESULT).unlink()  # as if it had been killed between the last checkpoint and the result
    assert main(command) == 0
    assert result_in(run)["status"] == "finished" and result_in(run)["epoch"] == 2


@pytest.mark.parametrize("epochs", [0, 1])
def test_interrupt_message_mentions_only_existing_checkpoint(
    epochs: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = loop.Trainer._epoch

    def interrupted(self: Any) -> Any:
        if self.progress.epoch == epochs:
            raise Stopped
        return whole(self)

    monkeypatch.setattr(loop.Trainer, "_epoch", interrupted)
    assert main([*MLP, "epochs=2", "hydra.run.dir=run"]) == 130
    assert ("to resume" in (said := capsys.readouterr().err)) == Path("run/checkpoints/last.pt").exists() == (epochs > 0)
    assert "Interrupted" in said and len(said.splitlines()) == 1


def test_unused_feedback_optimizer_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    for rule, unused in (("fa", True), ("kp", False)):
        assert main([*MLP, f"algorithm={rule}", "optimizer@feedback_optimizer=adam", "hydra.run.dir=" + rule]) == 0
        said = capsys.readouterr().out
        assert ("feedback_optimizer=adam is not used: fa learns no feedback" in said) == unused
        assert ("is not used" in Path(rule, "run.log").read_text()) == unused


def test_batch_size_above_sample_count_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    for size, exceeds in ((22, False), (23, True)):  # two of 24 samples are for validation
        assert main([*MLP, f"batch_size={size}", "dataset.samples=24", f"hydra.run.dir=of{size}"]) == 0
        sentence = "batch_size=23 is more than the 22 training samples: an epoch is one step on all of them"
        assert (sentence in capsys.readouterr().out) == exceeds
        assert ("more than the" in Path(f"of{size}", "run.log").read_text()) == exceeds


def test_repeated_command_gives_same_records() -> None:
    assert main([*MLP, "epochs=2", "hydra.run.dir=run"]) == 0
    first = lines_in("run")
    assert main([*MLP, "epochs=2", "hydra.run.dir=run"]) == 0
    assert lines_in("run") == first and len(list(Path("run").glob("events*"))) == 1


def test_corrupt_checkpoint_error_names_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*MLP, "hydra.run.dir=run"]) == 0
    Path("run/checkpoints/last.pt").write_bytes(b"torn")
    with pytest.raises(SystemExit):
        train_alone([*MLP, "hydra.run.dir=run", "resume=true"])
    assert "last.pt" in capsys.readouterr().err


def train_alone(command: list[str]) -> None:
    raise SystemExit(main(command))


@pytest.mark.parametrize(("rate", "layer"), [("1e20", "fc2"), ("1e40", "fc1.weight")])  # in a layer's output, or in a weight
def test_divergence_ends_run_and_reports_layer(rate: str, layer: str) -> None:
    command = [*MLP, "epochs=5", f"optimizer.lr={rate}", "hydra.run.dir=run"]
    assert main(command) == 1
    result = result_in("run")
    assert result["status"] == "diverged" and result["step"] == 1
    assert {key: result["error"][key] for key in ("epoch", "step", "layer")} == {"epoch": 1, "step": 1, "layer": layer}
    assert main([*command, "on_divergence=continue", "hydra.run.dir=on"]) == 1
    on = result_in("on")
    assert on["status"] == "diverged" and on["error"] == result["error"]
    assert on["epoch"] == len(lines_in("on")) == 5 and lines_in("on")[-1]["train_loss"] is None


def test_grid_shares_data_and_writes_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-m", *MLP, "algorithm=bp,frozen,kp", "seed=0,1"]) == 0
    said = capsys.readouterr().out
    assert "test accuracy" in said and "report.png" in said
    folder = Path("outputs/synthetic-mlp")
    assert (folder / "report.png").is_file() and len(list(folder.rglob(RESULT))) == 6
    assert len({result_in(path.parent)["data_hash"] for path in folder.rglob(RESULT)}) == 1
    groups = {result_in(path.parent)["group"] for path in folder.rglob(RESULT)}
    assert len(groups) == 3 and main(["-m", *MLP, "algorithm=bp", "seed=2"]) == 0
    assert result_in(next(folder.glob("bp-*/seed2")))["group"] in groups


def test_grid_over_option_labels_log_lines_and_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-m", *MLP, "algorithm=bp,kp", "optimizer.lr=0.05,0.1", "seed=0,1"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line.startswith("[6/8] kp lr=0.05 seed 1 epoch 1/1")]
    assert [line for line in said if line.startswith("kp lr=0.1 ")]
    for name in ("report.csv", "report.md"):
        assert "bp lr=0.05" in (Path("outputs/synthetic-mlp") / name).read_text()
    assert main(["-m", *MLP, "algorithm=bp,kp", "seed=2"]) == 0
    assert "[2/2] kp seed 2 epoch" in capsys.readouterr().out


def test_failing_job_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fit = loop.Trainer.fit

    def fail(trainer: Any) -> Any:
        if trainer.rule.name == "fa":
            raise RuntimeError("out of luck")
        return fit(trainer)

    monkeypatch.setattr(loop.Trainer, "fit", fail)
    assert main(["-m", *MLP, "algorithm=fa,bp"]) == 1
    statuses = {path.parent.parent.name[:2]: result_in(path.parent) for path in Path("outputs").rglob(RESULT)}
    assert statuses["fa"]["status"] == "failed" and statuses["fa"]["error"]["message"] == "out of luck"
    assert statuses["bp"]["status"] == "finished"
    assert "failed" in capsys.readouterr().err
    assert "Traceback" in next(Path("outputs").glob("*/fa-*/seed0/run.log")).read_text()


def test_changed_working_directory_does_not_affect_other_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = loop.Trainer.fit
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(loop.Trainer, "fit", lambda *given: (os.chdir(tmp_path / "elsewhere"), fit(*given))[1])
    here = Path.cwd()
    assert main(["-m", *MLP, "algorithm=fa", "seed=0,1"]) == 0 and Path.cwd() == here
    assert len(list(here.glob("outputs/*/fa-*/seed*/result.json"))) == 2 and not list((tmp_path / "elsewhere").iterdir())


def test_runs_in_one_process_do_not_affect_each_other() -> None:
    assert main([*MLP, "hydra.run.dir=first"]) == 0
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(99)
    try:
        assert main([*MLP, "hydra.run.dir=second"]) == 0
    finally:
        torch.set_default_dtype(torch.float32)
    assert lines_in("first") == lines_in("second")


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Create a module with a rule, and a folder with the configs of a variant of the rule and of an experiment; unregister the
    rule afterwards."""
    (tmp_path / "my_rules.py").write_text(
        "import dataclasses\n"
        "from fa_bench.mechanisms.edge.rule import EdgeRule\n"
        "from fa_bench.mechanisms.edge.pathways import FixedFeedback\n"
        "from fa_bench.registry.options import option\n"
        "from fa_bench.registry.registries import ALGORITHMS\n"
        "@ALGORITHMS.register('mine')\n"
        "@dataclasses.dataclass(eq=False)\n"
        "class Mine(EdgeRule):\n"
        "    'My very own rule.'\n"
        "    density: float = option(0.5, 'fraction of B that is not zero', above=0, maximum=1)\n"
        "    def pathway(self, layer):\n"
        "        layer.put('B', 'kaiming_uniform', self.density)\n"
        "        return FixedFeedback()\n"
    )
    for group in ("algorithm", "experiment"):
        (tmp_path / "mine" / group).mkdir(parents=True)
    (tmp_path / "mine" / "algorithm" / "thin.yaml").write_text("defaults:\n  - /_schema/algorithm/mine@_here_\ndensity: 0.25\n")
    (tmp_path / "mine" / "experiment" / "my_figure.yaml").write_text("# @package _global_\nepochs: 3\n")
    known = dict(ALGORITHMS.items())
    monkeypatch.delitem(sys.modules, "my_rules", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield
    sys.modules.pop("my_rules", None)
    ALGORITHMS._entries.clear()
    ALGORITHMS._entries.update(known)


PLUGIN = ["--config-dir", "mine", "plugins=[my_rules]"]


def test_help_and_errors_for_plugin_rule(plugin: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help", *PLUGIN]) == 0
    said = capsys.readouterr().out
    assert "mine," in said and "my_figure" in said and len(said.splitlines()) <= 60
    assert main(["--help", *PLUGIN, "algorithm", "experiment"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^  mine +My very own rule\.$", said, re.M)
    assert re.search(r"^  quickstart +Six rules on handwritten digits", said, re.M)
    assert main(["--help", *PLUGIN, "algorithm=mine"]) == 0
    said = capsys.readouterr().out
    assert "algorithm.density=0.5" in said and "algorithm=mine: My very own rule." in said and "seed=" not in said
    assert main(["--help", *PLUGIN, "algorithm=thin"]) == 0
    assert "algorithm=thin (mine):" in (said := capsys.readouterr().out) and "algorithm.density=0.25" in said
    for words, named in (
        (["algorithm=mine", "algorithm.densty=0.3"], ["algorithm.densty", "'density'"]),
        (["algorithm=min"], ["algorithm=min", "'mine'", "thin"]),
        (["algorithm=mine", "algorithm.density=3"], ["algorithm.density=3", "<= 1"]),
        (["experiment=my_figur"], ["experiment=my_figur", "'my_figure'"]),
    ):
        assert main([*PLUGIN, *words]) == 2
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1 and all(part in said for part in named), said


def test_flags_are_accepted_between_overrides() -> None:
    assert main(["algorithm=bp,kp", "-m", *MLP, "seed=0"]) == 0
    assert len(list(Path("outputs").rglob(RESULT))) == 2


def test_plugin_rule_trains_from_command_line(plugin: None, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fa_bench.cli", "--config-dir", "mine", "plugins=[my_rules]", "algorithm=mine", *MLP]
    ran = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": ""}, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert len(list(Path("outputs").glob("synthetic-mlp/mine-*/seed0"))) == 1


def test_help_and_cfg_do_not_import_torch() -> None:
    code = (
        "import sys; from fa_bench.cli import main; code = main(sys.argv[1:]); "
        "print('torch imported:', 'torch' in sys.modules); sys.exit(code)"
    )
    for arguments, expected in ((["--help", "algorithm=kp"], "algorithm.b_init"), (["--cfg", "job", "algorithm=kp"], "name: kp")):
        ran = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
        assert ran.returncode == 0, ran.stderr
        assert expected in ran.stdout and "torch imported: False" in ran.stdout


def test_wheel_holds_the_configs(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    import zipfile

    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "installed")
    ran = subprocess.run(
        [sys.executable, "-m", "fa_bench.cli", "--cfg", "job"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "installed"), "PATH": ""},
    )
    assert ran.returncode == 0 and "architecture:" in ran.stdout, ran.stderr
