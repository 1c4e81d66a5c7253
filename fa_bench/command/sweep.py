"""Run a sweep: check every job, pass all jobs to the launcher at once, and write a report."""

from __future__ import annotations

import dataclasses
import os
import platform
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from hydra.core.plugins import Plugins
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from fa_bench.command.compose import Composer, folder_of
from fa_bench.command.fit import check_fit
from fa_bench.command.gpus import GpuPool, jobs_at_a_time, shares_devices, visible_devices
from fa_bench.command.hydra_sections import errors_named
from fa_bench.command.jobs import Task, job_name, report_interrupt
from fa_bench.config.job import Job
from fa_bench.config.labels import differing_keys, flatten, sweep_summary, swept_keys
from fa_bench.config.scale import scaled
from fa_bench.errors import first_line, printable
from fa_bench.report.files import check_folder
from fa_bench.report.mean_curves import check_mean_curves, write_mean_curves
from fa_bench.runs.checked_json import RecordError
from fa_bench.runs.locks import lock_holder
from fa_bench.runs.logs import preserve_root_logger
from fa_bench.runs.rundir import RunDirectory, RunState
from fa_bench.runs.schemas import SUCCESSES
from fa_bench.runs.sweep import PlannedRun, find_planned_runs, write_sweep
from fa_bench.utils.process import cores
from fa_bench.utils.stopping import interrupt_on_signals

#: Seconds to wait for jobs in other processes to write their checkpoints after a signal.
SHUTDOWN_SECONDS = 10.0
Jobs = Sequence[tuple[Job, Path]]


def sweep(context: HydraContext, task: Any, config: DictConfig, arguments: list[str]) -> int:
    """Expand, check and run a sweep, and write its report.

    Args:
        context: Hydra's context, with the config loader.
        task: the function that runs a job, a `Task`.
        config: the config of the sweep, composed from the overrides with a single value.
        arguments: the overrides, without those of Hydra's own options.

    Returns:
        0 if every run finished or was stopped by a callback, else 1; after a signal, 128 plus the number of the signal.

    Raises:
        FaBenchError: before the first job starts, if one of the jobs cannot be run.
    """
    hydra_overrides: Any = OmegaConf.to_container(config.hydra.overrides.hydra, resolve=False)
    composer = Composer(config.hydra.job.config_name, None, [*hydra_overrides, *arguments], context.config_loader)
    overrides = composer.expand(multirun=True, config=config)
    jobs = composer.check(overrides)
    check_fit(job for job, _ in jobs)
    folders = _folders(jobs)
    for folder in folders:
        check_folder(folder)
        check_mean_curves(folder)
    assert composer.config is not None
    folder_of(config, "hydra.sweep.dir")  # a launcher may write its own files there before the first job
    # ${now:...} must resolve to the same time in the config of the sweep as in those of the jobs.
    OmegaConf.copy_cache(from_config=composer.config, to_config=config)
    config.hydra.sweep.dir = composer.config.hydra.sweep.dir
    configs: dict[str, list[dict[str, Any]]] = {}
    for job, _ in jobs:
        configs.setdefault(job.algorithm.name, []).append(flatten(job.plain()))
    keys = {rule: differing_keys(of_rule) for rule, of_rule in configs.items()}
    swept = swept_keys(config for of_rule in configs.values() for config in of_rule)
    epochs = [scaled(job).run.epochs for job, _ in jobs]
    with tempfile.TemporaryDirectory() as scratch:
        assert isinstance(task, Task)
        task.directories.extend(run_dir for _, run_dir in jobs)
        n_jobs, count = OmegaConf.select(config, "hydra.launcher.n_jobs"), 0
        if n_jobs is not None and shares_devices({job.run.device for job, _ in jobs}):
            count = torch.cuda.device_count()
        n_jobs, gpu_note = jobs_at_a_time(n_jobs, count, min(job.run.jobs_per_gpu for job, _ in jobs))
        if n_jobs is not None:
            config.hydra.launcher.n_jobs = n_jobs
        task = dataclasses.replace(
            task,
            epochs=epochs,
            keys=keys,
            swept=swept,
            threads=torch.get_num_threads(),
            parent_pid=os.getpid(),
            failure_marker=Path(scratch, "failed"),
            gpus=GpuPool(visible_devices(count, os.environ), Path(scratch)) if count else None,
        )
        with errors_named(config, "launcher"):
            launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=config)
        print(f"Running {sweep_summary([job for job, _ in jobs], *folders)}{_earlier_runs(jobs)}", flush=True)
        planned = {
            run_dir: PlannedRun(run_dir, job_name(job, keys), count) for (job, run_dir), count in zip(jobs, epochs, strict=True)
        }
        threads = {job.run.threads or torch.get_num_threads() for job, _ in jobs}
        for note in (gpu_note, oversubscribed(n_jobs, max(threads), cores())):
            if note:
                print(note, flush=True)
        for folder, members in folders.items():
            write_sweep(folder, task.command, [planned[run_dir] for run_dir in members])
        try:
            with interrupt_on_signals(lambda number: _stop_jobs(run_dir for _, run_dir in jobs)), preserve_root_logger():
                for returned in launcher.launch(overrides, initial_job_idx=0):
                    _ = returned.return_value  # raises the job's error
        except KeyboardInterrupt as error:
            return report_interrupt(jobs, error)
        except Exception as error:
            if "UncompletedJobError" not in [cls.__name__ for cls in type(error).__mro__]:
                raise
            print(
                printable(
                    f"fa-bench: submitit lost a job ({first_line(error)}). Others may still run; when they have ended, "
                    "rerun the same command to resume"
                ),
                file=sys.stderr,
            )
        # joblib would keep its processes for later sweeps, which may have a different working directory.
        if (loky := sys.modules.get("joblib.externals.loky")) is not None:
            loky.get_reusable_executor(reuse=True).shutdown(wait=True)
    stale = {run_dir for job, run_dir in jobs if RunDirectory(run_dir, job).is_stale}
    return max(_write_report(members, folder, stale) for folder, members in folders.items())


