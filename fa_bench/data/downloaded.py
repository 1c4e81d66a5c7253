"""Datasets that torchvision provides."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fa_bench.data.array_checks import check_labels
from fa_bench.data.base import ArrayDataset, CroppedDataset, augment_option, mean_option, std_option
from fa_bench.data.fetch import download, fetching, has_md5, reason, unpack_tar
from fa_bench.errors import DataError, missing_method
from fa_bench.registry.registries import DATASETS
from fa_bench.utils.lazy import torchvision


@dataclasses.dataclass(eq=False)
class Downloaded(ArrayDataset, CroppedDataset):
    """Base class of datasets that torchvision provides, stored in a folder in `data_dir`."""

    #: The name of the class in torchvision.datasets, the folder in data_dir, and the files in that folder.
    torchvision_name: ClassVar[str]
    folder: ClassVar[str]
    files: ClassVar[tuple[str, ...]]
    #: Glob pattern for the archives in data_dir; None if the files are downloaded without an archive.
    archives: ClassVar[str | None] = None

    def arrays(self, data_dir: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[str]]:
        folder = data_dir / self.folder
        if missing := [name for name in self.files if not (folder / name).is_file()]:
            self._download(data_dir, missing)
        try:
            train, test = self._open(data_dir, "train"), self._open(data_dir, "test")
            (train_x, train_y), (test_x, test_y), classes = self._unpack(train), self._unpack(test), self._classes(train)
            check_labels(train_x, train_y, classes, "training")
            check_labels(test_x, test_y, classes, "test")
        except Exception as error:  # damaged files raise many kinds of errors
            if damaged := [name for name in self.files if not self._is_intact(folder / name)]:
                raise DataError(
                    f"dataset={self.name}: {folder / damaged[0]} is damaged or incomplete; delete "
                    f"{', '.join(damaged)} there to download {'it' if len(damaged) == 1 else 'them'} again"
                ) from None
            raise DataError(
                f"dataset={self.name}: {folder} is damaged ({reason(error)}); "
                f"delete it to download it again (files: {', '.join(self.files)})"
            ) from None
        return train_x, train_y, test_x, test_y, classes

    def _download(self, data_dir: Path, missing: list[str]) -> None:
        """Download into a temporary folder and move complete files into place, so that the dataset never contains an incomplete
        file."""
        folder = data_dir / self.folder
        archives = sorted(data_dir.glob(self.archives)) if self.archives else []
        hashes = self._hashes()
        damaged = [path for path in archives if path.name in hashes and not has_md5(path, hashes[path.name])]
        description = f"{', '.join(missing)} in {folder}"
        if damaged:
            description += f" ({damaged[0]} is damaged or incomplete, delete it: its MD5 is not {hashes[damaged[0].name]})"
        with fetching(data_dir, self.name, description) as temporary:
            missing = [name for name in missing if not (folder / name).is_file()]  # another process may have downloaded some
            # torchvision unpacks existing archives without network access.
            for archive in archives:
                target = temporary / archive.relative_to(data_dir)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(archive, target)
            if missing:
                self._fetch(temporary, missing)
            folder.mkdir(parents=True, exist_ok=True)
            for name in missing:
                os.replace(temporary / self.folder / name, folder / name)

    @property
    def _torchvision(self) -> Any:
        return getattr(torchvision.datasets, self.torchvision_name)

    def _fetch(self, root: Path, missing: list[str]) -> None:
        """Download and unpack the missing files into `root`."""
        self._open(root, "train", download=True)

    def _open(self, root: Path, part: str, download: bool = False) -> Any:
        """The torchvision dataset for one part, train or test."""
        return self._torchvision(str(root), train=part == "train", download=download)

    def _unpack(self, dataset: Any) -> tuple[np.ndarray, np.ndarray]:
        """The images, uint8 (n, C, H, W), and the labels of one part."""
        raise missing_method(self, "_unpack")

    def _classes(self, dataset: Any) -> list[str]:
        return list(dataset.classes)

    def _hashes(self) -> dict[str, str]:
        """The MD5 checksums of the archives and files, by name."""
        raise missing_method(self, "_hashes")

    def _is_intact(self, path: Path) -> bool:
        """Whether a file is complete and unchanged, as far as can be checked."""
        return has_md5(path, self._hashes()[path.name])


@DATASETS.register("mnist")
@dataclasses.dataclass(eq=False)
class MNIST(Downloaded):
    """MNIST: 60,000 training and 10,000 test images (grey, 28x28) in 10 classes (LeCun et al. 1998); mean 0.1307, std 0.3081."""

    augment: bool = augment_option(False)
    mean: list[float] = mean_option(0.1307)
    std: list[float] = std_option(0.3081)

    channels: int = dataclasses.field(init=False, default=1)
    stored = (28, 28, 10)
    torchvision_name = "MNIST"
    folder = "MNIST/raw"
    files = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    archives = "MNIST/raw/*.gz"

    def _unpack(self, dataset: Any) -> tuple[np.ndarray, np.ndarray]:
        return dataset.data.numpy()[:, None], dataset.targets.numpy()

    def _hashes(self) -> dict[str, str]:
        return dict(self._torchvision.resources)  # only the hashes of the archives

    def _is_intact(self, path: Path) -> bool:
        """Whether the file has MNIST's format and is complete.

        In this format, a file starts with two zero bytes, the number 8 (which stands for bytes as values), the number of axes,
        and the length of each axis in four bytes. The values follow, one byte each.
        """
        with path.open("rb") as file:
            head = file.read(16)
        axes = 3 if "idx3" in path.name else 1
        lengths = np.frombuffer(head[4 : 4 + 4 * axes].ljust(4 * axes, b"\0"), ">u4")
        return head[:4] == bytes([0, 0, 8, axes]) and path.stat().st_size == 4 + 4 * axes + int(lengths.prod(dtype=np.int64))


@DATASETS.register("fashion_mnist")
@dataclasses.dataclass(eq=False)
class FashionMNIST(MNIST):
    """Fashion-MNIST: images of clothes in MNIST's format (Xiao et al. 2017); mean and std 0.5, as in the DKP paper."""

    mean: list[float] = mean_option(0.5)
    std: list[float] = std_option(0.5)

    torchvision_name = "FashionMNIST"
    folder = "FashionMNIST/raw"
    archives = "FashionMNIST/raw/*.gz"


