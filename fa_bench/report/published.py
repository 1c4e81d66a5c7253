"""The numbers that papers printed, from `published.yaml`, and which of them a group of runs answers to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

from fa_bench.errors import DataError
from fa_bench.report.groups import finished_by_seed
from fa_bench.report.numbers import known, mean
from fa_bench.report.runs import Run

FILE = Path(__file__).with_name("published.yaml")
#: What a table's row is compared by: the first of these that the paper has.
ACCURACIES = ("test_accuracy", "val_accuracy")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One published number.

    Attributes:
        paper, table: where it was published; `row` is what the paper calls its line there, or what we do.
        dataset, architecture: in words.
        rule: name of the algorithm here.
        quantity: a key of result.json (test_accuracy, val_accuracy, train_accuracy) or of its angles.
        value: in `unit`; NaN where only a range is known. Accuracies are in %.
        low, high: the range; infinite where open, NaN where there is none.
        layer: pattern of the layers that the value is of; empty for the whole network.
        spread: over `n` runs, NaN where not given; `spread_kind` says whether std or standard error.
        epochs: after how many epochs, where known.
        at: the epoch that it is of, however long the run; None for a run's last one.
        conditions: what else to know before comparing.
        presets: the presets whose runs answer to it.
        where: config key -> value, or list of values of which any will do, that such a run has.
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
    presets: tuple[str, ...] = ()
    where: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def source(self) -> str:
        """Paper and table in words."""
        return f"{self.paper}, {self.table}"

    @property
    def std(self) -> float:
        """Sample standard deviation over the published runs; NaN where it was not given."""
        return self.spread if self.spread_kind == "std" else math.nan

    def answers(self, run: Run) -> bool:
        """Whether `run` is one that this number was published for."""
        facts = {key: run.result.get(key) for key in ("dataset", "architecture", "optimizer")} | run.config
        return (run.preset in self.presets and run.result["algorithm"] == self.rule
                and all(_fits(facts.get(key), wanted) for key, wanted in self.where.items()))

    def ours(self, runs: Iterable[Run], layer: str = "") -> list[float]:
        """The finished runs' values of this quantity in `unit`, one a seed: the last ones, or those of epoch `at`.

        Of `layer` where it is one of layers.
        """
        finished = finished_by_seed(runs).values()
        if self.at is not None:
            lines = [line for run in finished for line in run.metrics if line["epoch"] == self.at]
            return [100 * value for value in known(line.get(self.quantity) for line in lines)]
        if self.layer:
            return known(run.layers(self.quantity).get(layer) for run in finished)
        return [100 * value for value in known(run.result.get(self.quantity) for run in finished)]

    def remark(self, runs: Iterable[Run]) -> str:
        """In what the finished runs are known not to be those of the paper; empty where nothing is."""
        runs = list(finished_by_seed(runs).values())
        scales = {str(run.config.get("scale", "full")) for run in runs} - {"full"}
        said = [f"a trial: scale={scale}" for scale in sorted(scales)]
        if self.epochs and any(run.epochs != self.epochs for run in runs):
            said.append(f"published after {self.epochs} epochs")
        return "; ".join(said)


def _fits(value: Any, wanted: Any) -> bool:
    return value in wanted if isinstance(wanted, list) and not isinstance(value, list) else value == wanted


def answering(entries: Iterable[Entry], runs: Sequence[Run]) -> list[Entry]:
    """The entries that a group of runs answers to, in the file's order."""
    return [entry for entry in entries if any(entry.answers(run) for run in runs)]


def headline(entries: Iterable[Entry], runs: Sequence[Run]) -> tuple[Entry | None, float]:
    """The accuracy among a group's entries that stands for it, and the group's own mean of it in %; None without one."""
    for quantity in ACCURACIES:
        fitting = [entry for entry in entries if entry.quantity == quantity and not math.isnan(entry.value)]
        for entry in [entry for entry in fitting if entry.ours(runs)] or fitting:
            return entry, mean(entry.ours(runs))
    return None, math.nan


def compare(entry: Entry, runs: Sequence[Run], layers: Sequence[str]) -> Iterator[tuple[str, list[float]]]:
    """(layer, our values of it) for every one of `layers` that the entry is of; one pair without layer for the network's."""
    if not entry.layer:
        yield "", entry.ours(runs)
    for layer in layers:
        if entry.layer and fnmatchcase(layer, entry.layer):
            yield layer, entry.ours(runs, layer)


@lru_cache(maxsize=1)
def published() -> tuple[Entry, ...]:
    """Every entry of `published.yaml`."""
    return tuple(read_entries(FILE))


def read_entries(path: Path) -> list[Entry]:
    """The entries of a file of the form that `published.yaml` explains at its head.

    Raises:
        DataError: it cannot be read, or a row has an unknown key or lacks one.
    """
    from omegaconf import OmegaConf

    try:
        tables: Any = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # whatever a damaged file makes the parser say
        raise DataError(f"{path}: unreadable: {error}") from error
    entries = []
    for table in tables:
        common = {key: value for key, value in table.items() if key != "rows"}
        for row in table["rows"]:
            both = common | {key: value for key, value in row.items() if key != "values"}
            both["where"] = common.get("where", {}) | row.get("where", {})
            try:
                entries += [entry for key, value in row["values"].items() for entry in _entries(both, str(key), value)]
            except (TypeError, KeyError, ValueError) as error:
                raise DataError(f"{path}: {table.get('table')}, row {row.get('row')}: {error}") from None
    return entries


def _entries(common: Mapping[str, Any], key: str, value: Any) -> Iterator[Entry]:
    """The entries of one cell: ``rule option=value ...`` and a value in one of its forms."""
    from omegaconf import OmegaConf

    rule, *options = key.split()
    chosen = dict(pair.split("=", 1) for pair in options)
    create: Any = OmegaConf.create
    typed = {name: create(f"v: {text}")["v"] for name, text in chosen.items()}
    where = {**common["where"], **typed}
    plain = {**common, "rule": rule, "where": where, "presets": tuple(common.get("presets", ()))}
    by_layer = value if isinstance(value, dict) and not {"low", "high"} & set(value) else {"": value}
    for layer, one in by_layer.items():
        if isinstance(one, dict):
            yield Entry(**plain, layer=layer, low=one.get("low", -math.inf), high=one.get("high", math.inf))
        else:
            centre, spread = one if isinstance(one, list) else (one, math.nan)
            yield Entry(**plain, layer=layer, value=float(centre), spread=float(spread))
