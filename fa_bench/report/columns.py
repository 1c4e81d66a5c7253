"""The columns of the comparison table, with their titles and formats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd

from fa_bench.metrics.alignment.base import Metric, declared
from fa_bench.objectives.scores import ACCURACY, Score
from fa_bench.registry.registries import METRICS
from fa_bench.report.cost import MEASURED, PREDICTED
from fa_bench.report.groups import FLOOR


class Column(NamedTuple):
    """How to show a column: its title with the unit, and its number format (None for text).

    `timing`: whether the values are measurements, such as seconds, memory and energy, which differ when the same runs are
    repeated. `of`: for a column that shows the spread of another one, the title of that column, because titles such as "std" are
    not unique.
    """

    title: str
    format: str | None = None
    timing: bool = False
    of: str = ""


def metric_columns(metrics: Mapping[str, type[Metric]]) -> dict[str, Column]:
    """The table columns for those alignment metrics that have a column."""
    return {
        name: Column(f"{metric.title} ({metric.unit})" if metric.unit else metric.title, ".1f" if metric.unit else ".2f")
        for name, metric in metrics.items()
        if metric.column
    }


def _statistics_columns(name: str, title: str, form: str) -> dict[str, Column]:
    return {
        name: Column(title, form),
        f"{name}_std": Column("std", form, of=title),
        f"{name}_ci95": Column("± 95 %", form, of=title),
        f"{name}_low": Column("lowest", form, of=title),
        f"{name}_high": Column("highest", form, of=title),
    }


def score_columns(score: Score) -> dict[str, Column]:
    """The table columns for a primary score."""
    unit = f" ({score.unit})" if score.unit else ""
    titles = {
        f"val_{score.name}": f"validation {score.title}",
        f"test_{score.name}": f"test {score.title}",
        f"test_{score.name}_at_best_val": f"test {score.title} at best validation",
    }
    return {
        name: column
        for key, title in titles.items()
        for name, column in _statistics_columns(key, f"{title}{unit}", score.format).items()
    }


def floor_column(score: Score) -> dict[str, Column]:
    """The table column for the floor's mean of a primary score."""
    return {f"floor_{score.name}": Column(f"floor: {FLOOR}{f' ({score.unit})' if score.unit else ''}", score.format)}


_DIFFERENCE, _PUBLISHED = "paired difference from bp (points)", "published (%)"
COLUMNS = {
    "label": Column("rule"),
    "group": Column("group"),
    "code_hash": Column("code"),
    "data_hash": Column("data"),
    "architecture": Column("architecture"),
    "dataset": Column("dataset"),
    "optimizer": Column("optimizer"),
    "epochs": Column("epochs", ".0f"),
    "n": Column("n", ".0f"),
    "runs": Column("runs", ".0f"),
    "seeds": Column("seeds"),
    "status": Column("status"),
    "unfinished": Column("not finished"),
    **score_columns(ACCURACY),
    "bp_difference": Column(_DIFFERENCE, "+.2f"),
    "bp_difference_ci95": Column("± 95 %", ".2f", of=_DIFFERENCE),
    "bp_difference_low": Column("lowest", "+.2f", of=_DIFFERENCE),
    "bp_difference_high": Column("highest", "+.2f", of=_DIFFERENCE),
    "bp_difference_n": Column("pairs", ".0f"),
    "bp_difference_dz": Column("effect size (Cohen's d_z)", "+.2f"),
    "bp_difference_p": Column("p (paired t test)", ".2g"),
    "bp_difference_p_holm": Column("p (Holm)", ".2g"),
    "bp_row": Column("paired with"),
    **floor_column(ACCURACY),
    "floor_row": Column("floor's row"),
    "floor": Column("beats floor"),
    **metric_columns(declared(METRICS)),
    "seconds": Column("seconds", ".1f", timing=True),
    "seconds_per_epoch": Column("seconds per epoch", ".2f", timing=True),
    **{name: Column(*column) for name, column in PREDICTED.items()},
    **{name: Column(*column, timing=True) for name, column in MEASURED.items()},
    "published": Column(_PUBLISHED, ".2f"),
    "published_std": Column("std", ".2f", of=_PUBLISHED),
    "published_difference": Column("difference from published (points)", "+.2f"),
    "published_source": Column("published in"),
    "tried": Column("values tried", ".0f"),
    "chosen": Column("chosen"),
    "note": Column("note"),
}
#: The columns of the table `best.Best.tried` for accuracies, in addition to those of the keys.
TRIED_COLUMNS = {"task": Column("task"), **{name: COLUMNS[name] for name in ("label", "n", "status", "val_accuracy", "chosen")}}
#: The columns of paired differences, which are in the unit of the row's score.
_DIFFERENCES = ("bp_difference", "bp_difference_ci95", "bp_difference_low", "bp_difference_high")
#: The columns that differ between two sweeps of the same runs.
TIMINGS = [name for name, column in COLUMNS.items() if column.timing]


def columns_of(frame: pd.DataFrame) -> dict[str, Column]:
    """The title and format of each column of a frame from `table.summarise`, in the order of the frame.

    The result has the columns in `COLUMNS`, those of other primary scores, settings that are not in the labels, and alignment
    metrics of plugins. Other columns are omitted.
    """
    added = metric_columns(declared(name for name in frame.attrs.get("metrics", ()) if name not in COLUMNS))
    added |= {key: Column(key) for key in frame.attrs.get("settings", ())}
    scores = primary_scores(frame)
    for score in scores:
        added |= {**score_columns(score), **floor_column(score)}
    if any(score.unit != "%" for score in scores):  # the differences are in the unit of each row's score
        added |= {
            name: Column(column.title.replace(" (points)", ""), column.format.replace(".2f", ".4f"))
            for name, column in COLUMNS.items()
            if name in _DIFFERENCES and column.format
        }
    return {name: column for name in frame if (column := {**COLUMNS, **added}.get(name)) is not None}


def primary_scores(frame: pd.DataFrame) -> list[Score]:
    """The primary scores of the rows of a frame."""
    return frame.attrs.get("scores") or [ACCURACY]
