"""Runs that are stopped, killed, damaged or started twice have the same results as uninterrupted runs."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fa_bench.cli import main
from fa_bench.errors import OutputError
from fa_bench.report import figures
from fa_bench.runs import checkpoint, hashes, locks, loop
from fa_bench.runs.callbacks import StopOnSignal
from fa_bench.runs.loop import Trainer
from fa_bench.runs.ownership import HOLDER, LOCK
from fa_bench.utils.files import ANGLES, CONFIG, METRICS, RESULT
from fa_bench.utils.stopping import Interrupted, interrupt_on_signals
from tests.data.files import write_cifar

Capture, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch
ROOT = Path(__file__).resolve().parents[2]
LAST, PREVIOUS = "run/checkpoints/last.pt", "run/checkpoints/previous.pt"
COMMON = [
    "dataset=synthetic",
    "dataset.samples=80",
    "dataset.test_samples=16",
    "batch_size=16",
    "epochs=3",
    "probe_size=8",
    "architecture.widths=[8,6]",
    "probe_every=2",
]
RUN = [*COMMON, "hydra.run.dir=run"]
#: Cases with a feedback optimizer, masks, a phase before training, or feedback that is sampled again in every step.
RULES = [
    ["algorithm=kp", "optimizer@feedback_optimizer=adam"],
    ["algorithm=pfa", "algorithm.density=0.5", "algorithm.ratio=2"],
    ["algorithm=wm", "algorithm.initial_steps=20"],
    ["algorithm=brsf"],
]
TIMES = ("seconds", "peak_memory_bytes", "energy_wh")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "metrics_of", lambda runs: {})


def recorded(run: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The result, including the lines of the measurements, and the lines of the epochs, all without times."""

    def timeless(record: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in record.items() if key not in TIMES}

    result, lines = (Path(run) / name for name in (RESULT, METRICS))
    measurements = {"measurements": Path(run, ANGLES).read_text().splitlines()}
    epochs = [timeless(json.loads(line)) for line in lines.read_text().splitlines()]
    return timeless(json.loads(result.read_text())) | measurements, epochs


def at_step(number: int, act: Callable[[], Any], monkeypatch: Patch) -> None:
    """Patch runs to call `act` once, after update `number`."""
    on_step, done = StopOnSignal.on_step_end, []

    def acting(callback: Any, trainer: Any) -> None:
        if trainer.progress.step == number and not done:
            done.append(number)
            act()
        on_step(callback, trainer)

    monkeypatch.setattr(StopOnSignal, "on_step_end", acting)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("rule", RULES, ids=["kp", "pfa", "wm", "brsf"])
