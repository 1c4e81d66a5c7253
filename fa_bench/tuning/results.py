"""The tables of a study: one row a rule, and one row a trial."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from fa_bench.config.job import Job
from fa_bench.errors import printable
from fa_bench.report.groups import CONTROL, FLOOR
from fa_bench.report.runs import Run
from fa_bench.report.table import BLANK, Column, summarise, to_markdown
from fa_bench.tuning.final import final_arguments
from fa_bench.tuning.folder import FIGURE, SECONDS, TABLE, TRIAL_TABLE
from fa_bench.tuning.plan import Plan
from fa_bench.tuning.space import as_typed, limits_at, shown
from fa_bench.tuning.store import RuleStudy
from fa_bench.tuning.trials import DIVERGED, DONE, FAILED, PRUNED
from fa_bench.utils.text import align_columns, escape_markdown

#: Columns of the report's table that this one has, too.
_FROM_REPORT = ("n", "test_accuracy", "test_accuracy_ci95", "bp_difference", "bp_difference_ci95", "floor_accuracy", "floor")
COLUMNS = {
    "rule": Column("rule"),
    "n": Column("n", ".0f"),
    "test_accuracy": Column("test accuracy (%)", ".2f"),
    "test_accuracy_ci95": Column("± 95 %", ".2f"),
    "bp_difference": Column(f"paired difference to tuned {CONTROL} (points)", "+.2f"),
    "bp_difference_ci95": Column("± 95 %", ".2f"),
    "floor_accuracy": Column(f"floor: tuned {FLOOR} (%)", ".2f"),
    "floor": Column("beats floor"),
    "chosen": Column("chosen values"),
    "best_trial": Column("best trial", ".0f"),
    "val_accuracy": Column("its validation accuracy (%)", ".2f"),
    "trials": Column("trials", ".0f"),
    DONE: Column(DONE, ".0f"),
    PRUNED: Column(PRUNED, ".0f"),
    DIVERGED: Column(DIVERGED, ".0f"),
    FAILED: Column(FAILED, ".0f"),
    "note": Column("note"),
}
_ON_TERMINAL = ("rule", "n", "test_accuracy", "test_accuracy_ci95", "bp_difference", "bp_difference_ci95", "floor", "chosen",
                DONE)
_LEGEND = """\
Every rule had {budget} trials of {epochs} epochs with {trial_seeds}, proposed by optuna's sampler `{sampler}` (seed
{study_seed}, pruner `{pruner}`) from the spaces below. Trial 0 of each rule is its default config. The best trial is the one
with the best validation accuracy after the last epoch (mean over its seeds; of equals, the earlier one). Trials that diverged or
failed count as trials, with an accuracy of 0. The test set was not used to choose anything.

The chosen config of each rule was then trained for {final_epochs} epochs with {seeds}, which no trial used, and tested
once. n is the number of its finished runs; ± 95 % is half the width of the Student t confidence interval of the mean.
Differences to the tuned `{control}` are paired by seed. A rule beats the floor if its mean is above that of the tuned `{floor}`,
which trains only the output layer. The validation accuracy of the best trial is the best of many, and so too high: compare rules
by their test accuracies.

The final runs can be repeated, or continued, with

    {command}
