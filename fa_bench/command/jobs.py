"""The task that Hydra runs for each job, in this process or in that of a launcher."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from omegaconf import DictConfig

from fa_bench.command.gpus import GpuPool
from fa_bench.config.job import Job, register_schemas
from fa_bench.config.labels import flatten, label
from fa_bench.errors import DirectoryLockedError, FaBenchError, first_line, printable
from fa_bench.runs import parallel
from fa_bench.runs.parent import exit_with_parent
from fa_bench.runs.rundir import RunDirectory
from fa_bench.utils.files import LOG
from fa_bench.utils.output import resilient_output
from fa_bench.utils.stopping import Interrupted, interrupt_on_signals, requeue_handler


@dataclasses.dataclass
class Task:
    """The function that Hydra calls with a job's config; a launcher pickles it for jobs in other processes.

    Attributes:
        command: the command line, for the record of a sweep.
        epochs: the number of epochs of each job of the sweep; empty for a single run.
        keys: the keys in which the jobs of each rule differ, by rule.
        swept: the keys in which the jobs of the sweep differ, each mapped to whether its values are numbers.
        threads: CPU threads of the process that started the sweep; their number changes rounding.
        parent_pid: the pid of that process.
        failure_marker: a file that exists once a job with on_error=stop has failed.
        gpus: CUDA devices that worker processes share; None if each process uses the devices that it sees.
        directories: the run directories of the checked jobs.
        errors: a list that collects the FaBenchErrors of a run within a user's program; if None, they are printed.
        owns_process: whether this process belongs to the command or a launcher, and not to a user's program.
    """

    command: Sequence[str]
    epochs: Sequence[int] = ()
    keys: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    swept: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    threads: int = 0
    parent_pid: int = 0
    failure_marker: Path | None = None
    gpus: GpuPool | None = None
    directories: list[Path] = dataclasses.field(default_factory=list)
    errors: list[FaBenchError] | None = None
    owns_process: bool = False

    def __call__(self, config: DictConfig) -> int:
        """Run one job. In a sweep, an error in one job does not prevent the others from running, unless on_error=stop is set.

        Returns:
            0 if the run finished, diverged or was stopped by a callback; 1 if it failed or was skipped; 2 after a FaBenchError;
            after a signal, the result of `_stopped`.
        """
        if self.epochs and os.getpid() != self.parent_pid:
            self._set_up_worker()
            self.owns_process = True
        from hydra.core.hydra_config import HydraConfig

        from fa_bench.runs.logs import console_log
        from fa_bench.runs.train import run
        from fa_bench.utils.memory_limits import describe_failure
        from fa_bench.utils.process import freeze_before_second_job

        if self.owns_process:
            freeze_before_second_job()

        settings = HydraConfig.get()
        directory = Path(settings.runtime.output_dir)
        job = Job.from_config(config)
        experiment = settings.runtime.choices.get("experiment")
        number = settings.job.num if self.epochs else 0
        prefix = f"[{number + 1}/{len(self.epochs)}] " if self.epochs else ""
        title = f"{prefix}{job_name(job, self.keys)}"
        marker = self.failure_marker if job.run.on_error == "stop" else None
        if marker and marker.exists():
            print(f"fa-bench: {title} skipped because another job failed (on_error=stop)", file=sys.stderr)
            return 1
        try:
            with resilient_output(), console_log(), interrupt_on_signals():
                run(
                    job,
                    directory,
                    title=title,
                    experiment=experiment,
                    later_epochs=sum(self.epochs[number + 1 :]),
                    swept=self.swept,
                    brief=number > 0,
                )
            return 0
        except KeyboardInterrupt as error:
            return self._stopped(error, prefix)
        except parallel.ProcessLost as error:
            parallel.current().report(f"fa-bench: {printable(error)}. {resume_hint([(job, directory)])}")
            return 1
        except BaseException as error:  # a plugin may raise anything, even SystemExit; only its job ends
            is_known = isinstance(error, FaBenchError)
            if isinstance(error, FaBenchError) and self.errors is not None:
                self.errors.append(error)
                return 2
            # The error is recorded in the run's directory, unless another process writes there or a single run raised a
            # FaBenchError.
            unrecorded = isinstance(error, DirectoryLockedError) or (is_known and not self.epochs) or parallel.current().rank > 0
            logged = unrecorded or _record(job, directory, error, experiment)
            where = f"traceback: {directory / LOG}" if logged else f"in {directory}, where no log can be written"
            message = error if is_known else f"failed: {describe_failure(error)} ({where})"
        parallel.current().report(printable(f"fa-bench: {prefix}{message}"))
        if marker:
            marker.touch()
        return 2 if is_known else 1

    def _stopped(self, error: KeyboardInterrupt, prefix: str) -> int:
        """End a job after a signal has stopped its run. Raises `error` unless a launcher can handle the signal.

        submitit requeues the job after the signal that Slurm sends before the job's time limit. After SIGTERM, Slurm itself may
        requeue the job, so the job must not return a result. Jobs of submitit_local are never requeued, so they return an exit
        code.
        """
        requeue = requeue_handler(error.number) if isinstance(error, Interrupted) else None
        if requeue is not None and isinstance(error, Interrupted):
            try:
                requeue(error.number, None)  # exits
            except Exception as refused:  # requeued too many times
                print(printable(f"fa-bench: {prefix}{first_line(refused)}"), file=sys.stderr)
                return 1
        if os.environ.get("SUBMITIT_EXECUTOR") == "local" and os.getpid() != self.parent_pid:
            return exit_code_of(error)
        raise error

    def _set_up_worker(self) -> None:
        """Give a launcher's process the same settings as the process that started the sweep."""
        import torch

        from fa_bench.utils.process import cores

        exit_with_parent(self.parent_pid)
        if self.gpus is not None:
            self.gpus.enter()
        register_schemas()
        torch.set_num_threads(min(self.threads, cores()))


