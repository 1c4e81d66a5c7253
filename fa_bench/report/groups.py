"""Runs in groups that differ in the seed alone, groups in tasks that can be compared, and all in an order of their own."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fa_bench.config.labels import DATA_DIR, differing_keys, label, result_options
from fa_bench.report.numbers import known, mean
from fa_bench.report.runs import FINISHED, VERSIONS, Run

CONTROL, FLOOR = "bp", "frozen"
Groups = Mapping[str, Sequence[Run]]


def in_order(runs: Iterable[Run]) -> list[Run]:
    """The runs in an order that follows from their records alone, so that a report does not depend on where they lie.

    By dataset, architecture, the control, the floor, the label (numbers in it by value), seed.
    """
    runs = sorted(runs, key=lambda run: (run.row, run.result["seed"], json.dumps(run.result, sort_keys=True)))
    labels = group_labels(group_runs(runs))

    def key(run: Run) -> Any:
        task = [str(run.result.get(key)) for key in ("dataset", "architecture")]
        rank = {CONTROL: 0, FLOOR: 1}.get(run.result["algorithm"], 2)
        return task, rank, _natural(labels[run.row]), run.row

    return sorted(runs, key=key)


def _natural(text: str) -> list[Any]:
    """A sort key in which numbers count by their value: words and numbers take turns."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[-+]?\d+)?)", text)
    return [float(part) if index % 2 else part for index, part in enumerate(parts)]