@pytest.mark.parametrize("step", [5, 8])  # the last batch of an epoch of five, and one within an epoch
def test_signal_saves_checkpoint_within_epoch(
    rule: list[str], number: signal.Signals, code: int, step: int, monkeypatch: Patch, capsys: Capture
) -> None:
    command = [*RUN, *rule, "dataset.validation=0"]
    assert main([*command, "hydra.run.dir=whole"]) == 0
    at_step(step, lambda: signal.raise_signal(number), monkeypatch)
    assert main(command) == code
    assert "Checkpoint saved; rerun the same command to resume" in capsys.readouterr().err
    assert json.loads(Path("run", RESULT).read_text())["status"] == "interrupted"
    progress = torch.load(LAST, weights_only=True)["progress"]
    assert (progress["step"], progress["epoch"], progress["batch"]) == (step, (step - 1) // 5, (step - 1) % 5 + 1)
    assert main(command) == 0
    assert f"resuming after epoch {(step - 1) // 5}, batch" in capsys.readouterr().out
    assert recorded("run") == recorded("whole")


def test_second_interrupt_within_step_saves_no_checkpoint(monkeypatch: Patch) -> None:
    """A second SIGINT ends the run at once; the run resumes from its last checkpoint, not from the middle of a step."""
    command = [*RUN, "dataset.validation=0"]
    assert main([*command, "hydra.run.dir=whole"]) == 0
    train_step = Trainer.train_step

    def interrupted(trainer: Trainer, *arguments: Any) -> None:
        train_step(trainer, *arguments)
        if trainer.progress.step == 7:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        assert main(command) == 130
    assert json.loads(Path("run", RESULT).read_text())["status"] == "interrupted"
    assert torch.load(LAST, weights_only=True)["progress"]["step"] == 5
    assert main([*command, "resume=true"]) == 0
    assert recorded("run") == recorded("whole")


def test_full_disk_after_signal_is_interrupt(monkeypatch: Patch, capsys: Capture) -> None:
    """Otherwise, a sweep would go on with its next run."""

    def full(*arguments: Any) -> None:
        raise OutputError("last.pt: cannot be written (No space left on device)")

    at_step(3, lambda: signal.raise_signal(signal.SIGTERM), monkeypatch)
    monkeypatch.setattr(checkpoint, "save", full)
    assert main([*RUN, "seed=0,1", "-m", "hydra.sweep.dir=sweep"]) == 143
    assert "last.pt: cannot be written" in capsys.readouterr().out and len(list(Path("sweep").rglob(METRICS))) == 1
    assert [json.loads(path.read_text())["status"] for path in Path("sweep").rglob(RESULT)] == ["interrupted"]


def test_error_after_signal_is_interrupt() -> None:
    with pytest.raises(Interrupted) as caught, interrupt_on_signals():
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:  # as if an import had been interrupted
            raise AttributeError("half a module") from None
    assert caught.value.code == 143
    with pytest.raises(AttributeError), interrupt_on_signals():
        raise AttributeError("an error of its own")


def test_interrupted_mirror_phase_resumes(monkeypatch: Patch) -> None:
    command = [*RUN, *RULES[2]]
    assert main([*command, "hydra.run.dir=whole"]) == 0
    from fa_bench.rules.wm import MirroredFeedback

    mirror, calls = MirroredFeedback.mirror, []

    def stopping(self: Any, layer: Any) -> None:
        calls.append(1)
        if len(calls) == 7:
            signal.raise_signal(signal.SIGTERM)
        mirror(self, layer)

    monkeypatch.setattr(MirroredFeedback, "mirror", stopping)
    assert main(command) == 143
    before = len(calls)
    assert before < 20 and main([*command, "resume=true"]) == 0
    assert recorded("run") == recorded("whole")
    # There are 20 steps before training and one after each of 12 updates, in two layers, and none is repeated.
    assert len(calls) == (20 + 12) * 2


def test_augmented_run_resumes_within_epoch(monkeypatch: Patch, tmp_path: Path) -> None:
    write_cifar(tmp_path / "data", monkeypatch)
    command = [
        "dataset=cifar10",
        "data_dir=data",
        "dataset.validation=0",
        "batch_size=2",
        "epochs=2",
        "probe_size=2",
        "algorithm=fa",
        "architecture.widths=[8]",
        "hydra.run.dir=run",
    ]
    assert main([*command, "hydra.run.dir=whole"]) == 0
    at_step(2, lambda: signal.raise_signal(signal.SIGTERM), monkeypatch)
    assert main(command) == 143 and main([*command, "resume=true"]) == 0
    assert recorded("run") == recorded("whole")


def test_checkpoint_epochs_and_minutes(monkeypatch: Patch) -> None:
    saved: list[tuple[int, int]] = []
    save = checkpoint.save

    def saving(*arguments: Any) -> None:
        saved.append((arguments[4].epoch, arguments[4].batch))
        save(*arguments)

    monkeypatch.setattr(checkpoint, "save", saving)
    assert main([*RUN, "epochs=5", "checkpoint_epochs=2"]) == 0
    assert saved == [(2, 0), (4, 0), (5, 0)]
    saved.clear()
    assert main([*RUN, "epochs=1", "checkpoint_minutes=1e-9", "hydra.run.dir=other"]) == 0
    assert saved == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 0)]


