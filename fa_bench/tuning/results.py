"""The tables of a study, one with a row per rule and one with a row per trial."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from fa_bench.config.job import Job
from fa_bench.errors import printable
from fa_bench.objectives.scores import Score
from fa_bench.report.columns import Column
from fa_bench.report.groups import CONTROL, FLOOR
from fa_bench.report.runs import Run
from fa_bench.report.table import summarise
from fa_bench.report.text import BLANK, to_markdown
from fa_bench.tuning.final import final_arguments
from fa_bench.tuning.folder import FIGURE, SECONDS, TABLE, TRIAL_TABLE
from fa_bench.tuning.plan import Plan
from fa_bench.tuning.space import as_typed, limits_at, shown
from fa_bench.tuning.store import RuleStudy
from fa_bench.tuning.trials import DIVERGED, DONE, FAILED, PRUNED
from fa_bench.utils.text import align_columns, escape_markdown

#: Columns that are taken from the report's table, in addition to those of the score.
_FROM_REPORT = ("n", "bp_difference", "bp_difference_ci95", "floor")


def columns(score: Score) -> dict[str, Column]:
    """The columns of the table, by name, for rules that are compared by `score`."""
    unit, form = f" ({score.unit})" if score.unit else "", score.format
    return {
        "rule": Column("rule"),
        "n": Column("n", ".0f"),
        f"test_{score.name}": Column(f"test {score.title}{unit}", form),
        f"test_{score.name}_ci95": Column("± 95 %", form),
        "bp_difference": Column(f"paired difference from tuned {CONTROL}{' (points)' if unit else ''}", f"+{form}"),
        "bp_difference_ci95": Column("± 95 %", form),
        f"floor_{score.name}": Column(f"floor: tuned {FLOOR}{unit}", form),
        "floor": Column("beats floor"),
        "chosen": Column("chosen values"),
        "best_trial": Column("best trial", ".0f"),
        f"val_{score.name}": Column(f"its validation {score.title}{unit}", form),
        "trials": Column("trials", ".0f"),
        DONE: Column(DONE, ".0f"),
        PRUNED: Column(PRUNED, ".0f"),
        DIVERGED: Column(DIVERGED, ".0f"),
        FAILED: Column(FAILED, ".0f"),
        "note": Column("note"),
    }


_LEGEND = """\
Every rule had {budget} trials of {epochs} epochs with {trial_seeds}, proposed by optuna's sampler `{sampler}` (seed
{study_seed}, pruner `{pruner}`) from the spaces below. Trial 0 of each rule is its default config. The best trial is the one
with the best validation {title} after the last epoch (mean over its seeds; in a tie, the earlier one). Trials that diverged or
failed count as trials, with {worst}. The test set was not used to choose anything.

The chosen config of each rule was then trained for {final_epochs} epochs with {seeds}, which no trial used, and tested once. n is
the number of finished runs; ± 95 % is half the width of the Student t confidence interval of the mean. Differences from the
tuned `{control}` are paired by seed. A rule beats the floor if its mean is better than that of the tuned `{floor}`, which trains
only the output layer. The validation {title} of the best trial is the best of many and therefore too
optimistic: compare rules by the test {title}.

The final runs can be repeated, or continued, with

    {command}
