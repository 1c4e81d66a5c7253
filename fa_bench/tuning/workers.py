"""Processes that run trials and end when the process that started them ends."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

from fa_bench.errors import FaBenchError, OutputError, StateError, describe_error
from fa_bench.runs.parent import exit_with_parent
from fa_bench.tuning.trials import Outcome, TrialRun, run_trial
from fa_bench.utils.files import write_failure
from fa_bench.utils.stopping import interrupt_on_signals

#: Seconds to wait for the workers' checkpoints after a signal.
SHUTDOWN_SECONDS = 10.0
#: tqdm reads this environment variable at import. Setting it turns off the workers' progress bars, which would overwrite each
#: other.
_NO_BARS = "TQDM_DISABLE"


class Workers:
    """Processes that each run one trial at a time.

    Args:
        count: the number of processes.
        threads: CPU threads of the process that starts the workers. Each worker uses the same number if it has enough cores,
            because the number changes rounding.
    """

    def __init__(self, count: int, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        before = os.environ.get(_NO_BARS)
        os.environ[_NO_BARS] = "1"
        try:
            for _ in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, os.getpid(), threads), daemon=True)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._connections.append(ours)
        finally:
            if before is None:
                del os.environ[_NO_BARS]
            else:
                os.environ[_NO_BARS] = before

    def start(self, worker: int, trial: TrialRun) -> None:
        """Send a trial to a worker, which runs it."""
        self._connections[worker].send(trial)

    def results(self, busy: list[int]) -> Iterator[tuple[int, Outcome]]:
        """Wait until a busy worker has finished its trial, and yield each worker that has, with the outcome.

        Raises:
            FaBenchError: if a trial has raised one, or if a worker has ended.
        """
        for ready in wait([self._connections[worker] for worker in busy]):
            worker = self._connections.index(ready)  # type: ignore[arg-type]
            try:
                result = self._connections[worker].recv()
            except (EOFError, OSError):
                self._processes[worker].join(SHUTDOWN_SECONDS)
                raise StateError(
                    f"a worker ended (exit code {self._processes[worker].exitcode}), perhaps because memory ran out; "
                    "rerun the same command to resume, with fewer jobs if necessary"
                ) from None
            if isinstance(result, BaseException):
                raise result
            yield worker, result

    def stop(self) -> None:
        """Ask the workers to write their checkpoints, wait for them to exit, and kill those that do not exit in time."""
        for process in self._processes:
            if process.is_alive():
                process.terminate()
        deadline = time.monotonic() + SHUTDOWN_SECONDS
        for process in self._processes:
            process.join(max(deadline - time.monotonic(), 0))
            if process.is_alive():
                process.kill()
                process.join()


@contextmanager
def workers(count: int, threads: int) -> Iterator[Workers]:
    """Workers that end when the block ends; after a signal, they first write their checkpoints."""
    started = Workers(count, threads)
    try:
        with interrupt_on_signals(lambda number: started.stop()):
            yield started
    finally:
        started.stop()


def _work(connection: Connection, starter: int, threads: int) -> None:
    """Run the trials that arrive until the connection is closed."""
    try:
        with interrupt_on_signals():
            exit_with_parent(starter)
            import torch

            from fa_bench.config.job import register_schemas
            from fa_bench.utils.process import cores

            register_schemas()
            torch.set_num_threads(min(threads, cores()))
            while True:
                connection.send(_result(connection.recv()))
    except (EOFError, OSError, KeyboardInterrupt):  # the parent has ended, or is stopping its workers
        return


def _result(trial: TrialRun) -> Outcome | FaBenchError:
    try:
        return run_trial(trial)
    except FaBenchError as error:
        return error
    except OSError as error:
        return OutputError(write_failure(error))
    except Exception as error:  # may not be picklable
        return StateError(f"{trial.title}: {describe_error(error, locate=True)}")
