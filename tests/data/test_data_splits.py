"""Tests of splits in memory, and of the datasets synthetic and digits: order, augmentation, normalisation, validation samples and
hash."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fa_bench.data.base import ResidentSplit, Splits, some
from fa_bench.data.crops import PaddedCrop, ResizedCrop, crop_and_flip
from fa_bench.errors import OptionError
from fa_bench.registry.registries import DATASETS

CPU = torch.device("cpu")
NOWHERE = Path("no-such-folder")


def numbered(count: int, augment: bool = False) -> ResidentSplit:
    """A split of `count` random RGB images of 6x5 pixels, labelled with their positions."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, 6, 5), dtype=np.uint8))
    return ResidentSplit(images, torch.arange(count), [0.1, 0.5, 0.9], [0.2, 0.5, 1.0], augment, CPU)


def order(split: ResidentSplit, **how: object) -> list[int]:
    return torch.cat([y for _, y in split.batches(4, **how)]).tolist()


def synthetic(**options: object) -> Splits:
    return DATASETS["synthetic"].from_mapping({"samples": 50, "test_samples": 20, **options}).load(NOWHERE, CPU)


def same_images(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A boolean tensor (N, M) that says whether image n of `x` equals image m of `y`."""
    return (x[:, None] == y[None]).flatten(2).all(2)


def test_unseeded_batches_are_ordered_and_not_augmented() -> None:
    split = numbered(10, augment=True)
    batches = list(split.batches(4))
    assert [len(y) for _, y in batches] == [4, 4, 2]
    assert order(split) == list(range(10))
    mean, std = np.array([0.1, 0.5, 0.9])[:, None, None], np.array([0.2, 0.5, 1.0])[:, None, None]
    expected = (split.images.numpy() / 255 - mean) / std
    x = torch.cat([x for x, _ in batches])
    assert x.dtype == torch.float32 and batches[0][1].dtype == torch.int64
    np.testing.assert_allclose(x.numpy(), expected, atol=1e-5)


def test_iterating_does_not_modify_images() -> None:
    split = numbered(10, augment=True)
    before = split.images.clone()
    for x, _ in split.batches(4, seed=0):
        x.zero_()
    for x, _ in split.batches(4):
        x.zero_()
    assert torch.equal(split.images, before)


def test_order_and_augmentation_depend_on_seed_and_epoch() -> None:
    split = numbered(40, augment=True)
    first, again = (list(split.batches(8, seed=3, epoch=2)) for _ in range(2))
    assert all(torch.equal(a, b) for one, other in zip(first, again, strict=True) for a, b in zip(one, other, strict=True))
    orders = {tuple(order(split, seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert all(sorted(found) == list(range(40)) for found in orders)


def test_augmentation_differs_between_epochs_for_the_same_image() -> None:
    split = ResidentSplit(numbered(1).images, torch.zeros(1, dtype=torch.int64), [0.5] * 3, [0.5] * 3, True, CPU)
    seen = {next(split.batches(1, seed=0, epoch=epoch))[0].numpy().tobytes() for epoch in range(20)}
    assert len(seen) > 10


@pytest.mark.parametrize("start", [1, 3, 5])
def test_batches_from_start_match_full_pass(start: int) -> None:
    """A run that is resumed within an epoch gets the remaining batches in the same order and with the same augmentation."""
    split = numbered(18, augment=True)
    whole, rest = (list(split.batches(4, seed=3, epoch=2, start=first)) for first in (0, start))
    assert len(whole) == 5 and len(rest) == 5 - start
    assert all(torch.equal(a, b) for one, other in zip(whole[start:], rest, strict=True) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("crop", [PaddedCrop(), ResizedCrop(4)], ids=["padded", "resized"])
def test_shared_batches_match_whole_batch_with_augmentation(crop: Any) -> None:
    split = numbered(9, augment=True)
    split.crop = crop
    whole = list(split.batches(4, seed=1, epoch=2))
    for rank in (0, 1):
        parts = split.batches(4, seed=1, epoch=2, share=lambda size, rank=rank: torch.arange(size)[rank::2])
        for (x, y), (all_x, all_y) in zip(parts, whole, strict=False):
            assert torch.equal(x, all_x[rank::2]) and torch.equal(y, all_y[rank::2])


@pytest.mark.parametrize("share", [None, lambda size: torch.arange(size)[1::3]], ids=["all", "a part"])
@pytest.mark.parametrize("how", [{}, {"seed": 1, "epoch": 2}, {"seed": 1, "epoch": 3, "start": 1}, {"seed": 1, "shuffle": False}])
@pytest.mark.parametrize("drop_last", [False, True])
def test_batch_indices_match_batches(drop_last: bool, how: dict, share: Any) -> None:
    """The labels are the positions of the images. If the last batch has only one sample, a share of it may be empty."""
    split = numbered(13, augment=True)
    got = list(split.batch_indices(4, drop_last=drop_last, share=share, **how))
    want = [y for _, y in split.batches(4, drop_last=drop_last, share=share, **how)]
    assert len(got) == len(want) == 4 - how.get("start", 0) - (drop_last or share is not None)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    assert split.is_indexed


def test_split_with_overridden_batches_is_not_indexed() -> None:
    class Stream(ResidentSplit):
        def batches(self, batch_size: int, **how: Any) -> Any:
            return super().batches(batch_size, **how)

    split = numbered(4)
    assert not Stream(split.images, split.labels, split.mean, split.std, False, CPU).is_indexed


def test_augmentation_does_not_change_the_order() -> None:
    assert order(numbered(40, augment=True), seed=1) == order(numbered(40, augment=False), seed=1)


def test_global_random_state_is_neither_used_nor_changed() -> None:
    split = numbered(20, augment=True)
    torch.manual_seed(0)
    np.random.seed(0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    one = order(split, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()
    torch.manual_seed(99)
    assert order(split, seed=1) == one


@pytest.mark.parametrize(
    ("count", "drop_last", "sizes"),
    [
        (10, False, [4, 4, 2]),
        (10, True, [4, 4]),
        (8, True, [4, 4]),
        (8, False, [4, 4]),
        (3, True, [3]),
        (3, False, [3]),
    ],
)
@pytest.mark.parametrize("seed", [None, 0])
def test_ragged_last_batch(count: int, drop_last: bool, sizes: list[int], seed: int | None) -> None:
    split = numbered(count)
    assert [len(y) for _, y in split.batches(4, seed=seed, drop_last=drop_last)] == sizes
    assert split.steps(4, drop_last) == len(sizes)


def test_drop_last_drops_different_samples_each_epoch() -> None:
    split = numbered(10)
    assert len({frozenset(range(10)) - frozenset(order(split, seed=0, epoch=epoch, drop_last=True)) for epoch in range(5)}) > 1


@pytest.mark.parametrize("shape", [(5, 3, 6, 4), (2, 1, 3, 7), (1, 3, 8, 8)])
@pytest.mark.parametrize("padding", [1, 4])
def test_crop_and_flip_matches_loop_reference(shape: tuple[int, ...], padding: int) -> None:
    images = torch.from_numpy(np.random.default_rng(1).integers(1, 256, shape, dtype=np.uint8))
    n, channels, height, width = shape
    result = crop_and_flip(images, torch.Generator().manual_seed(5), padding)
    draws = torch.Generator().manual_seed(5)
    tops = torch.randint(2 * padding + 1, (n, 1), generator=draws).flatten().tolist()
    lefts = torch.randint(2 * padding + 1, (n, 1), generator=draws).flatten().tolist()
    flips = torch.randint(2, (n, 1), generator=draws, dtype=torch.bool).flatten().tolist()
    for i in range(n):
        canvas = np.zeros((channels, height + 2 * padding, width + 2 * padding), np.uint8)
        canvas[:, padding : padding + height, padding : padding + width] = images[i].numpy()
        crop = canvas[:, tops[i] : tops[i] + height, lefts[i] : lefts[i] + width]
        np.testing.assert_array_equal(result[i].numpy(), crop[:, :, ::-1] if flips[i] else crop)


def test_every_shift_and_both_directions_occur() -> None:
    """A bright pixel in the middle shows the position of each crop, and a dimmer pixel beside it shows whether the crop is
    flipped."""
    images = torch.zeros(2000, 1, 9, 9, dtype=torch.uint8)
    images[:, 0, 4, 4], images[:, 0, 4, 5] = 200, 100
    cropped = crop_and_flip(images, torch.Generator().manual_seed(0))
    places = (cropped[:, 0] == 200).nonzero()[:, 1:]
    assert {tuple(place) for place in places.tolist()} == {(row, column) for row in range(9) for column in range(9)}
    inner = places[:, 1] < 8
    right_of = cropped[torch.arange(2000), 0, places[:, 0], (places[:, 1] + 1).clamp(max=8)] == 100
    assert 0.4 < right_of[inner].float().mean() < 0.6


def test_augment_false_leaves_images_unchanged() -> None:
    split = numbered(12, augment=False)
    for x, y in split.batches(4, seed=0):
        assert same_images(x, torch.cat([x for x, _ in split.batches(12)])).int().argmax(1).tolist() == y.tolist()


@pytest.mark.parametrize(("validation", "held"), [(0, 0), (0.2, 10), (7, 7), (1, 1), (49, 49)])
def test_validation_and_train_are_complements(validation: float, held: int) -> None:
    everything = synthetic(validation=0).train.images
    splits = synthetic(validation=validation)
    if held == 0:
        assert splits.validation is None and len(splits.train) == 50
        return
    assert (len(splits.train), len(splits.validation)) == (50 - held, held)
    assert not same_images(splits.train.images, splits.validation.images).any()
    assert same_images(torch.cat([splits.train.images, splits.validation.images]), everything).any(0).all()


@pytest.mark.parametrize(("validation", "held"), [(0, 0), (0.2, 4), (25, 10), (1, 1)])
def test_validation_of_trial_shrinks_with_training_set(validation: float, held: int) -> None:
    """The trial uses 20 of 50 images. If `validation` is a number of images, it shrinks in the same proportion."""
    splits = DATASETS["synthetic"].from_mapping({"samples": 50, "validation": validation}).load(NOWHERE, CPU, (20, 8))
    assert (len(splits.train), len(splits.validation or ())) == (20 - held, held)


def test_trial_uses_part_of_dataset_validation_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial uses at most as many validation images as test images, because both splits are evaluated after every epoch."""
    dataset, whole = DATASETS["synthetic"].from_mapping({"samples": 50}), synthetic(validation=0)
    own = dataclasses.replace(whole, validation=whole.train)
    monkeypatch.setattr(dataset, "read", lambda *_: own)
    splits = dataset.load(NOWHERE, CPU, (20, 8))
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [20, 8, 8]
    assert len(dataset.load(NOWHERE, CPU).validation) == 50


def test_validation_and_test_are_disjoint() -> None:
    splits = synthetic(validation=0.5)
    assert not same_images(splits.validation.images, splits.test.images).any()


def test_labels_stay_with_their_images() -> None:
    whole, splits = synthetic(validation=0), synthetic(validation=0.3)
    for part in (splits.train, splits.validation):
        source = same_images(part.images, whole.train.images).int().argmax(1)
        assert torch.equal(part.labels, whole.train.labels[source])
        assert source.tolist() == sorted(source.tolist())  # they remain in the stored order


def test_validation_split_depends_on_validation_seed() -> None:
    held = {seed: synthetic(validation=0.3, validation_seed=seed).validation.images for seed in (0, 1)}
    assert torch.equal(held[0], synthetic(validation=0.3, validation_seed=0).validation.images)
    assert not torch.equal(held[0], held[1])


@pytest.mark.parametrize("validation", [50, 51, 0.999])
def test_validation_of_all_training_images_is_rejected(validation: float) -> None:
    with pytest.raises(OptionError, match=r"validation=.* leaves none of 50 training images"):
        synthetic(validation=validation)


@pytest.mark.parametrize("validation", [1.5, float("inf")])
def test_validation_must_be_fraction_or_integer(validation: float) -> None:
    with pytest.raises(OptionError, match=r"neither a fraction below 1 nor a whole number|not a finite number"):
        DATASETS["synthetic"].from_mapping({"validation": validation})


def test_a_small_fraction_holds_out_one_image() -> None:
    assert len(synthetic(validation=0.0001).validation) == 1


def test_negative_validation_is_refused() -> None:
    with pytest.raises(OptionError, match=r"validation=-0\.1 is out of range"):
        DATASETS["synthetic"].from_mapping({"validation": -0.1})


def test_hash_does_not_depend_on_split() -> None:
    base = synthetic().data_hash
    assert len(base) == 64 and base == synthetic(validation=0.3, validation_seed=4).data_hash
    assert base != synthetic(data_seed=1).data_hash


@pytest.mark.parametrize("part", range(4))
def test_hash_detects_changed_pixel_or_label(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = DATASETS["synthetic"]
    base, original = synthetic().data_hash, cls.arrays

    def changed(self: object, data_dir: Path) -> tuple[object, ...]:
        arrays = original(self, data_dir)
        arrays[part].reshape(-1)[-1] ^= 1
        return arrays

    monkeypatch.setattr(cls, "arrays", changed)
    assert synthetic().data_hash != base


def test_synthetic_images_are_learnable_by_a_linear_model() -> None:
    from sklearn.linear_model import LogisticRegression

    splits = DATASETS["synthetic"]().load(NOWHERE, CPU)
    (x, y), (test_x, test_y) = (next(split.batches(len(split))) for split in (splits.train, splits.test))
    model = LogisticRegression(max_iter=200).fit(x.flatten(1).numpy(), y.numpy())
    assert model.score(test_x.flatten(1).numpy(), test_y.numpy()) > 0.9


def test_synthetic_shape_and_classes() -> None:
    splits = synthetic(classes=3, channels=2, size=5)
    assert splits.input_shape == (2, 5, 5) and splits.classes == ["0", "1", "2"]
    assert set(splits.train.labels.tolist()) == {0, 1, 2} and len(splits.test) == 20


def test_digits_split_is_stratified_and_reproducible() -> None:
    splits = DATASETS["digits"].from_mapping({"validation": 0}).load(NOWHERE, CPU)
    assert (len(splits.train), len(splits.test)) == (1437, 360)
    assert splits.input_shape == (1, 8, 8) and splits.classes == [str(i) for i in range(10)]
    counts = torch.bincount(splits.test.labels, minlength=10)
    shares = counts / (counts + torch.bincount(splits.train.labels, minlength=10))
    assert (shares - 0.2).abs().max() < 0.01
    assert splits.train.images.dtype == torch.uint8 and splits.train.images.max() == 255
    again = DATASETS["digits"].from_mapping({"validation": 0}).load(NOWHERE, CPU)
    assert again.data_hash == splits.data_hash and torch.equal(again.test.images, splits.test.images)


def test_digits_match_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch, dataset = load_digits(), DATASETS["digits"]()
    train, test = train_test_split(np.arange(len(bunch.target)), test_size=0.2, stratify=bunch.target, random_state=0)
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    expected = images[train], bunch.target[train], images[test], bunch.target[test]
    read = dataset.arrays(NOWHERE)
    assert all(np.array_equal(mine, theirs) and mine.dtype == theirs.dtype for mine, theirs in zip(read, expected, strict=False))
    assert read[4] == list(map(str, bunch.target_names))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # other scikit-learn versions may store it elsewhere
    assert all(map(np.array_equal, dataset.arrays(NOWHERE), read))


def test_digits_hold_out_ten_percent_by_default() -> None:
    splits = DATASETS["digits"]().load(NOWHERE, CPU)
    assert (len(splits.train), len(splits.validation)) == (1293, 144)


def test_listing_datasets_does_not_import_torch() -> None:
    code = (
        "import sys; from fa_bench.registry.registries import DATASETS; from fa_bench.registry.options import defaults; "
        "[defaults(cls) for cls in DATASETS.values()]; "
        "assert {'cifar100', 'digits', 'imagenet', 'mnist', 'svhn', 'tiny_imagenet'} <= set(DATASETS); "
        "slow = {'torch', 'torchvision', 'sklearn', 'PIL', 'scipy'} & set(sys.modules); assert not slow, slow"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr


def test_synthetic_images_are_prototypes_with_gaussian_noise() -> None:
    """The pixels of the prototypes are uniformly distributed from 0.2 to 0.8 of the full range, and consecutive samples cycle
    through the classes."""
    plain, noisy = (
        DATASETS["synthetic"](samples=60, test_samples=60, classes=4, size=20, noise=noise, validation=0).load(NOWHERE, CPU)
        for noise in (0.0, 0.02)
    )
    for part, other in ((plain.train, noisy.train), (plain.test, noisy.test)):
        assert part.labels.tolist() == other.labels.tolist() == [number % 4 for number in range(60)]
        assert torch.equal(part.images, part.images[:4].repeat(15, 1, 1, 1))
        difference = (other.images.double() - part.images) / 255
        # With 24,000 numbers, two standard errors of the standard deviation are 1 %. Rounding twice to 8 bits adds a variance of
        # 2 / (12 * 255^2).
        assert difference.std().item() == pytest.approx(math.sqrt(0.02**2 + 2 / 12 / 255**2), rel=0.03)
        assert abs(difference.mean().item()) < 5e-4
    assert torch.equal(plain.train.images[:4], plain.test.images[:4]) and not torch.equal(noisy.train.images, noisy.test.images)
    assert 51 <= plain.train.images.min() < 60 and 195 < plain.train.images.max() <= 204
    large = DATASETS["synthetic"](samples=10, size=200, noise=0.0, validation=0).load(NOWHERE, CPU).train.images
    # The mean of 400,000 pixels with a standard deviation of 44 should be the middle of the range; rounding down would lower it
    # by 0.5.
    assert large.double().mean().item() == pytest.approx(127.5, abs=0.25)
    strong = DATASETS["synthetic"](samples=60, noise=2.0).load(NOWHERE, CPU).train.images
    assert ((strong == 0) | (strong == 255)).double().mean() > 0.5, "values beyond black and white are not clipped"


def test_digits_grey_levels_are_rounded_sixteenths() -> None:
    splits = DATASETS["digits"].from_mapping({"validation": 0}).load(NOWHERE, CPU)
    assert splits.train.images.unique().tolist() == [int(np.round(level * 255 / 16)) for level in range(17)]


def test_some_returns_fixed_ordered_subset() -> None:
    split = numbered(40)
    chosen = some(split, 10).labels.tolist()
    assert len(chosen) == 10 and chosen == sorted(chosen) == some(numbered(40), 10).labels.tolist()
    assert chosen not in (list(range(10)), list(range(30, 40))), "the first or the last samples were chosen"
    assert some(split, 40) is split and some(split, 41) is split and len(some(split, 39)) == 39


@pytest.mark.parametrize("values", [[0.25], [0.1, 0.2, 0.3]])
def test_scalar_mean_and_std_apply_to_all_channels(values: list[float]) -> None:
    dataset = DATASETS["synthetic"].from_mapping({"channels": 3, "mean": values, "std": values, "validation": 0})
    x, _ = next(dataset.load(NOWHERE, CPU).test.batches(8))
    plain, _ = next(dataclasses.replace(dataset, mean=[0.0], std=[1.0]).load(NOWHERE, CPU).test.batches(8))
    one = torch.tensor(values * (3 // len(values))).view(3, 1, 1)
    torch.testing.assert_close(x, (plain - one) / one, rtol=1e-5, atol=1e-5)


def test_remaining_training_images_are_augmented(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training images are augmented even if other images are held out for validation, or left out of a trial run."""
    dataset = DATASETS["synthetic"].from_mapping({"samples": 40, "test_samples": 20, "validation": 10, "size": 6})
    monkeypatch.setattr(type(dataset), "augments", property(lambda self: True))
    monkeypatch.setattr(dataset, "cropping", PaddedCrop)
    for splits in (dataset.load(NOWHERE, CPU), dataset.load(NOWHERE, CPU, (20, 10))):
        plain = next(splits.train.batches(len(splits.train)))[0]
        for seed in (0, 1):
            x, _ = next(splits.train.batches(len(splits.train), seed=seed))
            # Each image gets one of 81 positions and possibly a flip, so a few images may remain unchanged.
            assert same_images(x, plain).any(1).sum() < 4


def test_empty_dataset_validation_split_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    """No training images are held out if the dataset has a validation split of its own, even an empty one."""
    dataset, whole = DATASETS["synthetic"].from_mapping({"samples": 50, "validation": 5}), synthetic(validation=0)
    own = dataclasses.replace(whole, validation=whole.test.subset(torch.arange(0)))
    monkeypatch.setattr(dataset, "read", lambda *_: own)
    splits = dataset.load(NOWHERE, CPU)
    assert (len(splits.train), len(splits.validation)) == (50, 0)
