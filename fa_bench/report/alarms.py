"""Alarms: values of layers beyond the thresholds that metrics and probes declare, and rules that do not beat a floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from fa_bench.metrics.alarm import Alarm
from fa_bench.registry.registries import METRICS, PROBES
from fa_bench.report.columns import Column
from fa_bench.report.groups import finished_by_seed, group_runs, is_floor
from fa_bench.report.numbers import known, mean
from fa_bench.report.references import References
from fa_bench.report.runs import Run

ALARM_COLUMNS = {
    "label": Column("rule"),
    "quantity": Column("quantity"),
    "layer": Column("layer"),
    "value": Column("value", ".4g"),
    "condition": Column("alarm if"),
    "runs": Column("runs"),
    "meaning": Column("meaning"),
}
LEGEND = """\
The thresholds are declared by the metrics and probes and apply to values at the end of training. The column `value` gives the
most extreme value of the finished runs, and `runs` gives the number of runs beyond the threshold. Scores are means over the
finished runs, accuracies in %. docs/faeval.md explains the alarms.
"""


def declared_alarms() -> dict[str, Alarm]:
    """A map {quantity: alarm} with the thresholds that all metrics and probes declare, in the order of their names."""
    components: tuple[Mapping[str, Any], ...] = (METRICS, PROBES)
    return {name: alarm for registry in components for cls in registry.values() for name, alarm in cls.alarms.items()}


def alarms(runs: Sequence[Run], reference: str) -> tuple[pd.DataFrame, str]:
    """The alarms of a report's runs.

    Args:
        runs: the runs.
        reference: how the rows of floors are chosen, see `references.References`.

    Returns:
        A table with the columns `ALARM_COLUMNS` and one row per group, quantity and layer with an alarm, and an explanation. If
        there was no alarm, the explanation says so; if there was nothing to check, it is empty.
    """
    groups = group_runs(runs)
    references = References(groups, reference)
    thresholds = declared_alarms()
    floors = [rule for rule in dict.fromkeys(run.result["algorithm"] for run in runs) if is_floor(rule)]
    rows: list[tuple[Any, ...]] = []
    checked: dict[str, int] = {}
    for group, members in groups.items():
        finished, label = list(finished_by_seed(members).values()), references.labels[group]
        for quantity, alarm in thresholds.items():
            for layer in dict.fromkeys(layer for run in finished for layer in run.layers(quantity)):
                values = known(run.layers(quantity).get(layer) for run in finished)
                checked[quantity] = checked.get(quantity, 0) + len(values)
                if beyond := [value for value in values if alarm.fires(value)]:
                    worst = max(beyond) if alarm.above else min(beyond)
                    rows.append(
                        (label, quantity, layer, worst, alarm.condition, f"{len(beyond)} of {len(values)}", alarm.meaning)
                    )
        for floor in [] if is_floor(members[0].result["algorithm"]) else floors:
            other = references.of(floor, members[0])
            primary = members[0].primary
            score = f"test_{primary.name}"
            ours, theirs = (known(run.score(score) for run in of) for of in (finished, finished_by_seed(other.runs).values()))
            if ours and theirs:
                checked[score] = checked.get(score, 0) + 1
                if not primary.is_better(mean(ours), mean(theirs)):
                    sign = "<=" if primary.higher_is_better else ">="
                    rows.append(
                        (
                            label,
                            score,
                            "",
                            mean(ours),
                            f"{sign} {mean(theirs):{primary.format}} of {other.label}",
                            "",
                            f"Not better than the floor {floor}: training the rest of the net gained nothing.",
                        )
                    )
    counts = ", ".join(f"{number} of {name}" for name, number in checked.items() if number)
    frame = pd.DataFrame(rows, columns=list(ALARM_COLUMNS))
    if not counts:
        return frame, ""
    return frame, f"{LEGEND}Checked: {counts}.\n" if rows else f"No alarm. Values checked: {counts}.\n"
