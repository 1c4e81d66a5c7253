"""Compare the rules over all tasks and seeds, as recommended by Agarwal et al. 2021."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from fa_bench.errors import names
from fa_bench.objectives.scores import ACCURACY
from fa_bench.report.columns import Column
from fa_bench.report.groups import finished_by_seed, group_labels, group_runs, tasks, validation_merit
from fa_bench.report.numbers import bootstrap_interval, interquartile_mean, known, mean
from fa_bench.report.runs import Run

AGGREGATE_COLUMNS = {
    "algorithm": Column("rule"),
    "tasks": Column("tasks", ".0f"),
    "n": Column("runs", ".0f"),
    "iqm": Column("interquartile mean of the test accuracy (%)", ".2f"),
    "iqm_low": Column("95 % from", ".2f"),
    "iqm_high": Column("to", ".2f"),
    "mean": Column("mean (%)", ".2f"),
    "rows": Column("rows"),
}
AGGREGATE_LEGEND = """\
The interquartile mean is over the test accuracies of all tasks and seeds, without the lowest and the highest quarter. Its
interval is the 95 % percentile interval of a stratified bootstrap (10,000 resamples of the runs within each task, with a fixed
random seed), as in rliable (Agarwal et al. 2021). If a rule has several rows in a task, the one with the best validation score is
used.
"""


def over_tasks(runs: Sequence[Run]) -> tuple[pd.DataFrame, list[str]]:
    """Statistics over the test accuracies (%) of all tasks and seeds, with one row per rule.

    Returns:
        The table, and a line for each exclusion: a task is excluded if its primary score is not accuracy, and a rule if it has
        no finished run in one of the other tasks.
    """
    groups = group_runs(runs)
    labels, left_out = group_labels(groups), []
    by_task = {}
    for title, of_task in tasks(groups).items():
        primary = next(iter(of_task.values()))[0].primary
        if primary == ACCURACY:
            by_task[title] = of_task
        else:
            left_out.append(f"{title} is not in the aggregate: its score is not an accuracy ({primary.title})")
    used: dict[str, dict[str, str]] = {}  # {rule: {task: group}}
    for title, of_task in by_task.items():
        for group, members in of_task.items():
            rule = members[0].result["algorithm"]
            current = used.setdefault(rule, {}).get(title)
            if _accuracies(members) and (current is None or _rank(members) > _rank(groups[current])):
                used[rule][title] = group
    rows = []
    for rule, chosen in used.items():
        if lacking := [title for title in by_task if title not in chosen]:
            left_out.append(f"{rule} is not in the aggregate: no finished run in {names(lacking)}")
            continue
        strata = [_accuracies(groups[group]) for group in chosen.values()]
        values = [value for stratum in strata for value in stratum]
        low, high = bootstrap_interval(strata)
        rows.append(
            {
                "algorithm": rule,
                "tasks": len(strata),
                "n": len(values),
                "iqm": interquartile_mean(values),
                "iqm_low": low,
                "iqm_high": high,
                "mean": mean(values),
                "rows": names(dict.fromkeys(labels[group] for group in chosen.values())),
            }
        )
    return pd.DataFrame(rows, columns=list(AGGREGATE_COLUMNS)), left_out


def _rank(members: Sequence[Run]) -> float:
    merit = validation_merit(members)
    return -math.inf if math.isnan(merit) else merit


def _accuracies(members: Sequence[Run]) -> list[float]:
    return [100 * value for value in known(run.result.get("test_accuracy") for run in finished_by_seed(members).values())]
