"""The parts of a loaded dataset, which are iterated over in batches.

Shapes: N batch, n samples, C channels, H and W pixels, F features, T positions, O outputs. Images are stored as uint8; before
    they reach the model, they are converted to float32 and normalised.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from fa_bench.data.crops import Crop, PaddedCrop, Part
from fa_bench.errors import printable
from fa_bench.registry.kinds import CLASSES, IMAGES
from fa_bench.utils.lazy import torch
from fa_bench.utils.sampling import seed_for

if TYPE_CHECKING:
    from torch import Tensor


@dataclasses.dataclass
class Splits:
    """A loaded dataset.

    Attributes:
        train, validation, test: the splits; validation is None if there is no validation set.
        classes: the names of the classes; for tokens, the vocabulary; for values, the names of the outputs.
        input_shape: the shape of one sample: (C, H, W), (F,) or (T,).
        data_hash: a hash of the dataset as stored, before training samples are held out for validation.
        notes: printable sentences about the source, for example on skipped files or converted images.
        inputs, targets: their kinds (`fa_bench.registry.kinds`).
    """

    train: Split
    validation: Split | None
    test: Split
    classes: list[str]
    input_shape: tuple[int, ...]
    data_hash: str
    notes: list[str] = dataclasses.field(default_factory=list)
    inputs: str = IMAGES
    targets: str = CLASSES

    def __post_init__(self) -> None:
        self.notes = [printable(note) for note in self.notes]  # file names may contain control characters


class Split(abc.ABC):
    """A set of samples that can be iterated over in batches."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abc.abstractmethod
    def subset(self, indices: Tensor) -> Split:
        """A split with only the samples at `indices`, (n,) int64."""

    @abc.abstractmethod
    def gather(self, chunks: Iterator[Tensor], key: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """For each chunk of indices, yield the inputs, to be converted by `prepared`, and the targets, both on the device.

        `key` is the seed for everything that varies between epochs while reading; with None, nothing varies.
        """

    #: The targets of the samples, (n, ...), for code that depends on their classes; None if they are not available.
    targets: Tensor | None = None
    #: For text, the mean number of characters per token in this split.
    characters: float | None = None

    @property
    def varies(self) -> bool:
        """Whether the samples differ from epoch to epoch."""
        return False

    @property
    def is_indexed(self) -> bool:
        """Whether an index refers to the same sample in every epoch, and `batch_indices` yields the indices of the samples in
        `batches`."""
        return type(self).batches is Split.batches

    def prepared(self, x: Tensor, seed: tuple[int, ...] | None, part: Part | None = None) -> Tensor:
        """Convert a batch of gathered inputs to the form that the model receives.

        `seed` is the seed of the batch (None: no augmentation); `part` specifies which samples of the batch `x` contains (None:
        all).
        """
        return x

    def steps(self, batch_size: int, drop_last: bool = False) -> int:
        """Number of batches in one pass."""
        full, rest = divmod(len(self), batch_size)
        return full + (rest > 0 and (not drop_last or full == 0))

    def batches(
        self,
        batch_size: int,
        *,
        seed: int | None = None,
        epoch: int = 0,
        drop_last: bool = False,
        start: int = 0,
        shuffle: bool = True,
        share: Callable[[int], Tensor] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of one pass over the samples: inputs x and targets y, on the device.

        Args:
            batch_size: number of samples in a batch; the last batch may have fewer.
            seed: None for the stored order without augmentation; otherwise, the samples are shuffled and augmented, as a function
                of (seed, epoch) only.
            epoch: number of the pass.
            drop_last: drop the last incomplete batch, unless it is the only one.
            start: number of batches to skip at the beginning; the other batches are the same for every `start`.
            shuffle: false for the stored order, even with a seed.
            share: returns the positions of the wanted samples in a batch of the given size, (n,) int64; None: all. A batch
                without wanted samples is skipped.
        """
        chunks = self.batch_indices(
            batch_size, seed=seed, epoch=epoch, drop_last=drop_last, start=start, shuffle=shuffle, share=share
        )
        parts: Iterator[Part | None] = itertools.repeat(None)
        if share is not None:
            parts = iter(self._parts(share, batch_size, range(start, self.steps(batch_size, drop_last))))
        varies = self.varies and seed is not None
        key = seed_for("read", seed, epoch) if varies else None
        for number, ((x, y), part) in enumerate(zip(self.gather(chunks, key), parts, strict=False), start):
            # Each batch has its own seed, so that a run can be resumed in the middle of an epoch.
            seeds = (seed, epoch, number) if varies and seed is not None else None
            yield self.prepared(x, seeds) if part is None else self.prepared(x, seeds, part), y

    def batch_indices(
        self,
        batch_size: int,
        *,
        seed: int | None = None,
        epoch: int = 0,
        drop_last: bool = False,
        start: int = 0,
        shuffle: bool = True,
        share: Callable[[int], Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """Yield the indices of the samples in each batch that `batches` yields with the same arguments, (N,) int64 on the CPU."""
        indices = torch.arange(len(self))
        if seed is not None and shuffle:
            indices = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed_for("order", seed, epoch)))
        steps = range(start, self.steps(batch_size, drop_last))
        chunks = (indices[i * batch_size : (i + 1) * batch_size] for i in steps)
        if share is None:
            return chunks
        parts = self._parts(share, batch_size, steps)
        return (chunk[part.positions] for chunk, part in zip(chunks, parts, strict=False))

    def _parts(self, share: Callable[[int], Tensor], batch_size: int, steps: range) -> list[Part]:
        """The requested part of each batch, excluding batches without requested samples; the last batch may be smaller."""
        sizes = (min(batch_size, len(self) - i * batch_size) for i in steps)
        return [part for size in sizes if len((part := Part(share(size), size)).positions)]


class ImageSplit(Split):
    """A split of images, which are stored as uint8 (n, C, H, W)."""

    mean: list[float]
    std: list[float]
    augment: bool
    device: torch.device
    crop: Crop

    @property
    def varies(self) -> bool:
        return self.augment

    def prepared(self, x: Tensor, seed: tuple[int, ...] | None, part: Part | None = None) -> Tensor:
        """The images as float32 (N, C, H, W), cropped and normalised."""
        scale, shift = self._normalisation
        if seed is not None:
            x = self.crop.random(x, torch.Generator().manual_seed(seed_for("augment", *seed)), part)
        else:
            x = self.crop.fixed(x)
        return x.to(torch.float32).mul_(scale).add_(shift)

    @functools.cached_property
    def _normalisation(self) -> tuple[Tensor, Tensor]:
        """The pair (scale, shift) for normalising images as x * scale + shift, which takes two in-place passes over the batch."""
        scale = torch.tensor([1 / (255 * s) for s in self.std], device=self.device).view(-1, 1, 1)
        shift = torch.tensor([-m / s for m, s in zip(self.mean, self.std, strict=True)], device=self.device).view(-1, 1, 1)
        return scale, shift


class ResidentSplit(ImageSplit):
    """A split of images that stay on the device.

    Args:
        images: uint8 (n, C, H, W).
        labels: int64 (n,).
        mean, std: the mean and standard deviation of each channel, in units of the full range.
        augment: crop and flip training batches.
        device: the device of the samples.
        crop: how batches are cropped and resized; None for PaddedCrop at the stored size.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: list[float],
        std: list[float],
        augment: bool,
        device: torch.device,
        crop: Crop | None = None,
    ) -> None:
        self.images, self.labels = images.to(device), labels.to(device)
        self.targets = self.labels
        self.mean, self.std, self.augment, self.device, self.crop = mean, std, augment, device, crop or PaddedCrop()

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> ResidentSplit:
        indices = indices.to(self.device)
        return ResidentSplit(
            self.images[indices], self.labels[indices], self.mean, self.std, self.augment, self.device, self.crop
        )

    def gather(self, chunks: Iterator[Tensor], key: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        for chunk in chunks:
            chunk = chunk.to(self.device, non_blocking=True)
            yield self.images.index_select(0, chunk), self.labels.index_select(0, chunk)


class ArraySplit(Split):
    """A split of features or tokens that stay on the device.

    Args:
        inputs: float32 (n, F), or int64 (n, T).
        targets: int64 (n,) or (n, T), or float32 (n, O).
        device: the device of the samples.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, device: torch.device) -> None:
        self.inputs, self.of_inputs, self.device = inputs.to(device), targets.to(device), device
        self.targets = self.of_inputs

    def __len__(self) -> int:
        return len(self.inputs)

    def subset(self, indices: Tensor) -> ArraySplit:
        indices = indices.to(self.device)
        return ArraySplit(self.inputs[indices], self.of_inputs[indices], self.device)

    def gather(self, chunks: Iterator[Tensor], key: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        for chunk in chunks:
            chunk = chunk.to(self.device, non_blocking=True)
            yield self.inputs.index_select(0, chunk), self.of_inputs.index_select(0, chunk)


def some(split: Split, number: int) -> Split:
    """At most `number` samples of a split, in their original order; a fixed seed makes the choice the same in every run."""
    return split if len(split) <= number else split.subset(some_indices(split, number))


def some_indices(split: Split, number: int) -> Tensor:
    """The indices of the samples that `some` would choose."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed_for("trial")))
    return order[:number].sort().values


def stratified(labels: Tensor, count: int, seed: int) -> Tensor:
    """The sorted indices of `count` samples with the same class proportions as `labels` (n,), up to rounding."""
    labels = labels.cpu()
    classes, sizes = labels.unique(return_counts=True)
    shares = sizes.double() * count / len(labels)
    numbers = shares.floor().long()
    # Samples left over from rounding down go to the classes with the largest remainders; ties are broken in favour of the earlier
    # class.
    order = (numbers - shares).argsort(stable=True)
    numbers[order[: count - int(numbers.sum())]] += 1
    chosen = []
    for label, number in zip(classes.tolist(), numbers.tolist(), strict=True):
        members = (labels == label).nonzero().flatten()
        generator = torch.Generator().manual_seed(seed_for("samples", seed, label))
        chosen.append(members[torch.randperm(len(members), generator=generator)[:number]])
    return torch.cat(chosen).sort().values
