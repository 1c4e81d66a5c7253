"""Crop and resize images to the size of the model's input: in batches on the device, or one by one while decoding.

Shapes: N batch, C channels, H and W pixels.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

#: Number of tries for a random resized crop, and number of random numbers per image. Each try needs an area and an aspect ratio;
#: the position needs two numbers and the flip needs one.
TRIES = 10
DRAWS = 2 * TRIES + 3
#: For evaluation, `ResizedCrop` resizes the shorter side to this multiple of the crop's size: to 256 pixels for a crop of 224.
MARGIN = 256 / 224


class Part(NamedTuple):
    """The samples of a batch that one of several processes trains on.

    Attributes:
        positions: their positions in the batch, (n,) int64.
        batch: the number of samples in the batch.
    """

    positions: Tensor
    batch: int


@dataclasses.dataclass
class Crop:
    """Leaves images unchanged; the base class of the other crops.

    Attributes:
        size: height and width of the result; None: as stored.
    """

    size: int | None = None

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the result for images of `height` and `width`."""
        return (height, width) if self.size is None else (self.size, self.size)

    def random(self, images: Tensor, generator: torch.Generator, part: Part | None = None) -> Tensor:
        """Augment a training batch (N, C, H, W) with random numbers from `generator`, which is on the CPU.

        `part` specifies which images of the batch are passed (None: all). They get the same random numbers as if the whole batch
        were passed.
        """
        return self.fixed(images)

    def fixed(self, images: Tensor) -> Tensor:
        """A batch (N, C, H, W) without augmentation, as stored or, after resizing, as float32 from 0 to 255."""
        return images


class PaddedCrop(Crop):
    """Resizes the shorter side to `size` and crops the centre. Augmentation then pads each image with 4 pixels of zeros on every
    side, crops it at a random position, and flips it horizontally with probability 1/2."""

    def random(self, images: Tensor, generator: torch.Generator, part: Part | None = None) -> Tensor:
        return crop_and_flip(self.fixed(images), generator, part=part)

    def fixed(self, images: Tensor) -> Tensor:
        target = self.shape(*images.shape[2:])
        return images if target == images.shape[2:] else resize_and_crop(images, min(target), target)


class ResizedCrop(Crop):
    """Augments each image by cropping a random 8 % to 100 % of its area, resizing the crop to `size`, and flipping it
    horizontally with probability 1/2 (Szegedy et al. 2015).

    Without augmentation, the shorter side is resized to 256/224 of `size`, and the centre is cropped.
    """

    def random(self, images: Tensor, generator: torch.Generator, part: Part | None = None) -> Tensor:
        count = len(images) if part is None else part.batch
        draws = _of_part(torch.rand(count, DRAWS, generator=generator, dtype=torch.float64), part).numpy()
        height, width = images.shape[2:]
        return crop_and_resize(images, random_boxes(draws, height, width), draws[:, -1] < 0.5, self.shape(height, width))

    def fixed(self, images: Tensor) -> Tensor:
        target = self.shape(*images.shape[2:])
        return resize_and_crop(images, margin(min(target)), target)

    def decode_random(self, image: Any, rng: np.random.Generator) -> Any:
        """Augment one PIL image in an 8-bit mode with Pillow, as `random` augments a batch."""
        from PIL import Image

        draws = rng.random((1, DRAWS))
        top, left, height, width = random_boxes(draws, image.height, image.width)[0].tolist()
        out = self.shape(image.height, image.width)
        # The image is cropped first, because resize(box=...) would use pixels outside of the box.
        image = image.crop((left, top, left + width, top + height)).resize(out[::-1], Image.Resampling.BILINEAR)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draws[0, -1] < 0.5 else image

    def decode_fixed(self, image: Any) -> Any:
        """Resize and crop one PIL image in an 8-bit mode with Pillow, as `fixed` does with a batch."""
        from PIL import Image

        target = self.shape(image.height, image.width)
        height, width = resized_shape(image.height, image.width, margin(min(target)))
        top, left = (centre(length, part) for length, part in zip((height, width), target, strict=True))
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        return image.crop((left, top, left + target[1], top + target[0]))


def _of_part(draws: Tensor, part: Part | None) -> Tensor:
    """Select the random numbers for the samples of a part from those for the whole batch."""
    return draws if part is None else draws[part.positions]


#: The choices of `dataset.crop`.
CROPS: dict[str, type[Crop]] = {"padded": PaddedCrop, "resized": ResizedCrop}


def margin(size: int) -> int:
    """The length to which the shorter side is resized for evaluation before the central `size` pixels are cropped."""
    return round(size * MARGIN)


