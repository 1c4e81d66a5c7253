"""Paths that the shell or Hydra would misread are refused, with a corrected override if there is one, and no folder is created
for them."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fa_bench.cli import main
from fa_bench.command.overrides import parse
from fa_bench.utils.files import RESULT
from fa_bench.utils.shell import hydra_quote, shell_quote

SMALL = ["dataset=synthetic", "dataset.samples=64", "dataset.test_samples=16", "architecture.widths=[8]", "epochs=1"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "my home"))
    monkeypatch.setenv("MY_FOLDER", "mine")
    return tmp_path


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and len(said) < 2000
    return said.strip()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("output_dir=o1/lr=0.1", "o1/lr=0.1"),
        ("output_dir=o1/結果", "o1/結果"),
        ("output_dir=o1/ä b", "o1/ä b"),
        ("output_dir=it's", "it's"),
        ("output_dir=~/o", "{home}/o"),
        ("output_dir='~/o'", "{home}/o"),
        ("output_dir='~'", "{home}"),
        ("output_dir='$MY_FOLDER/o'", "mine/o"),
        ("output_dir=o(1)", "o(1)"),
        ("output_dir=a=b=c", "a=b=c"),
        ('output_dir=o1/5"', 'o1/5"'),
        ("data_dir=~/data", "{home}/data"),
        ("data_dir=a#é", "a#é"),
    ],
)
def test_path_requiring_quotes_suggests_working_command(
    typed: str, meant: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused([*SMALL, typed], capsys)
    key = typed.split("=")[0]
    assert key in said
    mend = said.rpartition("write ")[2]
    in_shell = subprocess.run(["sh", "-c", f"printf %s {mend}"], capture_output=True, text=True, check=True).stdout
    assert shlex.split(mend) == [in_shell]
    assert parse(in_shell).key_or_group == key and parse(in_shell).value() == meant.format(home=folder / "my home")
    assert list(folder.iterdir()) == []
    assert main(["--dry-run", *SMALL, in_shell]) == 0


@pytest.mark.parametrize("typed", ["~nobody_here/o", "'~nobody_here/o'"])
def test_unknown_home_directory_is_rejected(typed: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "the full path" in refused([*SMALL, f"output_dir={typed}"], capsys)


@pytest.mark.parametrize("key", ["hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir"])
def test_hydra_directories_are_validated(key: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = [] if key == "hydra.run.dir" else ["-m", "seed=0,1"]
    for value in ("'~/o'", "null", "[a]", "${nope}", "${oc.env:FA_BENCH_UNSET}", "'a\0b'", "'" + "x" * 300 + "'"):
        said = refused([*grid, *SMALL, f"{key}={value}"], capsys)
        assert key in said or "output_dir" in said or "not a valid directory" in said
    assert list(folder.iterdir()) == []


def test_too_long_name_creates_no_parent_directories(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "too long" in refused([*SMALL, f"output_dir=new/{'x' * 300}"], capsys)
    assert list(folder.iterdir()) == []


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(st.characters(min_codepoint=32, exclude_categories=["Cs", "Cc"]), min_size=1).filter(lambda t: "${" not in t))
def test_quoted_text_round_trips_through_shell_and_hydra(text: str) -> None:
    override = f"output_dir={hydra_quote(text)}"
    assert shlex.split(shell_quote(override)) == [override]
    value = parse(override).value()
    assert str(value) == text or hydra_quote(text) == text  # unquoted text may be parsed as a number or null


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_timestamp_in_path_is_shared_by_jobs(launcher: str, folder: Path) -> None:
    more = ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    assert main(["-m", *SMALL, "seed=0,1", "output_dir=o/${now:%H%M%S-%f}", f"hydra/launcher={launcher}", *more]) == 0
    (made,) = (folder / "o").iterdir()
    assert len(list(made.rglob(RESULT))) == 2 and not list((folder / "o").rglob("multirun.yaml"))


def test_timestamp_is_shared_by_run_and_grid_parts(folder: Path) -> None:
    assert main([*SMALL, "hydra.run.dir=o/${now:%f}"]) == 0
    assert len(list((folder / "o").iterdir())) == 1
    (folder / "c" / "experiment").mkdir(parents=True)
    (folder / "c" / "experiment" / "two.yaml").write_text(
        "# @package _global_\noutput_dir: p/${now:%f}\ngrid:\n  - {algorithm: bp}\n  - {algorithm: fa}\n"
    )
    assert main(["-m", "--config-dir", "c", *SMALL, "experiment=two"]) == 0
    assert len(list((folder / "p").iterdir())) == 1


def test_hydra_job_num_counts_across_grid_parts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-m", *SMALL, "seed=4,5", "hydra.sweep.subdir=${hydra:job.num}"]) == 0
    seeds = {path.parent.name: json.loads(path.read_text())["seed"] for path in (folder / "outputs").rglob(RESULT)}
    assert seeds == {"0": 4, "1": 5}
    (folder / "c" / "experiment").mkdir(parents=True)
    (folder / "c" / "experiment" / "two.yaml").write_text(
        "# @package _global_\ngrid:\n  - {algorithm: bp}\n  - {algorithm: fa}\n"
    )
    assert main(["-m", "--config-dir", "c", *SMALL, "output_dir=o", "experiment=two", "hydra.sweep.subdir=${hydra.job.num}"]) == 0
    rules = {path.parent.name: json.loads(path.read_text())["algorithm"] for path in (folder / "o").rglob(RESULT)}
    assert rules == {"0": "bp", "1": "fa"}  # jobs are numbered across all parts of the sweep
