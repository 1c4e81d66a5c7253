"""The base class of analyses. An analysis has options and produces a table and a figure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from fa_bench.errors import missing_method
from fa_bench.registry.options import Options
from fa_bench.utils.drawing import default_style
from fa_bench.utils.files import atomic

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class Analysis(Options):
    """Base class of analyses; the fields of a subclass are its options."""

    #: Width and height of the figure in inches.
    size: ClassVar[tuple[float, float]] = (10, 4.5)

    def table(self) -> pd.DataFrame:
        """The results, which `write` saves as a CSV file."""
        raise missing_method(self, "table")

    def summary(self, table: pd.DataFrame) -> pd.DataFrame:
        """The part of the table that is printed in the terminal. By default, the whole table is printed."""
        return table

    def plot(self, figure: Figure, table: pd.DataFrame) -> None:
        """Plot the table on an empty figure."""
        raise missing_method(self, "plot")

    def write(self, directory: Path) -> tuple[pd.DataFrame, Path, Path]:
        """Compute the table and write NAME.csv and NAME.png to `directory`. Identical options give byte-identical files.

        Returns:
            The table and the two paths.
        """
        table = self.table()
        directory.mkdir(parents=True, exist_ok=True)
        csv, png = directory / f"{self.name}.csv", directory / f"{self.name}.png"
        with atomic(csv) as temporary:
            table.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
        with default_style(), atomic(png) as temporary:
            from matplotlib.figure import Figure

            figure = Figure(figsize=self.size, dpi=120, layout="constrained")
            self.plot(figure, table)
            # Omit matplotlib's version from the metadata, so that identical figures give byte-identical files.
            figure.savefig(temporary, format="png", metadata={"Software": None})
        return table, csv, png
