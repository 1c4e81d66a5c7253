"""Datasets that torchvision reads, and downloads where they are missing."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fa_bench.data.base import ArrayDataset
from fa_bench.errors import DataError
from fa_bench.lazy import torchvision
from fa_bench.options import option
from fa_bench.registries import DATASETS


@dataclasses.dataclass(eq=False)
class Downloaded(ArrayDataset):
    """Base: `data_dir` is torchvision's root folder."""

    #: Name of the class in torchvision.datasets; folder below data_dir; files in it.
    torchvision_name: ClassVar[str]
    folder: ClassVar[str]
    files: ClassVar[tuple[str, ...]]

    def arrays(self, data_dir: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[str]]:
        train, test = self._dataset(data_dir, True), self._dataset(data_dir, False)
        (train_x, train_y), (test_x, test_y) = self._unpack(train), self._unpack(test)
        return train_x, train_y, test_x, test_y, list(train.classes)

    def _dataset(self, data_dir: Path, train: bool) -> Any:
        make = getattr(torchvision.datasets, self.torchvision_name)
        try:
            return make(str(data_dir), train=train, download=False)
        except (RuntimeError, OSError, ValueError, EOFError):
            pass  # missing or not whole: the download replaces what does not match its checksum
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                return make(str(data_dir), train=train, download=True)
        except (RuntimeError, OSError, ValueError, EOFError) as error:
            folder = data_dir / self.folder
            _remove_empty(folder, data_dir)
            missing = [name for name in self.files if not (folder / name).exists()]
            what = f"missing {', '.join(missing)}" if missing else f"unreadable {', '.join(self.files)}"
            raise DataError(f"dataset={self.name}: {what} in {folder}, and the download failed "
                            f"({type(error).__name__}); put the files there, or set data_dir") from None

    def _unpack(self, dataset: Any) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError


def _remove_empty(folder: Path, top: Path) -> None:
    """Remove the folders, up to `top`, that a failed download made and left empty."""
    with contextlib.suppress(OSError):
        while folder == top or top in folder.parents:
            folder.rmdir()
            folder = folder.parent


@DATASETS.register("mnist")
@dataclasses.dataclass(eq=False)
class MNIST(Downloaded):
    """MNIST: 60,000 and 10,000 grey images of 28x28 pixels in 10 classes (LeCun et al. 1998); mean 0.1307, std 0.3081."""

    torchvision_name = "MNIST"
    folder = "MNIST/raw"
    files = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    mean_std = ([0.1307], [0.3081])

    def _unpack(self, dataset: Any) -> tuple[np.ndarray, np.ndarray]:
        return dataset.data.numpy()[:, None], dataset.targets.numpy()


@DATASETS.register("fashion_mnist")
@dataclasses.dataclass(eq=False)
class FashionMNIST(MNIST):
    """Fashion-MNIST: MNIST's format with clothes (Xiao et al. 2017); mean and std 0.5, as in the DKP paper."""

    torchvision_name = "FashionMNIST"
    folder = "FashionMNIST/raw"
    mean_std = ([0.5], [0.5])


@DATASETS.register("cifar10")
@dataclasses.dataclass(eq=False)
class CIFAR10(Downloaded):
    """CIFAR-10: 50,000 and 10,000 colour images of 32x32 pixels in 10 classes (Krizhevsky 2009)."""

    augment: bool = option(True, "random crop with 4 pixels of padding, and horizontal flip, of training images")

    torchvision_name = "CIFAR10"
    folder = "cifar-10-batches-py"
    files = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
    mean_std = ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616])

    @property
    def augments(self) -> bool:
        return self.augment

    def _unpack(self, dataset: Any) -> tuple[np.ndarray, np.ndarray]:
        return dataset.data.transpose(0, 3, 1, 2), np.asarray(dataset.targets)