def group_runs(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs of each row: of each config up to its seed, version of the code and data, in the order of first appearance."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.row, []).append(run)
    return groups


def group_labels(groups: Groups) -> dict[str, str]:
    """What to call each group: its label; where several groups share it, with what their configs differ in, and with the code
    that ran them and the data where those differ.

    A group that is still not told apart, for its config is not there or says nothing, goes by its own name.
    """
    labels = {group: runs[0].result["label"] for group, runs in groups.items()}
    for name in [name for name, count in Counter(labels.values()).items() if count > 1]:
        configs = {group: groups[group][0].config for group, label in labels.items() if label == name}
        keys = differing_keys(configs.values())
        labels |= {group: label(name, config, keys) for group, config in configs.items()}
    for key, word in VERSIONS.items():
        for name in [name for name, count in Counter(labels.values()).items() if count > 1]:
            hashes = {group: groups[group][0].result.get(key) for group, label in labels.items() if label == name}
            several = set(hashes.values())
            if len(several) > 1:
                length = next((n for n in (8, 16) if len({str(one)[:n] for one in several}) == len(several)), None)
                labels |= {group: f"{name} {word}={one[:length] if one else 'unknown'}" for group, one in hashes.items()}
    shared = Counter(labels.values())
    names = Counter(runs[0].result["group"] for runs in groups.values())
    own = {group: name if names[name := runs[0].result["group"]] == 1 else group for group, runs in groups.items()}
    return {group: label if shared[label] == 1 else own[group] for group, label in labels.items()}


def tasks(groups: Groups) -> dict[str, dict[str, Sequence[Run]]]:
    """The groups by what they learn: by dataset (and its folder, where it is one) and architecture with their options.

    Title -> groups, in order. A title names dataset and architecture, and options in which tasks of these names differ.
    """
    found: dict[str, dict[str, Sequence[Run]]] = {}
    for group, members in groups.items():
        found.setdefault(repr(sorted(_task(members[0]).items(), key=str)), {})[group] = members
    firsts = {key: next(iter(members.values()))[0] for key, members in found.items()}
    titles = {key: f"{run.result.get('dataset')}, {run.result.get('architecture')}" for key, run in firsts.items()}
    for name in [name for name, count in Counter(titles.values()).items() if count > 1]:
        configs = {key: _task(firsts[key]) for key, title in titles.items() if title == name}
        keys = differing_keys(configs.values())
        titles |= {key: label(name, config, keys) for key, config in configs.items()}
    titled: dict[str, dict[str, Sequence[Run]]] = {}
    for key, members in found.items():
        titled.setdefault(titles[key], {}).update(members)  # where a config cannot be read, nothing may tell two tasks apart
    return titled


def _task(run: Run) -> dict[str, Any]:
    """What of a run's config decides what is learned and by which network."""
    own = {key: run.result.get(key) for key in ("dataset", "architecture")}
    return own | {key: value for key, value in result_options(run.config).items() if key.split(".")[0] in (*own, DATA_DIR)}


class Reference(NamedTuple):
    """The runs that a row is compared with, empty where there are none; their label where the task has several such groups;
    and what a reader has to know about the choice, or why there is none."""

    runs: Sequence[Run] = ()
    label: str = ""
    note: str = ""


def reference(algorithm: str, run: Run, groups: Groups) -> Reference:
    """The group of `algorithm` that `run` is to be compared with.

    It has the run's task. Each rule may have an optimizer of its own, so a single group fits whatever its optimizer. Among
    several it is one of the same code and data, where there is such a one, and whose setting is the run's own or differs from it
    in fewest keys; of those that differ in as many, the one with the best validation accuracy (last epoch, mean over the
    finished runs), and none where none has one.
    """
    if run.result["algorithm"] == algorithm:
        return Reference()
    fitting = {group: members for group, members in groups.items()
               if members[0].result["algorithm"] == algorithm and _task(members[0]) == _task(run)}
    if not fitting:
        return Reference()
    if len(fitting) == 1:
        (members,) = fitting.values()
        return Reference(members, "", _other_version(algorithm, run, members))
    far = {group: _distance(run, members[0]) for group, members in fitting.items()}
    near = [group for group in fitting if far[group] == min(far.values())]
    chosen, how = near[0], ""
    if len(near) > 1:
        validation = {group: mean(other.result.get("val_accuracy") for other in finished_by_seed(fitting[group]).values())
                      for group in near}
        if not known(validation.values()):
            return Reference(note=f"several {algorithm} groups fit, and none has a validation accuracy to choose by")
        chosen = max(near, key=lambda group: known([validation[group]]))
        how = f"{algorithm} by validation out of {len(near)} that fit as well"
    name = group_labels(groups)[chosen]
    lacking = "" if finished_by_seed(fitting[chosen]) else f"{name} has no finished run"
    code = _other_version(algorithm, run, fitting[chosen])
    return Reference(fitting[chosen], name, "; ".join(filter(None, (how, lacking, code))))


def _other_version(algorithm: str, run: Run, members: Sequence[Run]) -> str:
    """A note where the reference's runs are not of the same code or data as `run`."""
    other = [word for key, word in VERSIONS.items() if run.result.get(key) != members[0].result.get(key)]
    return f"the runs of {algorithm} are of other {' and '.join(other)}" if other else ""


def _distance(run: Run, other: Run) -> tuple[int, int, int]:
    """How far two runs are apart: in code and data, in optimizer and epochs, then in any key but the rule and its own options."""
    keys = differing_keys([{key: value for key, value in each.config.items() if key.split(".")[0] != "algorithm"}
                      for each in (run, other)])
    return (sum(run.result.get(key) != other.result.get(key) for key in VERSIONS),
            sum(run.result.get(key) != other.result.get(key) for key in ("optimizer", "epochs")), len(keys))


def finished_by_seed(runs: Iterable[Run]) -> dict[int, Run]:
    """The finished run of each seed: the last one given, because counting a repeated seed twice understates the spread."""
    return {run.result["seed"]: run for run in runs if run.finished}


def status_counts(runs: Iterable[Run]) -> str:
    """How many runs ended how, for example ``2 finished, 1 diverged``."""
    counts = Counter(run.result["status"] for run in runs)
    return ", ".join(f"{counts[status]} {status}" for status in sorted(counts, key=lambda s: (s != FINISHED, s)))