def damage(path: str) -> None:
    """Flip a bit in the middle of the largest tensor's bytes."""
    with zipfile.ZipFile(path) as archive:
        member = max((info for info in archive.infolist() if not info.filename.endswith(".pkl")), key=lambda info: info.file_size)
    content = bytearray(Path(path).read_bytes())
    content[member.header_offset + 200 + member.file_size // 2] ^= 1
    Path(path).write_bytes(content)


def test_corrupt_checkpoint_falls_back_to_previous(capsys: Capture) -> None:
    assert main(RUN) == 0
    whole = recorded("run")
    damage(LAST)
    assert torch.load(LAST, weights_only=True)  # torch does not notice this
    assert main([*RUN, "resume=true"]) == 0
    said = capsys.readouterr().out
    assert re.search(rf"{LAST}: corrupt checkpoint: checksum mismatch in .*; resuming from \S+{PREVIOUS}", said)
    assert "resuming after epoch 2" in said
    assert recorded("run") == whole
    for path in (LAST, PREVIOUS):
        Path(path).write_bytes(Path(path).read_bytes()[:-500])
    before = recorded("run")
    assert main([*RUN, "resume=true"]) == 2
    said = capsys.readouterr().err
    assert LAST in said and PREVIOUS in said and len(said.splitlines()) == 1 and recorded("run") == before


def test_malicious_checkpoint_does_not_execute_code(tmp_path: Path, capsys: Capture) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "evil"),)

    assert main(RUN) == 0
    Path(PREVIOUS).unlink()
    torch.save({"version": checkpoint.VERSION, "config_hash": Evil()}, LAST)
    assert main([*RUN, "resume=true"]) == 2
    assert "not a readable checkpoint" in capsys.readouterr().err and not (tmp_path / "evil").exists()


