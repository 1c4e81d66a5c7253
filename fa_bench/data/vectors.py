"""The base class of datasets with features or tokens as inputs.

Shapes: n samples, F features, T positions.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from fa_bench.data.array_checks import checked
from fa_bench.data.base import Dataset
from fa_bench.data.splits import ArraySplit, Splits
from fa_bench.errors import DataError, FaBenchError, missing_method
from fa_bench.registry.kinds import FEATURES
from fa_bench.registry.options import option
from fa_bench.utils.lazy import torch


def standardise_option() -> Any:
    """Return the `standardise` option for a dataset with features."""
    return option(True, "subtract the mean of each feature over the training samples, and divide by its standard deviation")


@dataclasses.dataclass(eq=False)
class VectorDataset(Dataset):
    """Base class of datasets with features (n, F) or tokens (n, T) that are read as arrays and fit on the device."""

    inputs: ClassVar[str] = FEATURES

    def arrays(self, data_dir: Path) -> tuple[Any, Any, Any, Any, list[str]]:
        """The training inputs and targets, the test inputs and targets, and the names (see
        `fa_bench.data.array_checks.checked`)."""
        raise missing_method(self, "arrays")

    def read(self, data_dir: Path, device: torch.device) -> Splits:
        train_x, train_y, test_x, test_y, names = self.arrays(data_dir)
        return self.splits_of({"train": (train_x, train_y), "test": (test_x, test_y)}, names, device)

    def splits_of(self, parts: Mapping[str, tuple[Any, Any]], names: list[str], device: torch.device) -> Splits:
        """Check arrays and return them as splits; `parts` maps train, test and possibly validation to (inputs, targets).

        Raises:
            DataError: if an array is invalid; the message names it and the problem.
        """
        notes: list[str] = []
        digest, splits = hashlib.sha256(), {}
        try:
            for name in (name for name in parts if name != "train"):
                arrays = (*parts["train"], *parts[name], names)
                train_x, train_y, x, y, names = checked(arrays, notes, self.inputs, self.targets, name)
                splits |= {"train": (train_x, train_y), name: (x, y)}
        except FaBenchError:
            raise
        except ValueError as error:
            raise DataError(f"dataset={self.name}: {error}") from None
        for part in splits.values():
            for array in part:
                digest.update(array.data)
        made = {name: ArraySplit(torch.from_numpy(x), torch.from_numpy(y), device) for name, (x, y) in splits.items()}
        return Splits(
            made["train"],
            made.get("validation"),
            made["test"],
            names,
            splits["train"][0].shape[1:],
            digest.hexdigest(),
            list(dict.fromkeys(notes)),
        )

    def finished(self, splits: Splits) -> Splits:
        if self.inputs == FEATURES and getattr(self, "standardise", False):
            standardise(splits)
        return splits


def standardise(splits: Splits) -> None:
    """Standardise all splits with the mean and standard deviation of each feature in the training split; from features that are
    constant there, only the mean is subtracted."""
    parts = [split for split in (splits.train, splits.validation, splits.test) if isinstance(split, ArraySplit)]
    inputs = parts[0].inputs.double()
    mean, std = inputs.mean(0), inputs.std(0, correction=0)
    std = nonzero(mean, std)
    for split in parts:
        split.inputs = ((split.inputs.double() - mean) / std).float()


def nonzero(mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """The standard deviations, with 1 in place of those of constant values."""
    # The computed standard deviation of equal numbers may be a rounding error instead of 0.
    return torch.where(std > 1e-7 * mean.abs(), std, torch.ones_like(std))
