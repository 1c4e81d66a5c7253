"""STL-10."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path
from typing import Any

import numpy as np

from fa_bench.data.base import augment_option
from fa_bench.data.downloaded import Downloaded
from fa_bench.data.fetch import download, unpack_tar
from fa_bench.registry.registries import DATASETS


@DATASETS.register("stl10")
@dataclasses.dataclass(eq=False)
class STL10(Downloaded):
    """STL-10: 5,000 training and 8,000 test images (colour, 96x96) in 10 classes (Coates et al. 2011); mean and std 0.5.

    The 100,000 unlabelled images are in the same archive (2.6 GB) but are not kept.
    """

    channels: int = dataclasses.field(init=False, default=3)
    stored = (96, 96, 10)
    torchvision_name = "STL10"
    folder = "stl10_binary"
    files = ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin")
    archives = "stl10_binary.tar.gz"
    augment: bool = augment_option(True)

    def _fetch(self, root: Path, missing: list[str]) -> None:
        archive = root / self._torchvision.filename
        if not archive.exists():
            download(self._torchvision.url, self._torchvision.tgz_md5, archive)
        unpack_tar(archive, root)

    def _open(self, root: Path, part: str, download: bool = False) -> Any:
        # The files are read here, because torchvision would require the unlabelled images and verify their checksum.
        folder = root / self.folder
        images = np.fromfile(folder / f"{part}_X.bin", np.uint8).reshape(-1, 3, 96, 96).transpose(0, 1, 3, 2)
        return types.SimpleNamespace(data=images, targets=np.fromfile(folder / f"{part}_y.bin", np.uint8).astype(np.int64) - 1)

    def _unpack(self, dataset: Any) -> tuple[np.ndarray, np.ndarray]:
        return np.ascontiguousarray(dataset.data), dataset.targets

    def _classes(self, dataset: Any) -> list[str]:
        return ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]

    def _hashes(self) -> dict[str, str]:
        cls = self._torchvision
        return dict([(cls.filename, cls.tgz_md5), *cls.train_list, *cls.test_list])
