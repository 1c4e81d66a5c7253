"""Datasets that are one file for each image: what is read before training, and the split that streams."""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fa_bench.data.base import CroppedDataset, ResidentSplit, Split, Splits
from fa_bench.data.crops import Crop, PaddedCrop, ResizedCrop
from fa_bench.data.decoding import CroppingDecoder, Decoder, Facts, quiet, regular, said, total, upright_size
from fa_bench.data.listing import Listing
from fa_bench.errors import DataError, OptionError
from fa_bench.registry.options import option
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

#: SHA-256 of the files of a part, and what was found in them by a decoder, by the state of the files: not read again in this
#: process while their sizes and times are the same.
_contents: dict[bytes, bytes] = {}
_inspected: dict[tuple[bytes, str], Facts] = {}


def workers_option(default: int) -> Any:
    """The option `workers` of a dataset."""
    return option(default, "processes that decode what streams; 0: none but the run's own", minimum=0)


@dataclasses.dataclass(eq=False)
class ImageFiles(CroppedDataset):
    """Base of the datasets that are one file for each image.

    What fits into memory is decoded once and stays on the device; larger sets stream through workers.
    """

    memory_limit_gb: float = option(2.0, "largest decoded size, in units of 1e9 bytes, that is kept on the device", minimum=0)
    workers: int = workers_option(2)

    channels: int = dataclasses.field(init=False, default=3)
    background: float = dataclasses.field(init=False, default=1.0)
    #: Height and width of all its images, where they are known to have one size.
    stored_size: ClassVar[int | None] = None
    #: Bytes of files up to which all are read before training, even where they stream: decoded once, and hashed.
    reads_all: ClassVar[float] = float("inf")

    def check(self) -> None:
        super().check()
        if self.stored_size is None and self.size is None and isinstance(self.cropping(), ResizedCrop):
            raise OptionError("size", f"=null does not go with crop={self.crop}: it needs a number of pixels, such as 224")

    def listing(self, data_dir: Path) -> Listing:
        """Find the files, downloading them where that is possible and needed; implemented by each dataset."""
        raise NotImplementedError

    def read(self, data_dir: Path, device: torch.device) -> Splits:
        quiet()
        listing = self.listing(data_dir)
        decode, crop, may_stay = self._decoding(listing.parts["train"][1][0][0])
        height, width = decode.height, decode.width
        mean, std = (self.per_channel(key, self.channels) for key in ("mean", "std"))
        images = sum(len(files) for _, files in listing.parts.values())
        fits = may_stay and images * self.channels * height * width <= self.memory_limit_gb * 1e9
        parts = {name: _Part(root, files) for name, (root, files) in listing.parts.items()}
        all_read, notes = self._reads_all(parts), list(listing.notes)
        splits: dict[str, Split] = {}
        for name, part in parts.items():
            labels = torch.from_numpy(part.labels)
            if fits:
                pixels = np.empty((len(labels), self.channels, height, width), np.uint8)
                facts = part.inspect(decode, pixels)
                splits[name] = ResidentSplit(torch.from_numpy(pixels), labels, mean, std, self.augment, device, crop)
            else:
                facts = part.inspect(decode, None) if all_read else Facts()
                splits[name] = StreamedSplit(part.paths, labels, decode, self.workers, mean, std, self.augment, device, crop)
            notes += said(facts, str(part.root), decode.background)
        return Splits(splits["train"], splits.get("validation"), splits["test"], listing.classes,
                      (self.channels, *crop.shape(height, width)), _hash(parts, all_read), notes)

    def content_hash(self, data_dir: Path) -> str:
        parts = {name: _Part(root, files) for name, (root, files) in self.listing(data_dir).parts.items()}
        return _hash(parts, self._reads_all(parts))

    def _reads_all(self, parts: dict[str, _Part]) -> bool:
        return sum(part.size for part in parts.values()) <= self.reads_all

    def _decoding(self, first: Path) -> tuple[Decoder, Crop, bool]:
        """What reads a file, what crops batches of what it read, and whether that may stay on the device."""
        crop, background = self.cropping(), round(255 * self.background)
        if self.stored_size is not None:
            return Decoder(self.channels, self.stored_size, self.stored_size, False, background), crop, True
        height, width = (self.size, self.size) if self.size else upright_size(first)
        if isinstance(crop, ResizedCrop):
            # A random part is cut from the whole image, whatever its size: while it is decoded.
            return CroppingDecoder(self.channels, height, width, background, crop), Crop(), False
        return Decoder(self.channels, height, width, self.size is not None, background), PaddedCrop(), True


