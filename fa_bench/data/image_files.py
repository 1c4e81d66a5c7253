"""Datasets with one file per image, and splits whose images are decoded when a batch needs them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fa_bench.data.base import CroppedDataset, ResidentSplit, Splits
from fa_bench.data.crops import Crop, PaddedCrop, ResizedCrop
from fa_bench.data.decoding import Decoder, configure_warnings, describe, errors_named, regular, upright_size
from fa_bench.data.listing import Listing
from fa_bench.data.splits import ImageSplit, Split
from fa_bench.errors import DataError, OptionError, missing_method
from fa_bench.registry.options import option
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

#: Caches of the SHA-256 of the files and of a decoder's notes on them. The keys depend on the sizes and times of the files, so an
#: entry is used only while the files are unchanged.
_contents: dict[bytes, bytes] = {}
_inspected: dict[tuple[bytes, str], Counter[str]] = {}


def workers_option(default: int) -> Any:
    """Return the `workers` option for a dataset."""
    return option(default, "processes that decode streamed images; 0: the run's own process", minimum=0)


@dataclasses.dataclass(eq=False)
class ImageFiles(CroppedDataset):
    """Base class of datasets with one file per image.

    Datasets of up to `memory_limit_gb` are decoded once and stay on the device; larger ones are streamed. With crop=resized, all
    datasets are streamed, except those whose images are known to have the same size.
    """

    memory_limit_gb: float = option(2.0, "largest decoded size, in units of 1e9 bytes, that is kept on the device", minimum=0)
    workers: int = workers_option(2)

    channels: int = dataclasses.field(init=False, default=3)
    background: float = dataclasses.field(init=False, default=1.0)
    #: The height and width of all images, if they are known to be square and of the same size; otherwise None.
    stored_size: ClassVar[int | None] = None
    #: The total size in bytes up to which all files are decoded once and hashed before training, even if they are streamed.
    reads_all: ClassVar[float] = float("inf")

    def check(self) -> None:
        super().check()
        if self.stored_size is None and self.size is None and isinstance(self.cropping(), ResizedCrop):
            raise OptionError("size", f"=null is not possible with crop={self.crop}, which needs a number of pixels, such as 224")

    def listing(self, data_dir: Path) -> Listing:
        """List the files, downloading them first if they are missing and can be downloaded. Each dataset implements this
        method."""
        raise missing_method(self, "listing")

    def read(self, data_dir: Path, device: torch.device) -> Splits:
        configure_warnings()
        listing = self.listing(data_dir)
        decode, crop, may_reside = self._decoding(listing.parts["train"][1][0][0])
        height, width = decode.height, decode.width
        mean, std = (self.per_channel(key, self.channels) for key in ("mean", "std"))
        images = sum(len(files) for _, files in listing.parts.values())
        fits = may_reside and images * self.channels * height * width <= self.memory_limit_gb * 1e9
        parts = {name: _Part(root, files) for name, (root, files) in listing.parts.items()}
        all_read, notes = self._reads_all(parts), list(listing.notes)
        splits: dict[str, Split] = {}
        for name, part in parts.items():
            labels = torch.from_numpy(part.labels)
            if fits:
                pixels = np.empty((len(labels), self.channels, height, width), np.uint8)
                found = part.inspect(decode, pixels)
                splits[name] = ResidentSplit(torch.from_numpy(pixels), labels, mean, std, self.augment, device, crop)
            else:
                found = part.inspect(decode, None) if all_read else Counter()
                splits[name] = StreamedSplit(part.paths, labels, decode, self.workers, mean, std, self.augment, device, crop)
            notes += describe(found, str(part.root), decode.background)
        return Splits(
            splits["train"],
            splits.get("validation"),
            splits["test"],
            listing.classes,
            (self.channels, *crop.shape(height, width)),
            _hash(parts, all_read),
            notes,
        )

    def content_hash(self, data_dir: Path) -> str:
        parts = {name: _Part(root, files) for name, (root, files) in self.listing(data_dir).parts.items()}
        return _hash(parts, self._reads_all(parts))

    def _reads_all(self, parts: dict[str, _Part]) -> bool:
        return sum(part.size for part in parts.values()) <= self.reads_all

    def _decoding(self, first: Path) -> tuple[Decoder, Crop, bool]:
        """The decoder for the files, the crop for decoded batches, and whether decoded images may stay on the device."""
        crop, background = self.cropping(), round(255 * self.background)
        if self.stored_size is not None:
            return Decoder(self.channels, self.stored_size, self.stored_size, False, background), crop, True
        height, width = (self.size, self.size) if self.size else upright_size(first)
        if isinstance(crop, ResizedCrop):
            # The random part is cropped from the image at its original size, so cropping happens during decoding.
            return Decoder(self.channels, height, width, True, background, crop), Crop(), False
        return Decoder(self.channels, height, width, self.size is not None, background), PaddedCrop(), True


class _Part:
    """The files of one part of a dataset.

    Attributes:
        root: their common folder.
        paths: the files.
        labels: int64 (n,).
        size: total bytes.
    """

    def __init__(self, root: Path, files: list[tuple[Path, int]]) -> None:
        self.root, self.paths = root, [path for path, _ in files]
        self.labels = np.array([label for _, label in files], np.int64)
        state, names, self.size = hashlib.sha256(), hashlib.sha256(self.labels.tobytes()), 0
        skip = len(str(root)) + 1  # slicing, because relative_to takes seconds for a million files
        for path in self.paths:
            name = os.fsencode(str(path)[skip:].replace(os.sep, "/"))
            status = regular(path)
            self.size += status.st_size
            names.update(b"%b %d\n" % (name, status.st_size))
            numbers = status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
            state.update(b"%b %d %d %d %d\n" % (os.fsencode(path), *numbers))
        self.state, self.names = state.digest(), names.digest()

    def inspect(self, decode: Decoder, pixels: np.ndarray | None) -> Counter[str]:
        """Decode and hash every file, and count the decoder's notes.

        The images are stored in `pixels` unless it is None. If it is None and no file has changed since a call with the same
        decoder, the files are not read again.
        """
        key = self.state, str(dataclasses.astuple(decode))
        if pixels is None and key in _inspected:
            return _inspected[key]
        digest, notes = hashlib.sha256(), Counter[str]()
        read = functools.partial(decode.inspect, keep=pixels is not None)
        title = f"{'checking' if pixels is None else 'decoding'} {self.root.name}"
        for index, (image, found, content) in enumerate(_read_all(read, self.paths, title)):
            if pixels is not None:
                pixels[index] = image
            digest.update(content)
            notes += found
        _contents[self.state], _inspected[key] = digest.digest(), notes
        return notes

    def contents(self) -> bytes:
        """The SHA-256 of the concatenated SHA-256 digests of the files."""
        if self.state not in _contents:
            digest = hashlib.sha256()
            for content in _read_all(_sha256, self.paths, f"hashing {self.root.name}"):
                digest.update(content)
            _contents[self.state] = digest.digest()
        return _contents[self.state]


def _hash(parts: dict[str, _Part], contents: bool) -> str:
    """A hash of the names, sizes and labels of all files and, with `contents`, of their bytes."""
    digest = hashlib.sha256()
    for name in sorted(parts):
        digest.update(name.encode() + parts[name].names + (parts[name].contents() if contents else b""))
    return digest.hexdigest()


def _sha256(path: Path) -> bytes:
    with errors_named(path):
        return hashlib.sha256(path.read_bytes()).digest()


class StreamedSplit(ImageSplit):
    """A split of images that are decoded when a batch needs them.

    Args:
        paths: the files, (n,).
        labels: int64 (n,).
        decode: decodes one file.
        workers: maximum number of processes that decode images; with 0, this process decodes them.
        mean, std, augment, device, crop: see ResidentSplit.
    """

    def __init__(
        self,
        paths: Sequence[Path] | np.ndarray,
        labels: Tensor,
        decode: Decoder,
        workers: int,
        mean: list[float],
        std: list[float],
        augment: bool,
        device: torch.device,
        crop: Crop,
    ) -> None:
        # Use a single array, because workers can share its memory. In a list of a million paths, changes of the reference counts
        # would make each worker copy the list.
        self.paths = paths if isinstance(paths, np.ndarray) else np.array([os.fsencode(path) for path in paths])
        self.labels, self.decode, self.workers = labels, decode, workers
        self.targets = labels
        self.mean, self.std, self.augment, self.device, self.crop = mean, std, augment, device, crop

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, indices: Tensor) -> StreamedSplit:
        return StreamedSplit(
            self.paths[indices.numpy()],
            self.labels[indices],
            self.decode,
            self.workers,
            self.mean,
            self.std,
            self.augment,
            self.device,
            self.crop,
        )

    def gather(self, chunks: Iterator[Tensor], key: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        from fa_bench.utils.process import cores

        workers = min(self.workers, cores())  # more processes would slow each other down, and torch warns about them
        files: Any = _Files(self.paths, self.decode, key)  # no torch Dataset: this module does not import torch
        loader = torch.utils.data.DataLoader(
            files,
            batch_sampler=[chunk.tolist() for chunk in chunks],
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),
            multiprocessing_context=_start_method() if workers else None,
            worker_init_fn=_end_with_parent,
        )
        for images, indices in loader:
            if isinstance(images, str):
                raise DataError(images)
            yield images.to(self.device, non_blocking=True), self.labels[indices].to(self.device, non_blocking=True)


def _end_with_parent(worker: int) -> None:
    """Make a worker process exit when its parent exits. torch's own watchdog does not notice a parent that was killed before the
    watchdog started."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _start_method() -> str:
    """The start method for worker processes. In a joblib worker, the default is joblib's own method, which can start only joblib
    workers, so it is replaced by the system's default."""
    method, known = multiprocessing.get_start_method(), multiprocessing.get_all_start_methods()
    return method if method in known else known[0]  # the system's default


class _Files:
    """A map-style dataset for a DataLoader: a sample is a decoded image with its index, or an error message with the index.

    The augmentation of a sample depends only on `key` and its index.
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
            # If a worker raised an exception, its text would contain the worker's traceback.
            return str(error), index


def _collate(samples: list[tuple[Any, int]]) -> tuple[Any, Any]:
    for image, _ in samples:
        if isinstance(image, str):
            return image, None
    return torch.from_numpy(np.stack([image for image, _ in samples])), torch.tensor([index for _, index in samples])


def _read_all(read: Callable[[Path], Any], paths: list[Path], title: str) -> Iterator[Any]:
    """Call `read` on every file in a thread pool, with a progress bar, yield the results in order, and stop at the first
    error."""
    from tqdm import tqdm

    with ThreadPoolExecutor() as pool:
        try:
            yield from tqdm(pool.map(read, paths), total=len(paths), desc=title, unit="image", disable=None, leave=False)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
