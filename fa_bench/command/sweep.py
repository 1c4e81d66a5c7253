"""A sweep: every job checked, all jobs given to the launcher at once, and a report on what they gave."""

from __future__ import annotations

import dataclasses
import os
import platform
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from fa_bench.command.compose import Composer, folder_of
from fa_bench.command.fit import check_fit
from fa_bench.command.jobs import Task, interrupted, job_name
from fa_bench.command.rehearsal import making
from fa_bench.config.job import Job
from fa_bench.config.labels import differing_keys, flatten, sweep_summary
from fa_bench.config.scale import scaled
from fa_bench.errors import printable
from fa_bench.report.files import check_folder
from fa_bench.runs.locks import lock_holder
from fa_bench.runs.logs import preserve_root_logger
from fa_bench.runs.rundir import RunDirectory, RunState
from fa_bench.runs.sweep import PlannedRun, write_sweep
from fa_bench.utils.stopping import interrupt_on_signals

#: Seconds that jobs in other processes are given to write their checkpoints.
FAREWELL = 10.0
Jobs = Sequence[tuple[Job, Path]]


def sweep(context: HydraContext, task: Any, config: DictConfig, arguments: list[str]) -> int:
    """Expand, check and run a sweep, and report on it.

    Args:
        context: Hydra's, with what composes configs.
        task: what each job calls, a `Task`.
        config: the sweep's, composed of the overrides with one value.
        arguments: the overrides but Hydra's own.

    Returns:
        0 where every run finished; 1 where one did not; 130 or more after a signal.

    Raises:
        FaBenchError: before the first job starts, for one that cannot be run.
    """
    hydras: Any = OmegaConf.to_container(config.hydra.overrides.hydra, resolve=False)
    composer = Composer(config.hydra.job.config_name, None, [*hydras, *arguments], context.config_loader)
    overrides = composer.expand(multirun=True, config=config)
    jobs = composer.check(overrides)
    check_fit(job for job, _ in jobs)
    folders = _folders(jobs)
    for folder in folders:
        check_folder(folder)
    folder_of(config, "hydra.sweep.dir")  # a launcher's own files lie there, before there is a job
    # All jobs have the times that were checked.
    assert composer.config is not None
    OmegaConf.copy_cache(from_config=composer.config, to_config=config)
    config.hydra.sweep.dir = composer.config.hydra.sweep.dir
    keys = _differing(jobs)
    epochs = [scaled(job).run.epochs for job, _ in jobs]
    with tempfile.TemporaryDirectory() as scratch:
        assert isinstance(task, Task)
        task.directories.extend(place for _, place in jobs)
        task = dataclasses.replace(task, epochs=epochs, keys=keys, threads=_threads(), starter=os.getpid(),
                                   failed=Path(scratch, "failed"))
        with making(config, "launcher"):
            launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=config)
        print(sweep_summary([job for job, _ in jobs], *folders) + _found(jobs), flush=True)
        for folder, members in folders.items():
            write_sweep(folder, task.command, [PlannedRun(place, job_name(job, keys), count)
                                               for (job, place), count in zip(jobs, epochs, strict=True) if place in members])
        try:
            with interrupt_on_signals(lambda number: _dismiss([place for _, place in jobs])), preserve_root_logger():
                for returned in launcher.launch(overrides, initial_job_idx=0):
                    _ = returned.return_value  # raises what a job raised
        except KeyboardInterrupt as error:
            return interrupted(jobs, error)
        _end_workers()
    return max(_report(members, folder) for folder, members in folders.items())


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _end_workers() -> None:
    """End the processes that joblib keeps for later: they would run the next sweep in this one's working directory."""
    if (loky := sys.modules.get("joblib.externals.loky")) is not None:
        loky.get_reusable_executor(reuse=True).shutdown(wait=True)


def _found(jobs: Jobs) -> str:
    """A line on what an earlier start of the sweep left, or nothing."""
    counts = Counter(RunDirectory(place, job).state for job, place in jobs if job.run.resume is not False)
    states = (RunState.FINISHED, RunState.UNFINISHED, RunState.STALE)
    found = [f"{counts[state]} {state.value}" for state in states if counts[state]]
    return f"\n  of these: {', '.join(found)}" if found else ""


def _dismiss(places: Sequence[Path]) -> None:
    """Ask jobs in other processes of this machine to write their checkpoints, and wait for them."""
    until = time.monotonic() + FAREWELL
    asked: set[int] = set()
    while time.monotonic() < until:
        holders = [about for about in map(lock_holder, places) if about and about.get("host") == platform.node()]
        others = {int(about["pid"]) for about in holders if about.get("pid") not in (None, os.getpid())}
        if not others:
            return
        for pid in others - asked:
            with suppress(OSError):
                os.kill(pid, signal.SIGTERM)
        asked |= others
        time.sleep(0.1)


def _differing(jobs: Jobs) -> dict[str, list[str]]:
    """Rule -> the keys in which its jobs differ."""
    configs: dict[str, list[dict[str, Any]]] = {}
    for job, _ in jobs:
        configs.setdefault(job.algorithm.name, []).append(flatten(job.plain()))
    return {rule: differing_keys(found) for rule, found in configs.items()}


def _report(places: list[Path], folder: Path) -> int:
    from fa_bench.report import write_report

    written = write_report(places, folder)
    print(f"\n{written.text}\n\nreport: {printable(written.markdown)}\ncurves: {printable(written.figure)}")
    bad = {place: status for place in places if (status := _status(place)) != "finished"}
    for place, status in bad.items():
        print(printable(f"fa-bench: {status}: {place}"), file=sys.stderr)
    return 1 if bad else 0


def _status(place: Path) -> str:
    """How the run in a directory ended, in a word."""
    from fa_bench.report.runs import read_run
    from fa_bench.runs.readers import RecordError

    try:
        found = read_run(place)
    except RecordError:  # the report says what is wrong with it
        return "damaged record"
    return found.result["status"] if found else "no result"


def _folders(jobs: Jobs) -> dict[Path, list[Path]]:
    """Where the list of a sweep's runs and the report on them go: folder -> the directories of its runs.

    One folder for each `output_dir`, so that nothing is written beside those that somebody has chosen.
    """
    by_output: dict[str, list[Path]] = {}
    for job, place in jobs:
        by_output.setdefault(job.run.output_dir, []).append(place)
    folders: dict[Path, list[Path]] = {}
    for places in by_output.values():
        common = Path(os.path.commonpath(places))
        folders.setdefault(common.parent if len(places) == 1 else common, []).extend(places)
    return folders
