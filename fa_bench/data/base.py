"""The base classes of datasets, and splits that stay on the device.

Shapes: N batch, C channels, H and W pixels. Images are stored as uint8 and reach the model normalised, as float32.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from fa_bench.data.array_checks import checked
from fa_bench.data.crops import CROPS, Crop, PaddedCrop
from fa_bench.errors import DataError, FaBenchError, OptionError, printable
from fa_bench.registry.kinds import CLASSES, IMAGES, VALUES
from fa_bench.registry.options import Options, option
from fa_bench.utils.lazy import torch
from fa_bench.utils.sampling import seed_for

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclasses.dataclass
class Splits:
    """A loaded dataset.

    Attributes:
        train, validation, test: the splits; validation is None if nothing is held out.
        classes: their names.
        input_shape: (C, H, W).
        data_hash: of all images and labels as stored, before the validation split.
        notes: a printable sentence on each part of the source that is skipped or changed.
        inputs, targets: their kinds (`fa_bench.registry.kinds`).
    """

    train: Split
    validation: Split | None
    test: Split
    classes: list[str]
    input_shape: tuple[int, int, int]
    data_hash: str
    notes: list[str] = dataclasses.field(default_factory=list)
    inputs: str = IMAGES
    targets: str = CLASSES

    def __post_init__(self) -> None:
        self.notes = [printable(note) for note in self.notes]  # file names may contain control characters


class Split(abc.ABC):
    """Samples that can be iterated over in batches."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abc.abstractmethod
    def subset(self, indices: Tensor) -> Split:
        """The samples at `indices`, (n,) int64."""

    @abc.abstractmethod
    def gather(self, chunks: Iterator[Tensor], key: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """For each chunk of indices, the images, uint8 (N, C, H, W), and labels, int64 (N,), on the device.

        `key` seeds augmentation while reading; None: no augmentation.
        """

    mean: list[float]
    std: list[float]
    augment: bool
    device: torch.device
    crop: Crop
    #: Of text, the characters of a token on average in this split.
    characters: float | None = None

    def steps(self, batch_size: int, drop_last: bool = False) -> int:
        """Number of batches in one pass."""
        full, rest = divmod(len(self), batch_size)
        return full + (rest > 0 and (not drop_last or full == 0))

    def batches(
        self, batch_size: int, *, seed: int | None = None, epoch: int = 0, drop_last: bool = False, start: int = 0,
        shuffle: bool = True,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the samples: x float32 (N, C, H, W), normalised, and y int64 (N,), on the device.

        Args:
            batch_size: samples in a batch; the last may have fewer.
            seed: None for the stored order without augmentation; else the samples are shuffled and augmented, as a function of
                (seed, epoch) only.
            epoch: number of the pass.
            drop_last: drop the last incomplete batch, unless it is the only one.
            start: number of batches to skip at the beginning; the others do not depend on it.
            shuffle: false for the stored order also with a seed.
        """
        indices = torch.arange(len(self))
        if seed is not None and shuffle:
            indices = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed_for("order", seed, epoch)))
        steps = self.steps(batch_size, drop_last)
        chunks = (indices[i * batch_size : (i + 1) * batch_size] for i in range(start, steps))
        # x * scale + shift in place: two passes over the batch, whatever the mean.
        scale = torch.tensor([1 / (255 * s) for s in self.std], device=self.device).view(-1, 1, 1)
        shift = torch.tensor([-m / s for m, s in zip(self.mean, self.std, strict=True)], device=self.device).view(-1, 1, 1)
        augments = self.augment and seed is not None
        generator = torch.Generator()
        key = seed_for("read", seed, epoch) if augments else None
        for number, (images, labels) in enumerate(self.gather(chunks, key), start):
            if augments:
                # A seed for each batch, so that a run can be resumed in the middle of an epoch.
                images = self.crop.random(images, generator.manual_seed(seed_for("augment", seed, epoch, number)))
            else:
                images = self.crop.fixed(images)
            yield images.to(torch.float32).mul_(scale).add_(shift), labels


class ResidentSplit(Split):
    """Samples that stay on the device.

    Args:
        images: uint8 (n, C, H, W).
        labels: int64 (n,).
        mean, std: of each channel, in units of the full range.
        augment: crop and flip training batches.
        device: of the samples.
        crop: how batches are cropped and resized; None for PaddedCrop at the stored size.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, mean: list[float], std: list[float], augment: bool, device: torch.device,
        crop: Crop | None = None,
    ) -> None:
        self.images, self.labels = images.to(device), labels.to(device)
        self.mean, self.std, self.augment, self.device, self.crop = mean, std, augment, device, crop or PaddedCrop()

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> ResidentSplit:
        indices = indices.to(self.device)
        return ResidentSplit(self.images[indices], self.labels[indices], self.mean, self.std, self.augment, self.device,
                             self.crop)

    def gather(self, chunks: Iterator[Tensor], key: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        for chunk in chunks:
            chunk = chunk.to(self.device, non_blocking=True)
            yield self.images.index_select(0, chunk), self.labels.index_select(0, chunk)


def mean_option(*default: float) -> Any:
    """The option `mean` of a dataset, with the values of its source or a paper."""
    return option([*default], "mean of each channel in units of the full range, or one number for all", minimum=0, maximum=1)


def std_option(*default: float) -> Any:
    """The option `std` of a dataset."""
    return option([*default], "standard deviation of each channel in units of the full range, or one number for all", above=0)


def augment_option(default: bool) -> Any:
    """The option `augment` of a dataset."""
    return option(default, "crop training images at random (see `crop`), and flip half of them horizontally")


def crop_option(default: str) -> Any:
    """The option `crop` of a dataset."""
    return option(default, "padded: resize to `size`, augment by crops with 4 pixels of padding; resized: resize a random 8 to "
                           "100 % of each image to `size`, for evaluation the centre of 256/224 of `size`", choices=list(CROPS))


def size_option(default: int | None) -> Any:
    """The option `size` of a dataset."""
    return option(default, "height and width to resize images to; null: as stored", minimum=1)


@dataclasses.dataclass(eq=False)
class Dataset(Options):
    """Base of the datasets."""

    validation: float = option(0.1, "fraction (below 1) or number (1 or more) of training images to hold out for validation; 0: "
                                    "none", minimum=0)
    validation_seed: int = option(0, "seed of the validation split, the same for every run seed", minimum=0)
    mean: list[float] = mean_option(0.5)
    std: list[float] = std_option(0.5)

    #: Channels of its images; 0 if unknown before reading.
    channels: int = dataclasses.field(init=False, default=0)
    #: The kind of its inputs (`fa_bench.registry.kinds`).
    inputs: ClassVar[str] = IMAGES
    #: The kind of its targets: class indices, or numbers (n, O) of O outputs, whose names replace
    #: those of the classes.
    targets: ClassVar[str] = CLASSES
    #: Whether data_dir is the dataset itself, and therefore part of a run's identity.
    content_is_data_dir: ClassVar[bool] = False
    #: Height and width of the stored images and the number of classes; None if unknown before reading.
    stored: ClassVar[tuple[int, int, int] | None] = None

    def check(self) -> None:
        if self.validation >= 1 and not self.validation.is_integer():
            raise OptionError("validation", f"={self.validation:g} is neither a fraction below 1 nor a whole number")
        for key in ("mean", "std"):
            self.per_channel(key, self.channels or max(len(getattr(self, key)), 1))

    def per_channel(self, key: str, channels: int) -> list[float]:
        """The option `mean` or `std` with a number for each of `channels`; raises OptionError if it has a wrong length."""
        values = getattr(self, key)
        if len(values) not in (1, channels):
            allowed = "1 number" if channels == 1 else f"1 or {channels} numbers, one for each channel"
            raise OptionError(key, f"={values} should have {allowed}")
        return [*values] * (channels // len(values))

    @property
    def augments(self) -> bool:
        """Whether training batches are augmented."""
        return False

    def shape(self) -> tuple[tuple[int, int, int], int] | None:
        """(C, H, W) and the number of classes after `load`; None if unknown before reading."""
        if self.stored is None:
            return None
        height, width, classes = self.stored
        return (self.channels, *self.cropping().shape(height, width)), classes

    def cropping(self) -> Crop:
        """How batches are cropped and resized."""
        return Crop()

    def load(self, data_dir: Path, device: torch.device, at_most: tuple[int, int] | None = None) -> Splits:
        """Read the dataset, after downloading it if needed and possible.

        Args:
            data_dir: the folder of the datasets.
            device: of samples that fit in memory.
            at_most: numbers of training and test images of a trial, sampled with a fixed seed; None: all. A number of held-out
                images is then reduced in proportion.

        Raises:
            DataError: naming the missing or unreadable file, or the split without images.
            OptionError: if an option does not fit the data.
        """
        splits = self._with_data_errors(lambda: self.read(data_dir, device))
        splits.inputs, splits.targets = self.inputs, self.targets
        total = len(splits.train)
        if at_most is not None:
            train, test = at_most
            splits = dataclasses.replace(
                splits, train=some(splits.train, train), test=some(splits.test, test),
                validation=splits.validation and some(splits.validation, test))
        for part, split in (("training", splits.train), ("test", splits.test)):
            if not len(split):
                raise DataError(f"dataset={self.name}: there are no {part} images")
        return splits if splits.validation is not None else self._hold_out(splits, total)

    def _hold_out(self, splits: Splits, total: int) -> Splits:
        """Hold out training images for validation; `total` is the number of training images in the complete dataset."""
        train = splits.train
        held = round(self.validation * len(train) / (1 if self.validation < 1 else total))
        if self.validation > 0:
            held = max(held, 1)
        if held >= len(train):
            raise OptionError("dataset.validation", f"={self.validation:g} leaves none of {len(train)} training images")
        if held == 0:
            return splits
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed_for("split", self.validation_seed)))
        # Sorted, so that the held-out and the remaining images keep the order of the files.
        validation, rest = order[:held].sort().values, order[held:].sort().values
        return dataclasses.replace(splits, train=train.subset(rest), validation=train.subset(validation))

    def hash_of(self, data_dir: Path) -> str:
        """The `data_hash` of `load`, without keeping or decoding images.

        Image files that this process has read before are not read again unless they have changed.

        Raises:
            FaBenchError: as `load`.
        """
        return self._with_data_errors(lambda: self.content_hash(data_dir))

    def content_hash(self, data_dir: Path) -> str:
        """The result of `hash_of`; overridden if it can be computed faster than by reading the dataset."""
        return self.read(data_dir, torch.device("cpu")).data_hash

    def _with_data_errors(self, read: Callable[[], T]) -> T:
        """Call `read`, and turn errors of the system, such as missing permissions, into DataError."""
        try:
            return read()
        except DataError:
            raise
        except OSError as error:
            file = f"{error.filename}: " if error.filename else ""
            raise DataError(f"dataset={self.name}: {file}cannot be read ({error.strerror or error})") from None

    def read(self, data_dir: Path, device: torch.device) -> Splits:
        """The dataset, without a validation split unless the source has one; implemented by each dataset."""
        raise NotImplementedError


def some(split: Split, number: int) -> Split:
    """At most `number` samples of a split in their order, sampled with a fixed seed: the same in every run."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed_for("trial")))
    return split if len(split) <= number else split.subset(order[:number].sort().values)


@dataclasses.dataclass(eq=False)
class CroppedDataset(Dataset):
    """Base of the datasets whose images can be cropped, resized and augmented."""

    augment: bool = augment_option(True)
    crop: str = crop_option("padded")
    size: int | None = size_option(None)

    @property
    def augments(self) -> bool:
        return self.augment

    def cropping(self) -> Crop:
        return CROPS[self.crop](self.size)


@dataclasses.dataclass(eq=False)
class ArrayDataset(Dataset):
    """Base of the datasets that are read as arrays and fit on the device."""

    def arrays(self, data_dir: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[str]]:
        """Training images and labels, test images and labels, class names; see `fa_bench.data.array_checks` for valid values."""
        raise NotImplementedError

    def read(self, data_dir: Path, device: torch.device) -> Splits:
        notes: list[str] = []
        try:
            train_x, train_y, test_x, test_y, classes = checked(self.arrays(data_dir), notes, values=self.targets == VALUES)
        except FaBenchError:
            raise
        except ValueError as error:
            raise DataError(f"dataset={self.name}: {error}") from None
        digest = hashlib.sha256()
        for array in (train_x, train_y, test_x, test_y):
            digest.update(array.data)
        channels, *stored = train_x.shape[1:]
        crop, (mean, std) = self.cropping(), (self.per_channel(key, channels) for key in ("mean", "std"))

        def split(images: np.ndarray, labels: np.ndarray) -> ResidentSplit:
            return ResidentSplit(torch.from_numpy(images), torch.from_numpy(labels), mean, std, self.augments, device, crop)

        return Splits(split(train_x, train_y), None, split(test_x, test_y), classes, (channels, *crop.shape(*stored)),
                      digest.hexdigest(), notes)
