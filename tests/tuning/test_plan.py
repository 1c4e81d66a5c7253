"""Tests of the plan of a study: its command line, its experiment, and the checks before the first trial."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fa_bench.config.job import register_schemas
from fa_bench.errors import FaBenchError
from fa_bench.tuning import optuna_parts
from fa_bench.tuning.cli import main
from fa_bench.tuning.options import OWN_KEYS, TuneOptions
from fa_bench.tuning.optuna_parts import PRUNERS, SAMPLERS
from fa_bench.tuning.plan import Plan, make_plan
from fa_bench.tuning.tune import prepared

from .small import SMALL

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENT = """\
# @package _global_
defaults:
  - override /dataset: synthetic
epochs: 1
optimizer:
  lr: "${by:algorithm,{fa: 0.02},0.1}"
rules:
  fa: {density: 0.5}
grid:
  - {algorithm: "bp,fa", seed: "0,1"}
  - {algorithm: dkp, algorithm.b_init: zeros, seed: "0,1"}
tune:
  budget: 7
  seeds: [5, 6]
  name: mine
  space:
    optimizer.lr: tag(log,interval(0.01,10))
    optimizer.weight_decay: 0.001
    algorithm.density: [0.5, 1.0]
"""


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text(EXPERIMENT)
    monkeypatch.chdir(tmp_path)
    register_schemas()


def spaces(plan: Plan) -> dict[str, dict[str, str]]:
    return {each.rule: {key: one.text for key, one in each.space.items()} for each in plan.rules}


LR, DECAY = "tag(log,interval(0.001,1.0))", "0,1e-05,0.0001,0.001,0.01"


def test_spaces_combine_optimizer_and_rule_dimensions() -> None:
    plan = prepared(["algorithm=bp,usf", "optimizer=adam"], None)
    common = {"optimizer.lr": "tag(log,interval(1e-05,0.1))", "optimizer.weight_decay": DECAY}
    assert spaces(plan) == {"bp": common, "usf": {**common, "algorithm.scale": "xavier,pytorch,xiao"}}
    assert plan.rules[0].default == {"optimizer.lr": 0.001, "optimizer.weight_decay": 0.0}
    assert plan.directory == Path("outputs/digits-mlp-tune") and plan.options.trial_seeds == [3]


def test_overrides_replace_add_and_fix_dimensions() -> None:
    plan = prepared(
        [
            "algorithm=bp,fa,kp",
            "optimizer.lr=interval(0.1,1)",
            "optimizer.momentum=0,0.9",
            "optimizer.weight_decay=0.1",
            "algorithm.density=0.1,1.0",
            "algorithm.b_init=pytorch",
            "seeds=range(0,2)",
            "tune_seeds=7,8",
            "final_epochs=50",
        ],
        None,
    )
    common = {"optimizer.lr": "interval(0.1,1.0)", "optimizer.momentum": "0,0.9"}
    assert spaces(plan) == {"bp": common, "fa": {**common, "algorithm.density": "0.1,1.0"}, "kp": common}
    assert [each.job.plain()["algorithm"].get("b_init") for each in plan.rules] == [None, "pytorch", "pytorch"]
    assert {each.job.optimizer.weight_decay for each in plan.rules} == {0.1}
    assert (plan.options.seeds, plan.options.trial_seeds) == ([0, 1], [7, 8])
    job, directory = plan.trial(plan.rules[1], {"optimizer.lr": 0.25, "algorithm.density": 0.1}, seed=8)
    assert (job.optimizer.lr, job.plain()["algorithm"]["density"], job.run.seed) == (0.25, 0.1, 8)
    assert directory.parent.parent == Path("outputs/digits-mlp-tune/trials/digits-mlp")


def test_experiment_tune_section_is_used_and_overridable() -> None:
    plan = prepared(["experiment=mine", "budget=9"], "own")
    common = {"optimizer.lr": "tag(log,interval(0.01,10.0))"}
    assert spaces(plan) == {
        "bp": common,
        "fa": {"algorithm.b_init": "xavier_uniform,kaiming_uniform,pytorch", **common, "algorithm.density": "0.5,1.0"},
        "dkp": {"algorithm.b_lr_scale": LR, **common, "algorithm.density": "0.5,1.0"},
    }
    assert (plan.options.budget, plan.options.seeds, plan.directory) == (9, [5, 6], Path("outputs/mine"))
    assert [each.default["optimizer.lr"] for each in plan.rules] == [0.1, 0.02, 0.1]
    assert [each.default.get("algorithm.density") for each in plan.rules] == [None, 0.5, 1.0]
    assert plan.rules[2].job.plain()["algorithm"]["b_init"] == "zeros"
    assert {each.job.optimizer.weight_decay for each in plan.rules} == {0.001}
    plan = prepared(["experiment=mine", "algorithm=fa", "optimizer.lr=0.1,0.2", "algorithm.density=0.7", "name=other"], "own")
    assert spaces(plan) == {"fa": {"algorithm.b_init": "xavier_uniform,kaiming_uniform,pytorch", "optimizer.lr": "0.1,0.2"}}
    assert plan.rules[0].job.plain()["algorithm"]["density"] == 0.7


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["seed=0,1"], "seed=0,1: a study has two sets of seeds; write tune_seeds=..."),
        (["dataset=digits,mnist"], "one study for each dataset"),
        (["optimizer=sgd,adam"], "one study for each optimizer"),
        (["experiment=mine,quickstart"], "one study for each experiment"),
        (["hydra.run.dir=x"], "output_dir=FOLDER name=NAME"),
        (["budget=0"], "budget=0"),
        (["bugdet=3"], "bugdet: unknown key; did you mean 'budget'?"),
        (["sampler=tpa"], "did you mean 'tpe'?"),
        (["seeds=0,1", "tune_seeds=1,2"], "seed 1 is one of `seeds`"),
        (["seeds=0,0"], "lists 0 twice"),
        (["tune_seeds=0"], "at least one seed"),
        (["name=a/b"], "name=a/b: use a folder name"),
        (["optimizer.lr=interval(-1,1)"], "optimizer.lr=-1.0"),
        (["optimizer.rate=interval(0,1)"], "optimizer.rate"),
        (["epochs=1,2"], "epochs cannot be searched"),
        (["data_dir=a,b"], "data_dir cannot be searched"),
        (["algorithm=bp", "algorithm.density=0.1,1.0"], "no rule of this study has this option"),
        (["algorithm=bp", "algorithm.density=0.1"], "no rule of this study has this option"),
        (["algorithm=bp", "optimizer.lr=0.1", "optimizer.weight_decay=0"], "nothing to search"),
        (["algorithm=bp,unknown"], "algorithm=unknown: no such algorithm"),
        (["algorithm=bp,fa", "optimizer.rate=3"], "optimizer.rate: unknown key rate in optimizer"),
        (["experiment=several"], "its grid has several values of algorithm.density for fa"),
        (["output_dir=/"], "root of the file system"),
        (["optimizer.lr=glob(*)"], "optimizer.lr=glob(*)"),
    ],
)
def test_invalid_studies_are_refused_before_writing(words: list[str], problem: str, capsys: pytest.CaptureFixture) -> None:
    keys = [word.partition("=")[0] for word in words]
    words = [*(word for word in SMALL if word.partition("=")[0] not in keys and "experiment" not in keys), *words]
    Path("own/experiment/several.yaml").write_text("# @package _global_\ngrid: [{algorithm: fa, algorithm.density: '0.1,1.0'}]")
    assert main(["--config-dir", "own", *words]) == 2
    error = capsys.readouterr().err
    assert problem in error and error.count("\n") <= 2 and error.startswith("fa-bench-tune: ")
    assert [path.name for path in Path().iterdir()] == ["own"]


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ("tune: {bugdet: 3}", "tune.bugdet: unknown key; did you mean 'budget'?"),
        ("tune: 3", "tune=3: must be a mapping"),
        ("tune: {space: [1]}", "tune.space=[1]: must map keys"),
        ("tune: {space: {dataset: [digits, mnist]}}", "only values can be searched"),
        ("tune: {seeds: 3.5}", "seeds"),
    ],
)
def test_invalid_tune_sections_are_rejected(section: str, problem: str) -> None:
    Path("own/experiment/mine.yaml").write_text(EXPERIMENT.partition("tune:")[0] + section)
    with pytest.raises(FaBenchError, match=re.escape(problem)):
        make_plan(["experiment=mine"], "own")


def test_study_without_validation_split_is_rejected(capsys: pytest.CaptureFixture) -> None:
    assert main([*SMALL, "dataset.validation=0"]) == 2
    assert "dataset.validation=0: trials are compared by their validation accuracy" in capsys.readouterr().err
    assert not Path("outputs").exists()


def test_missing_optuna_error_suggests_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(optuna_parts.importlib.util, "find_spec", lambda name: None)
    assert main(SMALL) == 2
    assert capsys.readouterr().err == "fa-bench-tune: tuning needs optuna: pip install optuna\n"


def test_dry_run_describes_study_and_writes_nothing(capsys: pytest.CaptureFixture) -> None:
    assert main(["--dry-run", *SMALL, "budget=3", "seeds=0,1"]) == 0
    out = capsys.readouterr().out
    assert "Tuning 2 rules: 6 trials (3 of each) of 2 epochs, with seed 2; then 4 final runs, with seeds 0, 1" in out
    assert f"  optimizer.lr: {LR}\n  optimizer.weight_decay: {DECAY}" in out
    assert not Path("outputs").exists()


def test_help_lists_all_keys_and_unknown_flag_suggests_help(capsys: pytest.CaptureFixture) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name}=" in out for name in OWN_KEYS) and {"budget", "name", "pruner"} < {*OWN_KEYS}
    assert main(["--hlep"]) == 2 and "see fa-bench-tune --help" in capsys.readouterr().err


def test_trial_seeds_follow_final_seeds() -> None:
    assert TuneOptions(seeds=[4, 9, 1], tune_seeds=3).trial_seeds == [10, 11, 12]


def test_command_is_declared_in_pyproject() -> None:
    assert re.search(rf'^fa-bench-tune = "{main.__module__}:main"$', (ROOT / "pyproject.toml").read_text(), re.M)


PAGE = (ROOT / "docs" / "tune.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("line", re.findall(r"^    fa-bench-tune (.*)$", PAGE, re.M))
def test_documented_commands_are_valid_studies(line: str) -> None:
    assert make_plan([word for word in shlex.split(line) if word != "--dry-run"], None).rules


def test_documentation_lists_all_keys() -> None:
    table = PAGE.split("## What is searched")[0]
    assert [key for key in OWN_KEYS if f"`{key}`" not in table] == []
    assert [name for name in (*SAMPLERS, *PRUNERS) if f"`{name}`" not in table] == []
