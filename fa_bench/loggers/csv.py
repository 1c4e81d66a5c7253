"""A logger that writes curves to a CSV file."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fa_bench.loggers.base import Logger
from fa_bench.registry.registries import LOGGERS
from fa_bench.utils.files import CURVES, write_text

if TYPE_CHECKING:
    from fa_bench.config.job import Job


@LOGGERS.register("csv")
@dataclasses.dataclass(eq=False)
class CSV(Logger):
    """The file ``curves.csv`` in the run's directory, with one row per value and the columns step, tag and value."""

    def open(self, directory: Path, job: Job, step: int) -> None:
        self.path, self.values = directory / CURVES, {}
        if step and self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    if int(row["step"]) <= step:
                        self.values[int(row["step"]), row["tag"]] = row["value"]

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.values |= {(step, tag): repr(float(value)) for tag, value in values.items()}

    def flush(self) -> None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("step", "tag", "value"))
        writer.writerows((*key, value) for key, value in self.values.items())
        write_text(self.path, text.getvalue())

    def finish(self, status: str, numbers: Mapping[str, float | None], step: int) -> None:
        self.flush()
