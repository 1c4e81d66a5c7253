"""Invalid values of options, including Hydra's own, and malformed experiments give short errors that name the key or the
value."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fa_bench.cli import main
from fa_bench.command.guard import check_config
from fa_bench.config.job import MAX_THREADS, RunOptions
from fa_bench.errors import MAX_MESSAGE, ConfigError, OptionError, first_line, printable, truncate
from fa_bench.registry.registries import ALGORITHMS

SMALL = ["dataset=synthetic", "dataset.samples=64", "dataset.test_samples=16", "architecture.widths=[8]", "epochs=1"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert 1 <= said.count("\n") <= 2 and len(said) <= MAX_MESSAGE + 20 and "Traceback" not in said
    return said.strip()


@pytest.mark.parametrize("key", ["threads", "seed", "probe_size"])
@pytest.mark.parametrize("value", [-1, 10**30, 1.5, "1", [1], [[1]], {"a": 1}, None, True, float("nan")])
def test_invalid_number_error_names_option(key: str, value: object) -> None:
    with pytest.raises(OptionError, match=f"^{key}="):
        RunOptions(**{key: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [MAX_THREADS + 1, 100_000, 2**31, 2**63])
def test_too_many_threads_are_rejected(threads: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert RunOptions(threads=MAX_THREADS).threads == MAX_THREADS
    assert "threads=" in refused([*SMALL, f"threads={threads}"], capsys)


@pytest.mark.parametrize("key", ["channels", "samples", "size", "classes"])
def test_oversized_dataset_is_rejected_before_allocation(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"dataset.{key}" in refused([*SMALL, f"dataset.{key}={2**31}"], capsys)


@pytest.mark.parametrize("jobs", ["0", "true", "1.5", "x"])
def test_invalid_joblib_n_jobs_is_rejected_before_sweep(jobs: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["-m", *SMALL, "seed=0,1", "hydra/launcher=joblib", f"hydra.launcher.n_jobs={jobs}"]
    assert "hydra.launcher.n_jobs" in refused(words, capsys) and not Path("outputs").exists()


@pytest.mark.parametrize(
    "device",
    [
        "cuda:99999999999999999999",
        "cuda:128",
        "cuda:256",
        "cuda:2147483648",
        "cuda:01",
        "cuda:",
        "cuda:-1",
        "cuda:٣",
        "cuda:0 ",
        "CPU",
        "mps:0",
        "cpu\n",
        "",
        "x" * 10_000,
    ],
)
def test_invalid_device_is_rejected(device: str) -> None:
    with pytest.raises(OptionError, match="device=") as caught:
        RunOptions(device=device)
    assert len(str(caught.value)) < 300
    assert RunOptions(device="cuda:127").device == "cuda:127"


@pytest.mark.parametrize(
    "value",
    [
        [["readout"]],
        ["readout", ["readout"]],
        [{"a": 1}],
        {"readout": 1},
        [None],
        [1],
        "readout",
        "x" * 10**5,
    ],
)
def test_invalid_list_error_names_option(value: object) -> None:
    with pytest.raises(OptionError, match="probes=") as caught:
        RunOptions(probes=value)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 400
    assert ("did you mean probes=[readout]?" in str(caught.value)) == (value == "readout")


@pytest.mark.parametrize("name", [["fa"], [["fa"]], {"a": 1}, None, 3, "x" * 10**5])
def test_component_lookup_requires_string(name: object) -> None:
    assert name not in ALGORITHMS
    with pytest.raises(ConfigError, match="no such algorithm") as caught:
        ALGORITHMS[name]  # type: ignore[index]
    assert len(str(caught.value)) < 800  # the message lists all rules


def test_messages_are_truncated() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert truncate("abc", 3) == "abc" and len(truncate("x" * 10**6, 100)) == 100
    assert len(printable("\x1b" * 10**6)) <= MAX_MESSAGE and "\x1b" not in printable("\x1b[31m")
    assert printable("a" * 10**5 + "end").endswith("end")
    assert first_line(Mute()) == "Mute" and len(first_line(ValueError("x" * 10**5))) <= 300
    assert first_line(ValueError("\n\na\nb")) == "a" and first_line(ValueError()) == "ValueError"


LONG = "x" * 19_000


@pytest.mark.parametrize(
    "word",
    [
        f"{LONG}=1",
        f"seed={LONG}",
        f"algorithm={LONG}",
        f"--{LONG}",
        f"+{LONG}=1",
        f"optimizer.{LONG}=1",
        f"probes=['{LONG}']",
        f"plugins=['{LONG}']",
        f"hydra/launcher={LONG}",
        f"seed=${{{LONG}}}",
        f"hydra.searchpath=['{LONG}']",
        f"--config-dir={LONG}",
        f"output_dir=a={LONG}",
        f"scale={LONG}",
        f"hydra.verbose={{a: {LONG}}}",
    ],
)
def test_long_argument_is_truncated_in_error(word: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused([*SMALL, word], capsys)
    assert list(folder.iterdir()) == []


# ------------------------------------------------------------------------------------------------ Hydra's own
@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("hydra.sweeper.max_batch_size=1", ["hydra.sweeper.max_batch_size: unknown key"]),
        ("+hydra.sweeper.max_batch_size=1", ["hydra.sweeper.max_batch_size: fa-bench's sweeper has no options"]),
        ("hydra/sweeper=basic", ["hydra/sweeper=basic", "fa_bench"]),
        ("hydra/sweeper=bacis", ["hydra/sweeper=bacis", "allowed: fa_bench"]),
        ("hydra.sweep.dir=a,b", ["hydra.sweep.dir=a,b", "one value"]),
        ("hydra.run.dir=a,b", ["hydra.run.dir=a,b", "one value"]),
        ("hydra.job.name=a,b", ["hydra.job.name=a,b", "one value"]),
        ("hydra/launcher=basic,joblib", ["hydra/launcher=basic,joblib", "one value"]),
        ("hydra.sweep.dir=o/${hydra.job.num}", ["hydra.sweep.dir=o/${hydra.job.num}", "hydra.job.num"]),
        ("hydra.sweep.subdir=o/${hydra.job.id}", ["hydra.sweep.subdir", "hydra.job.id"]),
        ("output_dir=o/${hydra.job.name}", ["output_dir=o/${hydra.job.name}", "hydra.run.dir"]),
        ("hydra.sweeper=null", ["hydra.sweeper=null"]),
        ("hydra.sweeper=1", ["hydra.sweeper=1"]),
        ("hydra.launcher=null", ["hydra.launcher=null"]),
        ("+hydra.launcher.x=1", ["hydra.launcher", "'x'"]),
        ("+hydra.callbacks.x=1", ["hydra.callbacks={'x': 1}"]),
        ("+hydra.job_logging.root=1", ["hydra.job_logging="]),
        ("hydra.job_logging={version: 1, root: 1}", ["hydra.job_logging="]),
        ("+hydra.job_logging.root={level: NOPE}", ["hydra.job_logging="]),
        ("~hydra/job_logging", ["hydra.job_logging"]),
        ("hydra.verbose=1", ["hydra.verbose=1"]),
        ("hydra.overrides.task=[a]", ["hydra.overrides", "must not"]),
        ("hydra.overrides.hydra=[a]", ["hydra.overrides", "must not"]),
        ("~output_dir", ["output_dir"]),
        ("~hydra.sweep.dir", ["hydra.sweep.dir"]),
        ("~hydra.sweep.subdir", ["hydra.sweep.subdir"]),
        ("hydra/launcher=ray", ["hydra/launcher=ray", "pip install hydra-ray-launcher", "basic"]),
        ("hydra/sweeper=optuna", ["hydra/sweeper=optuna: not supported", "allowed: fa_bench"]),
        ("hydra/job_logging=colorlog", ["hydra/job_logging=colorlog", "pip install hydra-colorlog"]),
        ("hydra/launcher=submitit_lokal", ["hydra/launcher=submitit_lokal", "'submitit_local'"]),
        ("hydra/launcher=joblb", ["hydra/launcher=joblb", "'joblib'"]),
        ("hydra/lancher=joblib", ["hydra/lancher"]),
    ],
)
def test_invalid_hydra_options_are_rejected_before_grid(
    word: str, named: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(["-m", *SMALL, "seed=0,1", word], capsys)
    for part in named:
        assert part in said
    assert list(folder.iterdir()) == []


def test_multiple_run_dirs_are_rejected_without_multirun(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "one value" in refused([*SMALL, "hydra.run.dir=a,b"], capsys)


def test_supported_hydra_options_are_accepted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["-m", *SMALL, "seed=0,1", "hydra/job_logging=default", "hydra.verbose=[x]", "hydra.sweep.dir=o/${hydra.job.name}"])
        == 0
    )
    assert len(list((folder / "o").rglob("result.json"))) == 2


def test_self_reference_via_hydra_resolver_is_rejected() -> None:
    from omegaconf import OmegaConf

    with pytest.raises(ConfigError, match="refers to itself"):
        check_config(OmegaConf.create({"hydra": {"job": {"name": "${hydra:job.name}"}}}), [])


# ------------------------------------------------------------------------------------------------ presets
@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("'': 3", "''"),
        ("optimizer: {'': 1}", "optimizer.''"),
        ("grid:\n  - {'': 1}", "grid: cannot read '=1'"),
        ("grid:\n  - {'a b': 1}", "grid: cannot read 'a b=1'"),
        ("grid:\n  - {seed: '[0'}", "grid: cannot read 'seed=[0'"),
        ("grid:\n  - {hydra.sweep.dir: 'a,b'}", "hydra.sweep.dir=a,b"),
        ("grid: '${nope}'", "grid"),
        ("rules: '${nope}'", "rules"),
        ("grid: {a: 1}", "grid={'a': 1}"),
        ("rules: {'': {}}", "rules."),
        ("rules: {fa: {'': 1}}", "rules.fa"),
        ("rules: {fa: {'a b': 1}}", "rules.fa"),
        ("rules: {1: {}}", "rules.1"),
        ("null: 3", "None"),
        ("hydra: 1", "experiment/odd"),
        ("hydra:\n  sweeper: {max_batch_size: 0}", "hydra.sweeper.max_batch_size"),
        ("hydra:\n  callbacks: {x: 1}", "hydra.callbacks"),
        ("output_dir: ['a']", "output_dir=['a']"),
        ("output_dir: '~/o'", "output_dir=~/o"),
        ("data_dir: '~'", "data_dir=~"),
        ("probes: [[readout]]", "probes=[['readout']]"),
        ("defaults:\n  - override /hydra/launcher: ray", "hydra-ray-launcher"),
        (f"'{'k' * 1000}': 1", "kkk"),
        (f"grid:\n  - {{'{'k' * 1000}': 1}}", "grid"),
    ],
)
def test_invalid_preset_is_reported(text: str, named: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "c" / "experiment").mkdir(parents=True)
    (folder / "c" / "experiment" / "odd.yaml").write_text(f"# @package _global_\n{text}\n")
    assert named in refused(["-m", "--config-dir", "c", *SMALL, "experiment=odd"], capsys)
    assert [path.name for path in folder.iterdir()] == ["c"]


@pytest.mark.parametrize("text", ["", "'': 1", "x: 1", "name: nope"])
def test_help_rejects_config_without_component(text: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "c" / "algorithm").mkdir(parents=True)
    (folder / "c" / "algorithm" / "odd.yaml").write_text(text)
    assert "algorithm=odd" in refused(["--help", "--config-dir", "c", "algorithm=odd"], capsys)


def test_missing_package_gives_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert "nope" in refused(["--cfg", "job", "--package", "nope"], capsys)


def test_sweep_records_command_overrides(folder: Path) -> None:
    assert main(["-m", *SMALL, "seed=0", "output_dir='o=1'"]) == 0
    (listed,) = folder.rglob("sweep.json")
    assert "output_dir='o=1'" in json.loads(listed.read_text())["command"]
