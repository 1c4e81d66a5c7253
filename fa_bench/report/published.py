"""Published numbers from `published.yaml`, matched to runs and compared with them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

from fa_bench.errors import DataError
from fa_bench.report.groups import CONTROL, finished_by_seed
from fa_bench.report.numbers import known, mean
from fa_bench.report.runs import Run

FILE = Path(__file__).with_name("published.yaml")
#: A row of the comparison table is compared with a published number of the first of these quantities for which there is one.
ACCURACIES = ("test_accuracy", "val_accuracy")
#: The quantity whose values are test accuracies minus those of backpropagation on the same task, paired by seed, in percentage
#: points.
DIFFERENCE = "bp_difference"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One published number.

    Attributes:
        paper, table: where the number was published; `row` names the row of the table, in the paper's words or in ours.
        dataset, architecture: descriptions.
        rule: the name that the rule has in fa_bench.
        quantity: a key of result.json (test_accuracy, val_accuracy, train_accuracy) or of its angles, or `DIFFERENCE`.
        value: the value in `unit`; NaN if only a range is known. Accuracies are in %.
        low, high: the range; infinite if open, NaN without a range.
        layer: pattern of the layers that the value belongs to; empty for the whole network.
        spread: the spread over `n` runs, NaN if not given; `spread_kind` is std or standard error.
        epochs: number of training epochs, if known.
        at: the epoch that the value belongs to, however long the run was; None for the last epoch.
        conditions: remarks to consider in a comparison.
        experiments: the experiments whose runs the number is compared with.
        where: config key -> the value that a run must have to be compared, or a list of allowed values.
    """

    paper: str
    table: str
    row: str
    dataset: str
    architecture: str
    rule: str
    quantity: str
    unit: str
    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    layer: str = ""
    spread: float = math.nan
    spread_kind: str = "std"
    n: int | None = None
    epochs: int | None = None
    at: int | None = None
    conditions: str = ""
    experiments: tuple[str, ...] = ()
    where: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def source(self) -> str:
        """Paper and table."""
        return f"{self.paper}, {self.table}"

    @property
    def std(self) -> float:
        """The sample standard deviation over the published runs; NaN if the paper does not give it."""
        return self.spread if self.spread_kind == "std" else math.nan

    def matches(self, run: Run) -> bool:
        """Whether `run` has the rule, experiment and settings of this number."""
        config = {key: run.result.get(key) for key in ("dataset", "architecture", "optimizer")} | run.config
        return (
            run.experiment in self.experiments
            and run.result["algorithm"] == self.rule
            and all(_is_allowed(config.get(key), allowed) for key, allowed in self.where.items())
        )

    def ours(self, runs: Iterable[Run], layer: str = "") -> list[float]:
        """The values of this quantity in the finished runs, in units of `unit`, with one value per seed.

        For a quantity that is measured per layer, the values are those of `layer`. The values are from epoch `at` or, if it is
        None, from the last epoch.
        """
        finished = finished_by_seed(runs).values()
        if self.at is not None:
            lines = [line for run in finished for line in run.metrics if line["epoch"] == self.at]
            return [100 * value for value in known(line.get(self.quantity) for line in lines)]
        if self.layer:
            return known(run.layers(self.quantity).get(layer) for run in finished)
        return [100 * value for value in known(run.result.get(self.quantity) for run in finished)]

    def differences(self, runs: Iterable[Run], all_runs: Iterable[Run]) -> list[float]:
        """The test accuracies of the finished runs minus those of backpropagation, as in `DIFFERENCE`, with one value per common
        seed.

        The runs of backpropagation are those in `all_runs` that meet the conditions of this entry, except conditions on options
        of the rule.
        """
        where = {key: value for key, value in self.where.items() if not key.startswith("algorithm.")}
        control = dataclasses.replace(self, rule=CONTROL, where=where)
        references = finished_by_seed(run for run in all_runs if control.matches(run))
        return [
            run.score(ACCURACIES[0]) - references[seed].score(ACCURACIES[0])
            for seed, run in finished_by_seed(runs).items()
            if seed in references
        ]

    def remark(self, runs: Iterable[Run]) -> str:
        """Remarks on finished runs that were shortened or trained for another number of epochs than the paper's; empty if there
        are none."""
        runs = list(finished_by_seed(runs).values())
        scales = {str(run.config.get("scale", "full")) for run in runs} - {"full"}
        remarks = [f"a shortened run: scale={scale}" for scale in sorted(scales)]
        if self.epochs and any(run.epochs != self.epochs for run in runs):
            remarks.append(f"published after {self.epochs} epochs")
        return "; ".join(remarks)


