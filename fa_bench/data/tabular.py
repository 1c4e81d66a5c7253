"""Tables of numbers, bundled with scikit-learn or read from a CSV file."""

from __future__ import annotations

import dataclasses
import functools
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from fa_bench.data.vectors import VectorDataset, standardise_option
from fa_bench.errors import DataError, OptionError, names, nearest, truncate
from fa_bench.registry.kinds import CLASSES, VALUES
from fa_bench.registry.options import option
from fa_bench.registry.registries import DATASETS

#: The bundled tables, and the kinds of their targets.
BUNDLED = {"diabetes": VALUES, "wine": CLASSES, "breast_cancer": CLASSES}
_TASKS = {"regression": VALUES, "classification": CLASSES}
#: Maximum number of column names in a message.
_MANY = 12
#: Matches the names that pandas gives to columns without a name. A file that pandas has read and written may contain these names.
_UNNAMED = re.compile(r"Unnamed: \d+(\.\d+)*")


@DATASETS.register("tabular")
@dataclasses.dataclass(eq=False)
class Tabular(VectorDataset):
    """A table of numbers: diabetes (regression), wine or breast_cancer, which are bundled with scikit-learn, or your own CSV
    file.

    The table `diabetes` has 442 patients with 10 features; its target is the progression of the disease after a year (Efron et
    al. 2004). The table `wine` has 178 wines with 13 features in 3 classes (Aeberhard and Forina 1991), and `breast_cancer` has
    569 tumours with 30 features in 2 classes (Wolberg et al. 1993).

    A CSV file has a header with the column names; all columns except the target are features and must be numeric. If the target
    column contains text, its entries are classes; if it contains fractions, they are values to predict. Whole numbers may be
    either, so set `task` for such a column. Classes are sorted alphabetically, or by value if they are numbers.

    `test_seed` determines which rows form the test set. For classification, the training and test sets have the same class
    proportions. With `standardise`, regression targets are also standardised, by their mean and standard deviation over the rows
    that are not in the test set. The RMSE is then in units of that standard deviation.
    """

    table: str = option("diabetes", "diabetes, wine, breast_cancer, or the path of a CSV file")
    target: str | None = option(None, "for a CSV file: the name of the column with the target; null: the last column")
    task: str | None = option(
        None, "for a CSV file: regression or classification; null: inferred from the target", choices=list(_TASKS)
    )
    test: float = option(0.2, "fraction of the rows in the test set", above=0, below=1)
    test_seed: int = option(0, "seed of the test set, the same for every run seed", minimum=0)
    standardise: bool = standardise_option()

    def check(self) -> None:
        super().check()
        if self.table in BUNDLED:
            for key in ("target", "task"):
                if getattr(self, key) is not None:
                    raise OptionError(key, f"={getattr(self, key)} is for a CSV file, not for table={self.table}")
        elif not self.table.lower().endswith(".csv"):
            raise OptionError(
                "table",
                f"={truncate(self.table, 100)} is neither one of {names(BUNDLED)} nor the path of a .csv "
                f"file{nearest(self.table, BUNDLED)}",
            )

    @property
    def targets(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The kind of the targets; a CSV file may have to be read to determine it."""
        return BUNDLED[self.table] if self.table in BUNDLED else _TASKS[self.task or self._table.task]

    @property
    def _table(self) -> _Table:
        path = Path(self.table)
        try:
            state = path.stat()
        except OSError as error:
            raise DataError(f"dataset.table={self.table}: cannot be read ({error.strerror or error})") from None
        return _read(path, self.target, self.task, state.st_mtime_ns, state.st_size)

    def arrays(self, data_dir: Path) -> tuple[Any, Any, Any, Any, list[str]]:
        from sklearn.model_selection import train_test_split

        if self.table in BUNDLED:
            import sklearn.datasets

            bunch: Any = getattr(sklearn.datasets, f"load_{self.table}")()
            x, y = bunch.data, bunch.target
            classes = ["progression"] if self.targets == VALUES else [str(name) for name in bunch.target_names]
        else:
            table = self._table
            x, y, classes = table.features, table.values, table.names
        try:
            train, test = train_test_split(
                np.arange(len(x)),
                test_size=self.test,
                random_state=self.test_seed,
                stratify=y if self.targets == CLASSES else None,
            )
        except ValueError as error:  # too few rows, or a class with a single row
            raise OptionError(
                "dataset.test", f"={self.test:g}: the rows cannot be split ({str(error).splitlines()[0]:.150})"
            ) from None
        train, test = np.sort(train), np.sort(test)
        if self.targets == VALUES:
            y = y.astype(np.float64)
            if self.standardise:
                y = (y - y[train].mean()) / (y[train].std() or 1.0)
        return x[train], y[train], x[test], y[test], classes


@dataclasses.dataclass
class _Table:
    """The content of a CSV file: features (n, F), targets (n,), the names of the classes or of the output, and the task."""

    features: np.ndarray
    values: np.ndarray
    names: list[str]
    task: str


@functools.lru_cache(maxsize=4)
def _read(path: Path, target: str | None, task: str | None, *state: int) -> _Table:
    """Read a CSV file; the result is cached until the file's `state` changes.

    Raises:
        DataError: if a column or row cannot be used; the message names it.
        OptionError: if there is no column `target`, if it does not fit `task`, or if it has whole numbers and `task` is None.
    """
    import pandas as pd

    try:
        with warnings.catch_warnings():
            # With `index_col=False`, pandas warns about rows that are longer than the header; by default, it would use their
            # first values as an index.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(path, skipinitialspace=True, index_col=False)
    except pd.errors.ParserWarning:
        raise DataError(f"{path}: rows have more values than the header has names; name all columns") from None
    except (OSError, ValueError) as error:
        raise DataError(f"dataset.table={path}: cannot be read as CSV ({str(error).splitlines()[0]:.150})") from None
    columns = [str(name) for name in frame.columns]
    frame.columns = columns
    if unnamed := [number for number, name in enumerate(columns, 1) if _UNNAMED.fullmatch(name)]:
        listed = f"{names(unnamed[:_MANY])}{', ...' * (len(unnamed) > _MANY)}"
        raise DataError(
            f"{path}: {'columns' if len(unnamed) > 1 else 'column'} {listed} of {len(columns)} "
            f"{'have' if len(unnamed) > 1 else 'has'} no name in the header, perhaps an index "
            "that pandas wrote; write the file with to_csv(..., index=False), or name the column if it is a feature"
        )
    target = columns[-1] if target is None else target
    if all(_is_number(name) for name in columns):
        raise DataError(
            f"{path}: its first row has only numbers ({names(columns[:_MANY])}); add a header with the names of the columns"
        )
    if target not in columns:
        listed = f"{names(columns[:_MANY])}{', ...' * (len(columns) > _MANY)}"
        raise OptionError(
            "dataset.target", f"={truncate(target, 100)}: {path} has no such column{nearest(target, columns)} (columns: {listed})"
        )
    if len(columns) < 2 or frame.empty:
        other = next((mark for mark in (";", "\t", "|") if mark in columns[0]), None)
        hint = f" (columns are separated by commas, not by {other!r})" if other and len(columns) == 1 else ""
        raise DataError(
            f"{path}: has {len(frame)} rows and {len(columns)} column{'s' * (len(columns) != 1)}; at least one row, "
            f"a feature and a target are needed{hint}"
        )
    missing = np.argwhere(frame.isna().to_numpy())
    if len(missing):
        row, column = missing[0]
        rows = len({int(row) for row, _ in missing})
        raise DataError(
            f"{path}: no value in column '{columns[column]}' of row {row + 1} (below the header); {rows} "
            f"row{'s lack' if rows > 1 else ' lacks'} values; remove or fill them"
        )
    features = frame.drop(columns=target)
    if text := [name for name in features if not pd.api.types.is_numeric_dtype(features[name])]:
        raise DataError(
            f"{path}: non-numeric values in column{'s' * (len(text) > 1)} {names(text[:_MANY])}; remove or encode them"
        )
    of = frame[target]
    is_number = pd.api.types.is_numeric_dtype(of) and not pd.api.types.is_bool_dtype(of)
    if task is None:
        if is_number and (of == of.round()).all():
            raise OptionError(
                "dataset.task",
                f"=null: column '{target}' has whole numbers, which may be classes or values; set "
                "dataset.task=classification or dataset.task=regression",
            )
        task = "regression" if is_number else "classification"
    if task == "regression" and not is_number:
        raise OptionError("dataset.task", f"=regression: column '{target}' is not numeric")
    x = features.to_numpy(np.float64)
    infinite = np.argwhere(~np.isfinite(x))
    if len(infinite):
        row, column = infinite[0]
        raise DataError(
            f"{path}: {x[row, column]} in column '{features.columns[column]}' of row {row + 1} (below the header), "
            "not a finite number"
        )
    if task == "regression":
        if len(rows := np.flatnonzero(~np.isfinite(of.to_numpy(np.float64)))):
            raise DataError(
                f"{path}: {of.iloc[rows[0]]} in column '{target}' of row {rows[0] + 1} (below the header), not a finite number"
            )
        return _Table(x, of.to_numpy(np.float64), [target], task)
    classes, labels = np.unique(of.to_numpy() if is_number else of.astype(str).to_numpy(str), return_inverse=True)
    of_classes, counts = [_class_name(name) for name in classes], np.bincount(labels)
    if len(counts) < 2:
        raise DataError(f"{path}: column '{target}' has the same class, {truncate(of_classes[0], 40)}, in all rows")
    if rare := [truncate(name, 40) for name, count in zip(of_classes, counts, strict=True) if count < 2]:
        occur = "occurs" if len(rare) == 1 else "occur"
        raise DataError(
            f"{path}: in column '{target}', {len(rare)} of {len(counts)} classes {occur} only once "
            f"({names(rare[:3])}{', ...' * (len(rare) > 3)}); the training set and the test set need one row each"
        )
    return _Table(x, labels, of_classes, task)


def _class_name(value: Any) -> str:
    """A class as text, with as many digits as a number needs."""
    if isinstance(value, str) or float(f"{value:g}") != value:
        return str(value)
    return f"{value:g}"


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True
