"""Tests of locks and of the processes that runs start: no process outlives its use or keeps the lock of another process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fa_bench.cli import main
from fa_bench.runs import locks, parent
from fa_bench.runs.locks import lock_holder
from fa_bench.runs.ownership import HOLDER, LOCK
from fa_bench.utils import locks as utils_locks
from fa_bench.utils.files import METRICS, RESULT
from fa_bench.utils.stopping import Interrupted, interrupt_on_signals

Patch = pytest.MonkeyPatch
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
COMMON = [
    "dataset=synthetic",
    "dataset.samples=64",
    "dataset.test_samples=16",
    "batch_size=16",
    "probe_size=8",
    "architecture.widths=[8]",
]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)


@contextmanager
def started(*command: str) -> Iterator[subprocess.Popen[str]]:
    """Start a Python command in a separate process, which is killed at the end."""
    with subprocess.Popen([sys.executable, *command], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def until(found: Callable[[], Any], seconds: float = 60) -> Any:
    """Wait until `found` returns a true value, and return this value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.02)
    raise AssertionError("timed out")


def test_forked_child_does_not_keep_lock() -> None:
    """Workers of a data loader, for example, outlive a killed run by seconds and must not keep its lock."""
    holding = (
        "import os, time; from pathlib import Path; from fa_bench.runs import locks\n"
        "with locks.lock_directory(Path('run')):\n"
        "    if not os.fork():\n"
        "        print(os.getpid(), flush=True)\n"  # by then, the inherited files are closed
        "    time.sleep(60)"
    )
    with started("-c", holding) as process:
        assert process.stdout
        child = int(process.stdout.readline())
        try:
            assert (lock_holder(Path("run")) or {})["pid"] == process.pid
            process.kill()
            process.wait()
            os.kill(child, 0)  # it is alive
            assert lock_holder(Path("run")) is None
            with locks.lock_directory(Path("run")):
                assert (lock_holder(Path("run")) or {})["pid"] == os.getpid()
        finally:
            os.kill(child, signal.SIGKILL)
    assert not list(Path("run").iterdir())


def test_lock_holder_does_not_follow_links() -> None:
    Path("run").mkdir()
    Path("theirs").write_text("theirs")
    Path("run", LOCK).symlink_to(Path("theirs").absolute())
    assert lock_holder(Path("run")) is None and Path("theirs").read_text() == "theirs"


def test_lock_is_retried_while_holder_exits(monkeypatch: Patch) -> None:
    holding = (
        "import sys; from pathlib import Path; from fa_bench.runs import locks\n"
        "with locks.lock_directory(Path('run')): print('held', flush=True); sys.stdin.readline()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holding], env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout and other.stdin and other.stdout.readline() == "held\n"
        monkeypatch.setattr(utils_locks, "PATIENCE", 60.0)
        other.stdin.write("\n")
        other.stdin.flush()
        with locks.lock_directory(Path("run")):
            assert json.loads(Path("run", HOLDER).read_text())["pid"] == os.getpid()


def test_sweep_workers_exit_when_parent_is_killed() -> None:
    command = [
        "-m",
        "fa_bench.cli",
        "-m",
        *COMMON,
        "epochs=100000",
        "seed=0,1",
        "output_dir=out",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
    ]
    with started(*command) as process:
        places = until(lambda: found if len(found := [p.parent for p in Path("out").rglob(METRICS)]) == 2 else None, 120)
        pids = [(lock_holder(place) or {})["pid"] for place in places]
        assert process.pid not in pids
        process.kill()
        process.wait()
    until(lambda: not any(lock_holder(place) for place in places), 20)
    for pid in pids:
        until(lambda pid=pid: not alive(pid), 20)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and forks")
def test_data_worker_exits_if_parent_is_killed_during_startup() -> None:
    # The parent is killed after the fork but before torch's watchdog in the worker looks up its parent process, which is a
    # different one by then.
    code = """
import os, signal, time
from pathlib import Path
import numpy, torch
from torch.utils.data._utils import worker
from fa_bench.data.crops import PaddedCrop
from fa_bench.data.image_files import StreamedSplit
class Late(worker.ManagerWatchdog):
    def __init__(self):
        parent = os.getppid()
        Path("worker.tmp").write_text(str(os.getpid()))
        os.rename("worker.tmp", "worker")
        while os.getppid() == parent:
            time.sleep(0.01)
        super().__init__()
worker.ManagerWatchdog = Late
decode, cpu = lambda path, rng: numpy.zeros((1, 2, 2), numpy.uint8), torch.device("cpu")
split = StreamedSplit([Path("a")], torch.zeros(1, dtype=torch.int64), decode, 1, [0.0], [1.0], False, cpu, PaddedCrop())
next(split.gather(iter([torch.tensor([0])]), None))
"""
    with started("-c", code) as process:
        pid = int(until(lambda: Path("worker").exists() and Path("worker").read_text(), 60))
        process.kill()
        process.wait()
    try:
        until(lambda: not alive(pid), 20)
    finally:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("starter", ["this", "another"])
def test_only_processes_that_multiprocessing_started_are_watched(starter: str) -> None:
    threads: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parent.threading, "Thread", lambda **options: threads.append(options))
        parent.exit_with_parent(os.getpid() if starter == "this" else os.getppid())
    assert not threads


def test_process_exits_if_parent_ended_before_watching() -> None:
    code = (
        "import multiprocessing; from fa_bench.runs import parent\n"
        "multiprocessing.current_process().name = 'Worker'; parent.end_with(1 << 30); print('lives on')"
    )
    ran = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (1, ""), ran.stderr


def test_sighup_interrupts_unless_ignored() -> None:
    with pytest.raises(Interrupted) as caught, interrupt_on_signals():
        signal.raise_signal(signal.SIGHUP)
    assert caught.value.code == 129
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupt_on_signals():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_run_does_not_require_posix_modules() -> None:
    """Every module is imported and a run is trained in a process where fa_bench and filelock cannot import fcntl and resource."""
    code = """
import builtins, importlib, pkgutil, sys
ask = builtins.__import__
def refusing(name, globals=None, *arguments, **named):
    if name in ("fcntl", "resource") and (globals or {}).get("__name__", "").split(".")[0] in ("fa_bench", "filelock"):
        raise ModuleNotFoundError(name)
    return ask(name, globals, *arguments, **named)
builtins.__import__ = refusing
import fa_bench
for module in pkgutil.walk_packages(fa_bench.__path__, "fa_bench."):
    if "__main__" not in module.name:
        importlib.import_module(module.name)
from fa_bench.cli import main
sys.exit(main(sys.argv[1:]))
"""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *COMMON, "epochs=1", "hydra.run.dir=run"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(Path("run", RESULT).read_text())["peak_memory_bytes"] is None
    assert main([*COMMON, "epochs=1", "hydra.run.dir=run"]) == 0
