"""Cropping and resizing of whole batches, and of single images as they are decoded, agree with torchvision's functions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as reference

from fa_bench.data.base import ResidentSplit
from fa_bench.data.crops import (
    CROPS,
    DRAWS,
    TRIES,
    PaddedCrop,
    ResizedCrop,
    crop_and_resize,
    margin,
    random_boxes,
    resize_and_crop,
    resized_shape,
)
from fa_bench.errors import OptionError
from fa_bench.registry.registries import DATASETS

CPU = torch.device("cpu")
#: The rounding of the float32 weights changes a pixel's level by up to 1e-6 of 255, and by a few times as much near a border.
CLOSE = {"rtol": 0, "atol": 2e-3}


def images(n: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, 3, height, width), dtype=np.uint8))


@pytest.mark.parametrize("size", [(32, 32), (75, 61), (9, 20), (1, 1)])
def test_resized_crops_match_torchvision(size: tuple[int, int]) -> None:
    """Crops at the borders of the image and in its interior are upscaled, downscaled with antialiasing, or upscaled in one
    direction and downscaled in the other."""
    batch = images(6, 30, 40)
    boxes = np.array([[0, 0, 30, 40], [5, 7, 11, 13], [29, 39, 1, 1], [0, 30, 17, 10], [3, 0, 27, 40], [12, 9, 2, 30]])
    flips = np.array([False, True] * 3)
    result = crop_and_resize(batch, boxes, flips, size)
    for image, (top, left, height, width), flipped, got in zip(batch, boxes.tolist(), flips, result, strict=True):
        expected = reference.resized_crop(image.float(), top, left, height, width, list(size), antialias=True)
        torch.testing.assert_close(got, expected.flip(2) if flipped else expected, **CLOSE)


@pytest.mark.parametrize("shape", [(32, 32), (41, 57), (57, 41), (300, 260)])
@pytest.mark.parametrize(("shorter", "size"), [(256, 224), (73, 64), (20, 20), (21, 18)])
def test_evaluation_crops_match_torchvision(shape: tuple[int, int], shorter: int, size: int) -> None:
    batch = images(2, *shape)
    expected = reference.center_crop(reference.resize(batch.float(), shorter, antialias=True), size)
    torch.testing.assert_close(resize_and_crop(batch, shorter, (size, size)), expected, **CLOSE)


def test_evaluation_resizes_to_256_for_224() -> None:
    assert margin(224) == 256 and resized_shape(375, 500, 256) == (256, 341) and resized_shape(500, 333, 256) == (384, 256)
    batch = images(2, 32, 32)
    expected = reference.center_crop(reference.resize(batch.float(), 256, antialias=True), 224)
    torch.testing.assert_close(ResizedCrop(224).fixed(batch), expected, **CLOSE)


def test_padded_crop_with_size_resizes_whole_image() -> None:
    batch = images(3, 32, 32)
    assert PaddedCrop().fixed(batch) is batch and PaddedCrop(32).fixed(batch) is batch
    torch.testing.assert_close(PaddedCrop(40).fixed(batch), reference.resize(batch.float(), 40, antialias=True), **CLOSE)
    assert PaddedCrop(40).random(batch, torch.Generator().manual_seed(0)).shape == (3, 3, 40, 40)


def test_batch_crops_follow_random_draws() -> None:
    batch = images(40, 24, 32)
    result = ResizedCrop(16).random(batch, torch.Generator().manual_seed(3))
    draws = torch.rand(40, DRAWS, generator=torch.Generator().manual_seed(3), dtype=torch.float64).numpy()
    expected = crop_and_resize(batch, random_boxes(draws, 24, 32), draws[:, -1] < 0.5, (16, 16))
    assert torch.equal(result, expected)
    flipped = crop_and_resize(batch, random_boxes(draws, 24, 32), draws[:, -1] >= 0.5, (16, 16))
    assert torch.equal(result, flipped.flip(3)) and 0 < (draws[:, -1] < 0.5).sum() < 40


def test_boxes_from_given_draws() -> None:
    """The expected boxes are computed by hand from draws u, v and w: the area is 0.08 + 0.92 u of the image, the ratio is
    (4/3)^(2v - 1), and the position along an axis with n free pixels is floor(w (n + 1))."""
    draws = np.zeros((3, DRAWS))
    draws[0, :TRIES], draws[0, TRIES : 2 * TRIES] = 0.5, 0.5  # area 0.54 of 100x100: a square with sides of 73
    draws[0, -3:-1] = 0.999, 0.5
    draws[1, 0], draws[1, TRIES] = 0.99, 0.999  # wider than the image, so the second attempt is used
    draws[1, 1], draws[1, TRIES + 1] = 0.25, 0.0  # area 3100, ratio 3/4: 48 wide, 64 high
    draws[2, :TRIES], draws[2, TRIES : 2 * TRIES] = 1.0, 1.0  # never fits
    boxes = random_boxes(draws, 100, 100)
    assert boxes[0].tolist() == [27, 14, 73, 73] and boxes[1].tolist() == [0, 0, 64, 48]
    assert boxes[2].tolist() == [0, 0, 100, 100]
    # The fallback is a centred crop whose ratio lies between 3/4 and 4/3.
    assert random_boxes(draws, 100, 400)[2].tolist() == [0, 133, 100, 133]
    assert random_boxes(draws, 400, 90)[2].tolist() == [140, 0, 120, 90]


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 40)])
def test_box_distribution_matches_torchvision(height: int, width: int) -> None:
    """For 4,000 boxes from each implementation, the means of the coordinates, their squares, the areas and the aspect ratios
    differ by less than 4 standard errors."""
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    canvas = torch.zeros(1, height, width)
    theirs = np.array([RandomResizedCrop.get_params(canvas, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)], float)
    ours = random_boxes(np.random.default_rng(0).random((4000, DRAWS)), height, width).astype(float)
    assert (ours[:, 0] + ours[:, 2]).max() <= height and (ours[:, 1] + ours[:, 3]).max() <= width
    for values in (lambda b: b, lambda b: b**2, lambda b: b[:, 2:3] * b[:, 3:], lambda b: b[:, 2:3] / b[:, 3:]):
        one, other = values(ours), values(theirs)
        limit = 4 * np.sqrt((one.var(0) + other.var(0)) / 4000)
        assert (np.abs(one.mean(0) - other.mean(0)) < limit).all()


@pytest.mark.parametrize("shape", [(64, 64), (75, 100), (100, 61)])
def test_single_image_crop_matches_batch(shape: tuple[int, int]) -> None:
    """The tolerance is one level, because Pillow rounds to integers after each of its two passes."""
    batch = images(1, *shape, seed=2)
    image = Image.fromarray(batch[0].numpy().transpose(1, 2, 0))
    crop = ResizedCrop(20)
    for seed in range(20):
        draws = np.random.default_rng(seed).random((1, DRAWS))
        expected = crop_and_resize(batch, random_boxes(draws, *shape), draws[:, -1] < 0.5, (20, 20))[0]
        got = np.asarray(crop.decode_random(image, np.random.default_rng(seed))).transpose(2, 0, 1)
        np.testing.assert_allclose(got, expected.numpy(), atol=1.01)
    got = np.asarray(crop.decode_fixed(image))
    np.testing.assert_allclose(got.transpose(2, 0, 1), crop.fixed(batch)[0].numpy(), atol=1.01)
    np.testing.assert_array_equal(got, reference.center_crop(reference.resize(image, margin(20)), 20))


@pytest.mark.parametrize("name", list(CROPS))
@pytest.mark.parametrize("size", [None, 12])
def test_split_batches_are_cropped_and_normalised(name: str, size: int | None) -> None:
    crop = CROPS[name](size)
    split = ResidentSplit(images(10, 8, 8), torch.arange(10), [0.2] * 3, [0.5] * 3, True, CPU, crop)
    side = size or 8
    plain = torch.cat([x for x, _ in split.batches(4)])
    assert plain.shape == (10, 3, side, side) and plain.dtype == torch.float32
    torch.testing.assert_close(plain, (crop.fixed(split.images) / 255 - 0.2) / 0.5, rtol=1e-5, atol=1e-5)
    seen = [torch.cat([x for x, _ in split.batches(4, seed=0, epoch=epoch)]) for epoch in (0, 0, 1)]
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    assert torch.equal(split.subset(torch.tensor([3, 1])).labels, split.labels[[3, 1]])
    same = ResidentSplit(split.images[:1].repeat(16, 1, 1, 1), torch.arange(16), [0.2] * 3, [0.5] * 3, True, CPU, crop)
    first, second = (x for x, _ in same.batches(8, seed=0))
    assert not torch.equal(first, second), "both batches have the same crops"
    halves = split.subset(torch.arange(5))
    assert torch.equal(next(halves.batches(5))[0], plain[:5])


def test_resized_crop_preserves_stored_images_and_order() -> None:
    split = ResidentSplit(images(10, 8, 8), torch.arange(10), [0.5] * 3, [0.5] * 3, True, CPU, ResizedCrop())
    other = ResidentSplit(split.images, split.labels, [0.5] * 3, [0.5] * 3, False, CPU)
    before = split.images.clone()
    labels = [torch.cat([y for _, y in one.batches(4, seed=1)]).tolist() for one in (split, other)]
    assert torch.equal(split.images, before) and labels[0] == labels[1]


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("cifar100", {"crop": "resize"}, r"crop=resize is not one of padded, resized; did you mean 'resized'"),
        ("cifar10", {"size": 0}, r"size=0 is out of range"),
        ("cifar10", {"mean": [0.5, 0.5]}, r"mean=\[0\.5, 0\.5\] should have 1 or 3 numbers"),
        ("mnist", {"std": [0.5] * 3}, r"std=\[0\.5, 0\.5, 0\.5\] should have 1 number"),
        ("svhn", {"std": [0.5, 0.0, 0.5]}, r"std=0\.0 is out of range"),
        ("tiny_imagenet", {"mean": []}, r"mean=\[\] should have 1 or 3 numbers"),
        ("synthetic", {"mean": [0.5, 0.5]}, r"mean=\[0\.5, 0\.5\] should have 1 number"),
        ("imagenet", {"size": None}, r"size=null is not possible with crop=resized"),
        ("image_folder", {"crop": "resized"}, r"size=null is not possible with crop=resized"),
    ],
)
def test_invalid_options_are_rejected_before_loading(dataset: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        DATASETS[dataset].from_mapping(options)


def test_normalisation_can_be_set() -> None:
    """A mean of 0 and a standard deviation of 1 leave the pixels in the range 0 to 1, as in the weight-mirror paper's
    demonstration."""
    splits = DATASETS["digits"].from_mapping({"mean": [0.0], "std": [1.0], "validation": 0}).load(Path("nowhere"), CPU)
    x, _ = next(splits.train.batches(2000))
    assert x.min() == 0 and math.isclose(float(x.max()), 1, rel_tol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 2), (2, 1), (2, 2), (1, 9)])
def test_random_boxes_are_nonempty_and_inside_image(height: int, width: int) -> None:
    boxes = random_boxes(np.random.default_rng(0).random((500, DRAWS)), height, width)
    assert (boxes[:, 2:] >= 1).all() and (boxes[:, :2] >= 0).all()
    assert (boxes[:, 0] + boxes[:, 2] <= height).all() and (boxes[:, 1] + boxes[:, 3] <= width).all()
