"""MNIST, Fashion-MNIST and CIFAR-10 from small files in their own formats, and what is said when they are missing."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import shutil
import struct
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision.datasets import cifar, mnist

from fa_bench.errors import DataError
from fa_bench.registries import DATASETS

CPU = torch.device("cpu")
IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def write_idx(path: Path, array: np.ndarray) -> None:
    """The format of MNIST: 0, 0, type, number of axes, each axis' length, the bytes."""
    path.write_bytes(struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes())


def write_mnist(root: Path, folder: str = "MNIST", seed: int = 0) -> dict[str, np.ndarray]:
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    arrays = {
        IDX_FILES[0]: rng.integers(0, 256, (30, 28, 28)), IDX_FILES[1]: np.arange(30) % 10,
        IDX_FILES[2]: rng.integers(0, 256, (10, 28, 28)), IDX_FILES[3]: np.arange(10)[::-1],
    }
    for name, array in arrays.items():
        write_idx(raw / name, array)
    return arrays


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Five training batches of 4 images and one test batch of 6; torchvision's checksums are made to match."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name: str, content: dict[str, object]) -> str:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data, usedforsecurity=False).hexdigest()

    def batch(count: int) -> dict[str, object]:
        return {"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8), "labels": rng.integers(0, 10, count).tolist()}

    contents = [*(batch(4) for _ in range(5)), batch(6)]
    listed = [[name, write(name, content)] for name, content in zip(
        [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], contents, strict=True)]
    names = [f"thing {i}" for i in range(10)]
    meta = {"filename": "batches.meta", "key": "label_names", "md5": write("batches.meta", {"label_names": names})}
    monkeypatch.setattr(cifar.CIFAR10, "train_list", listed[:5])
    monkeypatch.setattr(cifar.CIFAR10, "test_list", listed[5:])
    monkeypatch.setattr(cifar.CIFAR10, "meta", meta)
    return contents


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise URLError("no network in this test")

    for module in (mnist, cifar):
        monkeypatch.setattr(module, "download_and_extract_archive", refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(("name", "folder", "mean", "std"), [
    ("mnist", "MNIST", 0.1307, 0.3081), ("fashion_mnist", "FashionMNIST", 0.5, 0.5),
])
def test_idx_files_arrive_as_written(
    tmp_path: Path, name: str, folder: str, mean: float, std: float, capfd: pytest.CaptureFixture[str]
) -> None:
    arrays = write_mnist(tmp_path, folder)
    splits = DATASETS[name].from_mapping({"validation": 0}).load(tmp_path, CPU)
    assert splits.input_shape == (1, 28, 28) and len(splits.classes) == 10 and splits.validation is None
    for split, images, labels in ((splits.train, *IDX_FILES[:2]), (splits.test, *IDX_FILES[2:])):
        x, y = next(split.batches(100))
        np.testing.assert_allclose(x[:, 0].numpy(), (arrays[images] / 255 - mean) / std, atol=1e-5)
        assert y.tolist() == arrays[labels].tolist()
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("no_network")
def test_mnist_hash_changes_with_a_pixel(tmp_path: Path) -> None:
    arrays = write_mnist(tmp_path)
    before = DATASETS["mnist"]().load(tmp_path, CPU).data_hash
    arrays[IDX_FILES[2]][9, 27, 27] ^= 1
    write_idx(tmp_path / "MNIST" / "raw" / IDX_FILES[2], arrays[IDX_FILES[2]])
    assert DATASETS["mnist"]().load(tmp_path, CPU).data_hash != before


@pytest.mark.usefixtures("no_network")
def test_missing_mnist_names_the_missing_files_and_their_folder(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    for name in IDX_FILES[1:3]:
        (tmp_path / "MNIST" / "raw" / name).unlink()
    with pytest.raises(DataError) as caught:
        DATASETS["mnist"]().load(tmp_path, CPU)
    text = str(caught.value)
    assert IDX_FILES[1] in text and IDX_FILES[2] in text and str(tmp_path / "MNIST" / "raw") in text
    assert IDX_FILES[0] not in text and IDX_FILES[3] not in text
    assert text.count("\n") <= 1


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(("name", "folder"), [
    ("mnist", "MNIST/raw"), ("fashion_mnist", "FashionMNIST/raw"), ("cifar10", "cifar-10-batches-py"),
])
def test_nothing_there_and_no_network(tmp_path: Path, name: str, folder: str) -> None:
    with pytest.raises(DataError) as caught:
        DATASETS[name]().load(tmp_path / "new", CPU)
    assert str(tmp_path / "new" / folder) in str(caught.value) and str(caught.value).count("\n") <= 1


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", [IDX_FILES[0], IDX_FILES[3]])
def test_a_cut_off_idx_file_is_a_data_error(tmp_path: Path, name: str) -> None:
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / name
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=name):
        DATASETS["mnist"]().load(tmp_path, CPU)


@pytest.mark.usefixtures("no_network")
def test_cifar_arrives_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = write_cifar(tmp_path, monkeypatch)
    splits = DATASETS["cifar10"].from_mapping({"validation": 0}).load(tmp_path, CPU)
    assert splits.input_shape == (3, 32, 32) and splits.classes[3] == "thing 3"
    mean = np.array([0.4914, 0.4822, 0.4465])[:, None, None]
    std = np.array([0.2470, 0.2435, 0.2616])[:, None, None]
    for split, batches in ((splits.train, contents[:5]), (splits.test, contents[5:])):
        x, y = next(split.batches(100))
        stored = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
        np.testing.assert_allclose(x.numpy(), (stored / 255 - mean) / std, atol=1e-5)
        assert y.tolist() == [label for batch in batches for label in batch["labels"]]


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("augment", [True, False])
def test_cifar_augments_training_batches_where_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, augment: bool
) -> None:
    write_cifar(tmp_path, monkeypatch)
    splits = DATASETS["cifar10"].from_mapping({"validation": 0, "augment": augment}).load(tmp_path, CPU)
    plain = next(splits.train.batches(20))[0].flatten(1)
    drawn = next(splits.train.batches(20, seed=0))[0].flatten(1)
    unchanged = (drawn[:, None] == plain[None]).all(2).any(1).float().mean()
    assert (unchanged < 0.5) if augment else (unchanged == 1)


@pytest.mark.usefixtures("no_network")
def test_a_cifar_batch_with_another_checksum_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, monkeypatch)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(DataError, match="cifar-10-batches-py"):
        DATASETS["cifar10"]().load(tmp_path, CPU)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("damage", [b"", bytes(range(200, 256)) * 4, b"\0\0\x07\x03" + bytes(40), b"\0\0\x08\x09" + bytes(60)])
