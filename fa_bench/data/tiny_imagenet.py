"""Tiny ImageNet."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from pathlib import Path
from typing import ClassVar

from fa_bench.data.base import mean_option, std_option
from fa_bench.data.fetch import download, fetching, has_md5, unpack_zip
from fa_bench.data.image_files import ImageFiles
from fa_bench.data.listing import Listing, is_hidden, labelled_files
from fa_bench.errors import DataError, nearest
from fa_bench.registry.registries import DATASETS


@DATASETS.register("tiny_imagenet")
@dataclasses.dataclass(eq=False)
class TinyImageNet(ImageFiles):
    """Tiny ImageNet: 100,000 training and 10,000 test images (colour photographs, 64x64) in 200 classes (Le and Yang 2015).

    The labelled validation images are the test set, because the labels of the test images are not public. If memory_limit_gb
    allows it, the images are decoded once and stay on the device, where they take 1.35e9 bytes.
    """

    mean: list[float] = mean_option(0.480, 0.448, 0.398)
    std: list[float] = std_option(0.277, 0.269, 0.282)

    stored_size: ClassVar[int | None] = 64
    stored = (64, 64, 200)
    folder: ClassVar[str] = "tiny-imagenet-200"
    url: ClassVar[str] = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    md5: ClassVar[str] = "90528d7ca1a48142e341f4ef8d21d0de"

    def listing(self, data_dir: Path) -> Listing:
        root = data_dir / self.folder
        if not root.is_dir():
            self._download(data_dir, root)
        for part in ("wnids.txt", "train", "val/images", "val/val_annotations.txt"):
            if not (root / part).exists():
                raise DataError(f"dataset={self.name}: {root / part} is missing; delete {root} to download it again")
        # The classes are sorted, as in datasets with class folders.
        classes = sorted((root / "wnids.txt").read_text(encoding="utf-8", errors="replace").split())
        train = labelled_files([root / "train" / name for name in classes], Counter())
        return Listing(classes, {"train": (root / "train", train), "test": (root / "val", annotated(root / "val", classes))})

    def _download(self, data_dir: Path, root: Path) -> None:
        """Download the archive if it is missing, and unpack it; an interruption never leaves an incomplete archive or dataset."""
        archive = data_dir / f"{self.folder}.zip"
        downloads = not archive.is_file()
        if downloads:
            with fetching(data_dir, self.name, f"{root} (or {archive}, from {self.url})") as temporary:
                if not archive.is_file() and not root.is_dir():  # otherwise another process has downloaded it
                    download(self.url, self.md5, temporary / archive.name)
                    os.replace(temporary / archive.name, archive)
        elif not has_md5(archive, self.md5):
            raise DataError(
                f"dataset={self.name}: {archive} is damaged or incomplete (its MD5 is not {self.md5}); "
                "delete it to download it again"
            )
        if not root.is_dir():
            unpack_zip(archive, root)
        if downloads:
            archive.unlink(missing_ok=True)


def annotated(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """The pairs (file, label) of the images in `folder`/images. Each line of `folder`/val_annotations.txt has the name, class and
    box of an image.

    Raises:
        DataError: if a line is invalid, or an image has no line; the message names it.
    """
    source, label_of = folder / "val_annotations.txt", {}
    labels = {name: label for label, name in enumerate(classes)}
    images = {name for name in os.listdir(folder / "images") if not is_hidden(name)}
    for number, line in enumerate(source.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        name, kind = (*line.split("\t"), "")[:2]
        if kind not in labels:
            raise DataError(
                f"{source}:{number}: no class '{kind}' in {folder.parent / 'wnids.txt'}{nearest(kind, classes)}; "
                f"delete {folder.parent} to download it again"
            )
        if name not in images:
            raise DataError(
                f"{source}:{number}: no image '{name}' in {folder / 'images'}; delete {folder.parent} to download it again"
            )
        label_of[name] = labels[kind]
    if unlabelled := sorted(images - set(label_of)):
        raise DataError(
            f"{source}: no line for {unlabelled[0]}{f' and {more} more' if (more := len(unlabelled) - 1) else ''} of "
            f"{folder / 'images'}; delete {folder.parent} to download it again"
        )
    return [(folder / "images" / name, label_of[name]) for name in sorted(label_of)]
