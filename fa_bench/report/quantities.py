"""The data that figures show: quantities in the records of runs, their curves over the seeds, and the user's selection."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fa_bench.errors import DataError, names, printable
from fa_bench.metrics.alignment.base import Metric
from fa_bench.objectives.scores import ACCURACY as ACCURACY_SCORE
from fa_bench.objectives.scores import Score
from fa_bench.report.groups import finished_by_seed, group_runs, nearest_key, swept_keys, validation_merit
from fa_bench.report.numbers import known, mean, number, std
from fa_bench.report.runs import Run

ACCURACY, LOSS, ANGLE = "accuracy", "loss", "angle"
#: The formats of figures, and the positions along a run against which curves can be plotted, with their axis labels.
FORMATS = ("png", "svg", "pdf")
POSITIONS = {"epoch": "epoch", "step": "step", "seconds": "seconds of training"}
#: Maps the parts of a dataset from their names in record keys to their names in titles, in the order in which figures show them.
_PARTS = {"test": "test", "val": "validation", "train": "training"}

Value = Callable[[Run, Mapping[str, Any]], float]


class Quantity(NamedTuple):
    """A number in the records of a run, with its name, title, axis label (with unit) and kind, and a function that reads it from
    a record.

    `measured`: whether the quantity is an alignment metric, which may also be measured within epochs. `lower`: whether lower
    values are better. `format`: the number format of the values and their standard deviations.
    """

    name: str
    title: str
    axis: str
    value: Value
    kind: str = ""
    measured: bool = False
    lower: bool = False
    format: str = ".3g"

    def final(self, run: Run) -> float:
        """The value at the end of a run; NaN if it is unknown."""
        return self.value(run, {**(run.metrics[-1] if run.metrics else {}), **run.result})


class Selection(NamedTuple):
    """What figures show, and the formats in which they are written.

    Attributes:
        formats: the formats of the files.
        rules: the rules to show; empty for all.
        metric: the name of the quantity to show; empty for those that a report shows by default.
        x: a position along the runs (`POSITIONS`), or the key of a swept option; empty for epochs and every swept option.
    """

    formats: tuple[str, ...] = FORMATS[:1]
    rules: tuple[str, ...] = ()
    metric: str = ""
    x: str = ""

    @property
    def position(self) -> str:
        """The position along the runs against which curves are plotted."""
        return self.x if self.x in POSITIONS else "epoch"

    def of(self, runs: Sequence[Run]) -> list[Run]:
        """The runs of the selected rules."""
        return [run for run in runs if not self.rules or run.result["algorithm"] in self.rules]

    def checked(self, runs: Sequence[Run]) -> list[Run]:
        """The runs of the selected rules.

        Raises:
            DataError: a part of the selection does not exist in the runs; the message names it and the allowed values.
        """
        for name in self.formats:
            _require("format", name, FORMATS)
        rules = dict.fromkeys(run.result["algorithm"] for run in runs)
        for name in self.rules:
            _require("rules", name, rules)
        selected = self.of(runs)
        if self.metric:
            _require("metric", self.metric, [*scalar_names(scores_in(selected)), *measured_metrics(selected)])
        if self.x:
            _require("x", self.x, [*POSITIONS, *swept_keys(group_runs(selected))])
        return selected


def _require(flag: str, name: str, allowed: Iterable[str]) -> None:
    if name not in (allowed := list(allowed)):
        raise DataError(printable(f"{flag}={name!r} is not available (allowed: {names(allowed)}){nearest_key(name, allowed)}"))


def measured_metrics(runs: Iterable[Run]) -> list[str]:
    """The names of the alignment metrics that some run measured, in their order of appearance."""
    return list(
        dict.fromkeys(
            name
            for run in runs
            for record in (run.result, *measurements(run))
            for name, layers in (record.get("angles") or {}).items()
            if layers
        )
    )


def scores_in(runs: Iterable[Run]) -> list[Score]:
    """The scores of the runs, with primary scores first; accuracy if there are no runs."""
    runs = list(runs)
    found = {score.name: score for score in (*(run.primary for run in runs), *(score for run in runs for score in run.scores))}
    return list(found.values()) or [ACCURACY_SCORE]


def primary(runs: Iterable[Run]) -> Score:
    """The most common primary score of the runs; in a tie, the one that comes first. Accuracy if there are no runs."""
    counts = Counter(run.primary for run in runs)
    return max(counts, key=lambda score: counts[score], default=ACCURACY_SCORE)


def runs_of(groups: Mapping[str, Sequence[Run]]) -> list[Run]:
    """All runs of some groups."""
    return [run for members in groups.values() for run in members]


def scalar_names(scores: Sequence[Score]) -> list[str]:
    """The names of the scores and losses in the records of epochs, in the order in which figures show them."""
    return [f"{part}_{name}" for name in (*(score.name for score in scores), "loss") for part in _PARTS]


def scalar(name: str, scores: Sequence[Score] = (ACCURACY_SCORE,)) -> Quantity:
    """A loss, or one of the given scores in the unit of tables (accuracies in %)."""
    part, _, of = name.partition("_")
    if of == "loss":
        title = f"{_PARTS[part]} loss"
        return Quantity(name, title.capitalize(), title, lambda run, record: number(record.get(name)), LOSS, lower=True)
    score = next(score for score in scores if score.name == of)
    title = f"{_PARTS[part]} {score.title}"
    kind = ACCURACY if score.unit == "%" and score.higher_is_better else "" if score.higher_is_better else LOSS
    return Quantity(
        name,
        title[0].upper() + title[1:],
        f"{title} ({score.unit})" if score.unit else title,
        lambda run, record: score.scale * number(record.get(name)),
        kind,
        lower=not score.higher_is_better,
        format=score.format,
    )


def layer_mean(name: str, metric: type[Metric]) -> Quantity:
    """An alignment metric, averaged over the layers that it declares."""
    return _measured(name, metric.title.capitalize(), metric, lambda run, record: run.layer_mean(name, record.get("angles")))


def in_layer(name: str, metric: type[Metric], layer: str) -> Quantity:
    """An alignment metric in one layer."""
    return _measured(name, layer, metric, lambda run, record: number(((record.get("angles") or {}).get(name) or {}).get(layer)))


def _measured(name: str, title: str, metric: type[Metric], value: Value) -> Quantity:
    axis = f"{metric.title} ({'degrees' if metric.unit == '°' else metric.unit})" if metric.unit else metric.title
    return Quantity(name, title, axis, value, ANGLE if metric.unit == "°" else "", measured=True)


def quantity(name: str, metrics: Mapping[str, type[Metric]], scores: Sequence[Score] = (ACCURACY_SCORE,)) -> Quantity:
    """The quantity with this name, which is a score or loss of every epoch, or one of `metrics`."""
    return scalar(name, scores) if name in scalar_names(scores) else layer_mean(name, metrics[name])


def measurements(run: Run) -> list[dict[str, Any]]:
    """All measurements of the alignment metrics; for runs of older versions, only the last one of each epoch."""
    return run.measurements or [line for line in run.metrics if line.get("angles")]


def curve(members: Sequence[Run], of: Quantity, x: str = "epoch") -> list[tuple[float, float, float]]:
    """The points of a curve: position, mean over seeds, and standard deviation, wherever some run has a value.

    The curve covers the finished runs of a group, or all its runs if none has finished.
    """
    at: dict[float, tuple[list[float], list[float]]] = {}
    for run in list(finished_by_seed(members).values()) or members:
        for record in measurements(run) if of.measured and x != "seconds" else run.metrics:
            value = of.value(run, record)
            if not math.isnan(value) and not math.isnan(position := number(record.get(x))):
                positions, values = at.setdefault(record["step"] if x == "step" else record["epoch"], ([], []))
                positions.append(position)
                values.append(value)
    return [(mean(positions), mean(values), std(values)) for _, (positions, values) in sorted(at.items())]


class Point(NamedTuple):
    """The statistics of a group of runs that share one value of a setting.

    `mean` and `std` are over the finished runs; `std` is the sample standard deviation, NaN for a single run. `validation` is the
    merit by which settings are chosen (`groups.validation_merit`). `n` is the number of finished runs with a known value, and
    `diverged` is the number of runs that diverged.
    """

    x: Any
    mean: float
    std: float
    validation: float
    n: int
    diverged: int


def point(x: Any, members: Sequence[Run], of: Quantity) -> Point:
    """The statistics of a group's final values."""
    finished = finished_by_seed(members).values()
    values = known(of.final(run) for run in finished)
    return Point(
        x,
        mean(values),
        std(values),
        validation_merit(members),
        len(values),
        sum(run.result["status"] == "diverged" for run in members),
    )


def best(groups: Mapping[str, Sequence[Run]]) -> str | None:
    """The group with the best validation score, or the only group; None if there are several and no validation score is known.

    Only groups whose primary score is the most common one are compared.
    """
    of = primary(runs_of(groups))
    merits = {
        group: merit
        for group, members in groups.items()
        if members[0].primary == of and not math.isnan(merit := validation_merit(members))
    }
    return max(merits, key=lambda group: merits[group]) if merits else next(iter(groups), None) if len(groups) == 1 else None
