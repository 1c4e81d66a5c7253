"""The gaps in a report: runs that have not finished or started, missing seeds, missing references, and published rows without a
run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from fa_bench.report.groups import CONTROL, FLOOR, by_rule, finished_by_seed, group_labels, group_runs, is_floor, tasks
from fa_bench.report.published import Entry
from fa_bench.report.runs import Run, short_path
from fa_bench.report.states import describe_status
from fa_bench.runs.readers import read_metrics
from fa_bench.runs.sweep import PlannedRun
from fa_bench.utils.files import METRICS, RESULT, resolved


def unfinished_runs(runs: Sequence[Run]) -> list[str]:
    """A line for each run that has not finished (stopped, diverged, failed, ...), with its status, epochs and reason, see
    `states.describe_status`."""
    labels = group_labels(group_runs(runs))
    return [
        f"{labels[run.row]} seed {run.result['seed']}: {describe_status(run)}"
        f"{'' if (run.directory / RESULT).is_file() else f', no {RESULT}'} ({short_path(run.directory)})"
        for run in runs
        if not run.finished
    ]


def unidentified_run(directory: Path) -> str:
    """A line for a directory that has no result and no config that identifies its run."""
    metrics = read_metrics(directory / METRICS)
    epochs = metrics[-1]["epoch"] if metrics else 0
    return f"no {RESULT}, {epochs} epoch{'s' * (epochs != 1)} done ({short_path(directory)})"


def runs_not_started(directories: Iterable[Path], planned: Iterable[PlannedRun]) -> list[str]:
    """A line for each of `directories`, whose runs have no record yet; it names the run if the run is in `planned`."""
    labels = {resolved(run.directory): run.label for run in planned}
    return [
        f"{f'{label}: ' if (label := labels.get(resolved(directory))) else ''}not started ({short_path(directory)})"
        for directory in directories
    ]


def missing_seeds(runs: Sequence[Run], planned: Iterable[PlannedRun]) -> list[str]:
    """A line for each row that lacks a finished run for a seed that a sweep announced.

    An announced run belongs to the row of the run in its directory. If there is no run in its directory yet, it belongs to the
    row of the runs in the directories beside it, provided that these runs are all in one row.
    """
    groups = group_runs(runs)
    labels = group_labels(groups)
    by_directory = {resolved(run.directory): run for run in runs}
    by_parent: dict[Path, set[str]] = {}
    for directory, run in by_directory.items():
        by_parent.setdefault(directory.parent, set()).add(run.row)
    seeds: dict[str, set[int]] = {}
    for each in planned:
        directory = resolved(each.directory)
        run, beside = by_directory.get(directory), by_parent.get(directory.parent, set())
        if run is not None:
            seeds.setdefault(run.row, set()).add(run.result["seed"])
        elif len(beside) == 1 and (match := re.search(r" seed (\d+)$", each.label)):
            seeds.setdefault(next(iter(beside)), set()).add(int(match[1]))
    missing = {group: sorted(seeds.get(group, set()) - set(finished_by_seed(members))) for group, members in groups.items()}
    return [
        f"{labels[group]}: no finished run with seed {', '.join(map(str, of_group))}"
        for group, of_group in missing.items()
        if of_group
    ]


def missing_references(runs: Sequence[Run]) -> list[str]:
    """A line if a task with several rules has no run of `bp`, and a line if a task with several rules has no run of a floor."""
    rules = {task: set(by_rule(groups)) for task, groups in tasks(group_runs(runs)).items()}
    compared = {task: of_task for task, of_task in rules.items() if len(of_task) > 1}
    without = {
        (CONTROL, "compare the rules with backpropagation"): [task for task in compared if CONTROL not in rules[task]],
        (FLOOR, "see whether the rules beat this floor"): [task for task in compared if not any(map(is_floor, rules[task]))],
    }
    lines = []
    for (reference, purpose), lacking in without.items():
        if lacking:
            where = "" if len(lacking) == len(rules) else f" for ({lacking[0]})"
            more = f" and {len(lacking) - 1} other task{'s' * (len(lacking) > 2)}" if where and len(lacking) > 1 else ""
            lines.append(f"no run of {reference}{where}{more}; include {reference} to {purpose}")
    return lines


def published_without_run(entries: Iterable[Entry], runs: Sequence[Run]) -> list[str]:
    """A line for each published row of the runs' experiments that has no finished run."""
    experiments = {run.experiment for run in runs}
    finished = [run for run in runs if run.finished]
    relevant = [entry for entry in entries if experiments & set(entry.experiments)]
    matched = {_cell(entry) for entry in relevant if any(entry.matches(run) and _has_epoch(entry, run) for run in finished)}
    return [cell for cell in dict.fromkeys(map(_cell, relevant)) if cell not in matched]


def _has_epoch(entry: Entry, run: Run) -> bool:
    return entry.at is None or any(line["epoch"] == entry.at for line in run.metrics)


def _cell(entry: Entry) -> str:
    options = " ".join(f"{key}={value}" for key, value in entry.where.items() if key.startswith("algorithm."))
    rule = f"{entry.rule} {options}".strip()
    task = ", ".join(filter(None, (entry.dataset, entry.architecture)))
    return f"{rule}: {entry.source}{f', {entry.row}' if entry.row else ''} ({task})"