def _is_allowed(value: Any, allowed: Any) -> bool:
    return value in allowed if isinstance(allowed, list) and not isinstance(value, list) else value == allowed


def matching_entries(entries: Iterable[Entry], runs: Sequence[Run]) -> list[Entry]:
    """The entries with which a group of runs is compared, in the order of the file."""
    return [entry for entry in entries if any(entry.matches(run) for run in runs)]


def headline(entries: Iterable[Entry], runs: Sequence[Run]) -> tuple[Entry | None, float]:
    """The published accuracy with which a group is compared (None if there is none), and the group's own mean in %."""
    for quantity in ACCURACIES:
        candidates = [entry for entry in entries if entry.quantity == quantity and not math.isnan(entry.value)]
        for entry in [entry for entry in candidates if entry.ours(runs)] or candidates:
            return entry, mean(entry.ours(runs))
    return None, math.nan


def compare(
    entry: Entry, runs: Sequence[Run], layers: Sequence[str], all_runs: Iterable[Run]
) -> Iterator[tuple[str, list[float]]]:
    """Yield (layer, our values) for each of `layers` to which the entry applies. An entry for the whole network yields one pair,
    with an empty layer.

    Args:
        entry: a published number.
        runs: the runs of one group.
        layers: the paths of the layers.
        all_runs: all runs; `DIFFERENCE` needs those of backpropagation.
    """
    if entry.quantity == DIFFERENCE:
        yield "", entry.differences(runs, all_runs)
    elif not entry.layer:
        yield "", entry.ours(runs)
    for layer in layers:
        if entry.layer and fnmatchcase(layer, entry.layer):
            yield layer, entry.ours(runs, layer)


@lru_cache(maxsize=1)
def published() -> tuple[Entry, ...]:
    """All entries of `published.yaml`."""
    return tuple(read_entries(FILE))


def read_entries(path: Path) -> list[Entry]:
    """The entries of a file in the format that the head of `published.yaml` explains.

    Raises:
        DataError: the file cannot be read, or a row has an unknown key or lacks a key.
    """
    from omegaconf import OmegaConf

    try:
        tables: Any = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # the parser raises many kinds of errors for a damaged file
        raise DataError(f"{path}: unreadable: {error}") from error
    entries = []
    for table in tables:
        common = {key: value for key, value in table.items() if key != "rows"}
        for row in table["rows"]:
            merged = common | {key: value for key, value in row.items() if key != "values"}
            merged["where"] = common.get("where", {}) | row.get("where", {})
            try:
                entries += [entry for key, value in row["values"].items() for entry in _entries(merged, str(key), value)]
            except (TypeError, KeyError, ValueError) as error:
                raise DataError(f"{path}: {table.get('table')}, row {row.get('row')}: {error}") from None
    return entries


def _entries(common: Mapping[str, Any], key: str, value: Any) -> Iterator[Entry]:
    """The entries of one cell of a table, with the key ``rule option=value ...`` and a value in one of the allowed forms."""
    from omegaconf import OmegaConf

    rule, *options = key.split()
    create: Any = OmegaConf.create
    typed = {name: create(f"v: {text}")["v"] for name, _, text in (option.partition("=") for option in options)}
    fields = {**common, "rule": rule, "where": {**common["where"], **typed}, "experiments": tuple(common.get("experiments", ()))}
    by_layer = value if isinstance(value, dict) and not {"low", "high"} & set(value) else {"": value}
    for layer, number in by_layer.items():
        if isinstance(number, dict):
            yield Entry(**fields, layer=layer, low=number.get("low", -math.inf), high=number.get("high", math.inf))
        else:
            mean_value, spread = number if isinstance(number, list) else (number, math.nan)
            yield Entry(**fields, layer=layer, value=float(mean_value), spread=float(spread))