@DATASETS.register("cifar10")
@dataclasses.dataclass(eq=False)
class CIFAR10(Downloaded):
    """CIFAR-10: 50,000 training and 10,000 test images (colour, 32x32) in 10 classes (Krizhevsky 2009).

    Mean and std are those of the training images. Three papers use other values: the PFA paper has the mean [0.4914, 0.4821,
    0.4465], the ASAP paper has the default std of `cifar100`, and the DKP paper has 0.5 for both.
    """

    mean: list[float] = mean_option(0.4914, 0.4822, 0.4465)
    std: list[float] = std_option(0.2470, 0.2435, 0.2616)

    channels: int = dataclasses.field(init=False, default=3)
    stored = (32, 32, 10)
    torchvision_name = "CIFAR10"
    folder = "cifar-10-batches-py"
    files = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
    archives = "cifar-10-python.tar.gz"

    def _fetch(self, root: Path, missing: list[str]) -> None:
        # torchvision does not check where the members of the archive would be unpacked.
        archive = root / self._torchvision.filename
        download(self._torchvision.url, self._torchvision.tgz_md5, archive)
        unpack_tar(archive, root)

    def _unpack(self, dataset: Any) -> tuple[np.ndarray, np.ndarray]:
        return dataset.data.transpose(0, 3, 1, 2), np.asarray(dataset.targets)

    def _hashes(self) -> dict[str, str]:
        cls = self._torchvision
        return dict([(cls.filename, cls.tgz_md5), *cls.train_list, *cls.test_list, (cls.meta["filename"], cls.meta["md5"])])


@DATASETS.register("cifar100")
@dataclasses.dataclass(eq=False)
class CIFAR100(CIFAR10):
    """CIFAR-100: images in CIFAR-10's format in 100 classes (Krizhevsky 2009); mean and std as in the code of the ASAP paper.

    For the DKP paper's AlexNet, set mean=[0.5] std=[0.5] size=224 crop=resized.
    """

    std: list[float] = std_option(0.2023, 0.1994, 0.2010)
    stored = (32, 32, 100)

    torchvision_name = "CIFAR100"
    folder = "cifar-100-python"
    files = ("train", "test", "meta")
    archives = "cifar-100-python.tar.gz"


@DATASETS.register("svhn")
@dataclasses.dataclass(eq=False)
class SVHN(Downloaded):
    """Street View House Numbers: 73,257 training and 26,032 test images (colour, 32x32) in 10 classes (Netzer et al. 2011).

    The extra training images are not used. Mean and std are 0.5, as in the ASAP paper.
    """

    augment: bool = augment_option(False)

    channels: int = dataclasses.field(init=False, default=3)
    stored = (32, 32, 10)
    torchvision_name = "SVHN"
    folder = "SVHN"
    files = ("train_32x32.mat", "test_32x32.mat")

    def _fetch(self, root: Path, missing: list[str]) -> None:
        for part in ("train", "test"):
            if f"{part}_32x32.mat" in missing:
                self._open(root, part, download=True)

    def _open(self, root: Path, part: str, download: bool = False) -> Any:
        return self._torchvision(str(root / self.folder), split=part, download=download)

    def _unpack(self, dataset: Any) -> tuple[np.ndarray, np.ndarray]:
        return dataset.data, dataset.labels

    def _classes(self, dataset: Any) -> list[str]:
        return [str(digit) for digit in range(10)]

    def _hashes(self) -> dict[str, str]:
        return {name: md5 for _, name, md5 in self._torchvision.split_list.values()}