class _Part:
    """The files of a part of a dataset, in order.

    Attributes:
        root: the folder that they are below.
        paths: the files.
        labels: int64 (n,).
        size: their bytes.
    """

    def __init__(self, root: Path, files: list[tuple[Path, int]]) -> None:
        self.root, self.paths = root, [path for path, _ in files]
        self.labels = np.array([label for _, label in files], np.int64)
        state, names, self.size = hashlib.sha256(), hashlib.sha256(self.labels.tobytes()), 0
        skip = len(str(root)) + 1  # a slice, for relative_to takes seconds for a million files
        for path in self.paths:
            name = os.fsencode(str(path)[skip:].replace(os.sep, "/"))
            found = regular(path)
            self.size += found.st_size
            names.update(b"%b %d\n" % (name, found.st_size))
            numbers = found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino
            state.update(b"%b %d %d %d %d\n" % (os.fsencode(path), *numbers))
        self.state, self.names = state.digest(), names.digest()

    def inspect(self, decode: Decoder, keep: np.ndarray | None) -> Facts:
        """Decode and hash every file, and put the images into `keep`; where that is None, not again while they are unchanged."""
        key = self.state, f"{type(decode).__name__} {dataclasses.astuple(decode)}"
        if keep is None and key in _inspected:
            return _inspected[key]

        def read(path: Path) -> tuple[np.ndarray | None, Facts, bytes]:
            return decode.inspect(path, keep is not None)

        digest, every = hashlib.sha256(), []
        title = f"{'checking' if keep is None else 'decoding'} {self.root.name}"
        for index, (image, facts, content) in enumerate(_read_all(read, self.paths, title)):
            if keep is not None:
                keep[index] = image
            digest.update(content)
            every.append(facts)
        _contents[self.state], _inspected[key] = digest.digest(), total(every)
        return _inspected[key]

    def contents(self) -> bytes:
        """The SHA-256 of the SHA-256 of each file."""
        if self.state not in _contents:
            digest = hashlib.sha256()
            for content in _read_all(_sha256, self.paths, f"hashing {self.root.name}"):
                digest.update(content)
            _contents[self.state] = digest.digest()
        return _contents[self.state]


def _hash(parts: dict[str, _Part], contents: bool) -> str:
    """A hash of the names, sizes and labels of all files, and where they are few enough of their bytes."""
    digest = hashlib.sha256()
    for name in sorted(parts):
        digest.update(name.encode() + parts[name].names + (parts[name].contents() if contents else b""))
    return digest.hexdigest()


def _sha256(path: Path) -> bytes:
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError as error:
        raise DataError(f"{path}: not a readable image ({error.strerror}); replace or remove it") from None


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
        files: Any = _Files(self.paths, self.decode, key)  # no torch Dataset: this module does not import torch
        loader = torch.utils.data.DataLoader(
            files, batch_sampler=[chunk.tolist() for chunk in chunks], num_workers=workers,
            collate_fn=_collate, pin_memory=self.device.type == "cuda", generator=torch.Generator(),
            multiprocessing_context=_start_method() if workers else None,
            worker_init_fn=_end_with_parent,
        )
        for images, indices in loader:
            if isinstance(images, str):
                raise DataError(images)
            yield images.to(self.device, non_blocking=True), self.labels[indices].to(self.device, non_blocking=True)


def _end_with_parent(worker: int) -> None:
    """Make a worker end with the process that started it; torch's own watch misses one that was killed before it first looked."""
    threading.Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _start_method() -> str:
    """How workers are started: joblib's processes have a method of their own set, which starts none but joblib's."""
    method, known = multiprocessing.get_start_method(), multiprocessing.get_all_start_methods()
    return method if method in known else known[0]  # the first is the system's usual one


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


def _read_all(read: Callable[[Path], Any], paths: list[Path], title: str) -> Iterator[Any]:
    """`read` of every file, in order, by a few threads, with a progress bar; the first error ends it."""
    from tqdm import tqdm

    with ThreadPoolExecutor() as pool:
        try:
            yield from tqdm(pool.map(read, paths), total=len(paths), desc=title, unit="image", disable=None, leave=False)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
