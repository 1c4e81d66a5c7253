"""Tests of image folders: their layout, the decoding of images, loading into memory and streaming, and errors before training."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from joblib import Parallel, delayed
from PIL import Image
from torchvision.transforms import functional as reference

from fa_bench.data import image_files
from fa_bench.data.base import ResidentSplit
from fa_bench.data.image_files import StreamedSplit
from fa_bench.errors import DataError, OptionError
from fa_bench.registry.registries import DATASETS

CPU = torch.device("cpu")
#: Python 3.12 and later warn whenever a process with threads forks; on Linux, torch's workers are forked up to Python 3.13.
FORK = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two classes of 6 training and 3 test images each, as RGB PNGs of 6x8 pixels (height x width)."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 3)):
        for name in ("cat", "dog"):
            for i in range(count):
                save(tmp_path / part / name / f"{i}.png", rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return tmp_path


def load(folder: Path, **options: object):
    return DATASETS["image_folder"].from_mapping({"validation": 0, "workers": 0, **options}).load(folder, CPU)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)


def both_modes(folder: Path, **options: object):
    resident, streamed = load(folder, **options), load(folder, memory_limit_gb=0, **options)
    assert isinstance(resident.train, ResidentSplit) and isinstance(streamed.train, StreamedSplit)
    return resident, streamed


def test_images_are_sorted_by_name_with_class_labels(folder: Path) -> None:
    splits = load(folder, mean=[0.25], std=[0.5])
    assert splits.classes == ["cat", "dog"] and splits.input_shape == (3, 6, 8)
    x, y = next(splits.train.batches(100))
    files = [folder / "train" / name / f"{i}.png" for name in ("cat", "dog") for i in range(6)]
    np.testing.assert_allclose(x.numpy(), (np.stack([pixels(path) for path in files]) / 255 - 0.25) / 0.5, atol=1e-5)
    assert y.tolist() == [0] * 6 + [1] * 6 and len(splits.test) == 6


@pytest.mark.parametrize("how", [{}, {"seed": 1, "epoch": 2}, {"seed": 1, "drop_last": True}])
@pytest.mark.parametrize("size", [None, 5])
def test_streamed_and_resident_batches_are_identical(folder: Path, how: dict[str, object], size: int | None) -> None:
    resident, streamed = both_modes(folder, size=size, augment=True, validation=3)
    for part in ("train", "validation", "test"):
        one, other = (list(getattr(splits, part).batches(4, **how)) for splits in (resident, streamed))
        assert one and len(one) == len(other)
        for (x, y), (u, v) in zip(one, other, strict=True):
            assert torch.equal(x, u) and torch.equal(y, v) and y.dtype == v.dtype == torch.int64


@FORK
def test_worker_processes_do_not_change_batches(folder: Path) -> None:
    without, with_workers = (load(folder, memory_limit_gb=0, workers=workers).train for workers in (0, 2))
    for (x, y), (u, v) in zip(without.batches(4, seed=0), with_workers.batches(4, seed=0), strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)


@FORK
def test_workers_start_in_joblib_processes(folder: Path) -> None:
    """In a joblib worker, the default start method is joblib's own, which cannot start the workers of a data loader."""
    want = [y.tolist() for _, y in load(folder, memory_limit_gb=0).train.batches(4, seed=0)]
    assert Parallel(n_jobs=2, backend="loky")([delayed(_labels_by_workers)(folder)] * 2) == [want, want]


def _labels_by_workers(folder: Path) -> list[list[int]]:
    return [y.tolist() for _, y in load(folder, memory_limit_gb=0, workers=1).train.batches(4, seed=0)]


