"""Distribute the jobs of a sweep over several CUDA devices, so that each worker process of a launcher gets one device."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

_VISIBLE = "CUDA_VISIBLE_DEVICES"
#: The lock on this process's slot, held until the process ends.
_claimed: list[FileLock] = []


@dataclasses.dataclass(frozen=True)
class GpuPool:
    """CUDA devices for the worker processes of a sweep.

    A worker claims the lowest free slot by locking a file; the lock is released when the worker ends, even if it is killed. Slots
    are assigned to the devices in turn. As long as all workers run, the numbers of workers on any two devices differ by at most
    one.

    Attributes:
        devices: the names of the devices, as in CUDA_VISIBLE_DEVICES.
        folder: the folder of the lock files, on this machine.
    """

    devices: Sequence[str]
    folder: Path

    def enter(self) -> None:
        """Make only one device visible to this process, before torch initialises CUDA. The option `device` of the run is not
        changed.

        Nothing is done in processes that multiprocessing did not start, because Slurm and Ray choose devices themselves.
        """
        if not _claimed and multiprocessing.current_process().name != "MainProcess":
            os.environ[_VISIBLE] = self.claim()

    def claim(self) -> str:
        """Claim a device for this process, and return its name."""
        for slot in itertools.count():
            lock = FileLock(self.folder / f"gpu-slot-{slot}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            _claimed.append(lock)
            return self.devices[slot % len(self.devices)]
        raise AssertionError


def visible_devices(count: int, environment: Mapping[str, str]) -> list[str]:
    """The names of the `count` CUDA devices that torch finds. To see only one of these devices, a process sets
    CUDA_VISIBLE_DEVICES to the name of that device."""
    listed = [name.strip() for name in environment.get(_VISIBLE, "").split(",")]
    return listed[:count] if len(listed) >= count and listed[0] else [str(index) for index in range(count)]


def shares_devices(requested: Collection[str]) -> bool:
    """Whether jobs with these values of `device` can be distributed over the CUDA devices, which requires that every value is
    auto, cuda or cpu, and that at least one is not cpu."""
    return bool({"auto", "cuda"}.intersection(requested)) and set(requested) <= {"auto", "cuda", "cpu"}


def jobs_at_a_time(jobs: int | None, devices: int, jobs_per_gpu: int) -> tuple[int | None, str]:
    """The number of jobs to request from the launcher, and a line of text about it; the line is empty if there is nothing to
    report.

    Args:
        jobs: the number of jobs at a time in the config (`hydra.launcher.n_jobs`); -1 for the launcher's default, None for a
            launcher without that option.
        devices: the number of CUDA devices.
        jobs_per_gpu: the number of jobs that run at a time on each device by default.
    """
    if not devices or jobs is None or jobs == 1:
        return jobs, ""
    if jobs != -1:
        return jobs, f"  each job gets one of {devices} CUDA devices" if devices > 1 else ""
    jobs = devices * jobs_per_gpu
    return jobs, f"  {jobs_per_gpu} at a time on each CUDA device (jobs_per_gpu), {jobs} in all"
