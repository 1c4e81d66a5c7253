"""Choose the rows of bp and of the floor with which the other rows of a task are compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fa_bench.config.labels import differing_keys
from fa_bench.report.groups import Groups, finished_by_seed, group_labels, task_key, validation_merit
from fa_bench.report.runs import VERSIONS, Run

#: The ways to choose a reference among several rows of a rule: by validation score, or by similarity of settings.
BEST, NEAREST = "best", "nearest"
CHOICES = (BEST, NEAREST)


class Reference(NamedTuple):
    """The runs with which a row is compared, if any, with their label and a note on the choice."""

    runs: Sequence[Run] = ()
    label: str = ""
    note: str = ""


class References:
    """Finds the rows of bp and of the floor with which other rows are compared.

    A reference is a row of the same task. Rows with the same code and data as the compared row are preferred; others are used
    with a note. If there are several candidates, `BEST` takes the one with the best primary validation score (last epoch, mean
    over its finished runs), because a reference should be trained as well as possible. `BEST` prefers rows with the same number
    of epochs and the same scale, and takes a row with runs that diverged only if no other row can be chosen. `NEAREST` prefers
    rows with the fewest differences from the compared row in optimizer and epochs, then rows with the fewest differing keys;
    ties go to the best validation score.

    Args:
        groups: all groups that may be references.
        choice: `BEST` or `NEAREST`.
    """

    def __init__(self, groups: Groups, choice: str = BEST) -> None:
        self.choice = choice
        self.labels = group_labels(groups)
        self._validation = {group: validation_merit(members) for group, members in groups.items()}
        self._by_rule: dict[tuple[str, str, str], dict[str, Sequence[Run]]] = {}
        for group, members in groups.items():
            run = members[0]
            self._by_rule.setdefault((run.result["algorithm"], task_key(run), run.primary.name), {})[group] = members

    def of(self, algorithm: str, run: Run) -> Reference:
        """The reference row of the rule `algorithm` for the row of `run`. It has no runs if `run` is itself a run of that rule,
        or if no row can be chosen."""
        rows = self._by_rule.get((algorithm, task_key(run), run.primary.name), {})
        if run.result["algorithm"] == algorithm or not rows:
            return Reference()
        rows = _fewest(rows, {group: _other_versions(run, members[0]) for group, members in rows.items()})
        group, note = self._best(algorithm, run, rows) if self.choice == BEST else self._nearest(algorithm, run, rows)
        if group is None:
            return Reference(note=note)
        notes = [
            note,
            "" if finished_by_seed(rows[group]) else f"{self.labels[group]} has no finished run",
            _other(algorithm, run, rows[group][0]),
        ]
        return Reference(rows[group], self.labels[group], "; ".join(filter(None, notes)))

    def _best(self, algorithm: str, run: Run, rows: Groups) -> tuple[str | None, str]:
        if len(rows) == 1:
            return next(iter(rows)), ""
        finished = {group: members for group, members in rows.items() if finished_by_seed(members)}
        choosable = {group: members for group, members in finished.items() if not math.isnan(self._validation[group])}
        if not finished:
            return None, f"none of {len(rows)} rows of {algorithm} has a finished run"
        if len(finished) == 1:
            return next(iter(finished)), ""
        if not choosable:
            group, note = self._nearest(algorithm, run, finished)
            return group, note or (
                f"{algorithm} chosen by its settings: no row of it can be chosen by validation {run.primary.title}"
            )
        return self._best_scored(
            _fewest(choosable, {group: _other_length(run, members[0]) for group, members in choosable.items()})
        ), ""

    def _nearest(self, algorithm: str, run: Run, rows: Groups) -> tuple[str | None, str]:
        nearest = _fewest(rows, {group: _distance(run, members[0]) for group, members in rows.items()})
        if len(nearest) == 1:
            return next(iter(nearest)), ""
        choosable = {group: members for group, members in nearest.items() if not math.isnan(self._validation[group])}
        if not choosable:
            return None, (
                f"{len(nearest)} rows of {algorithm} have equally similar settings, and none has a "
                f"validation {run.primary.title} to choose by"
            )
        return (
            self._best_scored(choosable),
            f"{algorithm} chosen by validation {run.primary.title} from {len(nearest)} rows with equally similar settings",
        )

    def _best_scored(self, rows: Groups) -> str:
        """The first row with the best validation score."""
        return max(rows, key=lambda group: self._validation[group])


def _fewest(rows: Groups, distances: Mapping[str, tuple[int, ...]]) -> dict[str, Sequence[Run]]:
    least = min(distances.values())
    return {group: members for group, members in rows.items() if distances[group] == least}


def _other_versions(run: Run, other: Run) -> tuple[int]:
    return (sum(run.result.get(key) != other.result.get(key) for key in VERSIONS),)


def _other_length(run: Run, other: Run) -> tuple[int]:
    return (
        (run.result.get("epochs") != other.result.get("epochs"))
        + (run.config.get("scale", "full") != other.config.get("scale", "full")),
    )


def _other(algorithm: str, run: Run, reference: Run) -> str:
    """A note if the runs of the reference are known to differ from `run` in code, data or epochs; otherwise empty."""
    words = [
        word
        for key, word in VERSIONS.items()
        if (own := run.result.get(key)) and (of_reference := reference.result.get(key)) and own != of_reference
    ]
    notes = [f"the runs of {algorithm} used different {' and '.join(words)}"] if words else []
    epochs = reference.result.get("epochs")
    if epochs and run.result.get("epochs") and epochs != run.result["epochs"]:
        notes.append(f"{algorithm} was trained for {epochs} epochs, but this row for {run.result['epochs']}")
    return "; ".join(notes)


def _distance(run: Run, other: Run) -> tuple[int, int]:
    """The number of differences in optimizer and epochs, and the number of keys that differ, not counting the rule and its
    options."""
    keys = differing_keys(
        [{key: value for key, value in each.config.items() if key.split(".")[0] != "algorithm"} for each in (run, other)]
    )
    return sum(run.result.get(key) != other.result.get(key) for key in ("optimizer", "epochs")), len(keys)
