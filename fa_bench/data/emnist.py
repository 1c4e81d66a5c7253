"""Datasets in the format of MNIST: cursive Japanese characters, and handwritten letters and digits."""

from __future__ import annotations

import dataclasses
import gzip
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from fa_bench.data.base import mean_option, std_option
from fa_bench.data.downloaded import MNIST
from fa_bench.data.fetch import download, unpack_zip
from fa_bench.registry.options import option
from fa_bench.registry.registries import DATASETS

#: The splits of EMNIST, and the number of classes in each.
EMNIST_SPLITS = {"balanced": 47, "byclass": 62, "bymerge": 47, "letters": 26, "digits": 10, "mnist": 10}


@DATASETS.register("kmnist")
@dataclasses.dataclass(eq=False)
class KMNIST(MNIST):
    """Kuzushiji-MNIST: cursive Japanese characters in 10 classes, in MNIST's format (Clanuwat et al. 2018); mean and std 0.5."""

    mean: list[float] = mean_option(0.5)
    std: list[float] = std_option(0.5)

    torchvision_name = "KMNIST"
    folder = "KMNIST/raw"
    archives = "KMNIST/raw/*.gz"


@DATASETS.register("emnist")
@dataclasses.dataclass(eq=False)
class EMNIST(MNIST):
    """EMNIST: upright grey images (28x28) of handwritten letters and digits (Cohen et al. 2017); mean and std 0.5.

    The splits `byclass` (62 classes) and `bymerge` (47 classes) have 697,932 training and 116,323 test images each. The split
    `balanced` has 112,800 and 18,800 images in 47 classes, and `letters` has 124,800 and 20,800 images in 26 classes. The split
    `digits` has 240,000 and 40,000 images, and `mnist` has 60,000 and 10,000 images, both in 10 classes.
    """

    split: str = option("balanced", "which part of EMNIST", choices=list(EMNIST_SPLITS))
    mean: list[float] = mean_option(0.5)
    std: list[float] = std_option(0.5)

    torchvision_name = "EMNIST"
    folder = "EMNIST/raw"
    archives = "EMNIST/raw/gzip.zip"

    @property
    def files(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The files of this split."""
        return tuple(
            f"emnist-{self.split}-{part}-{kind}-ubyte" for part in ("train", "test") for kind in ("images-idx3", "labels-idx1")
        )

    @property
    def stored(self) -> tuple[int, int, int]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Height, width and number of classes of the images in this split."""
        return 28, 28, EMNIST_SPLITS[self.split]

    def _open(self, root: Path, part: str, download: bool = False) -> Any:
        return self._torchvision(str(root), split=self.split, train=part == "train")

    def _fetch(self, root: Path, missing: list[str]) -> None:
        raw = root / self.folder
        raw.mkdir(parents=True, exist_ok=True)
        archive = raw / "gzip.zip"
        if not archive.exists():
            download(self._torchvision.url, self._torchvision.md5, archive)
        unpack_zip(archive, raw / "gzip")
        for name in missing:
            with gzip.open(raw / "gzip" / f"{name}.gz", "rb") as packed, (raw / name).open("wb") as file:
                shutil.copyfileobj(packed, file)

    def _unpack(self, dataset: Any) -> tuple[np.ndarray, np.ndarray]:
        # EMNIST stores images with rows and columns exchanged, and the labels of the split `letters` start at 1.
        labels = dataset.targets.numpy() - (self.split == "letters")
        return np.ascontiguousarray(dataset.data.numpy().transpose(0, 2, 1))[:, None], labels

    def _classes(self, dataset: Any) -> list[str]:
        return [name for name in dataset.classes if name != "N/A"]

    def _hashes(self) -> dict[str, str]:
        return {"gzip.zip": self._torchvision.md5}