def resized_shape(height: int, width: int, shorter: int) -> tuple[int, int]:
    """Height and width after resizing the shorter side to `shorter`; the longer side is rounded down, as in torchvision."""
    return (shorter, shorter * width // height) if height <= width else (shorter * height // width, shorter)


def centre(length: int, part: int) -> int:
    """The start of a centred crop of length `part`; halves are rounded to even, as in torchvision."""
    return round((length - part) / 2)


def crop_and_flip(images: Tensor, generator: torch.Generator, padding: int = 4, part: Part | None = None) -> Tensor:
    """Pad each image of a batch (N, C, H, W) with zeros, crop it at a random position, and flip it with probability 1/2.

    `part`: see `Crop.random`.
    """
    n, channels, height, width = images.shape
    device, count = images.device, n if part is None else part.batch

    def draws(high: int, dtype: torch.dtype = torch.int64) -> Tensor:
        values = torch.randint(high, (count, 1), generator=generator, dtype=dtype)
        return _of_part(values, part).to(device, non_blocking=True)

    rows = draws(2 * padding + 1) + torch.arange(height, device=device)
    columns = draws(2 * padding + 1) + torch.arange(width, device=device)
    flipped = draws(2, torch.bool)
    columns = torch.where(flipped, columns.flip(1), columns)
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    # One gather with flat positions shared by all channels is several times faster than indexing by rows and columns.
    positions = (rows[:, :, None] * padded.shape[3] + columns[:, None, :]).view(n, 1, -1).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, positions).view(images.shape)


def random_boxes(draws: np.ndarray, height: int, width: int) -> np.ndarray:
    """Boxes of random resized crops, with an area uniform between 8 % and 100 % of the image's and an aspect ratio log-uniform
    between 3/4 and 4/3.

    Each box is the first of ten tries that fits into the image. If none fits, it is the largest centred box with an aspect ratio
    between 3/4 and 4/3.

    Args:
        draws: uniform in [0, 1), (N, DRAWS); the last column, for the flip, is not used here.
        height, width: the height and width of the images.

    Returns:
        int64 (N, 4): top, left, height, width.
    """
    areas = height * width * (0.08 + 0.92 * draws[:, :TRIES])
    ratios = np.exp(math.log(4 / 3) * (2 * draws[:, TRIES : 2 * TRIES] - 1))
    widths, heights = np.rint(np.sqrt(areas * ratios)).astype(np.int64), np.rint(np.sqrt(areas / ratios)).astype(np.int64)
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    first, rows = fits.argmax(1), np.arange(len(draws))
    h, w = heights[rows, first], widths[rows, first]
    # For u uniform in [0, 1), floor(u (n + 1)) is uniform on the integers from 0 to n.
    top = (draws[:, -3] * (height - h + 1)).astype(np.int64)
    left = (draws[:, -2] * (width - w + 1)).astype(np.int64)
    fall_h, fall_w = min(height, round(width / (3 / 4))), min(width, round(height * (4 / 3)))
    fallback = ((height - fall_h) // 2, (width - fall_w) // 2, fall_h, fall_w)
    return np.stack([np.where(fits.any(1), one, other) for one, other in zip((top, left, h, w), fallback, strict=True)], 1)


def crop_and_resize(images: Tensor, boxes: np.ndarray, flips: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Crop each image to its box, resize it with bilinear interpolation and antialiasing, and flip it where `flips` is true.

    Args:
        images: uint8 or floating (N, C, H, W).
        boxes: (N, 4), top, left, height, width in pixels.
        flips: bool (N,).
        size: height and width of the result.

    Returns:
        The float32 batch (N, C, *size), whose pixel values are not rounded.
    """
    top, left, height, width = torch.from_numpy(boxes).to(images.device, torch.float32).T
    rows = _interpolation(top, height, images.shape[2], size[0], size[0])
    columns = _interpolation(left, width, images.shape[3], size[1], size[1])
    flipped = torch.from_numpy(flips).to(images.device)[:, None, None]
    return _apply(images, rows, torch.where(flipped, columns.flip(1), columns))


def resize_and_crop(images: Tensor, shorter: int, size: tuple[int, int]) -> Tensor:
    """Resize the shorter side of all images to `shorter`, with bilinear interpolation and antialiasing, and crop the centre.

    Args:
        images: uint8 or floating (N, C, H, W).
        shorter: length of the resized image's shorter side, in pixels.
        size: height and width of the result.

    Returns:
        The float32 batch (N, C, *size), whose pixel values are not rounded.
    """
    (height, width), zero, weights = images.shape[2:], torch.zeros(1, device=images.device), []
    for length, resized, part in zip((height, width), resized_shape(height, width, shorter), size, strict=True):
        weights.append(_interpolation(zero, zero + length, length, resized, part, centre(resized, part)))
    return _apply(images, *weights)


def _interpolation(start: Tensor, length: Tensor, total: int, resized: int, part: int, first: int = 0) -> Tensor:
    """Interpolation weights, (N, part, total), for resizing a range of pixels and cropping the result.

    The range begins at `start` (N,), has the length `length` (N,), and is resized to `resized` pixels. Of these, only `part`
    pixels are computed, starting with the pixel `first`. The filter is a triangle as wide as two pixels of the coarser grid.
    Pixels outside of the range have zero weight.
    """
    start, length = start[:, None, None], length[:, None, None]
    scale = length / resized
    centres = start + (torch.arange(first, first + part, device=start.device)[:, None] + 0.5) * scale
    pixels = torch.arange(total, device=start.device)
    weights = (1 - (pixels + 0.5 - centres).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = weights * ((pixels >= start) & (pixels < start + length))
    return weights / weights.sum(2, keepdim=True)


def _apply(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Compute rows @ image @ columns^T for every channel, which resizes the image because resizing is linear in rows and in
    columns."""
    return rows[:, None] @ (images.to(torch.float32) @ columns[:, None].transpose(2, 3))
