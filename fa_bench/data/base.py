"""The base classes of datasets.

Shapes: n samples, C channels, H and W pixels, O outputs.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from fa_bench.data.array_checks import checked
from fa_bench.data.crops import CROPS, Crop
from fa_bench.data.splits import ResidentSplit, Splits, some, stratified
from fa_bench.errors import DataError, FaBenchError, OptionError, missing_method
from fa_bench.registry.kinds import CLASSES, IMAGES, NOUNS
from fa_bench.registry.options import Options, option
from fa_bench.utils.lazy import torch
from fa_bench.utils.sampling import seed_for

T = TypeVar("T")


def mean_option(*default: float) -> Any:
    """Return the `mean` option for a dataset."""
    return option([*default], "mean of each channel in units of the full range, or one number for all", minimum=0, maximum=1)


def std_option(*default: float) -> Any:
    """Return the `std` option for a dataset."""
    return option([*default], "standard deviation of each channel in units of the full range, or one number for all", above=0)


def augment_option(default: bool) -> Any:
    """Return the `augment` option for a dataset."""
    return option(default, "crop training images at random (see `crop`), and flip half of them horizontally")


def crop_option(default: str) -> Any:
    """Return the `crop` option for a dataset."""
    return option(
        default,
        "padded: resize to `size`, augment by crops with 4 pixels of padding; resized: augment by cropping a random 8 to 100 % "
        "of each image and resizing it to `size`; without augmentation, resize to 256/224 of `size` and crop the centre",
        choices=list(CROPS),
    )


def size_option(default: int | None) -> Any:
    """Return the `size` option for a dataset."""
    return option(default, "height and width to which images are resized; null: as stored", minimum=1)


@dataclasses.dataclass(eq=False)
class Dataset(Options):
    """Base class of datasets.

    Examples:
        >>> from pathlib import Path
        >>> import torch
        >>> from fa_bench.registry.registries import DATASETS
        >>> splits = DATASETS["digits"](samples=100, validation=0.2).load(Path("data"), torch.device("cpu"))
        >>> len(splits.train), splits.input_shape, len(splits.classes)
        (100, (1, 8, 8), 10)
    """

    validation: float = option(
        0.1, "fraction (below 1) or number (1 or more) of training samples to hold out for validation; 0: none", minimum=0
    )
    validation_seed: int = option(0, "seed of the validation split, the same for every run seed", minimum=0)
    samples: int | float | None = option(
        None,
        "fraction (below 1) or number (1 or more) of training samples to train on, with "
        "the same class proportions; validation and test samples are not affected; null: all",
        above=0,
        identifying=False,
    )
    samples_seed: int = option(
        0, "seed for the choice of training samples, the same for every run seed", minimum=0, identifying=False
    )

    #: The kind of the inputs, as defined in `fa_bench.registry.kinds`.
    inputs: ClassVar[str] = IMAGES
    #: The kind of the targets, as defined in `fa_bench.registry.kinds`.
    targets: ClassVar[str] = CLASSES
    #: Whether data_dir is the dataset itself, and therefore part of a run's identity.
    content_is_data_dir: ClassVar[bool] = False

    #: Whether `load` holds out training samples if `read` returns no validation split.
    holds_out: ClassVar[bool] = True

    def check(self) -> None:
        for key in ("validation", "samples"):
            value = getattr(self, key)
            if isinstance(value, float) and value >= 1 and not value.is_integer():
                raise OptionError(key, f"={value:g} is neither a fraction below 1 nor a whole number")

    @property
    def nouns(self) -> tuple[str, str]:
        """The singular and the plural noun for a sample of this dataset."""
        return NOUNS[self.inputs]

    @property
    def augments(self) -> bool:
        """Whether training batches are augmented."""
        return False

    def shape(self) -> tuple[tuple[int, ...], int] | None:
        """The shape of a loaded sample and the number of classes; None if they are unknown before the data are read."""
        return None

    def load(self, data_dir: Path, device: torch.device, at_most: tuple[int, int] | None = None) -> Splits:
        """Read the dataset, downloading it first if it is missing and can be downloaded.

        Args:
            data_dir: the folder of the datasets.
            device: the device of the batches, where samples that fit in memory are stored.
            at_most: maximum numbers of training and test samples of a shortened run, sampled with a fixed seed; None: all. The
                number of held-out samples and the number that `samples` specifies are reduced in proportion.

        Raises:
            DataError: if a file is missing or unreadable, or if there are no training or test samples; the message names the
                file or the split.
            OptionError: if an option does not fit the data.
        """
        splits = self._with_data_errors(lambda: self.read(data_dir, device))
        splits.inputs, splits.targets = self.inputs, self.targets
        total = len(splits.train)
        if at_most is not None:
            train, test = at_most
            splits = dataclasses.replace(
                splits,
                train=some(splits.train, train),
                test=some(splits.test, test),
                validation=splits.validation and some(splits.validation, test),
            )
        for part, split in (("training", splits.train), ("test", splits.test)):
            if not len(split):
                raise DataError(f"dataset={self.name}: there are no {part} {self.nouns[1]}")
        has_own = splits.validation is not None or not self.holds_out
        splits, full = (splits, total) if has_own else self._hold_out(splits, total)
        return self.finished(self._reduced(splits, full))

    def finished(self, splits: Splits) -> Splits:
        """Return the final splits; `load` calls this method after selecting the samples. Override it for steps that depend on
        the training samples, such as scaling."""
        return splits

    def _hold_out(self, splits: Splits, total: int) -> tuple[Splits, int]:
        """Hold out training samples for validation.

        `total` is the number of training samples in the complete dataset. The returned number is how many of them a full run does
        not hold out.
        """
        train = splits.train
        held = round(self.validation * len(train) / (1 if self.validation < 1 else total))
        if self.validation > 0:
            held = max(held, 1)
        if held >= len(train):
            raise OptionError("dataset.validation", f"={self.validation:g} leaves none of {len(train)} training {self.nouns[1]}")
        if held == 0:
            return splits, total
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed_for("split", self.validation_seed)))
        # The indices are sorted, so that the held-out and the remaining samples keep their order.
        validation, rest = order[:held].sort().values, order[held:].sort().values
        return (
            dataclasses.replace(splits, train=train.subset(rest), validation=train.subset(validation)),
            round(total * len(rest) / len(train)),
        )

    @property
    def subsample(self) -> int | float | None:
        """The fraction or number of training samples to train on; None: all."""
        return self.samples

    def _reduced(self, splits: Splits, full: int) -> Splits:
        """Reduce the training split to the size that `samples` specifies; `full` is the number of training samples that a full
        run does not hold out."""
        wanted, train = self.subsample, splits.train
        if wanted is None:
            return splits
        if wanted > full:
            raise OptionError(
                "dataset.samples", f"={wanted:g}: there are only {full} training {self.nouns[1]} (excluding those for validation)"
            )
        count = max(round(wanted * len(train) / (1 if wanted < 1 else full)), 1)
        labels = train.targets if splits.targets == CLASSES else None
        one_class = torch.zeros(len(train), dtype=torch.int64)
        chosen = stratified(one_class if labels is None else labels, count, self.samples_seed)
        return dataclasses.replace(splits, train=train.subset(chosen))

    def hash_of(self, data_dir: Path) -> str:
        """The `data_hash` of the splits that `load` would return.

        Datasets with one file per image are hashed without decoding the images. If this process has already read all files of a
        split and none of them has changed, they are not read again.

        Raises:
            FaBenchError: see `load`.
        """
        return self._with_data_errors(lambda: self.content_hash(data_dir))

    def content_hash(self, data_dir: Path) -> str:
        """Compute the hash that `hash_of` returns. Override this if there is a faster way than reading the dataset."""
        return self.read(data_dir, torch.device("cpu")).data_hash

    def _with_data_errors(self, read: Callable[[], T]) -> T:
        """Call `read`, and convert operating system errors, such as missing permissions, to a DataError."""
        try:
            return read()
        except DataError:
            raise
        except OSError as error:
            file = f"{error.filename}: " if error.filename else ""
            raise DataError(f"dataset={self.name}: {file}cannot be read ({error.strerror or error})") from None

    def read(self, data_dir: Path, device: torch.device) -> Splits:
        """Read the dataset; the validation split is None unless the dataset defines its own. Each dataset implements this
        method."""
        raise missing_method(self, "read")


@dataclasses.dataclass(eq=False)
class ImageDataset(Dataset):
    """Base class of image datasets."""

    mean: list[float] = mean_option(0.5)
    std: list[float] = std_option(0.5)

    #: Number of channels of the images; 0 if it is unknown before the data are read.
    channels: int = dataclasses.field(init=False, default=0)
    #: Height and width of the stored images, and the number of classes; None if they are unknown before the data are read.
    stored: ClassVar[tuple[int, int, int] | None] = None

    def check(self) -> None:
        super().check()
        for key in ("mean", "std"):
            self.per_channel(key, self.channels or max(len(getattr(self, key)), 1))

    def per_channel(self, key: str, channels: int) -> list[float]:
        """The values of the option `mean` or `std`, one for each channel; raises an OptionError if the option has the wrong
        length."""
        values = getattr(self, key)
        if len(values) not in (1, channels):
            allowed = "1 number" if channels == 1 else f"1 or {channels} numbers, one for each channel"
            raise OptionError(key, f"={values} should have {allowed}")
        return [*values] * (channels // len(values))

    def shape(self) -> tuple[tuple[int, ...], int] | None:
        """The shape (C, H, W) of a loaded image and the number of classes; None if they are unknown before the data are read."""
        if self.stored is None:
            return None
        height, width, classes = self.stored
        return (self.channels, *self.cropping().shape(height, width)), classes

    def cropping(self) -> Crop:
        """The crop that this dataset applies to its images."""
        return Crop()


@dataclasses.dataclass(eq=False)
class CroppedDataset(ImageDataset):
    """Base class of image datasets with options for cropping, resizing and augmentation."""

    augment: bool = augment_option(True)
    crop: str = crop_option("padded")
    size: int | None = size_option(None)

    @property
    def augments(self) -> bool:
        return self.augment

    def cropping(self) -> Crop:
        return CROPS[self.crop](self.size)


@dataclasses.dataclass(eq=False)
class ArrayDataset(ImageDataset):
    """Base class of image datasets that are read as arrays and fit on the device.

    Examples:
        >>> import dataclasses, numpy, torch, fa_bench
        >>> @dataclasses.dataclass(eq=False)
        ... class Stripes(fa_bench.ArrayDataset):
        ...     '''Images of 8x8 pixels that are dark or bright.'''
        ...
        ...     def arrays(self, data_dir):
        ...         labels = numpy.arange(40) % 2
        ...         images = numpy.full((40, 1, 8, 8), 255, "uint8") * labels[:, None, None, None].astype("uint8")
        ...         return images, labels, images[:10], labels[:10], ["dark", "bright"]
        >>> splits = Stripes().load(None, torch.device("cpu"))
        >>> len(splits.train), len(splits.validation), len(splits.test)
        (36, 4, 10)
    """

    def arrays(self, data_dir: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[str]]:
        """The training images and labels, the test images and labels, and the class names (see `fa_bench.data.array_checks`)."""
        raise missing_method(self, "arrays")

    def read(self, data_dir: Path, device: torch.device) -> Splits:
        notes: list[str] = []
        try:
            train_x, train_y, test_x, test_y, classes = checked(self.arrays(data_dir), notes, targets=self.targets)
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

        return Splits(
            split(train_x, train_y),
            None,
            split(test_x, test_y),
            classes,
            (channels, *crop.shape(*stored)),
            digest.hexdigest(),
            notes,
        )
