"""What every layer has at the end: angles, norm ratios and what probes measured, over the seeds."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from fa_bench.report.groups import finished_by_seed, group_labels, group_runs
from fa_bench.report.numbers import half_width, known, mean, std
from fa_bench.report.runs import VERSIONS, Run

COLUMNS = ("label", "group", *VERSIONS, "architecture", "dataset", "layer", "quantity", "n", "mean", "std", "ci95")


def by_layer(runs: Sequence[Run]) -> pd.DataFrame:
    """One row per group, quantity and layer: mean, sample std and half the 95 % interval over the finished runs' last values.

    Angles are in degrees, probes' accuracies fractions; a layer in which no run has a value has no row.
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
                    rows.append((labels[group], *(first.get(key) for key in COLUMNS[1:6]), layer, quantity,
                                 len(values), mean(values), std(values), half_width(values)))
    return pd.DataFrame(rows, columns=list(COLUMNS))
