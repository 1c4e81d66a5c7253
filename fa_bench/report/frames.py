"""Runs as pandas data frames, for notebooks and scripts."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from fa_bench.config.job import VOLATILE
from fa_bench.config.labels import is_number
from fa_bench.objectives.scores import final_keys
from fa_bench.report.runs import Run, Runs, read_run, runs_in
from fa_bench.runs.checked_json import RecordError

if TYPE_CHECKING:
    import pandas as pd

#: The keys of a result that become columns.
_COLUMNS = (
    "status",
    "label",
    "algorithm",
    "architecture",
    "dataset",
    "optimizer",
    "objective",
    "experiment",
    "seed",
    "epoch",
    "test_accuracy",
    "test_accuracy_at_best_val",
    "val_accuracy",
    "train_accuracy",
    "best_epoch",
    "seconds",
    "peak_memory_bytes",
    "code_hash",
    "data_hash",
    "weights_hash",
    "device",
)
#: The columns that have a numeric type even if no run has recorded a value for them.
_NUMBERS = (
    "test_accuracy",
    "test_accuracy_at_best_val",
    "val_accuracy",
    "train_accuracy",
    "best_epoch",
    "seconds",
    "peak_memory_bytes",
    "train_loss",
    "val_loss",
    "test_loss",
    "lr",
    "value",
)
#: The columns of a frame of measurements.
_MEASURED = ("directory", "label", "seed", "step", "epoch", "metric", "layer", "value")


def load_results(*runs: Runs, curves: bool = False, angles: bool = False) -> pd.DataFrame:
    """Load runs into a data frame.

    Args:
        *runs: directories with runs, or runs, as `fa_bench.run` returns them; each run is counted once.
        curves: one row per run and epoch instead of one row per run.
        angles: one row per run, measurement, alignment metric and layer.

    Returns:
        One row per run: its directory, status, components, seed, scores (accuracies as fractions), seconds, the mean over layers
        of every alignment metric, and the options of its config by command-line key, such as ``optimizer.lr``. With `curves`,
        a row has the run's directory, label and seed, and the record of the epoch: losses, scores, learning rate, seconds so far,
        and the means of the alignment metrics that were measured. With `angles`, a row has the run's directory, label and seed,
        and the step, epoch (possibly fractional), metric, layer and value (NaN if undefined). Columns of numbers have a numeric
        type, with NaN for values that are not recorded. A run without a result has no row; a run with a damaged record is skipped
        with a warning.

    Raises:
        DataError: for a directory that does not exist.
        ValueError: if `runs` is empty, or if both `curves` and `angles` are set.
        TypeError: for anything that is neither a directory nor a run.

    Examples:
        >>> import fa_bench
        >>> runs = fa_bench.run("dataset=synthetic", "scale=smoke", algorithm=["bp", "fa"])
        Running 2 jobs...
        >>> frame = fa_bench.load_results("outputs")
        >>> frame[["algorithm", "seed", "status"]]
          algorithm  seed    status
        0        bp     0  finished
        1        fa     0  finished
        >>> fa_bench.load_results(runs, curves=True)[["label", "epoch"]]
          label  epoch
        0    bp      1
        1    fa      1
    """
    import pandas as pd

    if curves and angles:
        raise ValueError("load_results(curves=True, angles=True): two frames; choose one of them")
    if not runs:
        raise ValueError("load_results(): pass a directory, such as 'outputs', or runs")
    rows: list[Any] = []
    for item in runs_in(runs):
        try:
            run = item if isinstance(item, Run) else read_run(item)
            if run is not None:
                rows += _angles(run) if angles else _curves(run) if curves else [_row(run)]
        except RecordError as error:
            warnings.warn(f"skipped: {error}", stacklevel=2)
    columns = _MEASURED if angles else None if rows else ("directory", *(("label", "seed", "epoch") if curves else _COLUMNS))
    return _typed(pd.DataFrame(rows, columns=columns))


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    """Give a numeric type to every column that has only numbers and blanks. The columns in `_NUMBERS` get one even if they are
    blank."""
    for name, column in frame.items():
        present = column.dropna()
        are_numbers = all(map(is_number, present))
        if are_numbers and column.dtype == object and (len(present) or name in _NUMBERS):
            frame[name] = column.astype(float)
    return frame


def _row(run: Run) -> dict[str, Any]:
    options = {key: value for key, value in run.config.items() if key.split(".")[0] not in (*_COLUMNS, *VOLATILE) or "." in key}
    scores = {key: value for key, value in run.result.items() if key in final_keys(run.scores)}
    return {
        "directory": str(run.directory),
        **{key: run.result.get(key) for key in _COLUMNS},
        **scores,
        **_means(run, run.result.get("angles")),
        **options,
    }


def _curves(run: Run) -> list[dict[str, Any]]:
    identity = {"directory": str(run.directory), "label": run.result["label"], "seed": run.result["seed"]}
    return [
        {
            **identity,
            **{key: value for key, value in line.items() if key not in ("angles", "probes", "scores")},
            **_means(run, line.get("angles")),
        }
        for line in run.metrics
    ]


def _angles(run: Run) -> list[tuple[Any, ...]]:
    identity = str(run.directory), run.result["label"], run.result["seed"]
    return [
        (*identity, line["step"], line["epoch"], metric, layer, value)
        for line in run.measurements
        for metric, layers in (line["angles"] or {}).items()
        for layer, value in (layers or {}).items()
    ]


def _means(run: Run, angles: dict[str, Any] | None) -> dict[str, float]:
    return {name: run.layer_mean(name, angles) for name in angles or ()}
