"""Runs in groups that differ in the seed alone, groups in tasks that can be compared, and all in an order of their own."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fa_bench.labels import differing, label
from fa_bench.report.runs import FINISHED, Run

CONTROL, FLOOR = "bp", "frozen"
Groups = Mapping[str, Sequence[Run]]


def in_order(runs: Iterable[Run]) -> list[Run]:
    """The runs in an order that follows from their records alone, so that a report does not depend on where they lie.

    By dataset, architecture, the control, the floor, the label (numbers in it by value), seed.
    """
    runs = sorted(runs, key=lambda run: (run.result["group"], run.result["seed"], json.dumps(run.result, sort_keys=True)))
    labels = group_labels(group_runs(runs))

    def key(run: Run) -> Any:
        task = [str(run.result.get(key)) for key in ("dataset", "architecture")]
        rank = {CONTROL: 0, FLOOR: 1}.get(run.result["algorithm"], 2)
        return task, rank, _natural(labels[run.result["group"]]), run.result["group"]

    return sorted(runs, key=key)


def _natural(text: str) -> list[Any]:
    """A sort key in which numbers count by their value: words and numbers take turns."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[-+]?\d+)?)", text)
    return [float(part) if index % 2 else part for index, part in enumerate(parts)]


def group_runs(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs of each group, that is of each config up to its seed, in the order in which the groups first appear."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.result["group"], []).append(run)
    return groups


def group_labels(groups: Groups) -> dict[str, str]:
    """What to call each group: its label; where several groups share it, with what their configs differ in.

    A group that is still not told apart, for its config is not there or says nothing, goes by its own name.
    """
    labels = {group: str(runs[0].result["label"]) for group, runs in groups.items()}
    for name in [name for name, count in Counter(labels.values()).items() if count > 1]:
        configs = {group: groups[group][0].config for group, label in labels.items() if label == name}
        keys = differing(configs.values())
        labels |= {group: label(name, config, keys) for group, config in configs.items()}
    shared = Counter(labels.values())
    return {group: label if shared[label] == 1 else group for group, label in labels.items()}


def tasks(groups: Groups) -> dict[str, dict[str, Sequence[Run]]]:
    """The groups by what they learn: by dataset and architecture with their options. Title -> groups, in order.

    A title names dataset and architecture, and options in which tasks of these names differ.
    """
    found: dict[str, dict[str, Sequence[Run]]] = {}
    for group, members in groups.items():
        found.setdefault(repr(sorted(_task(members[0]).items(), key=str)), {})[group] = members
    firsts = {key: next(iter(members.values()))[0] for key, members in found.items()}
    titles = {key: f"{run.result.get('dataset')}, {run.result.get('architecture')}" for key, run in firsts.items()}
    for name in [name for name, count in Counter(titles.values()).items() if count > 1]:
        configs = {key: _task(firsts[key]) for key, title in titles.items() if title == name}
        keys = differing(configs.values())
        titles |= {key: label(name, config, keys) for key, config in configs.items()}
    titled: dict[str, dict[str, Sequence[Run]]] = {}
    for key, members in found.items():
        titled.setdefault(titles[key], {}).update(members)  # where a config cannot be read, nothing may tell two tasks apart
    return titled


def _task(run: Run) -> dict[str, Any]:
    """What of a run's config decides what is learned and by which network."""
    own = {key: run.result.get(key) for key in ("dataset", "architecture")}
    return own | {key: value for key, value in run.config.items() if key.split(".")[0] in own}


def reference(algorithm: str, run: Run, groups: Groups) -> tuple[Sequence[Run], str]:
    """The group of `algorithm` that `run` is to be compared with, empty where there is none, and a note on why not.

    It has the run's task. Each rule may have an optimizer of its own, so a single group fits whatever its optimizer; among
    several the one whose config differs least does, and none where several differ as little.
    """
    if run.result["algorithm"] == algorithm:
        return [], ""
    fitting = [members for members in groups.values()
               if members[0].result["algorithm"] == algorithm and _task(members[0]) == _task(run)]
    for distance in (lambda other: sum(run.result.get(key) != other.result.get(key) for key in ("optimizer", "epochs")),
                     lambda other: _differences(run, other)):
        distances = [distance(members[0]) for members in fitting]
        fitting = [members for members, far in zip(fitting, distances, strict=True) if far == min(distances)]
    if len(fitting) > 1:
        return [], f"several {algorithm} groups fit"
    return (fitting[0] if fitting else []), ""


def _differences(one: Run, other: Run) -> int:
    """In how many keys two runs' configs differ, the rule's own options apart."""
    keys = differing([{key: value for key, value in run.config.items() if key.split(".")[0] != "algorithm"}
                      for run in (one, other)])
    return len(keys)


def finished_by_seed(runs: Iterable[Run]) -> dict[int, Run]:
    """The finished run of each seed: the last one given, because counting a repeated seed twice understates the spread."""
    return {run.result["seed"]: run for run in runs if run.finished}


def status_counts(runs: Iterable[Run]) -> str:
    """How many runs ended how, for example ``2 finished, 1 diverged``."""
    counts = Counter(run.result["status"] for run in runs)
    return ", ".join(f"{counts[status]} {status}" for status in sorted(counts, key=lambda s: (s != FINISHED, s)))
