"""What every dataset is, and the split that lives on the device.

Shapes: N batch, C channels, H and W pixels. Images are stored as uint8 and reach the model normalised, as float32.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from fa_bench.errors import OptionError
from fa_bench.feedback import seed_for
from fa_bench.lazy import torch
from fa_bench.options import Options, option

if TYPE_CHECKING:
    from torch import Tensor


@dataclasses.dataclass
class Splits:
    """A dataset, loaded.

    Attributes:
        train, validation, test: the splits; validation is None where nothing is held out.
        classes: their names.
        input_shape: (C, H, W).
        data_hash: of all images and labels as stored, before the validation split.
    """

    train: Split
    validation: Split | None
    test: Split
    classes: list[str]
    input_shape: tuple[int, int, int]
    data_hash: str


class Split(abc.ABC):
    """Samples that can be walked through in batches."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abc.abstractmethod
    def subset(self, indices: Tensor) -> Split:
        """The samples at `indices`, (n,) int64."""

    @abc.abstractmethod
    def gather(self, chunks: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each chunk of indices the images, uint8 (N, C, H, W), and labels, int64 (N,), on the device."""

    mean: list[float]
    std: list[float]
    augment: bool
    device: torch.device

    def steps(self, batch_size: int, drop_last: bool = False) -> int:
        """Number of batches in one pass."""
        whole, rest = divmod(len(self), batch_size)
        return whole + (rest > 0 and (not drop_last or whole == 0))

    def batches(
        self, batch_size: int, *, seed: int | None = None, epoch: int = 0, drop_last: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the samples: x float32 (N, C, H, W), normalised, and y int64 (N,), on the device.

        Args:
            batch_size: samples in a batch; the last may have fewer.
            seed: None for the stored order without augmentation; else shuffled and augmented, as a function of
                (seed, epoch) alone, with random numbers of its own.
            epoch: number of the pass.
            drop_last: leave out a last batch that is not full, unless it is the only one.
        """
        indices = torch.arange(len(self))
        generator = None
        if seed is not None:
            generator = torch.Generator().manual_seed(seed_for("order", seed, epoch))
            indices = torch.randperm(len(self), generator=generator)
        steps = self.steps(batch_size, drop_last)
        chunks = (indices[i * batch_size : (i + 1) * batch_size] for i in range(steps))
        # x * scale + shift in place: two passes over the batch, whatever the mean.
        scale = torch.tensor([1 / (255 * s) for s in self.std], device=self.device).view(-1, 1, 1)
        shift = torch.tensor([-m / s for m, s in zip(self.mean, self.std, strict=True)], device=self.device).view(-1, 1, 1)
        for images, labels in self.gather(chunks):
            if generator is not None and self.augment:
                images = crop_and_flip(images, generator)
            yield images.to(torch.float32).mul_(scale).add_(shift), labels


class ResidentSplit(Split):
    """Samples that stay on the device.

    Args:
        images: uint8 (n, C, H, W).
        labels: int64 (n,).
        mean, std: of each channel, in units of the full range.
        augment: crop and flip training batches.
        device: where to keep them.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, mean: list[float], std: list[float], augment: bool, device: torch.device
    ) -> None:
        self.images, self.labels = images.to(device), labels.to(device)
        self.mean, self.std, self.augment, self.device = mean, std, augment, device

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> ResidentSplit:
        indices = indices.to(self.device)
        return ResidentSplit(self.images[indices], self.labels[indices], self.mean, self.std, self.augment, self.device)

    def gather(self, chunks: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for chunk in chunks:
            chunk = chunk.to(self.device, non_blocking=True)
            yield self.images.index_select(0, chunk), self.labels.index_select(0, chunk)


def crop_and_flip(images: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Each image of a batch (N, C, H, W) cropped at a random place of itself padded with zeros, and flipped with chance 1/2."""
    n, channels, height, width = images.shape
    device = images.device
    rows = torch.randint(2 * padding + 1, (n, 1), generator=generator).to(device) + torch.arange(height, device=device)
    columns = torch.randint(2 * padding + 1, (n, 1), generator=generator).to(device) + torch.arange(width, device=device)
    flipped = torch.randint(2, (n, 1), generator=generator, dtype=torch.bool).to(device)
    columns = torch.where(flipped, columns.flip(1), columns)
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    # One gather with flat positions that all channels share: several times faster than indexing by rows and columns.
    places = (rows[:, :, None] * padded.shape[3] + columns[:, None, :]).view(n, 1, -1).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, places).view(images.shape)


