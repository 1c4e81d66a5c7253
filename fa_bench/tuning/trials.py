"""The runs of a trial, in this process or in a worker."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fa_bench.config.job import Job
from fa_bench.errors import FaBenchError, first_line, printable
from fa_bench.runs.schemas import SUCCESSES
from fa_bench.tuning.pruning import Judge, Pruning, Rivals, recorded_scores
from fa_bench.utils.output import resilient_output

#: The states in which a trial can end.
DONE, PRUNED, DIVERGED, FAILED = "done", "pruned", "diverged", "failed"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Attributes:
        state: done, pruned, diverged or failed.
        value: the validation score after the last epoch, as recorded (an accuracy is a fraction), averaged over the seeds that
            were trained; None if the trial diverged or failed.
        epochs: number of epochs trained, over all seeds.
        seconds: training time in seconds, over all seeds.
        reason: why it diverged or failed, or was pruned.
        reported: the validation scores after each epoch, if they were reported to a pruner.
        system: the attributes that the pruner recorded in the trial.
    """

    state: str
    value: float | None = None
    epochs: int = 0
    seconds: float = 0.0
    reason: str = ""
    reported: Sequence[float] = ()
    system: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TrialRun:
    """The runs of one trial, as they are sent to a worker.

    Attributes:
        title: the title of the trial.
        configs: the plain config of each seed's run, and its directory.
        experiment: the name of the experiment, for the records.
        is_default: whether the trial has the rule's default config; a FaBenchError in this trial ends the study.
        rivals: the trials with which a pruner compares this trial; None without a pruner.
    """

    title: str
    configs: Sequence[tuple[dict[str, Any], Path]]
    experiment: str | None
    is_default: bool
    rivals: Rivals | None = None


def run_trial(trial: TrialRun) -> Outcome:
    """Run a trial's seeds one after another until one diverges, fails or is pruned; runs that have finished are not repeated.

    Raises:
        Interrupted: after a signal; the unfinished run resumes from its checkpoint.
        FaBenchError: if the rule's default config cannot be run.
        OSError: for data that cannot be read and folders that cannot be written, since the trial's values are not the cause.
    """
    from fa_bench.runs.outcome import record_failure
    from fa_bench.runs.train import run
    from fa_bench.utils.memory_limits import describe_failure

    judge = None if trial.rivals is None else Judge(trial.rivals)
    values: list[float] = []
    reported: list[float] = []
    epochs, seconds = 0, 0.0
    state, reason = DONE, ""
    for config, directory in trial.configs:
        job = Job.from_config(OmegaConf.create(config))
        try:
            with resilient_output():
                result = run(
                    job,
                    directory,
                    title=f"{trial.title} seed {job.run.seed}",
                    experiment=trial.experiment,
                    callbacks=[] if judge is None else [Pruning(judge, directory, len(reported))],
                )
        except (KeyboardInterrupt, OSError):
            raise
        except BaseException as error:  # a plugin may raise anything, even sys.exit(); only its own trial fails
            is_known = isinstance(error, FaBenchError)
            if is_known and trial.is_default:
                raise
            record_failure(job, directory, error, trial.experiment)
            state, reason = FAILED, first_line(error) if is_known else describe_failure(error)
        else:
            epochs, seconds = epochs + result["epoch"], seconds + (result["seconds"] or 0)
            if judge is not None:
                reported += recorded_scores(directory, result["epoch"])
                judge.catch_up(reported)
            state, reason = _state(result)
            if state in (DONE, PRUNED):
                value, title = result[f"val_{job.scores[0].name}"], job.scores[0].title
                if value is None or not math.isfinite(value):
                    state, reason = FAILED, f"its validation {title} is {'not known' if value is None else value}"
                else:
                    values.append(value)
        if state != DONE:
            reason = printable(f"seed {job.run.seed}: {reason}")
            break
    value = sum(values) / len(values) if state in (DONE, PRUNED) else None
    return Outcome(state, value, epochs, seconds, reason, reported, {} if judge is None else judge.system)


def _state(result: dict[str, Any]) -> tuple[str, str]:
    """The state of a trial after one of its runs has ended, and the reason if the trial ends with that run."""
    error = result["error"] or {}
    if result["status"] == "stopped" and error.get("callback") is None:
        return PRUNED, f"after epoch {result['epoch']}"
    # A callback of the config may stop a run early, which is part of what is tuned.
    return (DONE, "") if result["status"] in SUCCESSES else (DIVERGED, str(error.get("message") or ""))
