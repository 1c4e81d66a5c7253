"""ImageNet (ILSVRC 2012)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

from fa_bench.data.base import crop_option, mean_option, size_option, std_option
from fa_bench.data.image_files import ImageFiles, workers_option
from fa_bench.data.listing import EXTENSIONS, Listing, class_listing, visible_folders
from fa_bench.errors import DataError
from fa_bench.registry.registries import DATASETS

SOURCE = "register at https://image-net.org/download.php for the images of ILSVRC 2012"


@DATASETS.register("imagenet")
@dataclasses.dataclass(eq=False)
class ImageNet(ImageFiles):
    """ImageNet: 1,281,167 training and 50,000 validation images (colour photographs) in 1,000 classes (Russakovsky et al. 2015).

    `data_dir`/imagenet contains train/ and val/, each with one folder of images for each class; val/ is the test set. Subsets
    with fewer classes also work. The data may not be redistributed.
    """

    crop: str = crop_option("resized")
    size: int | None = size_option(224)
    mean: list[float] = mean_option(0.485, 0.456, 0.406)
    std: list[float] = std_option(0.229, 0.224, 0.225)
    workers: int = workers_option(8)

    #: Reading all 150 GB before every run would take too long, so only subsets of up to this many bytes are read completely.
    reads_all: ClassVar[float] = 4e9

    def listing(self, data_dir: Path) -> Listing:
        root = data_dir / "imagenet"
        if missing := [name for name in ("train", "val") if not (root / name).is_dir()]:
            raise DataError(
                f"dataset=imagenet: no {' and no '.join(f'{name}/' for name in missing)} in {root}, and ImageNet "
                f"cannot be downloaded automatically: {SOURCE}, and unpack them there, one folder for each class; "
                "or set data_dir"
            )
        for name in ("train", "val"):
            if not visible_folders(root / name):
                loose = sum(path.suffix.lower() in EXTENSIONS for path in (root / name).iterdir())
                raise DataError(
                    f"dataset=imagenet: {root / name} contains no class folders, but {loose} loose "
                    "images; sort them into folders named after their classes, such as n01440764"
                )
        return class_listing(root / "train", root / "val")