"""


def trial_table(plan: Plan, studies: Sequence[RuleStudy]) -> pd.DataFrame:
    """One row per trial, with the rule, number, state, validation score (accuracies in %), epochs, training time in seconds, and
    the reason if the trial diverged, failed or was pruned. Each key of the search spaces also has a column."""
    keys = dict.fromkeys(key for study in studies for key in study.plan.space)
    rows = [
        {
            "rule": study.plan.rule,
            "trial": trial.number,
            "state": trial.outcome.state,
            **{key: trial.values.get(key) for key in keys},
            f"val_{plan.score.name}": math.nan if trial.outcome.value is None else plan.score.scale * trial.outcome.value,
            "epochs": trial.outcome.epochs,
            "seconds": trial.outcome.seconds,
            "reason": trial.outcome.reason,
        }
        for study in studies
        for trial in study.finished
    ]
    return pd.DataFrame(rows)


def result_table(plan: Plan, studies: Sequence[RuleStudy], tuned: Mapping[str, Job], runs: Sequence[Run]) -> pd.DataFrame:
    """One row per rule, with the columns that `columns` lists. The column `chosen` contains the values as typed on the command
    line.

    Args:
        plan: the plan of the study.
        studies: the studies of the rules.
        tuned: the config of the final runs of each rule that has one.
        runs: the final runs.
    """
    score = plan.score
    from_report = [*_FROM_REPORT, f"test_{score.name}", f"test_{score.name}_ci95", f"floor_{score.name}"]
    report = summarise(runs, []).set_index("group") if runs else pd.DataFrame(columns=from_report)
    trained = {run.result["group"] for run in runs}
    rows = []
    for study in studies:
        job = tuned.get(study.plan.rule)
        group = job.group if job and job.group in trained else None
        counts = Counter(trial.outcome.state for trial in study.finished)
        best = study.best
        rows.append(
            {
                "rule": study.plan.rule,
                **({key: report.loc[group, key] for key in from_report} if group else {"n": 0}),
                "chosen": " ".join(f"{key}={as_typed(value)}" for key, value in best.values.items()) if best else "",
                "best_trial": best.number if best else math.nan,
                f"val_{score.name}": score.scale * (best.outcome.value or 0) if best else math.nan,
                "trials": len(study.finished),
                **{state: counts[state] for state in (DONE, PRUNED, DIVERGED, FAILED)},
                "note": "; ".join(_notes(plan, study, job)),
            }
        )
    table = pd.DataFrame(rows, columns=list(columns(score))).astype({"floor": object})
    table.attrs["scores"] = [score]
    return table


def _notes(plan: Plan, study: RuleStudy, job: Job | None) -> list[str]:
    best = study.best
    if best is None or job is None:
        return ["no trial finished: nothing to train"]
    notes = ["no trial was better than the default config"] if best.number == 0 else []
    for key, one in study.plan.space.items():
        if edge := one.edge(best.values[key], limits_at(job, key)):
            side, wider = edge
            notes.append(
                f"{key}={shown(best.values[key])} is at the {side} edge of {one.text}: to widen it, add "
                f"{wider} name={plan.directory.name}-wider"
            )
    different = len({str(trial.values) for trial in study.finished})
    if different < len(study.finished):
        notes.append(f"only {different} different configs in {len(study.finished)} trials")
    return notes


def to_text(table: pd.DataFrame) -> str:
    """The table as text for a terminal, followed by its notes."""
    score = table.attrs["scores"][0]
    formats = columns(score)
    shown = (
        "rule",
        "n",
        f"test_{score.name}",
        f"test_{score.name}_ci95",
        "bp_difference",
        "bp_difference_ci95",
        "floor",
        "chosen",
        DONE,
    )
    titles = {**{name: formats[name].title for name in shown}, "bp_difference": f"difference from {CONTROL}", DONE: "trials done"}
    cells = [[title, *(_cell(value, formats[name].format) for value in table[name])] for name, title in titles.items()]
    rows = list(zip(*([column[0], "-" * max(map(len, column)), *column[1:]] for column in cells), strict=True))
    numbers = [index for index, name in enumerate(titles) if formats[name].format is not None]
    notes = [
        printable(f"{rule}: {note}")
        for rule, text in zip(table["rule"], table["note"], strict=True)
        for note in text.split("; ")
        if note
    ]
    return "\n".join([*align_columns(rows, numbers), *([""] if notes else []), *notes])


def _cell(value: Any, form: str | None) -> str:
    if pd.isna(value) or value == "":
        return BLANK
    if isinstance(value, bool):
        return "yes" if value else "no"
    return printable(value) if form is None else format(value, form)


def short(table: pd.DataFrame, studies: Sequence[RuleStudy]) -> pd.DataFrame:
    """The table with the chosen values rounded to three significant digits for readability."""
    texts = [
        " ".join(f"{key}={shown(value)}" for key, value in study.best.values.items()) if study.best else "" for study in studies
    ]
    return table.assign(chosen=texts)


def markdown(plan: Plan, studies: Sequence[RuleStudy], table: pd.DataFrame) -> str:
    """The text of tune.md."""
    options, score = plan.options, plan.score
    command = shlex.join(["fa-bench", *final_arguments(plan)])
    legend = _LEGEND.format(
        budget=options.budget,
        epochs=plan.epochs,
        trial_seeds=_listed(options.trial_seeds),
        sampler=options.sampler,
        study_seed=options.study_seed,
        pruner=options.pruner,
        seeds=_listed(options.seeds),
        final_epochs=options.final_epochs or plan.epochs,
        control=CONTROL,
        floor=FLOOR,
        command=command,
        title=score.title,
        worst=f"the worst {score.title} of the others"
        if score.worst is None
        else f"a validation {score.title} of {score.worst:g}",
    )
    space = [
        f"- {escape_markdown(study.plan.rule)}: "
        + ", ".join(
            f"`{key}={one.text}` (default `{as_typed(default := study.plan.default[key])}`"
            f"{'' if one.contains(default) else ', outside the range'})"
            for key, one in study.plan.space.items()
        )
        for study in studies
    ]
    unfinished = [
        f"- {escape_markdown(f'{study.plan.rule} trial {trial.number}: {trial.outcome.state} {trial.outcome.reason}')}"
        for study in studies
        for trial in study.finished
        if trial.outcome.state in (DIVERGED, FAILED)
    ]
    sections = [
        "# Tuning",
        to_markdown(short(table, studies), columns(score)),
        legend,
        "## Search spaces",
        "\n".join(space),
        *(["## Trials that diverged or failed", "\n".join(unfinished)] if unfinished else []),
        "## Files",
        f"[{TABLE}]({TABLE}) is the table at full precision, [{TRIAL_TABLE}]({TRIAL_TABLE}) has all trials, and "
        f"[{SECONDS}]({SECONDS}) has their training times.",
        f"![{score.title} against learning rate, and the best so far]({FIGURE})",
    ]
    return "\n\n".join(section.strip("\n") for section in sections) + "\n"


def _listed(seeds: Sequence[int]) -> str:
    return f"{'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}"
