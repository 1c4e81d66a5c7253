"""A folder of images, one folder for each class."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

from fa_bench.config.options import option
from fa_bench.config.registries import DATASETS
from fa_bench.data.image_files import ImageFiles, Listing, class_folders, labelled_files
from fa_bench.errors import DataError, OptionError


@DATASETS.register("image_folder")
@dataclasses.dataclass(eq=False)
class ImageFolder(ImageFiles):
    """`data_dir` holds train/ and test/ (or val/), each with one folder of images for each class.

    What fits into memory is decoded once and stays on the device; larger sets, and all with crop=resized, stream through
    workers. Every image is opened before training starts.
    """

    channels: int = option(3, "3 for colour, 1 for grey", minimum=1, maximum=3)

    content_is_data_dir: ClassVar[bool] = True

    def check(self) -> None:
        if self.channels == 2:
            raise OptionError("channels", "=2 is not one of 1, 3")
        super().check()

    def listing(self, data_dir: Path) -> Listing:
        if not data_dir.is_dir():
            raise DataError(f"data_dir={data_dir}: no such folder; it should hold train/ and test/ (or val/)")
        train = data_dir / "train"
        test = next((data_dir / name for name in ("test", "val") if (data_dir / name).is_dir()), None)
        if not train.is_dir() or test is None:
            raise DataError(f"data_dir={data_dir}: holds no {'train/' if not train.is_dir() else 'test/ or val/'} folder")
        return list_folders(train, test)


def list_folders(train: Path, test: Path) -> Listing:
    """The images of two folders, each with one folder for each class, which their names tell.

    Raises:
        DataError: where there are no classes or no images, or where `test` has a class that `train` has not.
    """
    classes = [path.name for path in class_folders(train)]
    if not classes:
        raise DataError(f"{train}: holds no folders, one for each class")
    unknown = [path.name for path in class_folders(test) if path.name not in classes]
    if unknown:
        raise DataError(f"{test}: holds classes that {train} does not: {', '.join(unknown[:5])}")
    return Listing(classes, labelled_files(train, classes), labelled_files(test, classes, may_lack=True), train, test)
