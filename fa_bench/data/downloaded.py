"""Datasets that torchvision reads, and downloads where they are missing."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import shutil
import sys
import tempfile
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
    #: Pattern of the archives that hold them, below data_dir.
    archives: ClassVar[str]

    def arrays(self, data_dir: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[str]]:
        make, folder = getattr(torchvision.datasets, self.torchvision_name), data_dir / self.folder
        if missing := [name for name in self.files if not (folder / name).is_file()]:
            self._download(make, data_dir, missing)
        try:
            train, test = make(str(data_dir), train=True), make(str(data_dir), train=False)
            (train_x, train_y), (test_x, test_y) = self._unpack(train), self._unpack(test)
            if len(train_x) != len(train_y) or len(test_x) != len(test_y):
                raise ValueError("not one label for each image")
        except Exception as error:  # torchvision's readers meet damage with assertions and errors of many kinds
            raise DataError(f"dataset={self.name}: {folder} is damaged ({_reason(error)}); "
                            f"delete it to download it again (files: {', '.join(self.files)})") from None
        return train_x, train_y, test_x, test_y, list(train.classes)

    def _download(self, make: Any, data_dir: Path, missing: list[str]) -> None:
        """Download beside the folder and move whole files into it, so that none in it is ever half written."""
        folder = data_dir / self.folder
        bar = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".download-", dir=data_dir) as temporary:
                made = Path(temporary) / self.folder
                # torchvision unpacks an archive that is there already, without a network.
                for archive in (data_dir / self.archives).parent.glob(Path(self.archives).name):
                    target = Path(temporary) / archive.relative_to(data_dir)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(archive, target)
                with bar, contextlib.redirect_stdout(io.StringIO()):
                    make(temporary, train=True, download=True)
                folder.mkdir(parents=True, exist_ok=True)
                for name in missing:
                    os.replace(made / name, folder / name)
        except (RuntimeError, OSError, ValueError, EOFError) as error:
            with contextlib.suppress(OSError):
                data_dir.rmdir()  # only where it is empty: made for this download
            raise DataError(f"dataset={self.name}: missing {', '.join(missing)} in {folder}, and the download failed "
                            f"({_reason(error)}); put the files there, or set data_dir") from None

    def _unpack(self, dataset: Any) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError


def _remove_empty(folder: Path, top: Path) -> None:
    """Remove the folders, up to `top`, that a failed download made and left empty."""
    with contextlib.suppress(OSError):
        while folder == top or top in folder.parents:
            folder.rmdir()
            folder = folder.parent


def _reason(error: Exception) -> str:
    """The last line of an error's text: torchvision puts the cause there."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


@DATASETS.register("mnist")
@dataclasses.dataclass(eq=False)
class MNIST(Downloaded):
    """MNIST: 60,000 and 10,000 grey images of 28x28 pixels in 10 classes (LeCun et al. 1998); mean 0.1307, std 0.3081."""

    torchvision_name = "MNIST"
    folder = "MNIST/raw"
    files = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    archives = "MNIST/raw/*.gz"
    mean_std = ([0.1307], [0.3081])

    def _unpack(self, dataset: Any) -> tuple[np.ndarray, np.ndarray]:
        return dataset.data.numpy()[:, None], dataset.targets.numpy()


@DATASETS.register("fashion_mnist")
@dataclasses.dataclass(eq=False)
class FashionMNIST(MNIST):
    """Fashion-MNIST: MNIST's format with clothes (Xiao et al. 2017); mean and std 0.5, as in the DKP paper."""

    torchvision_name = "FashionMNIST"
    folder = "FashionMNIST/raw"
    archives = "FashionMNIST/raw/*.gz"
    mean_std = ([0.5], [0.5])


@DATASETS.register("cifar10")
@dataclasses.dataclass(eq=False)
class CIFAR10(Downloaded):
    """CIFAR-10: 50,000 and 10,000 colour images of 32x32 pixels in 10 classes (Krizhevsky 2009)."""

    augment: bool = option(True, "random crop with 4 pixels of padding, and horizontal flip, of training images")

    torchvision_name = "CIFAR10"
    folder = "cifar-10-batches-py"
    files = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
    archives = "cifar-10-python.tar.gz"
    mean_std = ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616])

    @property
    def augments(self) -> bool:
        return self.augment

    def _unpack(self, dataset: Any) -> tuple[np.ndarray, np.ndarray]:
        return dataset.data.transpose(0, 3, 1, 2), np.asarray(dataset.targets)
