"""Choose the best setting of each rule by the primary validation score, among the values that were tried for some keys."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from fa_bench.config.labels import differing_keys, is_number, result_options
from fa_bench.errors import DataError, format_value, names
from fa_bench.report.groups import (
    Groups,
    finished_by_seed,
    group_labels,
    group_runs,
    nearest_key,
    status_counts,
    tasks,
    validation_merit,
    validation_score,
    value_key,
)
from fa_bench.report.runs import VERSIONS, Run
from fa_bench.report.states import DIVERGED

#: Keys whose values cannot be chosen, and the reasons.
_REFUSED = {
    "algorithm": "the rules are being compared",
    "seed": "runs of different seeds are averaged",
    "dataset": "it is part of the task",
    "architecture": "it is part of the task",
}
UNSET = "-"


class Chosen(NamedTuple):
    """The values that `choose_best` chose for one rule and one combination of its other settings.

    `values` are the chosen values of the keys, as text. `tried` is the number of values that have at least one run, and `note`
    contains remarks on the choice.
    """

    values: str
    tried: int
    note: str


class Best(NamedTuple):
    """The runs with the chosen settings, the choices by row, warnings, and a table with one row for each value that was tried.
    Warnings are about rules and settings for which nothing could be chosen, and about unequal budgets."""

    runs: list[Run]
    chosen: dict[str, Chosen]
    warnings: list[str]
    tried: pd.DataFrame


def parse_keys(text: str) -> list[str]:
    """The distinct keys in the value of ``--best``, such as ``optimizer.lr,optimizer.weight_decay``."""
    return list(dict.fromkeys(word for part in text.split(",") if (word := part.strip())))


def choose_best(runs: Sequence[Run], keys: Sequence[str]) -> Best:
    """Choose the values of `keys` for each rule and remaining setting.

    The remaining setting consists of the other keys in which the rule's configs differ, the task, and the versions of code and
    data. The value with the best primary validation score (last epoch, mean over the finished runs) is chosen; ties go to the
    smallest value. A value with a run that diverged counts as tried but is never chosen. A value without a validation score is
    chosen only if no other value was tried.

    Args:
        runs: runs in the order of the report.
        keys: command-line keys of the config.

    Raises:
        DataError: a key is unknown, is part of the comparison, or does not differ within any rule; or nothing can be chosen.
    """
    groups = group_runs(runs)
    labels = group_labels(groups)
    swept = _swept_keys(groups)
    _check(keys, swept, groups)
    chosen: dict[str, Chosen] = {}
    warnings, rows = [], []
    for title, of_task in tasks(groups).items():
        for cell in _cells(of_task, keys, swept):
            best = _choose(cell, {group: validation_merit(members) for group, members in cell.items()})
            rows += [_tried_row(labels[group], members, keys, title, group == best) for group, members in cell.items()]
            if best is None:
                warnings.append(_nothing_chosen(cell, keys, title))
            else:
                chosen[best] = Chosen(_text(cell[best][0], keys), len(cell), _remarks(best, cell, keys))
    if not chosen:
        raise DataError("; ".join(warnings))
    for title, of_task in tasks({group: groups[group] for group in groups if group in chosen}).items():
        warnings += filter(None, [_unequal(title, of_task, chosen, labels, keys)])
        for group, note in _budget_notes(of_task, chosen).items():
            chosen[group] = chosen[group]._replace(note="; ".join(filter(None, (chosen[group].note, note))))
    values = list(dict.fromkeys(name for row in rows for name in row if name.startswith("val_")))
    table = pd.DataFrame(rows, columns=["task", "label", *keys, "n", "status", *values, "chosen"])
    table.attrs["scores"] = list({run.primary.name: run.primary for run in runs}.values())
    return Best([run for run in runs if run.row in chosen], chosen, warnings, table)


def _swept_keys(groups: Groups) -> dict[str, list[str]]:
    """A map from each rule to the keys in which its configs differ."""
    configs: dict[str, list[Mapping[str, Any]]] = {}
    for members in groups.values():
        configs.setdefault(members[0].result["algorithm"], []).append(members[0].config)
    return {rule: differing_keys(of_rule) for rule, of_rule in configs.items()}


def _check(keys: Sequence[str], swept: Mapping[str, Sequence[str]], groups: Groups) -> None:
    differing = [
        key
        for key in dict.fromkeys(key for of_rule in swept.values() for key in of_rule)
        if key.split(".")[0] not in _REFUSED or key.startswith("algorithm.")
    ]
    there = f"keys that differ between runs of a rule: {names(differing) or 'none'}"
    all_keys = {key: members[0].config[key] for members in groups.values() for key in result_options(members[0].config)}
    for key in keys:
        group = key if key in _REFUSED else key.partition(".")[0]
        if group in _REFUSED and (group == key or group != "algorithm"):
            raise DataError(f"--best {key}: cannot be chosen, because {_REFUSED[group]}; {there}")
        if key not in differing and key in all_keys:
            values = list(
                dict.fromkeys(format_value(members[0].config[key]) for members in groups.values() if key in members[0].config)
            )
            same = f"{key}={values[0]} in all runs" if len(values) == 1 else "it differs only between rules"
            raise DataError(f"--best {key}: nothing to choose, because {same}; {there}")
        if key not in differing:
            hint = nearest_key(key, [*differing, *all_keys])
            raise DataError(f"--best {key}: no run has this key{hint}{f' K{there[1:]}' if hint else f'; {there}'}")


def _cells(groups: Groups, keys: Sequence[str], swept: Mapping[str, Sequence[str]]) -> list[dict[str, Sequence[Run]]]:
    """The groups of a task, split by rule and remaining setting; in each part, groups with smaller values come first."""
    cells: dict[str, dict[str, Sequence[Run]]] = {}
    for group, members in groups.items():
        run = members[0]
        rest = [(key, run.config.get(key)) for key in swept[run.result["algorithm"]] if key not in keys]
        versions = [run.result.get(key) for key in VERSIONS]
        cells.setdefault(repr((run.result["algorithm"], versions, rest)), {})[group] = members

    def order(group: str) -> list[Any]:
        return [value_key(groups[group][0].config.get(key)) for key in keys]

    return [{group: cell[group] for group in sorted(cell, key=order)} for cell in cells.values()]


def _choose(cell: Groups, merits: Mapping[str, float]) -> str | None:
    """The first group with the best validation score; None if no group has one. A single group is chosen even without a score,
    provided that it has a finished run and no run that diverged."""
    if len(cell) == 1:
        ((group, members),) = cell.items()
        diverged = any(run.result["status"] == DIVERGED for run in members)
        return group if finished_by_seed(members) and not diverged else None
    choosable = [group for group in cell if not math.isnan(merits[group])]
    return max(choosable, key=lambda group: merits[group], default=None)


def _text(run: Run, keys: Sequence[str]) -> str:
    return " ".join(f"{key}={format_value(run.config[key])}" for key in keys if key in run.config)


def _tried_row(name: str, members: Sequence[Run], keys: Sequence[str], title: str, is_chosen: bool) -> dict[str, Any]:
    config = members[0].config
    return {
        "task": title,
        "label": name,
        **{key: format_value(config[key]) if key in config else UNSET for key in keys},
        "n": len(finished_by_seed(members)),
        "status": status_counts(members),
        f"val_{members[0].primary.name}": validation_score(members),
        "chosen": is_chosen,
    }


def _nothing_chosen(cell: Groups, keys: Sequence[str], title: str) -> str:
    """A line about a rule for which no value could be chosen."""
    runs = [run for members in cell.values() for run in members]
    rule, statuses = runs[0].result["algorithm"], status_counts(runs)
    reason = (
        f"no validation {runs[0].primary.title} to choose by"
        if all(run.finished for run in runs)
        else f"none can be chosen ({statuses})"
    )
    values = f"{len(cell)} value{'s' * (len(cell) > 1)} of {names(keys)}"
    return f"{rule} is not compared ({title}): {values} tried, {reason}"


def _remarks(best: str, cell: Groups, keys: Sequence[str]) -> str:
    """Remarks on a choice: whether the value is the smallest or largest one tried, how many values diverged, and whether the
    numbers of seeds are unequal."""
    remarks = []
    for key in keys:
        tried = sorted({value for members in cell.values() if is_number(value := members[0].config.get(key))})
        chosen = cell[best][0].config.get(key)
        if len(tried) > 1 and is_number(chosen) and chosen in (tried[0], tried[-1]):
            edge = "smallest" if chosen == tried[0] else "largest"
            remarks.append(f"{key}={format_value(chosen)} is the {edge} of {len(tried)} values tried")
    diverged = sum(any(run.result["status"] == DIVERGED for run in members) for members in cell.values())
    if diverged:
        remarks.append(f"{diverged} of {len(cell)} values diverged")
    seeds = [
        len(finished_by_seed(members))
        for members in cell.values()
        if not any(run.result["status"] == DIVERGED for run in members)
    ]
    if min(seeds) < max(seeds):
        remarks.append(f"{min(seeds)} to {max(seeds)} finished seeds per value")
    return "; ".join(remarks)


def _budgets(groups: Groups, chosen: Mapping[str, Chosen]) -> dict[str, dict[str, int]]:
    """The numbers of values, seeds and epochs of each group, as {quantity: {group: number}}; the epochs are those of a finished
    run."""
    finished = {group: list(finished_by_seed(members).values()) for group, members in groups.items()}
    return {
        "values": {group: chosen[group].tried for group in groups},
        "seeds": {group: len(of_group) for group, of_group in finished.items()},
        "epochs": {group: epochs for group, of_group in finished.items() if of_group and (epochs := of_group[0].epochs)},
    }


def _budget_notes(groups: Groups, chosen: Mapping[str, Chosen]) -> dict[str, str]:
    """If the budgets of a task's rows are unequal, a note for each row that states its budget and those of the other rows."""
    notes: dict[str, list[str]] = {}
    for what, counts in _budgets(groups, chosen).items():
        if len(set(counts.values())) > 1:
            for group, count in counts.items():
                unit = what[:-1] if count == 1 else what
                notes.setdefault(group, []).append(f"{count} {unit} (others {_others(counts, group)})")
    return {group: f"unequal budgets: {', '.join(parts)}" for group, parts in notes.items()}


def _others(counts: Mapping[str, int], group: str) -> str:
    others = sorted({count for other, count in counts.items() if other != group})
    return str(others[0]) if len(others) == 1 else f"{others[0]} to {others[-1]}"


def _unequal(title: str, groups: Groups, chosen: Mapping[str, Chosen], labels: Mapping[str, str], keys: Sequence[str]) -> str:
    """A line about unequal budgets among the compared rows of a task; empty if the budgets are equal."""
    parts = []
    for what, counts in _budgets(groups, chosen).items():
        if len(set(counts.values())) > 1:
            name = f"values of {names(keys)}" if what == "values" else what
            by_count: dict[int, list[str]] = {}
            for group, count in counts.items():
                by_count.setdefault(count, []).append(labels[group])
            parts.append(f"{name}: " + ", ".join(f"{count} ({abridged(by_count[count])})" for count in sorted(by_count)))
    return f"unequal budgets ({title}): {'; '.join(parts)}" if parts else ""


def abridged(items: Iterable[str], most: int = 6) -> str:
    """The items as text; a long list is shortened to its first items and the number of the others."""
    items = list(items)
    return names(items if len(items) <= most else [*items[: most - 1], f"{len(items) - most + 1} more"])
