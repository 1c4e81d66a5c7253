"""Tests of sweeps on several CUDA devices. No such device is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from fa_bench.cli import main
from fa_bench.command.gpus import jobs_at_a_time, shares_devices, visible_devices

SMALL = [
    "dataset=synthetic",
    "dataset.samples=32",
    "dataset.test_samples=16",
    "architecture.widths=[4]",
    "epochs=1",
    "threads=1",
    "loggers=[]",
    "probe_every=0",
]
#: The source of a callback that writes down the CUDA devices that are visible to its run, and waits until the other run has done
#: the same.
PLUGIN = """
import os, time
from pathlib import Path
import fa_bench

@fa_bench.register_callback("note_device")
class NoteDevice(fa_bench.Callback):
    \"\"\"Writes the device.\"\"\"

    def on_fit_start(self, trainer):
        Path(f"device-{trainer.options.seed}").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
        for _ in range(500):
            if len(list(Path().glob("device-*"))) == 2:
                return
            time.sleep(0.02)
"""
CLAIM = """
import sys
from pathlib import Path
from fa_bench.command.gpus import GpuPool

print(GpuPool(["a", "b"], Path(sys.argv[1])).claim(), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("count", "visible", "expected"),
    [(2, None, ["0", "1"]), (2, "3,5", ["3", "5"]), (1, "GPU-a, GPU-b", ["GPU-a"]), (2, "", ["0", "1"]), (0, "", [])],
)
def test_visible_devices_match_cuda_visible_devices(count: int, visible: str | None, expected: list[str]) -> None:
    assert visible_devices(count, {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == expected


@pytest.mark.parametrize(
    ("requested", "shared"),
    [({"auto"}, True), ({"cuda", "cpu"}, True), ({"cpu"}, False), ({"auto", "cuda:1"}, False), ({"mps"}, False)],
)
def test_devices_are_shared_unless_numbered(requested: set[str], shared: bool) -> None:
    assert shares_devices(requested) is shared


@pytest.mark.parametrize(
    ("asked", "devices", "per_gpu", "jobs", "note"),
    [
        (-1, 0, 2, -1, ""),
        (None, 4, 2, None, ""),
        (1, 4, 2, 1, ""),
        (3, 1, 2, 3, ""),
        (-1, 4, 2, 8, "  2 at a time on each CUDA device (jobs_per_gpu), 8 in all"),
        (-1, 1, 1, 1, "  1 at a time on each CUDA device (jobs_per_gpu), 1 in all"),
        (3, 4, 2, 3, "  each job gets one of 4 CUDA devices"),
    ],
)
def test_jobs_at_a_time(asked: int | None, devices: int, per_gpu: int, jobs: int | None, note: str) -> None:
    assert jobs_at_a_time(asked, devices, per_gpu) == (jobs, note)


def test_processes_alternate_between_devices_and_release_them(tmp_path: Path) -> None:
    def start() -> tuple[subprocess.Popen[str], str]:
        process = subprocess.Popen(
            [sys.executable, "-c", CLAIM, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        return process, process.stdout.readline().strip()

    started = [start() for _ in range(3)]
    try:
        assert [device for _, device in started] == ["a", "b", "a"]
        started[1][0].kill()
        started[1][0].wait()
        started.append(start())
        assert started[-1][1] == "b"
    finally:
        for process, _ in started:
            process.kill()
            process.communicate()


def test_each_job_sees_one_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The config of a run does not contain the device that was assigned to the run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    Path("noting.py").write_text(PLUGIN)
    assert main(["-m", "seed=0,1", *SMALL, "plugins=[noting]", "callbacks=[note_device]", "hydra/launcher=joblib"]) == 0
    assert sorted(Path(f"device-{seed}").read_text() for seed in (0, 1)) == ["0", "1"]
    assert "\n  1 at a time on each CUDA device (jobs_per_gpu), 2 in all\n" in capsys.readouterr().out
    assert {yaml.safe_load(path.read_text())["device"] for path in tmp_path.rglob("config.yaml")} == {"auto"}
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