@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_does_not_change_global_random_state(folder: Path, workers: int) -> None:
    split = load(folder, memory_limit_gb=0, workers=workers).train
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(split.batches(4, seed=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_streamed_order_depends_on_seed_and_epoch(folder: Path) -> None:
    split = load(folder, memory_limit_gb=0).train
    epochs = [torch.cat([x for x, _ in split.batches(4, seed=0, epoch=epoch)]) for epoch in (0, 0, 1)]
    assert torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[0], epochs[2])


@pytest.mark.parametrize("shape", [(10, 20), (20, 10), (9, 9), (31, 16)])
def test_size_resizes_shorter_side_and_crops_centre(folder: Path, shape: tuple[int, int]) -> None:
    """The image is a smooth ramp, so implementations that treat borders differently still agree, but a wrong crop is detected."""
    ramp = np.add.outer(np.linspace(0, 120, shape[0]), np.linspace(0, 120, shape[1])).astype(np.uint8)
    for path in folder.rglob("*.png"):
        save(path, np.stack([ramp] * 3, 2))
    splits = load(folder, size=8)
    expected = reference.center_crop(reference.resize(Image.fromarray(ramp), 8), 8)
    assert splits.input_shape == (3, 8, 8)
    difference = splits.train.images[0, 0].int().numpy() - np.asarray(expected).astype(int)
    assert np.abs(difference).max() <= 6


def test_unequal_image_size_without_size_option_is_reported(folder: Path) -> None:
    odd = folder / "train" / "dog" / "3.png"
    save(odd, np.zeros((6, 9, 3), np.uint8))
    for limit in (1, 0):
        with pytest.raises(DataError, match=r"dataset\.size") as caught:
            load(folder, memory_limit_gb=limit)
        assert str(odd) in str(caught.value)
    assert load(folder, size=4).input_shape == (3, 4, 4)


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_option_converts_images(folder: Path, channels: int) -> None:
    grey = np.random.default_rng(1).integers(0, 256, (6, 8), dtype=np.uint8)
    save(folder / "train" / "cat" / "0.png", grey)
    splits = load(folder, channels=channels)
    assert splits.input_shape == (channels, 6, 8)
    assert (splits.train.images[0].numpy() == grey).all()


def test_jpeg_is_read(folder: Path) -> None:
    (folder / "train" / "cat" / "0.png").unlink()
    save(folder / "train" / "cat" / "0.JPG", np.full((6, 8, 3), 90, np.uint8))
    assert np.abs(load(folder).train.images[0].int().numpy() - 90).max() <= 2


def test_other_files_and_hidden_folders_are_ignored(folder: Path) -> None:
    (folder / "train" / "cat" / "notes.txt").write_text("not an image")
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    splits = load(folder)
    assert splits.classes == ["cat", "dog"] and len(splits.train) == 12


def test_val_is_used_if_test_is_missing(folder: Path) -> None:
    (folder / "test").rename(folder / "val")
    assert len(load(folder).test) == 6


@pytest.mark.parametrize("limit", [1, 0])
@pytest.mark.parametrize("part", ["train", "test"])
def test_invalid_image_is_reported_before_training(folder: Path, part: str, limit: float) -> None:
    bad = folder / part / "dog" / "1.png"
    bad.write_bytes(b"not an image")
    with pytest.raises(DataError) as caught:
        load(folder, memory_limit_gb=limit)
    assert str(bad) in str(caught.value)


@FORK
def test_more_workers_than_cores_is_supported(folder: Path) -> None:
    split = load(folder, memory_limit_gb=0, workers=1000).train
    assert sum(len(y) for _, y in split.batches(4)) == 12


def test_missing_folders_are_reported(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        load(tmp_path / "nowhere")
    (folder / "test").rename(folder / "elsewhere")
    with pytest.raises(DataError, match=r"test/ or val/"):
        load(folder)
    (folder / "elsewhere").rename(folder / "test")
    (folder / "train").rename(folder / "elsewhere")
    with pytest.raises(DataError, match=r"train/"):
        load(folder)


def test_train_folder_without_classes_is_reported(folder: Path) -> None:
    (folder / "train").rename(folder / "elsewhere")
    (folder / "train").mkdir()
    with pytest.raises(DataError) as caught:
        load(folder)
    assert str(folder / "train") in str(caught.value)


def test_class_without_images_is_reported(folder: Path) -> None:
    (folder / "train" / "bird").mkdir()
    with pytest.raises(DataError) as caught:
        load(folder)
    assert str(folder / "train" / "bird") in str(caught.value)


def test_test_class_missing_from_training_is_reported(folder: Path) -> None:
    save(folder / "test" / "bird" / "0.png", np.zeros((6, 8, 3), np.uint8))
    with pytest.raises(DataError, match="bird") as caught:
        load(folder)
    assert str(folder / "test") in str(caught.value)


@pytest.mark.parametrize("part", ["train", "val", "test"])
@pytest.mark.parametrize("options", [{}, {"memory_limit_gb": 0}, {"crop": "resized", "size": 4}])
def test_hash_detects_image_replaced_in_place(folder: Path, part: str, options: dict[str, object]) -> None:
    """The image is replaced by a file with the same name, size in bytes and modification time."""
    shutil.copytree(folder / "test", folder / "val")
    path = folder / part / "dog" / "2.png"
    Image.new("RGB", (8, 6), (1, 2, 3)).save(path)
    dataset = DATASETS["image_folder"].from_mapping({"workers": 0, **options})
    before, times = dataset.load(folder, CPU).data_hash, path.stat()
    assert dataset.hash_of(folder) == before
    size = path.stat().st_size
    Image.new("RGB", (8, 6), (1, 2, 4)).save(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == size and path.stat().st_mtime_ns == times.st_mtime_ns
    assert dataset.hash_of(folder) == dataset.load(folder, CPU).data_hash != before


def test_hash_detects_renamed_file(folder: Path) -> None:
    before = load(folder).data_hash
    (folder / "train" / "cat" / "5.png").rename(folder / "train" / "cat" / "9.png")
    assert load(folder).data_hash != before


def test_hash_does_not_depend_on_loading_options(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    hashes = {load(folder, **options).data_hash for options in ({}, {"memory_limit_gb": 0}, {"size": 4}, {"channels": 1})}
    copy = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)  # the copies have other modification times
    assert hashes == {load(copy).data_hash}


def test_unchanged_files_are_hashed_once_per_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = DATASETS["image_folder"].from_mapping({})
    before, read = dataset.hash_of(folder), []
    original = image_files._sha256
    monkeypatch.setattr(image_files, "_sha256", lambda path: (read.append(path), original(path))[1])
    assert dataset.hash_of(folder) == before and not read
    (folder / "test" / "cat" / "0.png").touch()
    assert dataset.hash_of(folder) == before and len(read) == 6  # only test/, which contains the touched file, is read again


def test_special_file_in_place_of_image_is_reported(folder: Path) -> None:
    path = folder / "test" / "cat" / "0.png"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="a folder, pipe or device"):
        DATASETS["image_folder"].from_mapping({}).hash_of(folder)


def test_only_image_folder_is_identified_by_data_dir() -> None:
    assert [name for name in DATASETS if DATASETS[name].content_is_data_dir] == ["image_folder"]


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"channels": 2}, "channels"),
        ({"channels": 4}, "channels"),
        ({"mean": [0.5, 0.5]}, "mean"),
        ({"std": [0.0]}, "std"),
        ({"size": 0}, "size"),
        ({"workers": -1}, "workers"),
        ({"memory_limit_gb": -1}, "memory_limit_gb"),
    ],
)
def test_invalid_options_are_reported(options: dict[str, object], path: str) -> None:
    with pytest.raises(OptionError) as caught:
        DATASETS["image_folder"].from_mapping(options)
    assert caught.value.path == path
