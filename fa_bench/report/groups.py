"""Groups of runs that differ only in the seed, tasks of groups that can be compared, and the order of both in reports."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fa_bench.config.labels import DATA_DIR, differing_keys, label, result_options
from fa_bench.report.numbers import known, mean
from fa_bench.report.runs import FINISHED, VERSIONS, Run

CONTROL, FLOOR = "bp", "frozen"
Groups = Mapping[str, Sequence[Run]]


def in_order(runs: Iterable[Run]) -> list[Run]:
    """The runs in an order that depends only on their records, so that a report does not depend on where they lie.

    Sorted by dataset, architecture, the control, the floor, the label (numbers in it by value), and seed.
    """
    runs = sorted(runs, key=lambda run: (run.row, run.result["seed"], json.dumps(run.result, sort_keys=True)))
    labels = group_labels(group_runs(runs))

    def key(run: Run) -> Any:
        task = [str(run.result.get(key)) for key in ("dataset", "architecture")]
        rank = {CONTROL: 0, FLOOR: 1}.get(run.result["algorithm"], 2)
        return task, rank, _natural(labels[run.row]), run.row

    return sorted(runs, key=key)


def _natural(text: str) -> list[Any]:
    """A sort key that compares numbers in a text by value: words and numbers alternate."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[-+]?\d+)?)", text)
    return [float(part) if index % 2 else part for index, part in enumerate(parts)]


def group_runs(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs of each row (one config without the seed, version of the code, and data), in the order of first appearance."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.row, []).append(run)
    return groups


def group_labels(groups: Groups) -> dict[str, str]:
    """A distinct label for each group.

    Groups with the same label are distinguished by the keys in which their configs differ, then by the hashes of code and data.
    If neither distinguishes a group, because its config is missing or empty, its label is its group name.
    """
    labels = _distinguished({group: runs[0].result["label"] for group, runs in groups.items()},
                            lambda group: groups[group][0].config)
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


def _distinguished(labels: dict[str, str], config_of: Callable[[str], Mapping[str, Any]]) -> dict[str, str]:
    """The labels; to equal ones, the values of the keys in which their configs differ are added."""
    for name in _duplicates(labels):
        configs = {key: config_of(key) for key, label in labels.items() if label == name}
        keys = differing_keys(configs.values())
        labels = labels | {key: label(name, config, keys) for key, config in configs.items()}
    return labels


def tasks(groups: Groups) -> dict[str, dict[str, Sequence[Run]]]:
    """{title: groups} for each task: a dataset (with its folder if that is the data) and an architecture, with their options.

    A title names dataset and architecture, and the options in which tasks with the same names differ.
    """
    by_task: dict[str, dict[str, Sequence[Run]]] = {}
    for group, members in groups.items():
        by_task.setdefault(repr(sorted(_task(members[0]).items(), key=str)), {})[group] = members
    first = {key: next(iter(members.values()))[0] for key, members in by_task.items()}
    titles = _distinguished({key: f"{run.result.get('dataset')}, {run.result.get('architecture')}" for key, run in first.items()},
                            lambda key: _task(first[key]))
    by_title: dict[str, dict[str, Sequence[Run]]] = {}
    for key, members in by_task.items():
        by_title.setdefault(titles[key], {}).update(members)  # without readable configs, two tasks may have the same title
    return by_title


def _task(run: Run) -> dict[str, Any]:
    """The part of a run's config that defines its task."""
    names = {key: run.result.get(key) for key in ("dataset", "architecture")}
    return names | {key: value for key, value in result_options(run.config).items() if key.split(".")[0] in (*names, DATA_DIR)}


class Reference(NamedTuple):
    """The runs that a row is compared with, if any; their label if the task has several such groups; and a note on the choice."""

    runs: Sequence[Run] = ()
    label: str = ""
    note: str = ""


def reference(algorithm: str, run: Run, groups: Groups) -> Reference:
    """The group of `algorithm` in the task of `run` that `run` is compared with.

    A single group is used whatever its optimizer, because each rule may have its own. Of several, those with the same code and
    data are preferred, then those whose settings differ from the run's in the fewest keys, then the one with the best validation
    accuracy (last epoch, mean over the finished runs); without validation accuracies, none of these is chosen.
    """
    if run.result["algorithm"] == algorithm:
        return Reference()
    candidates = {group: members for group, members in groups.items()
                  if members[0].result["algorithm"] == algorithm and _task(members[0]) == _task(run)}
    if not candidates:
        return Reference()
    if len(candidates) == 1:
        (members,) = candidates.values()
        return Reference(members, "", _version_note(algorithm, run, members))
    distances = {group: _distance(run, members[0]) for group, members in candidates.items()}
    nearest = [group for group in candidates if distances[group] == min(distances.values())]
    chosen, choice = nearest[0], ""
    if len(nearest) > 1:
        validation = {group: mean(other.result.get("val_accuracy") for other in finished_by_seed(candidates[group]).values())
                      for group in nearest}
        if not known(validation.values()):
            return Reference(note=f"{len(nearest)} rows of {algorithm} match equally well, and none has a validation accuracy "
                                  "to choose by")
        chosen = max(nearest, key=lambda group: known([validation[group]]))
        choice = f"{algorithm} chosen by validation accuracy from {len(nearest)} equally close rows"
    name = group_labels(groups)[chosen]
    missing = "" if finished_by_seed(candidates[chosen]) else f"{name} has no finished run"
    version = _version_note(algorithm, run, candidates[chosen])
    return Reference(candidates[chosen], name, "; ".join(filter(None, (choice, missing, version))))


def _version_note(algorithm: str, run: Run, members: Sequence[Run]) -> str:
    """A note if the reference's runs have other code or data than `run`."""
    other = [word for key, word in VERSIONS.items() if run.result.get(key) != members[0].result.get(key)]
    return f"the runs of {algorithm} used different {' and '.join(other)}" if other else ""


def _distance(run: Run, other: Run) -> tuple[int, int, int]:
    """The numbers of differences: in code and data, in optimizer and epochs, and in all keys but the rule and its options."""
    keys = differing_keys([{key: value for key, value in each.config.items() if key.split(".")[0] != "algorithm"}
                      for each in (run, other)])
    return (sum(run.result.get(key) != other.result.get(key) for key in VERSIONS),
            sum(run.result.get(key) != other.result.get(key) for key in ("optimizer", "epochs")), len(keys))


def finished_by_seed(runs: Iterable[Run]) -> dict[int, Run]:
    """The finished run of each seed; of several the last one, because counting a seed twice would understate the spread."""
    return {run.result["seed"]: run for run in runs if run.finished}


def status_counts(runs: Iterable[Run]) -> str:
    """The number of runs with each status, for example ``2 finished, 1 diverged``."""
    counts = Counter(run.result["status"] for run in runs)
    return ", ".join(f"{counts[status]} {status}" for status in sorted(counts, key=lambda s: (s != FINISHED, s)))
