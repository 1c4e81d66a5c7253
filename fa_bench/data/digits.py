"""The handwritten digits of scikit-learn, which are real images that need no download."""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np

from fa_bench.data.base import ArrayDataset
from fa_bench.registry.registries import DATASETS


@DATASETS.register("digits")
@dataclasses.dataclass(eq=False)
class Digits(ArrayDataset):
    """1,797 images of 8x8 pixels in 10 classes (Alpaydin and Kaynak 1998), bundled with scikit-learn.

    The data have no official test split, so a fixed fifth of every class is the test set.
    """

    channels: int = dataclasses.field(init=False, default=1)
    stored = (8, 8, 10)

    def arrays(self, data_dir: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[str]]:
        pixels, labels = _table()
        images = np.round(pixels * (255 / 16)).astype(np.uint8)[:, None]
        train, test = _split(labels)
        return images[train], labels[train], images[test], labels[test], [str(name) for name in range(10)]


def _table() -> tuple[np.ndarray, np.ndarray]:
    """The pixels (N, 8, 8), from 0 to 16, and the labels (N,) that `sklearn.datasets.load_digits` returns.

    The data are read directly from scikit-learn's file if possible, because importing scikit-learn takes most of a second.
    """
    package = importlib.util.find_spec("sklearn")
    for folder in package.submodule_search_locations or () if package else ():
        if (path := Path(folder, "datasets", "data", "digits.csv.gz")).is_file():
            with gzip.open(path, "rt", encoding="utf-8") as file:
                table = np.loadtxt(file, delimiter=",")
            return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(int)
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    return bunch.images, bunch.target


def _split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The indices that `sklearn.model_selection.train_test_split` would return for a stratified test set of one fifth and
    random_state=0."""
    generator = np.random.RandomState(0)
    counts = np.bincount(labels)
    trained = _share(counts, len(labels) - math.ceil(len(labels) / 5), generator)
    tested = _share(counts - trained, math.ceil(len(labels) / 5), generator)
    train, test = [], []
    for digit, count in enumerate(counts):
        indices = np.flatnonzero(labels == digit)[generator.permutation(count)]
        train += list(indices[: trained[digit]])
        test += list(indices[trained[digit] : trained[digit] + tested[digit]])
    return generator.permutation(train), generator.permutation(test)


def _share(counts: np.ndarray, total: int, generator: np.random.RandomState) -> np.ndarray:
    """Divide `total` samples among the classes in proportion to `counts`, rounding up the shares with the largest remainders."""
    exact = counts / counts.sum() * total
    shares = np.floor(exact)
    missing = int(total - shares.sum())
    for value in np.sort(np.unique(exact - shares))[::-1] if missing else ():
        (equal,) = np.where(exact - shares == value)
        chosen = generator.choice(equal, size=min(len(equal), missing), replace=False)
        shares[chosen] += 1
        missing -= len(chosen)
        if not missing:
            break
    return shares.astype(int)
