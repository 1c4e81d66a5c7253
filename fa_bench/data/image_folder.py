"""A folder of images, one folder for each class."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fa_bench.data.base import Dataset, ResidentSplit, Split
from fa_bench.errors import DataError, OptionError
from fa_bench.lazy import torch
from fa_bench.options import option
from fa_bench.registries import DATASETS

if TYPE_CHECKING:
    from torch import Tensor

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".gif"})


@DATASETS.register("image_folder")
@dataclasses.dataclass(eq=False)
class ImageFolder(Dataset):
    """`data_dir` holds train/ and test/ (or val/), each with one folder of images for each class.

    What fits into memory is decoded once and stays on the device; larger sets stream through workers. Every image is
    opened before training starts.
    """

    size: int | None = option(None, "height and width: shorter side resized, centre cropped; null: all images have one size",
                              minimum=1)
    channels: int = option(3, "3 for colour, 1 for grey", minimum=1, maximum=3)
    augment: bool = option(True, "random crop with 4 pixels of padding, and horizontal flip, of training images")
    mean: list[float] = option([0.5], "mean of each channel, or one for all", minimum=0, maximum=1)
    std: list[float] = option([0.5], "standard deviation of each channel, or one for all", above=0)
    memory_limit_gb: float = option(2.0, "largest decoded size, in units of 1e9 bytes, that is kept on the device", minimum=0)
    workers: int = option(2, "processes that decode what streams", minimum=0)

    content_is_data_dir: ClassVar[bool] = True

    def check(self) -> None:
        super().check()
        if self.channels == 2:
            raise OptionError("channels", "=2 is not one of 1, 3")
        for key in ("mean", "std"):
            if len(getattr(self, key)) not in (1, self.channels):
                raise OptionError(key, f"={getattr(self, key)} should have 1 or {self.channels} numbers, one for each channel")

    def read(self, data_dir: Path, device: torch.device) -> tuple[Split, Split, list[str], tuple[int, int, int], str]:
        train_dir, test_dir = _find_splits(data_dir)
        classes = [path.name for path in _folders(train_dir)]
        if not classes:
            raise DataError(f"{train_dir}: holds no folders, one for each class")
        unknown = [path.name for path in _folders(test_dir) if path.name not in classes]
        if unknown:
            raise DataError(f"{test_dir}: holds classes that {train_dir} does not: {', '.join(unknown[:5])}")
        train, test = _files(train_dir, classes), _files(test_dir, classes, may_lack=True)
        height, width = (self.size, self.size) if self.size else _size_of(train[0][0])
        decode = Decoder(self.channels, height, width, resize=self.size is not None)
        mean, std = ([*values] * (self.channels // len(values)) for values in (self.mean, self.std))
        fits = (len(train) + len(test)) * self.channels * height * width <= self.memory_limit_gb * 1e9
        digest = hashlib.sha256()

        def split(files: list[tuple[Path, int]], root: Path) -> Split:
            labels = torch.tensor([label for _, label in files])
            paths = [path for path, _ in files]
            digest.update(labels.numpy().tobytes())
            if fits:
                images = np.empty((len(files), self.channels, height, width), np.uint8)
                for index, image in enumerate(_read_all(decode, paths, f"decoding {root.name}")):
                    images[index] = image
                digest.update(images.data)
                return ResidentSplit(torch.from_numpy(images), labels, mean, std, self.augment, device)
            for path, _ in zip(paths, _read_all(decode.check, paths, f"checking {root.name}"), strict=True):
                digest.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode())
            return StreamedSplit(paths, labels, decode, self.workers, mean, std, self.augment, device)

        return split(train, train_dir), split(test, test_dir), classes, (self.channels, height, width), digest.hexdigest()


@dataclasses.dataclass
class Decoder:
    """Reads one image file as uint8 (C, H, W)."""

    channels: int
    height: int
    width: int
    resize: bool

    def __call__(self, path: Path) -> np.ndarray:
        """Decode a file; raises DataError naming it."""
        from PIL import Image, ImageOps

        with _naming(path), Image.open(path) as opened:
            self._check_header(path, opened)
            # Pillow warns of every palette with transparency that does not pass through RGBA.
            image = opened.convert("RGBA") if opened.mode == "P" and "transparency" in opened.info else opened
            image = image.convert("RGB" if self.channels == 3 else "L")
        if self.resize and image.size != (self.width, self.height):
            image = ImageOps.fit(image, (self.width, self.height), Image.Resampling.BILINEAR)
        array = np.asarray(image)
        return array[None] if self.channels == 1 else array.transpose(2, 0, 1)

    def check(self, path: Path) -> None:
        """Open a file and read its header; raises DataError naming it."""
        from PIL import Image

        with _naming(path), Image.open(path) as opened:
            self._check_header(path, opened)

    def _check_header(self, path: Path, image: Any) -> None:
        size = image.size
        if image.mode[0] in "IF":
            # Pillow cuts such values off at 255 instead of scaling them: most images would come out white.
            raise DataError(f"{path}: more than 8 bits a channel (mode {image.mode}); convert it to 8 bits first")
        if not self.resize and size != (self.width, self.height):
            raise DataError(f"{path}: {size[1]}x{size[0]} pixels, others have {self.height}x{self.width}; "
                            "set dataset.size to bring all to one size")


class _naming:
    """Turns whatever an image reader raises into a DataError that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, DataError):
            raise DataError(f"{self.path}: not a readable image ({type(error).__name__})") from None


