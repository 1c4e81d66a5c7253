"""The cost of rows in a report, both predicted per training step and measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from fa_bench.report.groups import CONTROL, finished_by_seed, task_key
from fa_bench.report.numbers import known, mean, number
from fa_bench.report.runs import Run

#: The titles and formats of the columns of predicted costs.
PREDICTED = {
    "multiplications": ("multiplications per step", ".3g"),
    "multiplications_ratio": ("of bp's (predicted)", ".2f"),
    "bytes_moved": ("bytes moved per step", ".3g"),
    "bytes_moved_ratio": ("of bp's (predicted)", ".2f"),
    "predicted_memory": ("peak memory (bytes, predicted)", ".3g"),
    "predicted_memory_ratio": ("of bp's (predicted)", ".2f"),
}
#: The titles and formats of the columns of measured costs.
MEASURED = {
    "seconds_per_step": ("seconds per step", ".3g"),
    "time_ratio": ("of bp's (measured)", ".2f"),
    "peak_memory": ("peak memory (bytes, measured)", ".3g"),
    "energy_wh": ("energy (Wh)", ".3g"),
    "energy_counters": ("energy measured for", None),
}
#: The columns that a report has only if some run recorded its energy.
ENERGY = ("energy_wh", "energy_counters")
LEGEND = """\
Predicted costs are computed from shapes, for one uncompiled step in single precision. They are the multiplications in matrix
products and convolutions, the bytes of the inputs and outputs of all operations, as if none were fused, and the peak number of
bytes of tensors. Their ratios are relative to backpropagation in the same model. The measured time is the median of the seconds
per step over the finished runs, without evaluation and compilation; its ratio is relative to bp with the same task, batch size,
device, threads and way of execution. The measured peak memory is that of GPUs and includes resident data and evaluation. The
energy is measured for the components that the table names, during training and evaluation, and includes that of other
processes.
"""
#: The options that the time of a step depends on, in addition to the task, the rule and the device.
_EXECUTION = (
    "batch_size",
    "accumulate",
    "threads",
    "deterministic",
    "precision",
    "compile",
    "graphs",
    "channels_last",
    "optimizer",
)


class Costs:
    """The costs of rows.

    Args:
        runs: all runs of a report; times are compared with those of the bp runs.
    """

    def __init__(self, runs: Iterable[Run]) -> None:
        times: dict[Any, list[float]] = {}
        for run in runs:
            if run.result["algorithm"] == CONTROL and run.finished:
                times.setdefault(_setting(run), []).extend(known([_seconds_per_step(run)]))
        self._reference = {setting: _median(seconds) for setting, seconds in times.items()}

    def of(self, members: Sequence[Run]) -> dict[str, Any]:
        """The cost columns of a row; values that its finished runs did not record are NaN or empty text."""
        finished = list(finished_by_seed(members).values())
        predicted = next((cost for run in finished if (cost := run.result.get("cost"))), {})
        reference = predicted.get("bp") or {}
        seconds = _median(known(map(_seconds_per_step, finished)))
        columns = {name: number(predicted.get(key)) for name, key in _PREDICTIONS.items()}
        ratios = {f"{name}_ratio": _ratio(columns[name], number(reference.get(key))) for name, key in _PREDICTIONS.items()}
        counters = list(dict.fromkeys(name for run in finished for name in run.result.get("energy_counters") or ()))
        return {
            **columns,
            **ratios,
            "seconds_per_step": seconds,
            "time_ratio": _ratio(seconds, self._reference.get(_setting(members[0]), math.nan)),
            # Runs on a CPU are excluded, because they record the peak of the whole process, including all earlier runs.
            "peak_memory": mean(
                run.result.get("peak_memory_bytes") for run in finished if (run.result.get("device") or "").startswith("cuda")
            ),
            "energy_wh": mean(run.result.get("energy_wh") for run in finished),
            "energy_counters": " ".join(counters),
        }


#: For each predicted column, the key of its value in the cost record of a result.
_PREDICTIONS = {"multiplications": "multiplications", "bytes_moved": "bytes_moved", "predicted_memory": "peak_memory"}


def _setting(run: Run) -> Any:
    """A key that is equal for runs with comparable times."""
    return task_key(run), run.result.get("device"), *(str(run.config.get(key, run.result.get(key))) for key in _EXECUTION)


def _seconds_per_step(run: Run) -> float:
    seconds, steps = number(run.result.get("seconds")), run.result.get("step")
    return seconds / steps if steps else math.nan


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.nan


def _ratio(value: float, reference: float) -> float:
    return value / reference if reference else math.nan
