"""Your own images, with one folder for each class."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import ClassVar

from fa_bench.data.image_files import ImageFiles
from fa_bench.data.listing import Listing, class_listing, has_classes, skip_notes, train_classes, visible_folders
from fa_bench.errors import DataError, OptionError
from fa_bench.registry.options import option
from fa_bench.registry.registries import DATASETS

#: The allowed names of the folder with the validation images.
VALIDATION = ("val", "valid", "validation")


@DATASETS.register("image_folder")
@dataclasses.dataclass(eq=False)
class ImageFolder(ImageFiles):
    """Your own images: `data_dir` contains train/ and test/ (or val/), each with one folder for each class; see
    docs/own_images.md.

    If all three exist, val/ is the validation set. Datasets of up to `memory_limit_gb` are decoded once and stay on the device;
    larger datasets, and all datasets with crop=resized, are streamed. Every image is decoded before training starts.
    """

    channels: int = option(3, "3 for colour, 1 for grey", minimum=1, maximum=3)
    background: float = option(1.0, "grey level behind transparent pixels, from 0 (black) to 1 (white)", minimum=0, maximum=1)

    content_is_data_dir: ClassVar[bool] = True

    def check(self) -> None:
        if self.channels == 2:
            raise OptionError("channels", "=2 is not one of 1, 3")
        super().check()

    def listing(self, data_dir: Path) -> Listing:
        if not data_dir.is_dir():
            raise DataError(f"data_dir={data_dir}: no such folder; it should contain train/ and test/ (or val/)")
        skipped: Counter[str] = Counter()
        folders = [path.name for path in visible_folders(data_dir, skipped)]
        present = [name for name in VALIDATION if name in folders]
        if "train" not in folders or not {"test", *VALIDATION} & {*folders}:
            raise DataError(
                f"data_dir={data_dir}: contains no {'train/' if 'train' not in folders else 'test/ or val/'} folder"
                f"{', only ' + ', '.join(f'{name}/' for name in folders[:5]) if folders else ''}"
            )
        if len(present) > 1:
            raise DataError(
                f"data_dir={data_dir}: contains {' and '.join(f'{name}/' for name in present)}, but only one folder "
                "may contain the validation set; merge or rename them"
            )
        train, notes = data_dir / "train", skip_notes(data_dir, skipped)
        classes = [folder.name for folder in train_classes(train, Counter())]
        labelled = [name for name in ("test", *present) if name in folders and has_classes(data_dir / name, classes)]
        if not labelled:
            first = data_dir / ("test" if "test" in folders else present[0])
            names = ", ".join([*classes[:3], "..."] if len(classes) > 3 else classes)
            raise DataError(
                f"{first}: contains no folder named after a class in {train} ({names}); sort its images into such folders"
            )
        # If only one of test/ and val/ has labelled images, it is the test set.
        test, validation = data_dir / labelled[0], data_dir / labelled[1] if len(labelled) > 1 else None
        for name in ("test", *present):
            if name in folders and name not in labelled:
                notes.append(f"{data_dir / name}: skipped, because it has no folder named after a class in {train}")
        if test.name != "test":
            notes.append(f"{test}: used as the test set")
        if validation is not None and self.validation > 0:
            notes.append(f"{validation}: used as the validation set; no training images are held out")
        if validation is not None and self.validation == 0:
            notes.append(f"{validation}: skipped, because dataset.validation=0")
            validation = None
        if others := [name for name in folders if name not in ("train", "test", *present)]:
            notes.append(f"{data_dir}: skipped {', '.join(f'{name}/' for name in others[:5])}{', ...' * (len(others) > 5)}")
        listing = class_listing(train, test, validation)
        return dataclasses.replace(listing, notes=notes + listing.notes)
