"""Statistics over the seeds for the measurements of every layer at the end of training: angles, norm ratios and probe results."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from fa_bench.report.columns import Column
from fa_bench.report.groups import finished_by_seed, group_labels, group_runs
from fa_bench.report.numbers import half_width, known, mean, std
from fa_bench.report.runs import VERSIONS, Run

COLUMNS = ("label", "group", *VERSIONS, "architecture", "dataset", "layer", "quantity", "n", "mean", "std", "ci95")
PROBES_LEGEND = """\
Means over the finished runs at the end of training, one per seed; standard deviations are in report_layers.csv. Accuracies and
differences of accuracies (`readout`, `depth_utility`) are fractions. docs/probes.md explains each quantity.
"""


def by_layer(runs: Sequence[Run]) -> pd.DataFrame:
    """One row per group, quantity and layer, with the mean, the sample std and half the 95 % interval of the finished runs' last
    values.

    Angles are in degrees, and accuracies of probes are fractions. A layer without a value has no row.
    """
    groups = group_runs(runs)
    labels = group_labels(groups)
    rows = []
    for group, members in groups.items():
        finished = list(finished_by_seed(members).values())
        first = members[0].result
        for quantity in dict.fromkeys(key for run in finished for key in run.quantities):
            for layer in dict.fromkeys(layer for run in finished for layer in run.layers(quantity)):
                values = known(run.layers(quantity).get(layer) for run in finished)
                if values:
                    rows.append(
                        (
                            labels[group],
                            *(first.get(key) for key in COLUMNS[1:6]),
                            layer,
                            quantity,
                            len(values),
                            mean(values),
                            std(values),
                            half_width(values),
                        )
                    )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def probe_table(layers: pd.DataFrame, quantities: Iterable[str]) -> tuple[pd.DataFrame, dict[str, Column]]:
    """A table with one row per group and layer and one column per quantity; empty if no run measured any of them.

    Args:
        layers: a frame from `by_layer`.
        quantities: names of quantities that probes measured.

    Returns:
        The table and the format of its columns.
    """
    quantities = [name for name in quantities if name not in ("label", "layer")]
    columns = {"label": Column("rule"), "layer": Column("layer"), **{name: Column(name, ".4g") for name in quantities}}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    entries: Any = layers[layers["quantity"].isin(quantities)]
    for entry in entries.to_dict("records"):
        blank = {"label": entry["label"], "layer": entry["layer"], **dict.fromkeys(quantities, math.nan)}
        rows.setdefault((entry["label"], entry["layer"]), blank)[entry["quantity"]] = entry["mean"]
    return pd.DataFrame(list(rows.values()), columns=list(columns)), columns