class StreamedSplit(Split):
    """Images decoded by worker processes as they are needed.

    Args:
        paths: the files, (n).
        labels: int64 (n,).
        decode: reads one file.
        workers: number of processes; 0 decodes in this one.
        mean, std, augment, device: as for ResidentSplit.
    """

    def __init__(
        self, paths: Sequence[Path], labels: Tensor, decode: Decoder, workers: int, mean: list[float], std: list[float],
        augment: bool, device: torch.device,
    ) -> None:
        self.paths, self.labels, self.decode, self.workers = list(paths), labels, decode, workers
        self.mean, self.std, self.augment, self.device = mean, std, augment, device

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, indices: Tensor) -> StreamedSplit:
        return StreamedSplit([self.paths[i] for i in indices.tolist()], self.labels[indices], self.decode, self.workers,
                             self.mean, self.std, self.augment, self.device)

    def gather(self, chunks: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        # More processes than cores only slow each other down, and torch warns of them.
        workers = min(self.workers, os.cpu_count() or 1, len(getattr(os, "sched_getaffinity", lambda _: range(1024))(0)))
        loader = torch.utils.data.DataLoader(
            _Files(self.paths, self.decode), batch_sampler=[chunk.tolist() for chunk in chunks], num_workers=workers,
            collate_fn=_collate, pin_memory=self.device.type == "cuda", generator=torch.Generator(),
        )
        for images, indices in loader:
            if isinstance(images, str):
                raise DataError(images)
            yield images.to(self.device, non_blocking=True), self.labels[indices].to(self.device, non_blocking=True)


class _Files:
    """What a DataLoader's workers read: one sample is a decoded image and its index, or the text of an error."""

    def __init__(self, paths: list[Path], decode: Decoder) -> None:
        self.paths, self.decode = paths, decode

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            return self.decode(self.paths[index]), index
        except DataError as error:
            # An exception that crosses from a worker comes out with the worker's traceback in its text.
            return str(error), index


def _collate(samples: list[tuple[Any, int]]) -> tuple[Any, Any]:
    for image, _ in samples:
        if isinstance(image, str):
            return image, None
    return torch.from_numpy(np.stack([image for image, _ in samples])), torch.tensor([index for _, index in samples])


def _find_splits(data_dir: Path) -> tuple[Path, Path]:
    if not data_dir.is_dir():
        raise DataError(f"data_dir={data_dir}: no such folder; it should hold train/ and test/ (or val/)")
    train = data_dir / "train"
    test = next((data_dir / name for name in ("test", "val") if (data_dir / name).is_dir()), None)
    if not train.is_dir() or test is None:
        raise DataError(f"data_dir={data_dir}: holds no {'train/' if not train.is_dir() else 'test/ or val/'} folder")
    return train, test


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _files(root: Path, classes: list[str], may_lack: bool = False) -> list[tuple[Path, int]]:
    """(file, label) of every image, in the order of names."""
    found: list[tuple[Path, int]] = []
    for label, name in enumerate(classes):
        folder = root / name
        images = sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS) if folder.is_dir() else []
        if not images and not may_lack:
            raise DataError(f"{folder}: holds no images ({', '.join(sorted(EXTENSIONS))})")
        found += [(path, label) for path in images]
    if not found:
        raise DataError(f"{root}: holds no images ({', '.join(sorted(EXTENSIONS))})")
    return found


def _size_of(path: Path) -> tuple[int, int]:
    """(height, width) of an image file."""
    from PIL import Image

    with _naming(path), Image.open(path) as image:
        return image.height, image.width


def _read_all(read: Callable[[Path], Any], paths: list[Path], title: str) -> Iterator[Any]:
    """`read` of every file, in order, by a few threads, with a progress bar; the first error ends it."""
    from tqdm import tqdm

    with ThreadPoolExecutor() as pool:
        try:
            yield from tqdm(pool.map(read, paths), total=len(paths), desc=title, unit="image", disable=None, leave=False)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
