"""Published numbers compared with those of the runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from fa_bench.report.columns import Column
from fa_bench.report.groups import group_labels, group_runs
from fa_bench.report.numbers import half_width, mean, number, std
from fa_bench.report.published import Entry, compare, matching_entries
from fa_bench.report.runs import Run

COLUMNS = {
    "label": Column("rule"),
    "quantity": Column("quantity"),
    "layer": Column("layer"),
    "unit": Column("unit"),
    "n": Column("n", ".0f"),
    "ours": Column("ours", ".3f"),
    "ours_std": Column("std", ".3f"),
    "ours_ci95": Column("± 95 %", ".3f"),
    "published": Column("published", ".3f"),
    "published_low": Column("from", ".3f"),
    "published_high": Column("to", ".3f"),
    "published_spread": Column("±", ".3f"),
    "spread_kind": Column("± is"),
    "published_n": Column("n", ".0f"),
    "difference": Column("difference", "+.3f"),
    "inside": Column("inside"),
    "source": Column("published in"),
    "row": Column("row"),
    "note": Column("note"),
}


def against_published(entries: Sequence[Entry], runs: Sequence[Run]) -> pd.DataFrame:
    """One row per group, published number and layer, in the order of the groups and of `published.yaml`, with the columns
    `COLUMNS`.

    If there are several numbers for one quantity, layer and epoch, the first one in the file is used. If the paper gives a range,
    `inside` says whether our mean lies in it, and `difference` is NaN.
    """
    groups = group_runs(runs)
    labels = group_labels(groups)
    rows: list[dict[str, Any]] = []
    for group, members in groups.items():
        compared: set[tuple[str, str, int | None]] = set()
        for entry in matching_entries(entries, members):
            layers = list(dict.fromkeys(layer for run in members for layer in run.layers(entry.quantity)))
            for layer, values in compare(entry, members, layers, runs):
                if values and (entry.quantity, layer, entry.at) not in compared:
                    compared.add((entry.quantity, layer, entry.at))
                    rows.append({"label": labels[group], "layer": layer, **_row(entry, members, values)})
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"inside": object})


def _row(entry: Entry, members: Sequence[Run], values: Sequence[float]) -> dict[str, Any]:
    ours = mean(values)
    return {
        "quantity": entry.quantity,
        "unit": entry.unit,
        "n": len(values),
        "ours": ours,
        "ours_std": std(values),
        "ours_ci95": half_width(values),
        "published": entry.value,
        "published_low": number(entry.low),
        "published_high": number(entry.high),
        "published_spread": entry.spread,
        "spread_kind": "" if math.isnan(entry.spread) else entry.spread_kind,
        "published_n": math.nan if entry.n is None else entry.n,
        "difference": ours - entry.value,
        "inside": entry.low <= ours <= entry.high if not math.isnan(entry.low) else None,
        "source": entry.source,
        "row": entry.row,
        "note": "; ".join(filter(None, (entry.remark(members), entry.conditions))),
    }
