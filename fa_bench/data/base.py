"""What every dataset is, and the split that lives on the device.

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
from fa_bench.objectives.base import CLASSES, VALUES
from fa_bench.registry.options import Options, option
from fa_bench.utils.lazy import torch
from fa_bench.utils.sampling import seed_for

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclasses.dataclass
class Splits:
    """A dataset, loaded.

    Attributes:
        train, validation, test: the splits; validation is None where nothing is held out.
        classes: their names.
        input_shape: (C, H, W).
        data_hash: of all images and labels as stored, before the validation split.
        notes: what of the source is left out or changed, in a sentence each; a line that any terminal takes.
    """

    train: Split
    validation: Split | None
    test: Split
    classes: list[str]
    input_shape: tuple[int, int, int]
    data_hash: str
    notes: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.notes = [printable(note) for note in self.notes]  # names of files and folders may have control characters


class Split(abc.ABC):
    """Samples that can be walked through in batches."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abc.abstractmethod
    def subset(self, indices: Tensor) -> Split:
        """The samples at `indices`, (n,) int64."""

    @abc.abstractmethod
    def gather(self, chunks: Iterator[Tensor], key: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """For each chunk of indices the images, uint8 (N, C, H, W), and labels, int64 (N,), on the device.

        `key` seeds what is random in reading itself; None for reading without augmentation.
        """

    mean: list[float]
    std: list[float]
    augment: bool
    device: torch.device
    crop: Crop

    def steps(self, batch_size: int, drop_last: bool = False) -> int:
        """Number of batches in one pass."""
        whole, rest = divmod(len(self), batch_size)
        return whole + (rest > 0 and (not drop_last or whole == 0))

    def batches(
        self, batch_size: int, *, seed: int | None = None, epoch: int = 0, drop_last: bool = False, start: int = 0,
        shuffle: bool = True,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the samples: x float32 (N, C, H, W), normalised, and y int64 (N,), on the device.

        Args:
            batch_size: samples in a batch; the last may have fewer.
            seed: None for the stored order without augmentation; else shuffled and augmented, as a function of
                (seed, epoch) alone, with random numbers of its own.
            epoch: number of the pass.
            drop_last: leave out a last batch that is not full, unless it is the only one.
            start: batches to leave out at the beginning; the others are what they are without it.
            shuffle: false: the stored order also with a seed.
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
                # A seed for each batch: a run that goes on in the middle of an epoch need not draw what came before.
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
        device: where to keep them.
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
    """The option `mean` of a dataset, with the numbers that its source or a paper gives."""
    return option([*default], "mean of each channel in units of the full range, or one number for all", minimum=0, maximum=1)


def std_option(*default: float) -> Any:
    """The option `std` of a dataset."""
    return option([*default], "standard deviation of each channel in units of the full range, or one number for all", above=0)


def augment_option(default: bool) -> Any:
    """The option `augment` of a dataset."""
    return option(default, "crop training images at random, as `crop` says, and flip half of them horizontally")


def crop_option(default: str) -> Any:
    """The option `crop` of a dataset."""
    return option(default, "padded: resized to `size`, augmented by crops with 4 pixels of padding; resized: 8 to 100 % of an "
                           "image resized to `size`, for evaluation the centre out of 256/224 of `size`", choices=list(CROPS))


def size_option(default: int | None) -> Any:
    """The option `size` of a dataset."""
    return option(default, "height and width that images are brought to; null: as they are stored", minimum=1)


@dataclasses.dataclass(eq=False)
class Dataset(Options):
    """Base of the datasets."""

    validation: float = option(0.1, "fraction (below 1) or number (1 and more) of training images held out to select by; 0: none",
                               minimum=0)
    validation_seed: int = option(0, "seed of the validation split, the same for every run seed", minimum=0)
    mean: list[float] = mean_option(0.5)
    std: list[float] = std_option(0.5)

    #: Channels of its images; 0 where only the files tell.
    channels: int = dataclasses.field(init=False, default=0)
    #: What its targets are, of the kinds that `fa_bench.objectives.base` names: class indices, or numbers (n, O) of O outputs,
    #: whose names take the place of the classes' names.
    targets: ClassVar[str] = CLASSES
    #: Whether data_dir is the dataset itself, and so a part of a run's identity.
    content_is_data_dir: ClassVar[bool] = False
    #: Height and width of the stored images and the number of classes; None if only the files tell.
    stored: ClassVar[tuple[int, int, int] | None] = None

    def check(self) -> None:
        if self.validation >= 1 and not self.validation.is_integer():
            raise OptionError("validation", f"={self.validation:g} is neither a fraction below 1 nor a whole number")
        for key in ("mean", "std"):
            self.per_channel(key, self.channels or max(len(getattr(self, key)), 1))

    def per_channel(self, key: str, channels: int) -> list[float]:
        """The option `mean` or `std` with a number for each of `channels`; raises OptionError where it has another number."""
        values = getattr(self, key)
        if len(values) not in (1, channels):
            one = "1 number" if channels == 1 else f"1 or {channels} numbers, one for each channel"
            raise OptionError(key, f"={values} should have {one}")
        return [*values] * (channels // len(values))

    @property
    def augments(self) -> bool:
        """Whether training batches are augmented."""
        return False

    def shape(self) -> tuple[tuple[int, int, int], int] | None:
        """(C, H, W) and the number of classes of what `load` gives; None if only the files tell."""
        if self.stored is None:
            return None
        height, width, classes = self.stored
        return (self.channels, *self.cropping().shape(height, width)), classes

    def cropping(self) -> Crop:
        """How batches are cropped and resized."""
        return Crop()

    def load(self, data_dir: Path, device: torch.device, at_most: tuple[int, int] | None = None) -> Splits:
        """Read the dataset, downloading it where that is possible and needed.

        Args:
            data_dir: the folder of the datasets.
            device: where samples that fit are kept.
            at_most: training and test images that a trial is made of, drawn with a fixed seed; None: all. A number of held-out
                images then shrinks as the training images do.

        Raises:
            DataError: naming the missing or unreadable file, or the split without images.
            OptionError: where an option does not fit the data.
        """
        splits = self._reading(lambda: self.read(data_dir, device))
        whole = len(splits.train)
        if at_most is not None:
            train, test = at_most
            splits = dataclasses.replace(
                splits, train=some(splits.train, train), test=some(splits.test, test),
                validation=splits.validation and some(splits.validation, test))
        for part, split in (("training", splits.train), ("test", splits.test)):
            if not len(split):
                raise DataError(f"dataset={self.name}: there are no {part} images")
        return splits if splits.validation is not None else self._hold_out(splits, whole)

    def _hold_out(self, splits: Splits, whole: int) -> Splits:
        """The splits with a part of the training images for validation; `whole` is how many there are in the whole dataset."""
        train = splits.train
        held = round(self.validation * len(train) / (1 if self.validation < 1 else whole))
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
        """The `data_hash` that `load` gives, of all that is trained and tested on, without keeping or decoding images.

        Files of images that this process has read before and that did not change since are not read again.

        Raises:
            FaBenchError: as `load` does.
        """
        return self._reading(lambda: self.content_hash(data_dir))

    def content_hash(self, data_dir: Path) -> str:
        """What `hash_of` gives; implemented where it takes less than reading the dataset."""
        return self.read(data_dir, torch.device("cpu")).data_hash

    def _reading(self, read: Callable[[], T]) -> T:
        """What `read` gives, with the system's errors as DataError: a folder or file that may not be read, say."""
        try:
            return read()
        except DataError:
            raise
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise DataError(f"dataset={self.name}: {where}cannot be read ({error.strerror or error})") from None

    def read(self, data_dir: Path, device: torch.device) -> Splits:
        """The dataset, with no validation split unless it has one of its own; implemented by each dataset."""
        raise NotImplementedError


def some(split: Split, number: int) -> Split:
    """At most `number` samples of a split in their order, drawn with a fixed seed: the same in every run."""
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
        """Training images and labels, test images and labels, class names; `fa_bench.data.array_checks` says what is taken."""
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
