"""One job as Hydra's launchers call it, in this process or in another."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from omegaconf import DictConfig

from fa_bench.config.job import Job, register_schemas
from fa_bench.config.labels import flatten, label
from fa_bench.errors import DirectoryLockedError, FaBenchError, printable
from fa_bench.runs.parent import exit_with_parent
from fa_bench.runs.rundir import RunDirectory
from fa_bench.utils.files import LOG
from fa_bench.utils.output import resilient_output
from fa_bench.utils.stopping import Interrupted, interrupt_on_signals


@dataclasses.dataclass
class Task:
    """What Hydra calls with a job's config; a launcher pickles it for jobs in other processes.

    Attributes:
        command: the command line, for the record of a sweep.
        epochs: those of every job of the sweep; empty for a single run.
        keys: rule -> the keys in which its jobs differ.
        threads: CPU threads of the process that started the sweep, on which the rounding of results depends.
        starter: that process.
        failed: a file that exists once a job has failed.
        directories: those of the jobs, once they were checked.
    """

    command: Sequence[str]
    epochs: Sequence[int] = ()
    keys: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    threads: int = 0
    starter: int = 0
    failed: Path | None = None
    directories: list[Path] = dataclasses.field(default_factory=list)

    def __call__(self, config: DictConfig) -> int:
        """Run one job; in a sweep no error of it reaches the others.

        Returns:
            0; 1 for a run that failed, 2 for input that cannot be run.
        """
        if self.epochs and os.getpid() != self.starter:
            self._enter_worker()
        from hydra.core.hydra_config import HydraConfig

        from fa_bench.runs.logs import console_log
        from fa_bench.runs.train import run
        from fa_bench.utils.memory_limits import describe_failure

        settings = HydraConfig.get()
        directory = Path(settings.runtime.output_dir)
        job = Job.from_config(config)
        experiment = settings.runtime.choices.get("experiment")
        number = settings.job.num if self.epochs else 0
        counted = f"[{number + 1}/{len(self.epochs)}] " if self.epochs else ""
        title = f"{counted}{job_name(job, self.keys)}"
        stops = self.failed is not None and job.run.on_error == "stop"
        if stops and self.failed is not None and self.failed.exists():
            print(f"fa-bench: {title} skipped: a job failed, on_error=stop", file=sys.stderr)
            return 1
        try:
            with resilient_output(), console_log(), interrupt_on_signals():
                run(job, directory, title=title, experiment=experiment, later_epochs=sum(self.epochs[number + 1:]))
            return 0
        except DirectoryLockedError as error:
            reason: BaseException = error
            logged = True
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever a plugin raises, by sys.exit() too, ends its own job alone
            reason = error
            logged = (not self.epochs and isinstance(error, FaBenchError)) or _recorded(job, directory, error, experiment)
        known = isinstance(reason, FaBenchError)
        where = f" (traceback: {directory / LOG})" if logged else f" (in {directory}, where no log can be written)"
        message = reason if known else f"failed: {describe_failure(reason)}{where}"
        print(printable(f"fa-bench: {counted}{message}"), file=sys.stderr)
        if stops and self.failed is not None:
            self.failed.touch()
        return 2 if known else 1

    def _enter_worker(self) -> None:
        """Make a launcher's process what the one that started the sweep is."""
        import torch

        from fa_bench.utils.process import cores

        exit_with_parent(self.starter)
        register_schemas()
        torch.set_num_threads(min(self.threads, cores()))


def job_name(job: Job, keys: Mapping[str, Sequence[str]]) -> str:
    """What to call a job: its rule, the values of what the rule's jobs differ in, and its seed."""
    return f"{label(job.algorithm.name, flatten(job.plain()), keys.get(job.algorithm.name, ()))} seed {job.run.seed}"


def interrupted(jobs: Sequence[tuple[Job, Path]], error: KeyboardInterrupt) -> int:
    """Say how to resume jobs that were interrupted; the exit code, as shells count: 130 after SIGINT, 143 after SIGTERM."""
    saved = any(RunDirectory(place, job).checkpoint.exists() for job, place in jobs)
    same = "the same command without resume=false" if any(job.run.resume is False for job, _ in jobs) else "the same command"
    how = f"checkpoint saved: rerun {same} to resume" if saved else "no checkpoint yet"
    print(f"fa-bench: interrupted; {how}", file=sys.stderr)
    return exit_code_of(error)


def exit_code_of(error: KeyboardInterrupt) -> int:
    """What the process that a signal stopped exits with."""
    return error.code if isinstance(error, Interrupted) else 130


def _recorded(job: Job, directory: Path, error: BaseException, experiment: str | None) -> bool:
    """Whether a failure could be recorded: on a full disk the other jobs must have their turn all the same."""
    from fa_bench.runs.train import record_failure

    try:
        record_failure(job, directory, error, experiment)
    except OSError:
        return False
    return True