@pytest.mark.parametrize("moment", ["write", "replace"])
def test_full_disk_keeps_last_checkpoint(moment: str, monkeypatch: Patch, capsys: Capture) -> None:
    assert main([*RUN, "hydra.run.dir=whole"]) == 0
    write, replace = Path.open, os.replace

    def full(*arguments: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def when(path: Any) -> bool:
        return "last.pt" in str(path) and Path(LAST).exists()

    with monkeypatch.context() as patch:
        if moment == "write":
            patch.setattr(Path, "open", lambda self, *how, **more: (full if when(self) else write)(self, *how, **more))
        else:
            patch.setattr(os, "replace", lambda old, new: (full if when(new) else replace)(old, new))
        assert main(RUN) != 0
    said = capsys.readouterr().err
    assert f"{LAST}: cannot be written (No space left on device)" in said and "Traceback" not in said
    assert json.loads(Path("run", RESULT).read_text())["status"] == "failed"
    assert not list(Path("run").rglob("*.tmp"))
    assert main([*RUN, "resume=true"]) == 0
    assert recorded("run") == recorded("whole")


def test_run_directory_is_locked_by_one_process(capsys: Capture) -> None:
    holding = (
        "import sys, time; from pathlib import Path; from fa_bench.runs.locks import lock_directory\n"
        "with lock_directory(Path('run')): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holding],
        cwd=Path.cwd(),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        assert main(RUN) == 2
        said = capsys.readouterr().err
        assert re.search(rf"run: directory is locked by process {other.pid} on \S+ \(since .*\); ", said)
        assert len(said.splitlines()) == 1
        assert sorted(path.name for path in Path("run").iterdir()) == [HOLDER, LOCK]
        other.kill()
    assert main(RUN) == 0 and locks.lock_holder(Path("run")) is None  # a killed process holds no lock
    assert not (Path("run") / LOCK).exists()


SWEEP = ["-m", *COMMON, "algorithm=kp,brsf", "seed=0,1", "output_dir=out"]


def results(folder: str) -> dict[str, Any]:
    return {str(path.parent.relative_to(folder)): recorded(path.parent) for path in sorted(Path(folder).rglob(RESULT))}


def test_repeated_sweep_runs_only_unfinished_jobs(monkeypatch: Patch, capsys: Capture) -> None:
    assert main([*SWEEP, "output_dir=whole"]) == 0
    evaluate, calls = loop.evaluate, []

    def stopping(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 9:  # in the second epoch of the second run, with two evaluations per epoch
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", stopping)
        assert main(SWEEP) == 143
    assert "rerun the same command to resume" in capsys.readouterr().err
    assert main(SWEEP) == 0
    said = capsys.readouterr().out
    assert "of these: 1 finished, 1 unfinished" in said and "[1/4] kp seed 0 is already finished" in said
    assert "[1/4] kp seed 0 epoch" not in said and "resuming after epoch 1" in said and "[2/4] kp seed 1 epoch 3/3" in said
    assert results("out") == results("whole")
    assert main(SWEEP) == 0 and capsys.readouterr().out.count("is already finished") == 4


def test_sweep_retrains_runs_of_different_code_version(monkeypatch: Patch, capsys: Capture) -> None:
    sweep = ["-m", *COMMON, "algorithm=kp", "seed=0,1"]
    assert main(sweep) == 0
    first = results("outputs")
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(hashes, "_package_hash", lambda: "other code")
        assert main(sweep) == 0
    said = capsys.readouterr().out
    assert "of these: 2 from a different version" in said
    assert (said.count("epoch 1/3"), said.count("epoch 3/3")) == (1, 2)  # later runs of a sweep print one line
    assert said.count("was produced by a different version of the code; restarting") == 2
    for name, (result, lines) in results("outputs").items():
        assert lines == first[name][1] and result["code_hash"] != first[name][0]["code_hash"]
    run = next(Path("outputs").rglob(RESULT)).parent
    before = (run / CONFIG).read_bytes()
    assert main([*COMMON, "algorithm=kp", f"hydra.run.dir={run}", f"seed={run.name[4:]}", "resume=true"]) == 2
    assert "produced by a different version of the code" in capsys.readouterr().err and (run / CONFIG).read_bytes() == before


def test_on_error_stop_skips_remaining_jobs(monkeypatch: Patch, capsys: Capture) -> None:
    at_step(2, lambda: (_ for _ in ()).throw(MemoryError("no memory left")), monkeypatch)
    sweep = ["-m", *COMMON, "algorithm=kp,bp", "seed=0,1", "on_error=stop"]
    assert main(sweep) == 1
    said = capsys.readouterr().err
    assert said.count("skipped because another job failed (on_error=stop)") == 3 and "failed: out of memory" in said
    (result,) = Path("outputs").rglob(RESULT)
    assert json.loads(result.read_text())["error"] == {"type": "MemoryError", "message": "no memory left"}
    assert "Traceback" in (result.parent / "run.log").read_text()
    assert main(sweep) == 0 and len(list(Path("outputs").rglob(RESULT))) == 4


HASHES = ("initial_weights_hash", "batches_hash", "weights_hash", "feedback_hash", "optimizer_hash", "data_hash")


def test_results_are_identical_across_processes_and_joblib() -> None:
    command = [*COMMON, "algorithm=brsf", "seed=3"]
    assert main([*command, "hydra.run.dir=one"]) == 0 and main([*command, "hydra.run.dir=again"]) == 0
    ran = subprocess.run(
        [sys.executable, "-m", "fa_bench.cli", *command, "hydra.run.dir=other"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ran.returncode == 0, ran.stderr
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "fa_bench.cli",
            "-m",
            *command,
            "seed=3,4",
            "hydra/launcher=joblib",
            "hydra.launcher.n_jobs=2",
            "output_dir=parallel",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ran.returncode == 0, ran.stderr
    runs = ["one", "again", "other", next(Path("parallel").rglob("seed3"))]
    found = [[recorded(run)[0][key] for key in HASHES] for run in runs]
    assert found[0] == found[1] == found[2] == found[3] and all(found[0])


def test_compared_rules_share_weights_order_and_augmentation(tmp_path: Path, monkeypatch: Patch) -> None:
    write_cifar(tmp_path / "data", monkeypatch)
    assert (
        main(
            [
                "-m",
                "dataset=cifar10",
                "data_dir=data",
                "dataset.validation=0",
                "batch_size=2",
                "epochs=2",
                "probe_size=2",
                "architecture.widths=[8]",
                "algorithm=bp,kp,dfa,wm",
                "seed=0,1",
            ]
        )
        == 0
    )
    found = {path.parent.parent.name + path.parent.name: json.loads(path.read_text()) for path in Path("outputs").rglob(RESULT)}
    for key in ("initial_weights_hash", "batches_hash"):
        assert len({result[key] for result in found.values() if result["seed"] == 0}) == 1
        assert len({result[key] for result in found.values()}) == 2  # one hash for each seed
    assert len({result["weights_hash"] for result in found.values()}) == len(found) == 8


def test_runs_restore_process_state() -> None:
    model = torch.nn.Linear(1, 1)
    torch.manual_seed(7)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    assert main([*RUN, "deterministic=true", f"threads={threads + 1}"]) == 0
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
    seen: list[int] = []
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patch:
        at_step(
            1,
            lambda: (
                torch.nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1)),
                torch.set_default_dtype(torch.float64),
            ),
            patch,
        )
        main([*RUN, "epochs=1"])
    seen.clear()
    model(torch.ones(1, 1))
    assert not seen and torch.get_default_dtype() == torch.float32


def test_nondeterministic_operation_is_reported(monkeypatch: Patch, capsys: Capture) -> None:
    at_step(1, lambda: torch.ones(3).put_(torch.tensor([0]), torch.ones(1)), monkeypatch)
    assert main([*RUN, "deterministic=true"]) == 2
    said = capsys.readouterr().err
    assert "deterministic=true: put_ has no deterministic implementation" in said and "deterministic=false" in said
    assert len(said.splitlines()) == 1


def test_kill_runs_script() -> None:
    rules = ["kp", "wm"]
    command = [sys.executable, str(ROOT / "scripts" / "kill_runs.py"), "--kills", "2", "--seed", "5", "--only", *rules]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.findall(r"^\| (\w+) \| \d+ \| 1 \| .* \| 0 \|$", ran.stdout, re.M) == rules


def test_refused_restart_leaves_runs_of_other_code_unchanged(monkeypatch: Patch, capsys: Capture) -> None:
    sweep = ["-m", *COMMON, "algorithm=kp", "seed=0,1"]
    assert main(sweep) == 0
    first = results("outputs")
    with monkeypatch.context() as patch:
        patch.setattr(hashes, "_package_hash", lambda: "other code")
        for _ in range(2):
            capsys.readouterr()
            assert main([*sweep, "resume=true"]) == 1
            said = capsys.readouterr().err
            assert "was produced by a different version of the code, so resume=true would not" in said
            assert said.count("fa-bench: from a different version of the code, not restarted: outputs") == 2
            assert results("outputs") == first
    assert main([*sweep, "resume=true"]) == 0
    assert capsys.readouterr().out.count("is already finished; nothing to do") == 2 and results("outputs") == first
    with monkeypatch.context() as patch:
        patch.setattr(hashes, "_package_hash", lambda: "other code")
        assert main(sweep) == 0
    assert "was produced by a different version of the code; restarting" in capsys.readouterr().out


def test_run_of_other_code_with_damaged_config_is_not_resumed(monkeypatch: Patch, capsys: Capture) -> None:
    assert main([*COMMON, "algorithm=kp"]) == 0
    (config,) = Path("outputs").rglob("config.yaml")
    config.write_bytes(config.read_bytes() + b"# \xff\n")
    monkeypatch.setattr(hashes, "_package_hash", lambda: "other code")
    assert main([*COMMON, "algorithm=kp", "resume=true"]) == 2
    assert "was produced by a different version of the code, so resume=true" in capsys.readouterr().err


def test_refused_restart_does_not_make_checkpoints_of_other_code_resumable(monkeypatch: Patch, capsys: Capture) -> None:
    sweep = ["-m", *COMMON, "algorithm=kp", "seed=0,1"]
    assert main(sweep) == 0
    for result in Path("outputs").rglob("result.json"):
        result.unlink()
    monkeypatch.setattr(hashes, "_package_hash", lambda: "other code")
    for _ in range(2):
        capsys.readouterr()
        assert main([*sweep, "resume=true"]) == 1
        assert "was produced by a different version of the code, so resume=true would not" in capsys.readouterr().err


def test_result_names_uncovered_weights_as_weight_transport() -> None:
    options = ["algorithm=dfa", "algorithm.cuts=[act2]", "algorithm.allow_uncovered=true", "architecture.widths=[6,5]"]
    assert main([*COMMON, *options]) == 0
    (path,) = Path("outputs").rglob("result.json")
    assert json.loads(path.read_text())["weight_transport"] == ["through 1 uncovered weight (fc1.weight)"]
