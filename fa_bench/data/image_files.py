"""Datasets that are one file for each image: decoding, and the split that streams."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fa_bench.config.options import option
from fa_bench.data.base import CroppedDataset, ResidentSplit, Split
from fa_bench.data.crops import Crop, PaddedCrop, ResizedCrop
from fa_bench.errors import DataError, OptionError
from fa_bench.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".gif"})


def workers_option(default: int) -> Any:
    """The option `workers` of a dataset."""
    return option(default, "processes that decode what streams; 0: none but the run's own", minimum=0)


@dataclasses.dataclass
class Listing:
    """What a dataset of image files holds.

    Attributes:
        classes: names of the classes.
        train, test: (file, label) of every image.
        train_root, test_root: folders that the files are below.
    """

    classes: list[str]
    train: list[tuple[Path, int]]
    test: list[tuple[Path, int]]
    train_root: Path
    test_root: Path


@dataclasses.dataclass(eq=False)
class ImageFiles(CroppedDataset):
    """Base of the datasets that are one file for each image.

    What fits into memory is decoded once and stays on the device; larger sets stream through workers.
    """

    memory_limit_gb: float = option(2.0, "largest decoded size, in units of 1e9 bytes, that is kept on the device", minimum=0)
    workers: int = workers_option(2)

    channels: int = dataclasses.field(init=False, default=3)
    #: Height and width of all its images, where they are known to have one size.
    stored_size: ClassVar[int | None] = None
    #: Whether the header of every image is read before training starts, even where they stream.
    opens_all: ClassVar[bool] = True

    def check(self) -> None:
        super().check()
        if self.stored_size is None and self.size is None and isinstance(self.cropping(), ResizedCrop):
            raise OptionError("size", f"=null does not go with crop={self.crop}: it needs a number of pixels, such as 224")

    def listing(self, data_dir: Path) -> Listing:
        """Find the files, downloading them where that is possible and needed; implemented by each dataset."""
        raise NotImplementedError

    def read(self, data_dir: Path, device: torch.device) -> tuple[Split, Split, list[str], tuple[int, int, int], str]:
        from PIL import Image

        # Else Pillow warns of an image that would fill the memory, and then reads it.
        warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
        listing = self.listing(data_dir)
        decode, crop, may_stay = self._decoding(listing.train[0][0])
        height, width = decode.height, decode.width
        mean, std = (self.per_channel(key, self.channels) for key in ("mean", "std"))
        images = len(listing.train) + len(listing.test)
        fits = may_stay and images * self.channels * height * width <= self.memory_limit_gb * 1e9
        digest = hashlib.sha256()

        def split(files: list[tuple[Path, int]], root: Path) -> Split:
            labels = torch.tensor([label for _, label in files])
            paths = [path for path, _ in files]
            digest.update(labels.numpy().tobytes())
            if fits:
                images = np.empty((len(files), self.channels, height, width), np.uint8)
                for index, image in enumerate(_read_all(decode, paths, f"decoding {root.name}")):
                    images[index] = image
                # A slice, for relative_to takes seconds for a million files.
                digest.update(images.data)
                return ResidentSplit(torch.from_numpy(images), labels, mean, std, self.augment, device, crop)
            sizes = _read_all(decode.check, paths, f"checking {root.name}") if self.opens_all else map(file_size, paths)
            for path, size in zip(paths, sizes, strict=True):
                digest.update(f"{str(path)[len(str(root)) + 1:]} {size}\n".encode(errors="surrogateescape"))
            return StreamedSplit(paths, labels, decode, self.workers, mean, std, self.augment, device, crop)

        splits = split(listing.train, listing.train_root), split(listing.test, listing.test_root)
        return *splits, listing.classes, (self.channels, *crop.shape(height, width)), digest.hexdigest()

    def _decoding(self, first: Path) -> tuple[Decoder, Crop, bool]:
        """What reads a file, what crops batches of what it read, and whether that may stay on the device."""
        crop = self.cropping()
        if self.stored_size is not None:
            return Decoder(self.channels, self.stored_size, self.stored_size), crop, True
        height, width = (self.size, self.size) if self.size else _size_of(first)
        if isinstance(crop, ResizedCrop):
            # A random part is cut from the whole image, whatever its size: while it is decoded.
            return CroppingDecoder(self.channels, height, width, crop), Crop(), False
        return Decoder(self.channels, height, width, resize=self.size is not None), PaddedCrop(), True


@dataclasses.dataclass
class Decoder:
    """Reads one image file as uint8 (C, H, W)."""

    channels: int
    height: int
    width: int
    resize: bool = False

    def __call__(self, path: Path, rng: np.random.Generator | None = None) -> np.ndarray:
        """Decode a file, with augmentation that `rng` decides where the decoder has one; raises DataError naming it."""
        from PIL import Image

        with _naming(path), Image.open(path) as opened:
            self._check_header(path, opened)
            # Pillow warns of every palette with transparency that does not pass through RGBA.
            image = opened.convert("RGBA") if opened.mode == "P" and "transparency" in opened.info else opened
            image = self._bring(image.convert("RGB" if self.channels == 3 else "L"), rng)
        array = np.asarray(image)
        # Contiguous, as images that stay on the device are: a batch with channels last would take other kernels and other bits,
        # and oneDNN's for few channels write out of bounds (torch 2.15, seen with a 7x7 convolution of 4 channels at 224 pixels).
        return array[None] if self.channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))

    def check(self, path: Path) -> int:
        """Open a file and read its header; its size in bytes. Raises DataError naming it."""
        from PIL import Image

        with _naming(path), Image.open(path) as opened:
            self._check_header(path, opened)
        return file_size(path)

    def _bring(self, image: Any, rng: np.random.Generator | None) -> Any:
        """The PIL image at the size to be returned."""
        from PIL import Image, ImageOps

        if not self.resize or image.size == (self.width, self.height):
            return image
        return ImageOps.fit(image, (self.width, self.height), Image.Resampling.BILINEAR)

    def _check_header(self, path: Path, image: Any) -> None:
        size = image.size
        if image.mode[0] in "IF":
            # Pillow cuts such values off at 255 instead of scaling them: most images would come out white.
            raise DataError(f"{path}: more than 8 bits a channel (mode {image.mode}); convert it to 8 bits first")
        if not self.resize and size != (self.width, self.height):
            raise DataError(f"{path}: {size[1]}x{size[0]} pixels, others have {self.height}x{self.width}; "
                            "set dataset.size to bring all to one size")


class CroppingDecoder(Decoder):
    """Reads a random part of an image, or its centre, at one size.

    Args:
        channels, height, width: as for Decoder.
        crop: what cuts the image.
    """

    def __init__(self, channels: int, height: int, width: int, crop: ResizedCrop) -> None:
        super().__init__(channels, height, width, resize=True)
        self.crop = crop

    def _bring(self, image: Any, rng: np.random.Generator | None) -> Any:
        return self.crop.decode_fixed(image) if rng is None else self.crop.decode_random(image, rng)


def file_size(path: Path) -> int:
    """Bytes of a file."""
    return path.stat().st_size


class _naming:
    """Turns whatever an image reader raises into a DataError that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        try:
            mode = self.path.stat().st_mode
        except OSError as error:
            raise DataError(f"{self.path}: not a readable image ({error.strerror}); replace or remove it") from None
        if not stat.S_ISREG(mode):  # a pipe would make the run wait for ever
            raise DataError(f"{self.path}: not a readable image (a folder, pipe or device); replace or remove it")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, DataError):
            raise DataError(f"{self.path}: not a readable image ({type(error).__name__}); replace or remove it") from None