@dataclasses.dataclass(eq=False)
class Dataset(Options):
    """Base of the datasets."""

    validation: float = option(0.1, "fraction (below 1) or number (1 and more) of training images held out to select by; 0: none",
                               minimum=0)
    validation_seed: int = option(0, "seed of the validation split, the same for every run seed", minimum=0)

    #: Whether data_dir is the dataset itself, and so a part of a run's identity.
    content_is_data_dir: ClassVar[bool] = False

    def check(self) -> None:
        if self.validation >= 1 and not self.validation.is_integer():
            raise OptionError("validation", f"={self.validation:g} is neither a fraction below 1 nor a whole number")

    def load(self, data_dir: Path, device: torch.device, at_most: tuple[int, int] | None = None) -> Splits:
        """Read the dataset, downloading it where that is possible and needed.

        Args:
            data_dir: the folder of the datasets.
            device: where samples that fit are kept.
            at_most: training and test images that a trial is made of, drawn with a fixed seed; None: all.

        Raises:
            DataError: naming the missing or unreadable file.
            OptionError: where an option does not fit the data.
        """
        train, test, classes, shape, data_hash = self.read(data_dir, device)
        if at_most is not None:
            train, test = (_some(split, number) for split, number in zip((train, test), at_most, strict=True))
        held = round(self.validation * len(train)) if self.validation < 1 else int(self.validation)
        if self.validation > 0:
            held = max(held, 1)
        if held >= len(train):
            raise OptionError("dataset.validation", f"={self.validation:g} leaves none of {len(train)} training images")
        if held == 0:
            return Splits(train, None, test, classes, shape, data_hash)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed_for("split", self.validation_seed)))
        # Sorted, so that the held-out and the remaining images keep the order of the files.
        validation, rest = order[:held].sort().values, order[held:].sort().values
        return Splits(train.subset(rest), train.subset(validation), test, classes, shape, data_hash)

    def read(
        self, data_dir: Path, device: torch.device
    ) -> tuple[Split, Split, list[str], tuple[int, int, int], str]:
        """(all training images, test images, class names, (C, H, W), hash); implemented by each dataset."""
        raise NotImplementedError


def _some(split: Split, number: int) -> Split:
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed_for("trial")))
    return split if len(split) <= number else split.subset(order[:number].sort().values)


@dataclasses.dataclass(eq=False)
class ArrayDataset(Dataset):
    """Base of the datasets that are read as arrays and fit on the device."""

    #: Of each channel, in units of the full range.
    mean_std: ClassVar[tuple[list[float], list[float]]] = ([0.5], [0.5])

    def arrays(self, data_dir: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[str]]:
        """Training images (uint8, (n, C, H, W)) and labels, test images and labels, class names."""
        raise NotImplementedError

    @property
    def augments(self) -> bool:
        """Whether training batches are cropped and flipped."""
        return False

    def read(self, data_dir: Path, device: torch.device) -> tuple[Split, Split, list[str], tuple[int, int, int], str]:
        train_x, train_y, test_x, test_y, classes = self.arrays(data_dir)
        digest = hashlib.sha256()
        for array in (train_x, train_y.astype(np.int64), test_x, test_y.astype(np.int64)):
            digest.update(np.ascontiguousarray(array).data)
        mean, std = self.mean_std

        def split(images: np.ndarray, labels: np.ndarray) -> ResidentSplit:
            tensors = torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels.astype(np.int64))
            return ResidentSplit(*tensors, mean, std, self.augments, device)

        channels, height, width = train_x.shape[1:]
        return split(train_x, train_y), split(test_x, test_y), classes, (channels, height, width), digest.hexdigest()
