"""scikit-learn's handwritten digits: real images that need no download."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from fa_bench.data.base import ArrayDataset
from fa_bench.registry.registries import DATASETS


@DATASETS.register("digits")
@dataclasses.dataclass(eq=False)
class Digits(ArrayDataset):
    """1,797 images of 8x8 pixels in 10 classes (Alpaydin and Kaynak 1998), bundled with scikit-learn.

    The set has no test split of its own: one fifth of every class, always the same, is the test set.
    """

    channels: int = dataclasses.field(init=False, default=1)
    stored = (8, 8, 10)

    def arrays(self, data_dir: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[str]]:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        bunch: Any = load_digits()
        images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
        train, test = train_test_split(np.arange(len(images)), test_size=0.2, stratify=bunch.target, random_state=0)
        return images[train], bunch.target[train], images[test], bunch.target[test], [str(name) for name in bunch.target_names]
