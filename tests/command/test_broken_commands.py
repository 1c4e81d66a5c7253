"""A broken command line gives an error of one or two lines. The first line names the mistake and, if possible, the allowed values
or what was probably meant."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

from fa_bench.cli import main

#: Each case is a command line and the strings that the first line of the message must contain.
BROKEN = [
    ("algorithm=faa", ["algorithm=faa", "'fa'", "available", "kp"]),
    ("architecture=mpl", ["architecture=mpl", "'mlp'"]),
    ("dataset=digit", ["dataset=digit", "'digits'"]),
    ("optimizer=sdg", ["optimizer=sdg", "'sgd'"]),
    ("experiment=quickstar", ["experiment=quickstar", "'quickstart'"]),
    ("algorithm=null", ["algorithm=None", "available"]),
    ("~algorithm", ["algorithm=None", "choose one of"]),
    ("algoritm=fa", ["algoritm", "'algorithm'", "allowed"]),
    ("+algoritm=kp", ["algoritm", "'algorithm'", "allowed"]),
    ("optimizer.lrr=0.1", ["optimizer.lrr", "'lr'", "allowed"]),
    ("+optimizer.lrr=0.1", ["optimizer.lrr", "'lr'", "options"]),
    ("lr=0.1", ["lr: unknown key; did you mean 'optimizer.lr'?", "allowed"]),
    ("density=0.5", ["density: unknown key; did you mean 'algorithm.density'?"]),
    ("algorithm.lr=0.1", ["algorithm.lr: unknown key lr in algorithm; did you mean 'optimizer.lr'?"]),
    ("--help algoritm", ["--help algoritm", "'algorithm'"]),
    ("--help compile", ["--help compile", "--help run lists it"]),
    ("algorithm.densty=0.5", ["algorithm.densty", "'density'"]),
    ("algorithm/foo=3", ["algorithm/foo", "'algorithm'"]),
    ("hydra.swep=1", ["hydra.swep", "'sweep'"]),
    ("hydra.job.num=x", ["hydra.job.num=x (", "could not be converted to Integer"]),
    ("hydra.run.dir=null", ["hydra.run.dir=null (", "not Optional"]),
    ("optimizer.lr.x=1", ["optimizer.lr.x", "(allowed: none)"]),
    ("optimizer.lr=abc", ["optimizer.lr='abc'", "a number"]),
    ("optimizer.lr=-0.1", ["optimizer.lr=-0.1", "> 0"]),
    ("optimizer.schedule.name=cosin", ["optimizer.schedule.name=cosin", "'cosine'"]),
    ("optimizer.schedule=cosine", ["optimizer.schedule='cosine'", "did you mean optimizer.schedule.name=cosine?"]),
    ("optimizer.schedule.name=cosine optimizer.schedule.min_lr=0.06", ["optimizer.schedule.min_lr=0.06", "lr=0.05"]),
    (
        "optimizer=adam optimizer.schedule.name=linear optimizer.schedule.min_lr=0.06",
        ["optimizer.schedule.min_lr=0.06", "lr=0.001"],
    ),
    ("optimizer.schedule.name=step", ["optimizer.schedule.step_size", "is required"]),
    ("optimizer.schedule.min_lr=0.06", ["optimizer.schedule.min_lr: is not an option of schedule.name=constant", "cosine"]),
    ("optimizer.schedule.milestones=[3]", ["optimizer.schedule.milestones", "multistep"]),
    ("optimizer.nesterov=true optimizer.momentum=0", ["optimizer.nesterov", "momentum"]),
    ("architecture.widths=5", ["architecture.widths=5", "a list"]),
    ("architecture.widths=[5,0]", ["architecture.widths=0", ">= 1"]),
    ("architecture.widths=[5,a]", ["architecture.widths=[5, 'a'] is not a list of whole numbers"]),
    ("algorithm.allow_uncovered=3", ["algorithm.allow_uncovered=3 is not true or false or a list of names"]),
    ("callbacks=[early]", ["callbacks=early", "none are registered", "plugins=[MODULE]"]),
    ("loggers=[csv:a=1]", ["an item of the list needs quotes", """write 'loggers=["csv:a=1"]'"""]),
    ("loggers=[csv,wandb:a=1,b=2]", ["""write 'loggers=[csv,"wandb:a=1,b=2"]'"""]),
    ("algorithm.density=2", ["algorithm.density=2", "<= 1"]),
    ("seed=a", ["seed='a'", "whole number"]),
    ("epochs=0", ["epochs=0", ">= 1"]),
    ("batch_size=1.5", ["batch_size=1.5", "whole number"]),
    ("deterministic=maybe", ["deterministic='maybe'", "true or false"]),
    ("device=gpu", ["device=gpu", "'cpu'"]),
    ("device=cuda:77", ["device=cuda:77", "CUDA devices"]),
    ("epochs=${nope}", ["epochs", "nope"]),
    ("algorithm=bp,fa", ["algorithm=bp,fa", "-m"]),
    (
        "-m algorithm=fa,kp,bp,dkp algorithm.b_lr_scale=0.1,1",
        ["algorithm=fa,bp have no such option", "with algorithm=kp,dkp", "run fa,bp in another command"],
    ),
    ("-m optimizer=sgd,adam optimizer.momentum=0,0.9", ["optimizer=adam has no such option", "with optimizer=sgd"]),
    ("-m algorithm=fa,bp algorithm.b_lr_scale=0.1,1", ["unknown key b_lr_scale in algorithm", "allowed"]),
    ("algorithm=[bp,fa]", ["a run has one algorithm", "write -m algorithm=bp,fa"]),
    ("-m dataset=[digits,synthetic] seed=0,1", ["a run has one dataset", "write -m dataset=digits,synthetic"]),
    ("optimizer=[]", ["a run has one optimizer", "write -m optimizer=NAME,NAME"]),
    ("experiment=quickstart", ["experiment=quickstart", "-m"]),
    ("-m seed=0,0", ["two jobs", "seed0"]),
    ("-m optimizer.lr=0.1,abc seed=0,1", ["optimizer.lr='abc'", "a number"]),
    ("algorithm", ["'algorithm'", "key=value"]),
    ("optimizer.lr=[1", ["optimizer.lr=[1", "key=value"]),
    ("--foo", ["--foo", "--help"]),
    ("--config-dir /nope", ["/nope", "no such folder"]),
    ("plugins=[not_there]", ["plugins=[not_there]", "imported"]),
    ("plugins=nosuch", ["plugins='nosuch'", "a list"]),
    ("algorithm=mine plugins=my_rules", ["plugins='my_rules'", "a list"]),
    ("plugins=[torn]", ["plugins=[torn]", "SyntaxError", "torn.py, line 2"]),
    ("plugins=[odd]", ["plugins=[odd]", "NameError: name 'nope'", "odd.py:3"]),
    ("--help plugins=[torn]", ["plugins=[torn]", "SyntaxError"]),
    ("--help algorithm=dfaa", ["algorithm=dfaa", "'dfa'"]),
    ("--experiment=quickstart", ["--experiment=quickstart", "'experiment=quickstart'"]),
    ("algorithm=fa --seed=3 -m", ["--seed=3", "'seed=3'"]),
    ("--cfg job -m seed=0,1", ["--multirun and --cfg", "together"]),
    ("--cfg job seed=0,1", ["seed=0,1 is a sweep", "pass --dry-run -m instead"]),
    ("--cfg job experiment=quickstart", ["experiment=quickstart sweeps", "pass --dry-run -m instead"]),
    ("--resolve", ["--resolve", "--cfg"]),
    ("--package algorithm", ["--package", "--cfg"]),
    ("dataset.validation=-1", ["dataset.validation=-1", ">= 0"]),
    ("dataset.validation=5000", ["dataset.validation=5000", "1437"]),
    ("algorithm=dfa algorithm.form=kernel algorithm.cuts=[act1]", ["algorithm.cuts", "form=kernel"]),
    ("algorithm=dfa algorithm.cuts=[act9]", ["act9", "'act"]),
    ("algorithm=dfa architecture=torchvision dataset=synthetic", ["cut points", "cuts="]),
    ("architecture=torchvision architecture.model=resnet1 dataset=synthetic", ["architecture.model=resnet1", "'resnet18'"]),
    ("architecture=conv2 dataset=synthetic dataset.size=1", ["architecture.padding", "1x1"]),
    ("dataset=image_folder data_dir=none", ["data_dir=none", "train/"]),
    ("dataset=image_folder data_dir=broken", ["broken/train/a/1.png", "not a readable image"]),
]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        (tmp_path / "broken" / split / "a").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "broken" / split / "a" / "0.png")
    (tmp_path / "broken/train/a/1.png").write_text("not an image")
    (tmp_path / "torn.py").write_text("import os\ndef f(:\n")
    (tmp_path / "odd.py").write_text("import os\n\nx = nope\n")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


@pytest.mark.parametrize(("command", "named"), BROKEN, ids=[command for command, _ in BROKEN])
def test_broken_command_gives_short_error_before_training(
    command: str, named: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    try:
        code = main(command.split())
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert 1 <= len(said) <= 2
    for part in named:
        assert part in said[0]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("word", ["quantum=true", "optimizer.foo=x", "algorithm=backprop", "--help foo"])
def test_distant_name_gives_no_suggestion(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(word.split()) == 2
    assert "did you mean" not in capsys.readouterr().err


SMALL = ["dataset=synthetic", "dataset.samples=64", "dataset.test_samples=16", "architecture.widths=[8]", "epochs=1"]


@pytest.mark.parametrize("resume", ["false", "true"])
def test_directory_of_another_config_is_refused(resume: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "hydra.run.dir=here"]) == 0
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main([*SMALL, "hydra.run.dir=here", "optimizer.lr=0.3", f"resume={resume}"]) == 2
    assert "here" in (said := capsys.readouterr().err) and "optimizer.lr=0.05 there, 0.3 here" in said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_files_of_unknown_run_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "result.json").write_text("mine")
    assert main([*SMALL, "hydra.run.dir=here"]) == 2
    assert "result.json" in capsys.readouterr().err
    assert (tmp_path / "here" / "result.json").read_text() == "mine"