"""


def trial_table(plan: Plan, studies: Sequence[RuleStudy]) -> pd.DataFrame:
    """One row a trial: rule, number, state, the values of every key of the space, validation accuracy in %, epochs, seconds of
    training, and why it diverged or failed."""
    keys = dict.fromkeys(key for study in studies for key in study.plan.space)
    rows = [{"rule": study.plan.rule, "trial": trial.number, "state": trial.outcome.state,
             **{key: trial.values.get(key) for key in keys},
             "val_accuracy": math.nan if trial.outcome.value is None else 100 * trial.outcome.value,
             "epochs": trial.outcome.epochs, "seconds": trial.outcome.seconds, "reason": trial.outcome.reason}
            for study in studies for trial in study.finished]
    return pd.DataFrame(rows)


def result_table(plan: Plan, studies: Sequence[RuleStudy], tuned: Mapping[str, Job], runs: Sequence[Run]) -> pd.DataFrame:
    """One row a rule, with the columns `COLUMNS`; `chosen` has the values as typed on the command line.

    Args:
        plan: of the study.
        studies: those of the rules.
        tuned: the config of the final runs of each rule that has one.
        runs: the final runs.
    """
    report = summarise(runs, []).set_index("group") if runs else pd.DataFrame(columns=list(_FROM_REPORT))
    trained = {run.result["group"] for run in runs}
    rows = []
    for study in studies:
        job = tuned.get(study.plan.rule)
        group = job.group if job and job.group in trained else None
        counts = Counter(trial.outcome.state for trial in study.finished)
        best = study.best
        rows.append({
            "rule": study.plan.rule,
            **({key: report.loc[group, key] for key in _FROM_REPORT} if group else {"n": 0}),
            "chosen": " ".join(f"{key}={as_typed(value)}" for key, value in best.values.items()) if best else "",
            "best_trial": best.number if best else math.nan,
            "val_accuracy": 100 * (best.outcome.value or 0) if best else math.nan,
            "trials": len(study.finished),
            **{state: counts[state] for state in (DONE, PRUNED, DIVERGED, FAILED)},
            "note": "; ".join(_notes(plan, study, job)),
        })
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"floor": object})


def _notes(plan: Plan, study: RuleStudy, job: Job | None) -> list[str]:
    best = study.best
    if best is None or job is None:
        return ["no trial finished: nothing to train"]
    notes = ["no trial was better than the default config"] if best.number == 0 else []
    for key, one in study.plan.space.items():
        if edge := one.edge(best.values[key], limits_at(job, key)):
            side, wider = edge
            notes.append(f"{key}={shown(best.values[key])} is at the {side} edge of {one.text}: to widen it, add "
                         f"{wider} name={plan.directory.name}-wider")
    different = len({str(trial.values) for trial in study.finished})
    if different < len(study.finished):
        notes.append(f"only {different} different configs in {len(study.finished)} trials")
    return notes


def to_text(table: pd.DataFrame) -> str:
    """The table for a terminal, with the notes below it."""
    titles = {**{name: COLUMNS[name].title for name in _ON_TERMINAL}, "bp_difference": f"- tuned {CONTROL}", DONE: "trials done"}
    columns = [[title, *(_cell(value, COLUMNS[name].format) for value in table[name])] for name, title in titles.items()]
    rows = list(zip(*([column[0], "-" * max(map(len, column)), *column[1:]] for column in columns), strict=True))
    numbers = [index for index, name in enumerate(titles) if COLUMNS[name].format is not None]
    notes = [printable(f"{rule}: {note}") for rule, text in zip(table["rule"], table["note"], strict=True)
             for note in text.split("; ") if note]
    return "\n".join([*align_columns(rows, numbers), *([""] if notes else []), *notes])


def _cell(value: Any, form: str | None) -> str:
    if pd.isna(value) or value == "":
        return BLANK
    if isinstance(value, bool):
        return "yes" if value else "no"
    return printable(value) if form is None else format(value, form)


def short(table: pd.DataFrame, studies: Sequence[RuleStudy]) -> pd.DataFrame:
    """The table with the chosen values in three digits, for reading."""
    texts = [" ".join(f"{key}={shown(value)}" for key, value in study.best.values.items()) if study.best else ""
             for study in studies]
    return table.assign(chosen=texts)


def markdown(plan: Plan, studies: Sequence[RuleStudy], table: pd.DataFrame) -> str:
    """The text of tune.md."""
    options = plan.options
    command = shlex.join(["fa-bench", *final_arguments(plan)])
    legend = _LEGEND.format(
        budget=options.budget, epochs=plan.epochs, trial_seeds=_listed(options.trial_seeds), sampler=options.sampler,
        study_seed=options.study_seed, pruner=options.pruner, seeds=_listed(options.seeds),
        final_epochs=options.final_epochs or plan.epochs, control=CONTROL, floor=FLOOR, command=command)
    space = [f"- {escape_markdown(study.plan.rule)}: " + ", ".join(
        f"`{key}={one.text}` (default `{as_typed(default := study.plan.default[key])}`"
        f"{'' if one.contains(default) else ', outside of the range'})" for key, one in study.plan.space.items())
        for study in studies]
    unfinished = [f"- {escape_markdown(f'{study.plan.rule} trial {trial.number}: {trial.outcome.state} {trial.outcome.reason}')}"
                  for study in studies for trial in study.finished if trial.outcome.state in (DIVERGED, FAILED)]
    sections = [
        "# Tuning", to_markdown(short(table, studies), COLUMNS), legend, "## Search spaces", "\n".join(space),
        *(["## Trials that diverged or failed", "\n".join(unfinished)] if unfinished else []),
        "## Files", f"[{TABLE}]({TABLE}) is the table with all digits, [{TRIAL_TABLE}]({TRIAL_TABLE}) has all trials, and "
                    f"[{SECONDS}]({SECONDS}) their seconds of training.",
        f"![accuracy against learning rate, and the best so far]({FIGURE})",
    ]
    return "\n\n".join(section.strip("\n") for section in sections) + "\n"


def _listed(seeds: Sequence[int]) -> str:
    return f"{'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}"
