"""Groups of runs that differ only in the seed, tasks with comparable groups, and the order of both in reports."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fa_bench.config.labels import DATA_DIR, differing_keys, distinct_labels, is_number, result_options
from fa_bench.errors import format_value, nearest
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.report.numbers import mean
from fa_bench.report.runs import FINISHED, VERSIONS, Run
from fa_bench.report.states import DIVERGED

#: The names of the control and of the floor with which the rows of other rules are compared.
CONTROL, FLOOR = "bp", "frozen"
Groups = Mapping[str, Sequence[Run]]


def in_order(runs: Iterable[Run]) -> list[Run]:
    """Sort runs by their records alone, so that a report does not depend on where the runs are stored.

    Runs are sorted by dataset and architecture, then by rule (the control first, then the floors), label (comparing numbers by
    value) and seed.
    """
    runs = sorted(runs, key=lambda run: (run.row, run.result["seed"], json.dumps(run.result, sort_keys=True)))
    labels = group_labels(group_runs(runs))

    def key(run: Run) -> Any:
        task = [str(run.result.get(key)) for key in ("dataset", "architecture")]
        rule = run.result["algorithm"]
        rank = 0 if rule == CONTROL else 1 if is_floor(rule) else 2
        return task, rank, natural_key(labels[run.row]), run.row

    return sorted(runs, key=key)


def is_floor(rule: str) -> bool:
    """Whether the rule declares itself a floor; False if the rule is not registered because its plugin is missing."""
    return rule in ALGORITHMS and ALGORITHMS[rule].is_floor


def natural_key(text: str) -> list[Any]:
    """A sort key that compares the numbers in a string by value. It alternates between text and numbers."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[-+]?\d+)?)", text)
    return [float(part) if index % 2 else part for index, part in enumerate(parts)]


def value_key(value: Any) -> tuple[int, float, list[Any]]:
    """A sort key for the values of an option; numbers come first and are sorted by value."""
    return (0, float(value), []) if is_number(value) else (1, 0.0, natural_key(format_value(value)))


def nearest_key(name: str, allowed: Iterable[str]) -> str:
    """A hint such as ``; did you mean 'optimizer.lr'?``, also for the short name ``lr`` that labels use; empty if no key is
    similar."""
    allowed = list(allowed)
    whole = next((key for key in allowed if key.endswith(f".{name}")), None)
    return f"; did you mean '{whole}'?" if whole else nearest(name, allowed)


def group_runs(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs of each row, in the order of first appearance. The runs of a row have the same config except for the seed, the
    same code and the same data."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.row, []).append(run)
    return groups


def group_labels(groups: Groups) -> dict[str, str]:
    """A distinct label for each group.

    Groups with the same label are distinguished by the keys in which their configs differ, then by the hashes of code and data.
    If neither distinguishes a group, for example because its config is missing, its label is its group name or, if other groups
    have the same name, its key in `groups`.
    """
    labels = distinct_labels(
        {group: runs[0].result["label"] for group, runs in groups.items()},
        {group: runs[0].config for group, runs in groups.items()},
    )
    for key, word in VERSIONS.items():
        for name in _duplicates(labels):
            hashes = {group: groups[group][0].result.get(key) for group, label in labels.items() if label == name}
            distinct = set(hashes.values())
            if len(distinct) > 1:
                length = next((n for n in (8, 16) if len({str(value)[:n] for value in distinct}) == len(distinct)), None)
                labels |= {group: f"{name} {word}={value[:length] if value else 'unknown'}" for group, value in hashes.items()}
    duplicates = _duplicates(labels)
    names = Counter(runs[0].result["group"] for runs in groups.values())
    group_names = {group: name if names[name := runs[0].result["group"]] == 1 else group for group, runs in groups.items()}
    return {group: group_names[group] if label in duplicates else label for group, label in labels.items()}


def _duplicates(labels: Mapping[str, str]) -> list[str]:
    return [name for name, count in Counter(labels.values()).items() if count > 1]


def tasks(groups: Groups) -> dict[str, dict[str, Sequence[Run]]]:
    """The groups of each task, by title. A task consists of a dataset and an architecture with their options, and `data_dir` if
    it determines the data.

    A title names the dataset and the architecture, followed by the options in which tasks with the same names differ.
    """
    by_task: dict[str, dict[str, Sequence[Run]]] = {}
    for group, members in groups.items():
        by_task.setdefault(task_key(members[0]), {})[group] = members
    first = {key: next(iter(members.values()))[0] for key, members in by_task.items()}
    names = {key: f"{run.result.get('dataset')}, {run.result.get('architecture')}" for key, run in first.items()}
    titles = distinct_labels(names, {key: _task(run) for key, run in first.items()})
    by_title: dict[str, dict[str, Sequence[Run]]] = {}
    for key, members in by_task.items():
        by_title.setdefault(titles[key], {}).update(members)  # without readable configs, two tasks may have the same title
    return by_title


def task_key(run: Run) -> str:
    """A string that is the same for all runs of a task."""
    return repr(sorted(_task(run).items(), key=str))


def by_rule(groups: Groups) -> dict[str, dict[str, Sequence[Run]]]:
    """A map from each rule to its groups, in the order of first appearance."""
    rules: dict[str, dict[str, Sequence[Run]]] = {}
    for group, members in groups.items():
        rules.setdefault(members[0].result["algorithm"], {})[group] = members
    return rules


def swept_keys(groups: Groups) -> list[str]:
    """The keys in which configs of the same task and rule differ."""
    keys = (
        key
        for part in tasks(groups).values()
        for members in by_rule(part).values()
        for key in differing_keys(runs[0].config for runs in members.values())
    )
    return list(dict.fromkeys(keys))


def _task(run: Run) -> dict[str, Any]:
    """The part of a run's config that defines its task."""
    names = {key: run.result.get(key) for key in ("dataset", "architecture")}
    return names | {key: value for key, value in result_options(run.config).items() if key.split(".")[0] in (*names, DATA_DIR)}


def finished_by_seed(runs: Iterable[Run]) -> dict[int, Run]:
    """The finished run of each seed. If a seed has several, only the last one is used, because counting a seed twice would
    understate the spread."""
    return {run.result["seed"]: run for run in runs if run.finished}


def validation_score(members: Iterable[Run]) -> float:
    """The primary validation score of a group, by which settings are chosen. It is the mean over the finished runs in the last
    epoch, in the unit of tables (% for an accuracy).

    The score is rounded to 10 decimal places, so that ties do not depend on the order of the seeds. The score is NaN if it is
    unknown. It is also NaN if a run diverged, because otherwise a setting could win through lucky seeds.
    """
    members = list(members)
    if any(run.result["status"] == DIVERGED for run in members):
        return math.nan
    return round(mean(run.score(f"val_{run.primary.name}") for run in finished_by_seed(members).values()), 10)


def validation_merit(members: Sequence[Run]) -> float:
    """The `validation_score` of a group, negated if smaller scores are better, so that larger merits are always better."""
    return members[0].primary.merit(validation_score(members))


def status_counts(runs: Iterable[Run]) -> str:
    """The number of runs with each status, for example ``2 finished, 1 diverged``."""
    counts = Counter(run.result["status"] for run in runs)
    return ", ".join(f"{counts[status]} {status}" for status in sorted(counts, key=lambda s: (s != FINISHED, s)))
