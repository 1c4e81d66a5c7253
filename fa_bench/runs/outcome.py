"""How a run ended: its result, completed and written whether training finished or failed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fa_bench.config.job import Job
from fa_bench.errors import ConfigError, OutputError
from fa_bench.runs import parallel
from fa_bench.runs.assembly import Parts
from fa_bench.runs.divergence import Diverged
from fa_bench.runs.hashes import state_hash, weights_hash
from fa_bench.runs.locks import lock_directory
from fa_bench.runs.logs import log, log_file
from fa_bench.runs.loop import Progress, Trainer
from fa_bench.runs.parallel import ProcessLost
from fa_bench.runs.prediction import predicted_cost
from fa_bench.runs.record import Recorder, base_result, progress_result
from fa_bench.runs.rundir import RunDirectory
from fa_bench.utils.files import LOG, RESULT, dump_json, write_text
from fa_bench.utils.stopping import Interrupted


@contextmanager
def recording_outcome(
    result: dict[str, Any], job: Job, parts: Parts, recorder: Recorder, trainer: Trainer, save: Any
) -> Iterator[None]:
    """Complete `result` and write it at the end of the block, whether training finishes or fails."""
    progress, complete, raised = trainer.progress, False, None
    try:
        yield
        complete = True
        request = trainer.stop_request if progress.epoch < job.run.epochs else None
        if progress.diverged is not None:
            result |= _diverged(progress)
        elif request is not None:
            result |= _stopped(progress, request)
        else:
            result |= {"status": "finished"}
        # A run that can be resumed must not record measurements that an uninterrupted run would not make.
        if result["status"] == "finished" or (result["status"] == "stopped" and progress.stopped is not None):
            result |= {"probes": recorder.measure_probes(progress)}
    except Diverged:
        result |= _diverged(progress)
    except BaseException as error:
        error = raised = _explain(error, job)
        # A process that ended without reporting an error was killed or stopped.
        is_stopped = isinstance(error, KeyboardInterrupt) or (isinstance(error, ProcessLost) and not error.reason)
        status = "interrupted" if is_stopped else "failed"
        result |= {"status": status, "error": _error(error)}
        # A second SIGINT may arrive in the middle of a step, from which a run cannot resume.
        if isinstance(error, Interrupted) and error.is_deferred and trainer.world.stops_together:
            try:
                save()
            except OutputError as problem:
                log.warning("%s", problem)  # only logged, because a sweep must not go on with its next run
        raise error
    finally:
        result |= progress_result(recorder, progress, parts.meter, complete)
        if raised is None and not trainer.world.rank:  # after a signal or failure, the run must end quickly
            result |= {"cost": predicted_cost(job, parts.splits, parts.meter.x[:2], parts.rule.objective)}
        result |= {
            "batches_hash": progress.batches_hash,
            "weights_hash": weights_hash(parts.rule.model),
            "feedback_hash": state_hash([parts.rule.feedback, parts.rule.state_dict()]),
            "optimizer_hash": state_hash(parts.optimizers.state_dict()),
        }
        try:
            recorder.finish(result)
        except OutputError as error:
            if raised is None:
                raise
            log.warning("%s", error)  # only logged, so that it does not hide the error that is being raised


def _diverged(progress: Progress) -> dict[str, Any]:
    assert progress.diverged is not None
    log.warning("diverged: %s", progress.diverged["message"])
    return {"status": "diverged", "error": {"type": "Diverged", **progress.diverged}}


def _stopped(progress: Progress, request: dict[str, Any]) -> dict[str, Any]:
    log.info("stopped after epoch %d: %s", progress.epoch, request["reason"])
    return {
        "status": "stopped",
        "error": {
            "type": "Stopped",
            "message": request["reason"],
            "epoch": progress.epoch,
            "step": progress.step,
            "callback": request["callback"],
        },
    }


def _explain(error: BaseException, job: Job) -> BaseException:
    """Return the error, or a more specific one: a ProcessLost error if another process has ended, and a ConfigError if torch
    refused a nondeterministic operation."""
    error = parallel.current().explained(error)
    operation = re.match(r"(\S+) does not have a deterministic implementation", str(error))
    if isinstance(error, RuntimeError) and operation and job.run.deterministic:
        return ConfigError(
            f"deterministic=true: {operation[1]} has no deterministic implementation on {job.run.device}; "
            "use another architecture, or deterministic=false"
        )
    return error


def record_failure(job: Job, directory: Path, error: BaseException, experiment: str | None = None) -> None:
    """Log why a run failed, with the traceback, and write its result if the directory has none.

    Checkpoints and records of earlier attempts are kept. If the directory contains a run of different code, only the log is
    written, so that this run can still be read, and be resumed by its own code.

    Raises:
        RunDirectoryError: if the directory belongs to another run.
        OutputError: if the files cannot be written.
    """
    run_dir = RunDirectory(directory, job)
    run_dir.check()
    with lock_directory(directory):
        writes_result = not run_dir.is_stale and not (directory / RESULT).exists()
        if writes_result:
            run_dir.start(resume=True)
        with log_file(directory / LOG):
            log.debug("failed: %s", error, exc_info=error)
        if writes_result:
            write_text(directory / RESULT, dump_json(base_result(job, experiment) | {"error": _error(error)}, indent=1) + "\n")


def _error(error: BaseException) -> dict[str, str]:
    return {"type": type(error).__name__, "message": str(error)}
