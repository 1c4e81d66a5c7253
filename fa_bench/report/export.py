"""The rows of a report for other programs, as LaTeX, as JSON, and as a table with one row per run."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fa_bench.config.labels import differing_keys
from fa_bench.errors import printable
from fa_bench.objectives.scores import ACCURACY, PARTS
from fa_bench.report.columns import COLUMNS, columns_of, primary_scores
from fa_bench.report.groups import group_labels, group_runs
from fa_bench.report.numbers import number
from fa_bench.report.quantities import scores_in
from fa_bench.report.runs import VERSIONS, Run, metrics_of
from fa_bench.report.states import reason
from fa_bench.report.text import with_std
from fa_bench.utils.files import resolved

#: LaTeX code for the characters that LaTeX would not print as they are; [ and * are special only after the end of a row.
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "`": r"\textasciigrave{}",
    "|": r"\textbar{}",
    '"': "''",
    "[": "{[}",
    "*": "{*}",
    **{char: f"\\{char}" for char in "&%$#_{}"},
}
_ACCURACIES = ("train_accuracy", "val_accuracy", "test_accuracy", "test_accuracy_at_best_val")
_LOSSES = ("train_loss", "val_loss", "test_loss")
#: The columns of `runs_table` that contain measured seconds.
RUN_TIMINGS = ["seconds", "seconds_per_epoch"]


def escape_latex(text: str) -> str:
    """Escape arbitrary text for LaTeX. A character beyond ASCII is replaced by its code, such as ``U+00E9``, so that the text
    works in any encoding."""
    escaped = "".join(_LATEX.get(char, char if char.isascii() else f"U+{ord(char):04X}") for char in printable(text))
    return re.sub("-(?=-)", "-{}", escaped)  # two hyphens would become a dash


def to_latex(frame: pd.DataFrame) -> str:
    """The main columns as a LaTeX tabular in plain ASCII text, which requires the package booktabs; columns that are blank in
    every row are omitted.

    Args:
        frame: from `table.summarise`.
    """
    columns = {
        "rule": ("l", [escape_latex(label) for label in frame["label"]]),
        r"$n$": ("r", [str(n) for n in frame["n"]]),
        **{
            title: ("r", _math(with_std(frame, name)))
            for score in primary_scores(frame)
            for title, name in (
                ((r"validation (\%)", "val_accuracy"), (r"test (\%)", "test_accuracy"))
                if score == ACCURACY
                else (
                    (f"validation {escape_latex(score.in_unit)}", f"val_{score.name}"),
                    (f"test {escape_latex(score.in_unit)}", f"test_{score.name}"),
                )
            )
        },
        "difference from bp": ("r", _differences(frame)),
        r"$p$ (Holm)": ("r", [_number(value, ".2g") for value in frame["bp_difference_p_holm"]]),
        "beats floor": ("l", ["--" if pd.isna(beats) else "yes" if beats else "no" for beats in frame["floor"]]),
    }
    shown = {title: column for title, column in columns.items() if set(column[1]) - {"--"}}
    lines = [" & ".join(cells) + r" \\" for cells in zip(*(cells for _, cells in shown.values()), strict=True)]
    return (
        "\n".join(
            [
                r"% Requires \usepackage{booktabs}. Scores are mean and standard deviation over n seeds; differences (of",
                "% accuracies in percentage points) are paired by seed, with half the 95 % t interval (two seeds: the range).",
                rf"\begin{{tabular}}{{{''.join(align for align, _ in shown.values())}}}",
                r"\toprule",
                " & ".join(shown) + r" \\",
                r"\midrule",
                *lines,
                r"\bottomrule",
                r"\end{tabular}",
            ]
        )
        + "\n"
    )


def _math(cells: Sequence[str]) -> list[str]:
    return ["--" if cell == "-" else f"${cell.strip().replace('±', chr(92) + 'pm')}$" for cell in cells]


def _number(value: float, form: str) -> str:
    if math.isnan(value):
        return "--"
    mantissa, _, exponent = format(value, form).partition("e")
    return f"${mantissa} \\times 10^{{{int(exponent)}}}$" if exponent else f"${mantissa}$"


def _differences(frame: pd.DataFrame) -> list[str]:
    """The cells of the difference from bp, with as many decimal places as in the Markdown table."""
    form = columns_of(frame)["bp_difference"].format
    unsigned = columns_of(frame)["bp_difference_ci95"].format
    cells = []
    for row in frame.to_dict("records"):
        centre, half, low, high = (row[f"bp_difference{end}"] for end in ("", "_ci95", "_low", "_high"))
        if math.isnan(centre):
            cells.append("--")
        elif not math.isnan(half):
            cells.append(f"${centre:{form}} \\pm {half:{unsigned}}$")
        else:
            spread = "" if math.isnan(low) else f" (${low:{form}}$ to ${high:{form}}$)"
            cells.append(f"${centre:{form}}${spread}")
    return cells


def to_json(frame: pd.DataFrame) -> str:
    """The rows as a JSON list of objects with typed values: numbers, booleans, text and lists. Blank cells are null."""
    counts = {name for name, column in COLUMNS.items() if column.format == ".0f"}
    rows = [{name: _plain(row[name], name in counts) for name in frame} for row in frame.to_dict("records")]
    for row in rows:
        row["seeds"] = [int(seed) for seed in (row["seeds"] or "").split()]
    return json.dumps(rows, indent=1, allow_nan=False) + "\n"


def _plain(value: Any, is_count: bool) -> Any:
    if hasattr(value, "item"):  # a NumPy scalar
        value = value.item()
    if isinstance(value, (list, tuple)):
        return [_plain(item, is_count=False) for item in value]
    if isinstance(value, float):
        return None if not math.isfinite(value) else int(value) if is_count else value
    return None if value == "" else value


def _seconds_per_epoch(run: Run) -> float:
    """The seconds of training per epoch; NaN if the run completed no epoch."""
    if not run.epochs or run.result.get("epoch") == 0:
        return math.nan
    return number(run.result.get("seconds")) / run.epochs


def _score_keys(run: Run) -> list[str]:
    first, *others = (score.name for score in run.scores)
    return [
        *(f"{part}_{first}" for part in PARTS),
        f"test_{first}_at_best_val",
        *(f"{part}_{name}" for name in others for part in PARTS),
    ]


def runs_table(runs: Sequence[Run], folder: Path) -> pd.DataFrame:
    """A table with one row per run, finished or not, in the given order.

    The first columns are the directory relative to `folder`, the label, the status, the seed, the names of the components and the
    experiment, and each other key in which the configs differ. These columns are followed by the scores (accuracies in %) and
    losses of the last epoch, the means over layers of the alignment metrics, the epochs, the seconds of training, and hashes.
    `reason` says why a run did not finish. Values that a run did not record are blank.
    """
    labels = group_labels(group_runs(runs))
    names = ("algorithm", "architecture", "dataset", "optimizer", "experiment")
    swept = [key for key in differing_keys(run.config for run in runs) if key not in names]
    metrics, scores = metrics_of(runs), scores_in(runs)
    rows = [
        {
            "directory": Path(os.path.relpath(resolved(run.directory), resolved(folder))).as_posix(),
            "label": labels[run.row],
            "status": run.result["status"],
            "seed": run.result["seed"],
            **{key: run.result.get(key) for key in names},
            **{key: run.config[key] for key in swept if key in run.config},
            **dict.fromkeys(_ACCURACIES if ACCURACY in scores else (), math.nan),
            **{key: run.score(key) for key in _score_keys(run)},
            **{key: number(run.metrics[-1].get(key)) if run.metrics else math.nan for key in _LOSSES},
            **{name: run.layer_mean(name, run.result.get("angles")) for name in metrics},
            "epoch": run.metrics[-1]["epoch"] if run.metrics else run.result.get("epoch"),
            "epochs": run.result.get("epochs"),
            "best_epoch": run.result.get("best_epoch"),
            "seconds": number(run.result.get("seconds")),
            "seconds_per_epoch": _seconds_per_epoch(run),
            "group": run.result["group"],
            **{key: run.result.get(key) for key in (*VERSIONS, "weights_hash")},
            "reason": reason(run.result) if not run.finished else "",
        }
        for run in runs
    ]
    columns = list(dict.fromkeys(["directory", "label", "status", "seed", *names, *swept, *(key for row in rows for key in row)]))
    frame = pd.DataFrame(
        {name: pd.Series([row.get(name, math.nan) for row in rows], dtype=object if name in swept else None) for name in columns}
    )
    frame.attrs["swept"] = swept
    return frame