def job_name(job: Job, keys: Mapping[str, Sequence[str]]) -> str:
    """The display name of a job, which consists of its rule, the values in which the rule's jobs differ, and its seed."""
    return f"{label(job.algorithm.name, flatten(job.plain()), keys.get(job.algorithm.name, ()))} seed {job.run.seed}"


def report_interrupt(jobs: Sequence[tuple[Job, Path]], error: KeyboardInterrupt) -> int:
    """Print a message that says how to resume interrupted jobs, and return the exit code."""
    world = parallel.current()
    if not (world.rank and world.stops_together):  # otherwise process 0 saves the checkpoint and prints the message
        # torchrun also sends SIGTERM to the processes that remain after one has ended.
        world.report(f"fa-bench: {parallel.ProcessLost() if world.has_lost else 'Interrupted'}. {resume_hint(jobs)}")
    return exit_code_of(error)


def resume_hint(jobs: Sequence[tuple[Job, Path]]) -> str:
    """A message that says how to resume interrupted jobs."""
    saved = any(RunDirectory(run_dir, job).checkpoint.exists() for job, run_dir in jobs)
    without = " without resume=false" if any(job.run.resume is False for job, _ in jobs) else ""
    return f"Checkpoint saved; rerun the same command{without} to resume" if saved else "No checkpoint was saved yet"


def exit_code_of(error: KeyboardInterrupt) -> int:
    """The exit code of a process that was stopped by a signal, by the convention of shells: 130 after SIGINT, 143 after
    SIGTERM."""
    return error.code if isinstance(error, Interrupted) else 130


def _record(job: Job, directory: Path, error: BaseException, experiment: str | None) -> bool:
    """Record a failure, and return whether that succeeded. If the record cannot be written, for example because the disk is full,
    the other jobs continue."""
    from fa_bench.runs.outcome import record_failure

    try:
        record_failure(job, directory, error, experiment)
    except OSError:
        return False
    return True