def test_a_damaged_idx_file_is_a_data_error(tmp_path: Path, damage: bytes) -> None:
    write_mnist(tmp_path)
    (tmp_path / "MNIST" / "raw" / IDX_FILES[0]).write_bytes(damage)
    with pytest.raises(DataError, match="damaged"):
        DATASETS["mnist"]().load(tmp_path, CPU)


@pytest.mark.usefixtures("no_network")
def test_fewer_labels_than_images_is_a_data_error(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    write_idx(tmp_path / "MNIST" / "raw" / IDX_FILES[1], np.arange(20))
    with pytest.raises(DataError, match="not one label for each image"):
        DATASETS["mnist"]().load(tmp_path, CPU)


def test_an_interrupted_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(_url: str, download_root: str, filename: str, md5: str) -> None:
        (Path(download_root) / filename[:-3]).write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(mnist, "download_and_extract_archive", half)
    with pytest.raises(KeyboardInterrupt):
        DATASETS["mnist"]().load(tmp_path, CPU)
    assert list(tmp_path.iterdir()) == []


def test_a_download_is_quiet_and_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_mnist(tmp_path / "server", seed=1)
    write_mnist(tmp_path / "data", seed=0)
    (tmp_path / "data" / "MNIST" / "raw" / IDX_FILES[2]).unlink()

    def fetch(_url: str, download_root: str, filename: str, md5: str) -> None:
        print("downloading", file=sys.stderr)
        shutil.copy(tmp_path / "server" / "MNIST" / "raw" / filename[:-3], download_root)

    monkeypatch.setattr(mnist, "download_and_extract_archive", fetch)
    DATASETS["mnist"]().load(tmp_path / "data", CPU)
    assert capfd.readouterr() == ("", "")
    here, there = (tmp_path / part / "MNIST" / "raw" for part in ("data", "server"))
    same = [(here / name).read_bytes() == (there / name).read_bytes() for name in (IDX_FILES[0], IDX_FILES[2])]
    assert same == [False, True]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["MNIST"]


def test_archives_put_into_the_folder_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path)
    raw, resources = tmp_path / "MNIST" / "raw", []
    for name in IDX_FILES:
        data = gzip.compress((raw / name).read_bytes())
        (raw / name).unlink()
        (raw / f"{name}.gz").write_bytes(data)
        resources.append((f"{name}.gz", hashlib.md5(data, usedforsecurity=False).hexdigest()))
    monkeypatch.setattr(mnist.MNIST, "resources", resources)
    monkeypatch.setattr(mnist.MNIST, "mirrors", ["no-such-scheme://"])
    assert len(DATASETS["mnist"].from_mapping({"validation": 0}).load(tmp_path, CPU).train) == 30