class StreamedSplit(Split):
    """Images decoded by worker processes as they are needed.

    Args:
        paths: the files, (n).
        labels: int64 (n,).
        decode: reads one file.
        workers: number of processes; 0 decodes in this one.
        mean, std, augment, device, crop: as for ResidentSplit.
    """

    def __init__(
        self, paths: Sequence[Path] | np.ndarray, labels: Tensor, decode: Decoder, workers: int, mean: list[float],
        std: list[float], augment: bool, device: torch.device, crop: Crop,
    ) -> None:
        # One array instead of a million objects: workers share its memory, and the objects' counts would make them copy it.
        self.paths = paths if isinstance(paths, np.ndarray) else np.array([os.fsencode(path) for path in paths])
        self.labels, self.decode, self.workers = labels, decode, workers
        self.mean, self.std, self.augment, self.device, self.crop = mean, std, augment, device, crop

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, indices: Tensor) -> StreamedSplit:
        return StreamedSplit(self.paths[indices.numpy()], self.labels[indices], self.decode, self.workers,
                             self.mean, self.std, self.augment, self.device, self.crop)

    def gather(self, chunks: Iterator[Tensor], key: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        # More processes than cores only slow each other down, and torch warns of them.
        workers = min(self.workers, os.cpu_count() or 1, len(getattr(os, "sched_getaffinity", lambda _: range(1024))(0)))
        loader = torch.utils.data.DataLoader(
            _Files(self.paths, self.decode, key), batch_sampler=[chunk.tolist() for chunk in chunks], num_workers=workers,
            collate_fn=_collate, pin_memory=self.device.type == "cuda", generator=torch.Generator(),
        )
        for images, indices in loader:
            if isinstance(images, str):
                raise DataError(images)
            yield images.to(self.device, non_blocking=True), self.labels[indices].to(self.device, non_blocking=True)


class _Files:
    """What a DataLoader's workers read: one sample is a decoded image and its index, or the text of an error.

    What is random about a sample follows from `key` and its index, whichever worker reads it and when.
    """

    def __init__(self, paths: np.ndarray, decode: Decoder, key: int | None) -> None:
        self.paths, self.decode, self.key = paths, decode, key

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        rng = None if self.key is None else np.random.default_rng([self.key, index])
        try:
            return self.decode(Path(os.fsdecode(self.paths[index])), rng), index
        except DataError as error:
            # An exception that crosses from a worker comes out with the worker's traceback in its text.
            return str(error), index


def _collate(samples: list[tuple[Any, int]]) -> tuple[Any, Any]:
    for image, _ in samples:
        if isinstance(image, str):
            return image, None
    return torch.from_numpy(np.stack([image for image, _ in samples])), torch.tensor([index for _, index in samples])


def class_folders(root: Path) -> list[Path]:
    """The visible folders in a folder, in the order of names."""
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def labelled_files(root: Path, classes: list[str], may_lack: bool = False) -> list[tuple[Path, int]]:
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
