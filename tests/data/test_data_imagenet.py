"""Tests of the dataset imagenet on small folders with ImageNet's layout: crops are computed while decoding, and errors name
missing parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as reference

from fa_bench.data.crops import DRAWS, random_boxes
from fa_bench.data.image_files import StreamedSplit
from fa_bench.errors import DataError
from fa_bench.registry.registries import DATASETS
from fa_bench.utils.sampling import seed_for

from .files import IMAGENET_CLASSES, write_imagenet

CPU = torch.device("cpu")
#: Python 3.12 and later warn whenever a process with threads forks; on Linux, torch's workers are forked up to Python 3.13.
FORK = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    write_imagenet(tmp_path)
    return tmp_path


def load(data_dir: Path, name: str = "imagenet", **options: object):
    return DATASETS[name].from_mapping({"validation": 0, "workers": 0, "size": 32, **options}).load(data_dir, CPU)


def opened(data_dir: Path, part: str) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted((data_dir / "imagenet" / part).rglob("*.JPEG"))]


def normalised(image: Image.Image) -> torch.Tensor:
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - MEAN) / STD


def test_default_size_crop_and_augmentation() -> None:
    dataset = DATASETS["imagenet"]()
    assert (dataset.size, dataset.crop, dataset.augment) == (224, "resized", True)
    assert DATASETS["imagenet"].name == "imagenet" and not dataset.content_is_data_dir


def test_evaluation_preprocessing_matches_torchvision(data_dir: Path) -> None:
    splits = load(data_dir)
    assert splits.classes == IMAGENET_CLASSES and splits.input_shape == (3, 32, 32) and isinstance(splits.train, StreamedSplit)
    for part, split in (("train", splits.train), ("val", splits.test)):
        x, y = next(split.batches(100))
        images = [reference.center_crop(reference.resize(image, 37), 32) for image in opened(data_dir, part)]
        torch.testing.assert_close(x, torch.stack([normalised(image) for image in images]), rtol=0, atol=1e-4)
        assert y.tolist() == [0] * (len(split) // 2) + [1] * (len(split) // 2)


def test_training_crops_depend_on_seed_epoch_and_position(data_dir: Path) -> None:
    x, y = next(load(data_dir).train.batches(8, seed=5, epoch=2))
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed_for("order", 5, 2))).tolist()
    images = opened(data_dir, "train")
    for place, got, label in zip(order, x, y.tolist(), strict=True):
        draws = np.random.default_rng([seed_for("read", 5, 2), place]).random((1, DRAWS))
        image = images[place]
        expected = reference.resized_crop(image, *random_boxes(draws, image.height, image.width)[0].tolist(), [32, 32])
        expected = reference.hflip(expected) if draws[0, -1] < 0.5 else expected
        torch.testing.assert_close(got, normalised(expected), rtol=0, atol=1e-4)
        assert label == place // 4


def test_augment_false_disables_crops(data_dir: Path) -> None:
    split = load(data_dir, augment=False).train
    plain, (x, _) = next(split.batches(8))[0], next(split.batches(8, seed=0))
    assert (x[:, None] == plain[None]).flatten(2).all(2).any(1).all()


@FORK
def test_worker_processes_do_not_change_batches(data_dir: Path) -> None:
    without, with_workers = (load(data_dir, workers=workers).train for workers in (0, 2))
    for how in ({}, {"seed": 0}):
        for (x, y), (u, v) in zip(without.batches(3, **how), with_workers.batches(3, **how), strict=True):
            assert torch.equal(x, u) and torch.equal(y, v)


def test_crops_differ_between_epochs(data_dir: Path) -> None:
    split = load(data_dir).train.subset(torch.tensor([3]))
    seen = {next(split.batches(1, seed=0, epoch=epoch))[0].numpy().tobytes() for epoch in range(6)}
    assert len(seen) == 6


def test_validation_is_held_out_of_training(data_dir: Path) -> None:
    splits = load(data_dir, validation=3)
    parts = [{tuple(x.flatten().tolist()[:50]) for x in next(part.batches(9))[0]} for part in (splits.train, splits.validation)]
    assert [len(part) for part in parts] == [5, 3] and not parts[0] & parts[1]


def test_padded_crops_of_equally_sized_images(data_dir: Path) -> None:
    splits = load(data_dir, crop="padded")
    assert next(splits.train.batches(8, seed=0))[0].shape == (8, 3, 32, 32)


def test_image_folder_streams_resized_crops_like_imagenet(data_dir: Path) -> None:
    theirs = load(data_dir)
    ours = load(data_dir / "imagenet", "image_folder", crop="resized", mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    assert isinstance(ours.train, StreamedSplit)
    for how in ({}, {"seed": 1}):
        assert torch.equal(next(theirs.train.batches(8, **how))[0], next(ours.train.batches(8, **how))[0])


@FORK
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("content", [b"not an image", b"", None])
def test_undecodable_image_is_reported(
    data_dir: Path, workers: int, content: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = data_dir / "imagenet" / "train" / IMAGENET_CLASSES[1] / "2.JPEG"
    bad.write_bytes(bad.read_bytes()[:-400] if content is None else content)
    with pytest.raises(DataError, match=r"not a readable image .*; replace or remove it") as caught:
        load(data_dir, workers=workers)
    assert str(bad) in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.setattr(DATASETS["imagenet"], "reads_all", 0)  # small files are now read in the same way as the whole ImageNet
    split = load(data_dir, workers=workers).train
    with pytest.raises(DataError, match=r"not a readable image .*; replace or remove it") as caught:
        list(split.batches(4, seed=0))
    assert str(bad) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", [["train"], ["val"], ["train", "val"]])
def test_missing_folders_error_gives_instructions(data_dir: Path, missing: list[str]) -> None:
    for part in missing:
        (data_dir / "imagenet" / part).rename(data_dir / f"elsewhere-{part}")
    with pytest.raises(DataError, match="cannot be downloaded automatically") as caught:
        load(data_dir)
    text = str(caught.value)
    assert [f"no {part}/" in text for part in ("train", "val")] == [part in missing for part in ("train", "val")]
    assert str(data_dir / "imagenet") in text and "https://image-net.org" in text and "data_dir" in text and "\n" not in text


def test_unsorted_images_are_reported(data_dir: Path) -> None:
    val = data_dir / "imagenet" / "val"
    for number, path in enumerate(sorted(val.rglob("*.JPEG"))):
        path.rename(val / f"ILSVRC2012_val_{number:08}.JPEG")
    for name in IMAGENET_CLASSES:
        (val / name).rmdir()
    with pytest.raises(DataError, match="contains no class folders, but 4 loose images") as caught:
        load(data_dir)
    assert str(val) in str(caught.value)


def test_val_class_missing_from_train_is_reported(data_dir: Path) -> None:
    (data_dir / "imagenet" / "val" / IMAGENET_CLASSES[0]).rename(data_dir / "imagenet" / "val" / "n99999999")
    with pytest.raises(DataError, match=r"contains classes that .* does not: n99999999"):
        load(data_dir)


@pytest.mark.parametrize("limit", [0, 4e9])
def test_hash_detects_changed_name_or_size(data_dir: Path, limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the limit, only names and sizes are hashed, because reading the whole ImageNet takes too long."""
    monkeypatch.setattr(DATASETS["imagenet"], "reads_all", limit)
    path = data_dir / "imagenet" / "val" / IMAGENET_CLASSES[0] / "1.JPEG"
    hashes = [load(data_dir).data_hash, load(data_dir, size=16).data_hash]
    path.write_bytes(path.read_bytes() + b"\0")
    hashes.append(load(data_dir).data_hash)
    path.rename(path.with_name("7.JPEG"))
    hashes.append(load(data_dir).data_hash)
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3
    path = path.with_name("7.JPEG")
    path.write_bytes(path.read_bytes()[:-2] + b"\1\1")
    assert (load(data_dir).data_hash != hashes[-1]) == (limit > 0)


def test_streamed_batches_are_contiguous(data_dir: Path) -> None:
    """Streamed batches are contiguous, because the memory format channels_last would select kernels that round differently."""
    for seed in (None, 0):
        x, _ = next(load(data_dir).train.batches(4, seed=seed))
        assert x.is_contiguous()
