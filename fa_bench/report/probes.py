"""What the probes that runs asked for found, by layer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pandas as pd

from fa_bench.report.table import Column

LEGEND = """\
At the end of training, means over the finished runs, one per seed; standard deviations are in report_layers.csv. Accuracies and
differences between them (`readout`, `depth_utility`) are fractions. What each quantity is: docs/probes.md.
"""


def probe_table(layers: pd.DataFrame, quantities: Iterable[str]) -> tuple[pd.DataFrame, dict[str, Column]]:
    """One row for each group and layer, one column for each of `quantities`; empty where no run has any.

    Args:
        layers: what `fa_bench.report.layers.by_layer` gives.
        quantities: names of what probes measured.

    Returns:
        The table and how its columns are shown.
    """
    columns = {name: Column(name, ".4g") for name in quantities} | {"label": Column("rule"), "layer": Column("layer")}
    columns = {name: columns[name] for name in ("label", "layer", *columns)}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    entries: Any = layers[layers["quantity"].isin(list(columns)[2:])]
    for entry in entries.to_dict("records"):
        blank = {name: math.nan for name in columns} | {"label": entry["label"], "layer": entry["layer"]}
        rows.setdefault((entry["label"], entry["layer"]), blank)[entry["quantity"]] = entry["mean"]
    return pd.DataFrame(list(rows.values()), columns=list(columns)), columns