def oversubscribed(jobs: int | None, threads: int, available: int) -> str:
    """A warning if a launcher's jobs compete for CPU cores; empty if they do not.

    The number of threads is not reduced, because it changes rounding, and results must not depend on the launcher.

    Args:
        jobs: the number of jobs that run at a time, `hydra.launcher.n_jobs`; -1 for one per core, None for one.
        threads: the number of threads of each job.
        available: cores that this process may use.
    """
    jobs = available if jobs == -1 else jobs or 1
    if jobs == 1 or jobs * threads <= available:
        return ""
    return (
        f"  {jobs} jobs at a time with {threads} threads each share {available} cores; threads={max(available // jobs, 1)} "
        "is faster"
    )


def _earlier_runs(jobs: Jobs) -> str:
    """A line that counts the runs left by an earlier start of the sweep, by state; empty if there are none."""
    counts = Counter(RunDirectory(run_dir, job).state for job, run_dir in jobs if job.run.resume is not False)
    states = [state for state in (RunState.FINISHED, RunState.UNFINISHED, RunState.STALE) if counts[state]]
    return f"\n  of these: {', '.join(f'{counts[state]} {state.value}' for state in states)}" if states else ""


def _stop_jobs(run_dirs: Iterable[Path]) -> None:
    """Ask jobs in other processes on this machine to write their checkpoints, and wait for these processes to end."""
    run_dirs, deadline = list(run_dirs), time.monotonic() + SHUTDOWN_SECONDS
    asked: set[int] = set()
    while time.monotonic() < deadline:
        owners = [owner for owner in map(lock_holder, run_dirs) if owner and owner.get("host") == platform.node()]
        pids = {int(owner["pid"]) for owner in owners if owner.get("pid") not in (None, os.getpid())}
        if not pids:
            return
        for pid in pids - asked:
            with suppress(OSError):
                os.kill(pid, signal.SIGTERM)
        asked |= pids
        time.sleep(0.1)


def _write_report(run_dirs: list[Path], folder: Path, stale: Collection[Path]) -> int:
    """Report on all runs in the folder, print the table of the sweep's own runs, and return the exit code.

    Jobs that could not restart the runs of a different version of the code, `stale`, count as failed.
    """
    from fa_bench.report import write_report
    from fa_bench.report.runs import find_runs

    unusable: list[RecordError] = []
    planned = find_planned_runs([folder], unusable)
    report = write_report([*run_dirs, *find_runs([folder])], folder, planned, unusable=unusable, shown=run_dirs)
    print(f"\n{report.text}\n\nreport: {printable(report.markdown)}\ncurves: {printable(report.figure)}")
    for line in write_mean_curves([*run_dirs, *find_runs([folder])], folder):
        print(printable(line))
    failed = {run_dir: status for run_dir in run_dirs if (status := _status(run_dir)) not in SUCCESSES}
    failed |= {run_dir: f"{RunState.STALE.value}, not restarted" for run_dir in run_dirs if run_dir in stale}
    for run_dir, status in failed.items():
        print(printable(f"fa-bench: {status}: {run_dir}"), file=sys.stderr)
    return 1 if failed else 0


def _status(run_dir: Path) -> str:
    from fa_bench.report.runs import read_run

    try:
        run = read_run(run_dir)
    except RecordError:  # the report explains it
        return "damaged record"
    return run.result["status"] if run else "no result"


def _folders(jobs: Jobs) -> dict[Path, list[Path]]:
    """The folders for sweep.json and the report, and the run directories that belong to each.

    There is one folder for each `output_dir`, so nothing is written outside the folders that the user has chosen. In the default
    layout, the report goes to the folder of the experiment, or of the dataset and architecture if there is no experiment. If the
    sweep spans several of these folders, the report goes to `output_dir` itself. In any other layout, the report goes to the
    lowest folder that contains all run directories.
    """
    by_output: dict[str, list[tuple[Job, Path]]] = {}
    for job, run_dir in jobs:
        by_output.setdefault(job.run.output_dir, []).append((job, run_dir))
    folders: dict[Path, list[Path]] = {}
    for output_dir, members in by_output.items():
        run_dirs = [run_dir for _, run_dir in members]
        collections = {run_dir.parent.parent for run_dir in run_dirs}
        if all(_is_standard(job, run_dir) for job, run_dir in members):
            folder = next(iter(collections)) if len(collections) == 1 else Path(output_dir)
        else:
            folder = run_dirs[0].parent if len(run_dirs) == 1 else Path(os.path.commonpath(run_dirs))
        folders.setdefault(folder, []).extend(run_dirs)
    return folders


def _is_standard(job: Job, run_dir: Path) -> bool:
    """Whether the directory has the layout of the default config, which is `output_dir`/collection/group/seed."""
    return (
        (run_dir.name, run_dir.parent.name) == (f"seed{job.run.seed}", job.group)
        and len(run_dir.parents) > 2
        and (Path(os.path.abspath(run_dir.parents[2])) == Path(os.path.abspath(job.run.output_dir)))
    )
