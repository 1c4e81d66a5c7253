"""Configs are data: nothing in a YAML file is executed, and even a malicious file takes little time and memory to read."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from fa_bench.cli import main
from fa_bench.config.job import conf_dir
from fa_bench.errors import ConfigError, RunDirectoryError
from fa_bench.runs import checkpoint
from fa_bench.runs.checked_json import RecordError
from fa_bench.runs.readers import read_config
from fa_bench.utils.yaml_files import MAX_BYTES, MAX_DEPTH, parse_yaml, read_yaml

MAKE = "touch PWNED"
LOG = "{version: 1, root: {handlers: [x]}, handlers: {x: {%s}}}"
CREATE = "x: \"${oc.create:'{_tar${oc.decode:get_}: os.system, command: touch PWNED}'}\""

#: Maps a name to the content of the experiment and to what the message must contain. If they were not refused, some of these
#: experiments would create the file PWNED.
EVIL = {
    "apply": (f"seed: !!python/object/apply:os.system ['{MAKE}']", ["apply.yaml:2", "!!python/object/apply:os.system"]),
    "new": (f"seed: !!python/object/new:os.system ['{MAKE}']", ["new.yaml:2", "tag"]),
    "name": ("seed: !!python/name:os.system", ["name.yaml:2", "!!python/name:os.system"]),
    "module": ("seed: !!python/module:evil", ["module.yaml:2", "tag"]),
    "binary": ("seed: !!binary aGVsbG8=", ["binary.yaml:2", "!!binary"]),
    "own_tag": ("seed: !mine 5", ["own_tag.yaml:2", "!mine"]),
    "target": (f"algorithm: {{_target_: os.system, command: {MAKE}}}", ["algorithm._target_=os.system"]),
    "target_deep": ("optimizer: {schedule: {milestones: [{_target_: os.system}]}}", ["milestones.0._target_=os.system"]),
    "launcher": ("hydra: {launcher: {_target_: os.system}}", ["hydra.launcher._target_=os.system"]),
    "sweeper": (f"hydra: {{sweeper: {{_target_: os.system, command: {MAKE}}}}}", ["hydra.sweeper._target_=os.system"]),
    "callback": (f"hydra: {{callbacks: {{x: {{_target_: os.system, command: {MAKE}}}}}}}", ["hydra.callbacks.x._target_=os"]),
    # A name below Hydra's package can still refer to any module that one of Hydra's modules imports.
    "through_hydra": (
        f"hydra: {{callbacks: {{x: {{_target_: hydra._internal.core_plugins.bash_completion.os.system, command: {MAKE}}}}}}}",
        ["hydra.callbacks.x._target_=hydra._internal", "launchers"],
    ),
    "within": (
        f"hydra: {{callbacks: {{x: {{_target_: hydra.experimental.callbacks.LogJobReturnCallback, "
        f"y: {{_target_: os.system, command: {MAKE}}}}}}}}}",
        ["hydra.callbacks.x.y._target_=os.system"],
    ),
    "made_text": (f"hydra: {{callbacks: {{{CREATE}}}}}", ["hydra.callbacks.x=${oc.create"]),
    "elsewhere": ("evil: {}\nhydra: {callbacks: '${evil}'}", ["hydra.callbacks"]),
    "log_factory": ("hydra: {job_logging: %s}" % (LOG % f"(): os.system, command: {MAKE}"), ["handlers.x.()=os.system"]),
    "log_class": ("hydra: {hydra_logging: %s}" % (LOG % f"class: logging.os.system, command: {MAKE}"), ["x.class=logging.os"]),
    "log_ext": ("hydra: {job_logging: %s}" % (LOG % "class: logging.StreamHandler, stream: ext://evil.x"), ["ext://evil.x"]),
    "log_file": ("hydra: {job_logging: %s}" % (LOG % "class: logging.FileHandler, filename: /root/.profile"), [".profile"]),
    "environment": ("hydra: {job: {env_set: {PATH: bin}}}", ["hydra.job.env_set", "in the shell"]),
    "params": ("hydra: {sweeper: {params: {+hydra.callbacks.x._target_: os.system}}}", ["hydra.sweeper.params"]),
    "mode": ("hydra: {mode: MULTIRUN}", ["hydra.mode", "-m"]),
    "subdir": ("hydra: {output_subdir: ../../x}", ["hydra.output_subdir=../../x"]),
    "search": ("hydra: {searchpath: [pkg://evil]}", ["hydra.searchpath=pkg://evil"]),
    "plugins": ("plugins: [evil]", ["plugins=[evil]", "command line"]),
    "no_header": None,
    "bomb": ("a0: &a0 [x]\n" + "\n".join(f"a{n + 1}: &a{n + 1} [{','.join([f'*a{n}'] * 9)}]" for n in range(9)), ["aliases"]),
    "self_alias": ("seed: &a [*a]", ["*a", "contains it"]),
    "text_bomb": ("\n".join(f"k{n}: ${{k{n + 1}}}${{k{n + 1}}}" for n in range(40)) + "\nk40: x", ["longer than"]),
    "select_bomb": ("\n".join(f"k{n}: ${{oc.select:k{n + 1}}}${{.k{n + 1}}}" for n in range(40)) + "\nk40: x", ["longer than"]),
    "loop": ("a: ${b}\nb: ${a}", ["refers to itself"]),
    "deep": (f"seed: {'[' * 5000}{']' * 5000}", ["deep.yaml:2", "nested deeper"]),
    "deep_block": ("seed:\n" + "\n".join(" " * n + "a:" for n in range(1, 600)), ["nested deeper"]),
    "own_defaults": ("defaults: [own_defaults]", ["defaults"]),
    "digits": (f"seed: {'9' * 5000}", ["digits.yaml"]),
    "torn": ("seed: [1", ["torn.yaml:2", "YAML"]),
    "twice": ("seed: 1\nseed: 2", ["twice.yaml:3", "seed"]),
    "no_text": (b"seed: \xff\xfe", ["no_text.yaml", "UTF-8"]),
    "huge": ("#" * MAX_BYTES, ["huge.yaml", "larger"]),
    "unset": ("output_dir: ${oc.env:FA_BENCH_NOT_SET}", ["output_dir", "FA_BENCH_NOT_SET"]),
    "many": ("grid: [{seed: 'range(0,1000000000)'}]", ["range(0,1000000000)", "more than"]),
    "product": ("grid: [{seed: 'range(0,1000)', epochs: 'range(1,1000)'}]", ["999000 jobs"]),
}
EVIL["no_header"] = ("", ["experiment", "_global_"])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with every malicious experiment, and a module that creates a file when it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil/__init__.py").write_text("open('PWNED', 'w')")
    presets = tmp_path / "mine/experiment"
    presets.mkdir(parents=True)
    for name, (content, _) in EVIL.items():
        head = b"" if name == "no_header" else b"# @package _global_\n"
        (presets / f"{name}.yaml").write_bytes(head + (content if isinstance(content, bytes) else content.encode()))
    (tmp_path / "mine/search.yaml").write_text("hydra: {searchpath: [pkg://evil]}")
    (tmp_path / "mine/called.yaml").write_text(
        f"defaults: [config, _self_]\nhydra: {{callbacks: {{x: {{_target_: os.system, command: {MAKE}}}}}}}"
    )
    return tmp_path


def refused(arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    before = sorted(folder.rglob("*"))
    assert main(arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    assert sorted(folder.rglob("*")) == before
    assert "evil" not in sys.modules
    return said[0]


@pytest.mark.parametrize("name", [name for name in EVIL if name not in ("search", "no_header")])
def test_malicious_preset_is_rejected_without_execution(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = ["-m"] if name in ("many", "product") else []
    said = refused(["--config-dir", "mine", *grid, f"experiment={name}", "dataset=synthetic"], folder, capsys)
    assert len(said) < 1500
    for part in EVIL[name][1]:
        assert part in said


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config-dir", "mine", "--config-name", "search"],
        ["--config-dir", "mine", "--config-name", "search", "--info", "all"],
        ["--config-dir", "mine", "--config-name", "search", "--cfg", "all"],
        ["--config-dir", "mine", "--config-name", "search", "--shell-completion", "query=bash"],
        ["--config-dir", "mine", "--config-name", "called", "--info", "all"],
        ["--config-dir", "mine", "--config-name", "called", "--cfg", "hydra"],
        ["--config-dir", "mine", "--config-name", "called", "--shell-completion", "query=bash"],
        ["hydra.searchpath=[pkg://evil]"],
        ["hydra.searchpath=[nowhere]"],
        ["+hydra.callbacks.x._target_=os.system", f"+hydra.callbacks.x.command='{MAKE}'"],
        ["hydra.launcher._target_=os.system"],
        ["-m", "hydra.sweeper._target_=os.system", "seed=0,1"],
        ["-m", "seed=0,1", "+hydra.callbacks={x:{_target_:os.system}}"],
        ["+algorithm._target_=os.system"],
        ["+hydra.job.env_set.PATH=bin"],
        ["--config-path", "mine"],
        ["--experimental-rerun", "job.pickle"],
        ["seed=" + "[" * 3000 + "]" * 3000],
        ["epochs=" + "${" * 3000 + "}" * 3000],
        ["-m", "seed=range(0,10,0)"],
        ["-m", "seed=range(0,inf)"],
        ["-m", "seed=range(5,1)"],
        ["-m", "seed=interval(0,1)"],
    ],
    ids=lambda arguments: " ".join(arguments)[:70],
)
def test_malicious_command_line_is_rejected(arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if arguments[0] == "--experimental-rerun":
        (folder / "job.pickle").write_bytes(pickle.dumps(Evil()))
    assert len(refused(arguments, folder, capsys)) < 1500


@pytest.mark.parametrize("words", [[], ["install"], ["query=tcsh"], ["a=1"]])
def test_shell_completion_error_suggests_usage(words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "install=bash" in refused(["--shell-completion", *words], folder, capsys)


def test_shell_completion_and_hydra_help_still_work(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_LINE", "fa-bench algorithm=k")
    assert main(["--shell-completion", "query=bash"]) == 0
    assert "algorithm=kp" in capsys.readouterr().out
    assert main(["--hydra-help", "--config-dir", "mine", "--config-name", "search"]) == 0
    assert "--multirun" in capsys.readouterr().out


class Evil:
    """Creates a file when an instance is unpickled."""

    def __reduce__(self) -> object:
        return os.system, (MAKE,)


def test_malicious_checkpoint_is_not_executed(folder: Path) -> None:
    path = folder / "last.pt"
    torch.save({"version": checkpoint.VERSION, "config_hash": "x", "model": Evil()}, path)
    with pytest.raises(RunDirectoryError, match=r"last.pt: not a readable checkpoint"):
        checkpoint.read(path, "x", "cpu")
    assert not (folder / "PWNED").exists()
    torch.load(path, weights_only=False)
    assert (folder / "PWNED").exists()  # with weights_only=False, loading creates the file


@pytest.mark.parametrize("name", ["apply", "bomb", "deep", "torn", "no_text", "huge"])
def test_malicious_run_config_is_rejected(name: str, folder: Path) -> None:
    (folder / "config.yaml").write_bytes((folder / f"mine/experiment/{name}.yaml").read_bytes())
    with pytest.raises(RecordError, match=r"config\.yaml"):
        read_config(folder / "config.yaml")
    assert not (folder / "PWNED").exists()


def test_shipped_configs_are_within_limits() -> None:
    for path in conf_dir().rglob("*.yaml"):
        read_yaml(path)


def test_parse_yaml_matches_omegaconf() -> None:
    text = "a: &x {b: [1, 2.5, null, true, 1e-3, '5']}\nc: *x\nd: {<<: *x, e: '${a.b}'}\n" + "f: " + "[" * 38 + "]" * 38
    assert parse_yaml(text, "here") == OmegaConf.create(text)
    with pytest.raises(ConfigError, match=f"here:1: nested deeper than {MAX_DEPTH}"):
        parse_yaml("[" * (MAX_DEPTH + 1), "here")
