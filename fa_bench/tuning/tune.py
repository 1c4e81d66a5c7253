"""Run a study, from reading its command line to writing its tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fa_bench.errors import DataError
from fa_bench.runs import parallel
from fa_bench.tuning.folder import (
    FIGURE,
    MARKDOWN,
    SECONDS,
    TABLE,
    TRIAL_TABLE,
    check_budget,
    identity,
    study_folder,
)
from fa_bench.tuning.plan import Plan, describe, make_plan
from fa_bench.utils.files import atomic
from fa_bench.utils.stopping import Interrupted

if TYPE_CHECKING:
    import pandas as pd

    from fa_bench.tuning.store import RuleStudy


@dataclass(frozen=True)
class TuneResult:
    """A finished study.

    Attributes:
        table: one row per rule, as in tune.csv.
        trials: one row per trial, as in trials.csv, with the training time in seconds.
        directory: the study's folder.
        text: the table for a terminal.
        code: the exit code, which is 0 if there are final runs and all of them finished or were stopped by a callback, else 1.
    """

    table: pd.DataFrame
    trials: pd.DataFrame
    directory: Path
    text: str
    code: int

    def __repr__(self) -> str:
        return f"{self.text}\n\ntuning: {self.directory / MARKDOWN}"


def tune(overrides: Sequence[str], config_dir: str | None = None) -> TuneResult:
    """Run the trials, train the best configs with the final seeds, and write the tables and the figure.

    Args:
        overrides: the overrides of the command line.
        config_dir: a user's folder of configs, or None.

    Raises:
        FaBenchError: for invalid input, before the first trial; later, if a file cannot be read or written or a worker process
            ends unexpectedly.
        Interrupted: after a signal; the same call resumes.
    """
    from fa_bench.tuning.search import progress, search
    from fa_bench.tuning.store import stored_studies

    parallel.refuse("a study")
    plan = prepared(overrides, config_dir)
    with study_folder(plan, identity(plan, check_data(plan))):
        studies = stored_studies(plan)
        check_budget(plan.options.budget, {study.plan.rule: len(study.finished) for study in studies}, plan.directory)
        done = sum(len(study.finished) for study in studies)
        print(describe(plan) + (f"\n  of the trials, {done} are finished" if done else ""), flush=True)
        with progress(plan, studies) as report:
            search(plan, studies, report)
        return _finish(plan, studies)


def prepared(overrides: Sequence[str], config_dir: str | None) -> Plan:
    """The checked plan of a study.

    Raises:
        FaBenchError: for invalid input.
    """
    from fa_bench.tuning.final import check_final
    from fa_bench.tuning.optuna_parts import require_optuna

    plan = make_plan(overrides, config_dir)
    require_optuna(plan.options.sampler)
    check_final(plan)
    return plan


def check_data(plan: Plan) -> str:
    """Load the study's data, check that all rules and architectures fit the data, and return the hash of the data.

    Raises:
        DataError: if the data cannot be read, or have no validation split.
        FaBenchError: if a rule does not cover its network, or an architecture refuses the shape of the data.
    """
    from fa_bench.command.fit import check_fit
    from fa_bench.config.scale import scaled
    from fa_bench.runs.assembly import load, prepare
    from fa_bench.utils.process import isolated

    job = plan.rules[0].job
    with isolated():
        splits = load(scaled(job), prepare(job))
    if splits.validation is None or not len(splits.validation):
        raise DataError(f"dataset={job.dataset.name} has no validation split, which is needed to compare trials")
    if job.dataset.shape() is None:  # otherwise, the plan has been checked with this shape
        check_fit((each.job for each in plan.rules), (splits.input_shape, len(splits.classes)))
    return splits.data_hash


def _finish(plan: Plan, studies: Sequence[RuleStudy]) -> TuneResult:
    from fa_bench.report.runs import read_run
    from fa_bench.report.text import to_csv
    from fa_bench.tuning.final import run_final, tuned_job, write_experiment
    from fa_bench.tuning.results import markdown, result_table, short, to_text, trial_table
    from fa_bench.utils.drawing import default_style

    tuned = {study.plan.rule: tuned_job(plan, study.plan, study.best.values) for study in studies if study.best is not None}
    code, runs = 1, []
    if tuned:
        write_experiment(plan, tuned)
        code, directories = run_final(plan)
        runs = [run for run in map(read_run, directories) if run is not None]
    if code >= 128:  # the sweep has reported the signal
        raise Interrupted(code - 128)
    table, trials = result_table(plan, studies, tuned, runs), trial_table(plan, studies)
    directory = plan.directory
    _write(directory / TABLE, to_csv(table))
    _write(directory / TRIAL_TABLE, to_csv(trials.drop(columns="seconds")))
    _write(directory / SECONDS, to_csv(trials.filter(["rule", "trial", "seconds"])))
    with default_style():
        from fa_bench.tuning.figure import write_figure

        write_figure(studies, directory / FIGURE)
    _write(directory / MARKDOWN, markdown(plan, studies, table))
    return TuneResult(table, trials, directory, to_text(short(table, studies)), code)


def _write(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_bytes(text.encode())
