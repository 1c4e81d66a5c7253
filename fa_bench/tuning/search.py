"""Run the trials of a study, in this process or in workers, and store their outcomes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from fa_bench.errors import printable
from fa_bench.objectives.scores import ACCURACY, Score
from fa_bench.runs.ownership import checkpoint_files
from fa_bench.tuning.optuna_parts import NO_PRUNER
from fa_bench.tuning.plan import Plan
from fa_bench.tuning.space import shown
from fa_bench.tuning.store import Finished, RuleStudy
from fa_bench.tuning.trials import DONE, Outcome, TrialRun, run_trial
from fa_bench.utils.files import output_errors

Report = Callable[[RuleStudy, Finished], None]


def search(plan: Plan, studies: Sequence[RuleStudy], report: Report) -> None:
    """Run trials until each rule has used up its budget. The trials of a rule always run one after another, regardless of the
    number of jobs.

    Args:
        plan: the plan of the study.
        studies: the studies of the rules.
        report: called after every trial.

    Raises:
        Interrupted: after a signal.
        FaBenchError: if a default config cannot be run, or files cannot be read or written.
    """
    unfinished = [study for study in studies if len(study.finished) < plan.options.budget]
    if plan.options.jobs == 1 or len(unfinished) < 2:
        for study in unfinished:
            while len(study.finished) < plan.options.budget:
                trial, values = study.ask()
                runs = trial_run(plan, study, values)
                _finish(plan, study, trial, values, runs, run_trial(runs), report)
        return
    _in_workers(plan, unfinished, report)


def _in_workers(plan: Plan, unfinished: list[RuleStudy], report: Report) -> None:
    import torch

    from fa_bench.tuning.workers import workers

    with workers(min(plan.options.jobs, len(unfinished)), torch.get_num_threads()) as started:
        idle = list(range(min(plan.options.jobs, len(unfinished))))
        waiting, running = list(unfinished), dict[int, tuple[RuleStudy, Any, dict[str, Any], TrialRun]]()
        while waiting or running:
            while waiting and idle:
                study, worker = waiting.pop(0), idle.pop(0)
                trial, values = study.ask()
                runs = trial_run(plan, study, values)
                running[worker] = study, trial, values, runs
                started.start(worker, runs)
            for worker, outcome in started.results(list(running)):
                study, trial, values, runs = running.pop(worker)
                _finish(plan, study, trial, values, runs, outcome, report)
                idle.append(worker)
                if len(study.finished) < plan.options.budget:
                    waiting.append(study)


def trial_run(plan: Plan, study: RuleStudy, values: dict[str, Any]) -> TrialRun:
    """The runs of the study's next trial."""
    number = len(study.finished)
    runs = [plan.trial(study.plan, values, seed) for seed in plan.options.trial_seeds]
    return TrialRun(
        f"{study.plan.rule} trial {number}",
        [(job.plain(), directory) for job, directory in runs],
        plan.experiment,
        is_default=number == 0,
        rivals=None if plan.options.pruner == NO_PRUNER else study.rivals,
    )


def _finish(
    plan: Plan, study: RuleStudy, trial: Any, values: dict[str, Any], runs: TrialRun, outcome: Outcome, report: Report
) -> None:
    """Store and report a trial that has ended. Unless `keep_checkpoints` is set, its checkpoints are deleted, because a stored
    trial is never resumed."""
    finished = study.tell(trial, values, outcome)
    if not plan.options.keep_checkpoints:
        _discard_checkpoints(runs)
    report(study, finished)


def _discard_checkpoints(trial: TrialRun) -> None:
    for _, directory in trial.configs:
        files = checkpoint_files(directory)
        for path in files:
            with output_errors(path):
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the folder may be missing or contain other files
            files[0].parent.rmdir()


@contextlib.contextmanager
def progress(plan: Plan, studies: Sequence[RuleStudy]) -> Iterator[Report]:
    """Within the block, show a progress bar over all trials on a terminal. The yielded function prints one line for a finished
    trial."""
    total = plan.options.budget * len(studies)
    done = sum(len(study.finished) for study in studies)
    # The bar is drawn on standard error, and `tqdm.write` keeps the printed lines above it.
    with tqdm(total=total, initial=done, desc="trials", unit="trial", disable=None, leave=False, dynamic_ncols=True) as bar:

        def report(study: RuleStudy, finished: Finished) -> None:
            bar.update()
            count = sum(len(each.finished) for each in studies)
            tqdm.write(printable(f"[{count}/{total}] {_line(study, finished)}"), file=sys.stdout)
            sys.stdout.flush()

        yield report


def _line(study: RuleStudy, finished: Finished) -> str:
    outcome = finished.outcome
    reason = f" ({outcome.reason})" if outcome.reason else ""
    if outcome.state == DONE:
        result = f"val {_named(study.score)}{study.score.text(outcome.value or 0)}"
    else:
        result = f"{outcome.state}{reason}"
    values = " ".join(f"{key}={shown(value)}" for key, value in finished.values.items())
    return f"{study.plan.rule} trial {finished.number}{' (default)' * (finished.number == 0)}: {result}  {values}"


def _named(score: Score) -> str:
    return "" if score == ACCURACY else f"{score.title} "
