"""The sweeper of fa-bench starts one pool for all jobs, composes each job once before the sweep, and sets no environment
variables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins

import fa_bench
from fa_bench.cli import main
from fa_bench.config.job import conf_dir
from fa_bench.report import figures
from fa_bench.utils import process

SMALL = ["dataset=synthetic", "dataset.samples=64", "dataset.test_samples=16", "architecture.widths=[8]", "epochs=1"]
TWO = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "metrics_of", lambda runs: {})
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    for name, text in {
        "mine": "rules: {fa: {density: 0.5}, usf: {density: 0.25}}\n"
        "grid: [{algorithm: 'bp,fa,usf'}, {algorithm: dfa, algorithm.density: '1.0,0.75'}]",
        "other": "grid: [{algorithm: kp}]\nepochs: 2",
    }.items():
        (tmp_path / "own" / "experiment" / f"{name}.yaml").write_text(f"# @package _global_\n{text}\n")
    return tmp_path


def watched(name: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Patch the launcher class `name` so that each launch appends its number of jobs to the returned list."""
    cls: Any = Plugins.instance().class_name_to_class[name]
    launch, launched = cls.launch, []

    def count(self: Any, job_overrides: Any, initial_job_idx: int) -> Any:
        launched.append(len(job_overrides))
        return launch(self, job_overrides, initial_job_idx)

    monkeypatch.setattr(cls, "launch", count)
    return launched


def test_experiment_with_rule_options_uses_one_pool(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    launched = watched("hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher", monkeypatch)
    assert main(["-m", "--config-dir", "own", "experiment=mine", *SMALL, *TWO]) == 0
    assert launched == [5]
    found = [yaml.safe_load(path.read_text())["algorithm"] for path in folder.rglob("config.yaml")]
    assert sorted((rule["name"], rule.get("density", 1.0)) for rule in found) == [
        ("bp", 1.0),
        ("dfa", 0.75),
        ("dfa", 1.0),
        ("fa", 0.5),
        ("usf", 0.25),
    ]
    out = capfd.readouterr().out
    assert all(f"[{number}/5]" in out for number in range(1, 6)) and " remaining" in out
    assert not [name for name in os.environ if name.startswith(("FA_BENCH", "HYDRA"))]


def test_jobs_are_checked_and_launched_with_one_composition_each(monkeypatch: pytest.MonkeyPatch) -> None:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cls: Any = type(GlobalHydra.instance().config_loader())
    compose, composed = cls.load_configuration, []
    monkeypatch.setattr(
        cls,
        "load_configuration",
        lambda self, *args, **named: (
            composed.append(named["overrides"] if "overrides" in named else args[1]),
            compose(self, *args, **named),
        )[1],
    )
    launched = watched("hydra._internal.core_plugins.basic_launcher.BasicLauncher", monkeypatch)
    assert main(["-m", *SMALL, "algorithm=fa,bp", "seed=0,1"]) == 0
    assert launched == [4]
    assert len(composed) == 1 + 4 + 4  # the sweep's own config, each job's check, and each job's launch


def test_several_experiments_are_all_expanded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-m", "--config-dir", "own", "experiment=mine,other", *SMALL]) == 0
    assert len(list((folder / "outputs" / "mine").rglob("result.json"))) == 5
    assert len(list((folder / "outputs" / "other").rglob("result.json"))) == 1
    assert capsys.readouterr().out.startswith("Running 6 jobs (6 epochs); output: outputs\n")


def test_experiment_selects_launcher(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "own" / "experiment" / "two.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /hydra/launcher: joblib\nhydra: {launcher: {n_jobs: 2}}\n"
    )
    launched = watched("hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher", monkeypatch)
    assert main(["-m", "--config-dir", "own", "experiment=two", *SMALL, "seed=0,1"]) == 0
    assert launched == [2]


def test_only_output_directories_are_created(folder: Path) -> None:
    assert main(["-m", *SMALL, "output_dir=a,b"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b", "own"]
    assert not list(folder.rglob("multirun.yaml"))


def test_no_job_starts_if_last_is_invalid(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-m", "--config-dir", "own", "experiment=mine", *SMALL, *TWO, "optimizer.lr=0.1,-1"]) == 2
    assert "optimizer.lr=-1" in capsys.readouterr().err and not (folder / "outputs").exists()


def test_gc_freeze_is_called_only_for_command_line_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen: list[bool] = []
    monkeypatch.setattr(process.gc, "freeze", lambda: frozen.append(True))
    monkeypatch.setattr(process, "_jobs", 0)
    fa_bench.run(*SMALL, seed=[0, 1])
    assert not frozen
    assert main([*SMALL, "seed=2"]) == 0 and not frozen
    assert main(["-m", *SMALL, "seed=3,4"]) == 0 and frozen == [True]
