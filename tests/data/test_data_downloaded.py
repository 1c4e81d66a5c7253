"""Datasets that torchvision reads are loaded from small files in their original formats; missing or damaged files give clear
errors."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision.datasets import cifar, mnist, svhn

from fa_bench.errors import DataError
from fa_bench.registry.registries import DATASETS

from .files import CIFAR_FILES, IDX_FILES, write_cifar, write_idx, write_mnist, write_svhn

CPU = torch.device("cpu")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise URLError("no network in this test")

    for module in (mnist, cifar):
        monkeypatch.setattr(module, "download_and_extract_archive", refuse)
    monkeypatch.setattr(svhn, "download_url", refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("name", "folder", "mean", "std"),
    [
        ("mnist", "MNIST", 0.1307, 0.3081),
        ("fashion_mnist", "FashionMNIST", 0.5, 0.5),
    ],
)
def test_idx_files_are_read_unchanged(
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
def test_mnist_hash_detects_changed_pixel(tmp_path: Path) -> None:
    arrays = write_mnist(tmp_path)
    before = DATASETS["mnist"]().load(tmp_path, CPU).data_hash
    arrays[IDX_FILES[2]][9, 27, 27] ^= 1
    write_idx(tmp_path / "MNIST" / "raw" / IDX_FILES[2], arrays[IDX_FILES[2]])
    assert DATASETS["mnist"]().load(tmp_path, CPU).data_hash != before


@pytest.mark.usefixtures("no_network")
def test_missing_mnist_error_names_files_and_directory(tmp_path: Path) -> None:
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
@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mnist", "MNIST/raw"),
        ("fashion_mnist", "FashionMNIST/raw"),
        ("cifar10", "cifar-10-batches-py"),
        ("cifar100", "cifar-100-python"),
        ("svhn", "SVHN"),
    ],
)
def test_missing_files_without_network_give_error(tmp_path: Path, name: str, folder: str) -> None:
    with pytest.raises(DataError) as caught:
        DATASETS[name]().load(tmp_path / "new", CPU)
    assert str(tmp_path / "new" / folder) in str(caught.value) and str(caught.value).count("\n") <= 1


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", [IDX_FILES[0], IDX_FILES[3]])
def test_truncated_idx_file_raises_data_error(tmp_path: Path, name: str) -> None:
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / name
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=name):
        DATASETS["mnist"]().load(tmp_path, CPU)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("name", "key", "deviation"),
    [
        ("cifar10", "labels", [0.2470, 0.2435, 0.2616]),
        ("cifar100", "fine_labels", [0.2023, 0.1994, 0.2010]),
    ],
)
def test_cifar_is_read_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, key: str, deviation: list[float]
) -> None:
    contents = write_cifar(tmp_path, monkeypatch, name)
    splits = DATASETS[name].from_mapping({"validation": 0}).load(tmp_path, CPU)
    assert splits.input_shape == (3, 32, 32) and splits.classes[3] == "thing 3"
    assert len(splits.classes) == (10 if name == "cifar10" else 100)
    mean = np.array([0.4914, 0.4822, 0.4465])[:, None, None]
    std = np.array(deviation)[:, None, None]
    for split, batches in ((splits.train, contents[:-1]), (splits.test, contents[-1:])):
        x, y = next(split.batches(100))
        stored = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
        np.testing.assert_allclose(x.numpy(), (stored / 255 - mean) / std, atol=1e-5)
        assert y.tolist() == [label for batch in batches for label in batch[key]]


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("augment", [True, False])
def test_cifar_augment_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, augment: bool) -> None:
    write_cifar(tmp_path, monkeypatch)
    splits = DATASETS["cifar10"].from_mapping({"validation": 0, "augment": augment}).load(tmp_path, CPU)
    plain = next(splits.train.batches(20))[0].flatten(1)
    drawn = next(splits.train.batches(20, seed=0))[0].flatten(1)
    unchanged = (drawn[:, None] == plain[None]).all(2).any(1).float().mean()
    assert (unchanged < 0.5) if augment else (unchanged == 1)


@pytest.mark.usefixtures("no_network")
def test_cifar_batch_with_wrong_checksum_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, monkeypatch)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(DataError, match="damaged or incomplete; delete data_batch_2 there") as caught:
        DATASETS["cifar10"]().load(tmp_path, CPU)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("damage", [b"", bytes(range(200, 256)) * 4, b"\0\0\x07\x03" + bytes(40), b"\0\0\x08\x09" + bytes(60)])
def test_damaged_idx_file_raises_data_error(tmp_path: Path, damage: bytes) -> None:
    write_mnist(tmp_path)
    (tmp_path / "MNIST" / "raw" / IDX_FILES[0]).write_bytes(damage)
    with pytest.raises(DataError, match="damaged"):
        DATASETS["mnist"]().load(tmp_path, CPU)


@pytest.mark.usefixtures("no_network")
def test_fewer_labels_than_images_raises_data_error(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    write_idx(tmp_path / "MNIST" / "raw" / IDX_FILES[1], np.arange(20))
    with pytest.raises(DataError, match="not one label for each image"):
        DATASETS["mnist"]().load(tmp_path, CPU)


def test_interrupted_download_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(_url: str, download_root: str, filename: str, md5: str) -> None:
        (Path(download_root) / filename[:-3]).write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(mnist, "download_and_extract_archive", half)
    with pytest.raises(KeyboardInterrupt):
        DATASETS["mnist"]().load(tmp_path, CPU)
    assert list(tmp_path.iterdir()) == []


def test_download_is_silent_and_keeps_existing_files(
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


def test_local_archives_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.usefixtures("no_network")
def test_svhn_is_read_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = write_svhn(tmp_path, monkeypatch)
    splits = DATASETS["svhn"].from_mapping({"validation": 0}).load(tmp_path, CPU)
    assert splits.input_shape == (3, 32, 32) and splits.classes == list("0123456789")
    assert (len(splits.train), len(splits.test)) == (9, 5) and not splits.train.augment
    for split, part in ((splits.train, "train"), (splits.test, "test")):
        x, y = next(split.batches(100))
        np.testing.assert_allclose(x.numpy(), contents[part]["X"].transpose(3, 2, 0, 1) / 127.5 - 1, atol=1e-5)
        assert y.tolist() == [int(label) % 10 for label in contents[part]["y"].ravel()]


@pytest.mark.usefixtures("no_network")
def test_cifar100_at_224_matches_dkp_preprocessing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.transforms import functional

    contents = write_cifar(tmp_path, monkeypatch, "cifar100")
    options = {"mean": [0.5], "std": [0.5], "size": 224, "crop": "resized", "validation": 0}
    splits = DATASETS["cifar100"].from_mapping(options).load(tmp_path, CPU)
    assert splits.input_shape == (3, 224, 224) and next(splits.train.batches(3, seed=0))[0].shape == (3, 3, 224, 224)
    stored = torch.from_numpy(contents[1]["data"].reshape(-1, 3, 32, 32)) / 127.5 - 1
    expected = functional.center_crop(functional.resize(stored, 256, antialias=True), 224)
    torch.testing.assert_close(next(splits.test.batches(6))[0], expected, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(("name", "label"), [("cifar10", 10), ("cifar10", -1), ("cifar100", 100)])
def test_cifar_label_out_of_range_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, label: int) -> None:
    write_cifar(tmp_path, monkeypatch, name, label)
    with pytest.raises(DataError, match=rf"dataset={name}: .*test image 5 has label {label}, out of range") as caught:
        DATASETS[name]().load(tmp_path, CPU)
    assert str(tmp_path / CIFAR_FILES[name][1]) in str(caught.value)


@pytest.mark.usefixtures("no_network")
def test_svhn_and_mnist_labels_out_of_range_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_svhn(tmp_path, monkeypatch, label=11)
    with pytest.raises(DataError, match=r"dataset=svhn: .*training image 1 has label 11, out of range for 10 classes"):
        DATASETS["svhn"]().load(tmp_path, CPU)
    write_mnist(tmp_path)
    write_idx(tmp_path / "MNIST" / "raw" / IDX_FILES[3], np.arange(1, 11))
    with pytest.raises(DataError, match=r"dataset=mnist: .*test image 9 has label 10, out of range for 10 classes"):
        DATASETS["mnist"]().load(tmp_path, CPU)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("part", ["train", "test"])
def test_truncated_svhn_file_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    write_svhn(tmp_path, monkeypatch)
    path = tmp_path / "SVHN" / f"{part}_32x32.mat"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=f"{part}_32x32.mat is damaged or incomplete; delete {part}_32x32.mat there") as caught:
        DATASETS["svhn"]().load(tmp_path, CPU)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_svhn_downloads_only_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_svhn(tmp_path / "server", monkeypatch)
    shutil.copytree(tmp_path / "server" / "SVHN", tmp_path / "data" / "SVHN")
    (tmp_path / "data" / "SVHN" / "test_32x32.mat").unlink()
    asked = []

    def fetch(_url: str, root: str, filename: str, md5: str) -> None:
        asked.append(filename)
        Path(root).mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "server" / "SVHN" / filename, root)

    monkeypatch.setattr(svhn, "download_url", fetch)
    assert len(DATASETS["svhn"]().load(tmp_path / "data", CPU).test) == 5
    assert asked == ["test_32x32.mat"] and [path.name for path in (tmp_path / "data").iterdir()] == ["SVHN"]


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("name", "archive"),
    [
        ("mnist", "MNIST/raw/train-images-idx3-ubyte.gz"),
        ("cifar10", "cifar-10-python.tar.gz"),
        ("cifar100", "cifar-100-python.tar.gz"),
    ],
)
def test_truncated_archive_is_reported(tmp_path: Path, name: str, archive: str) -> None:
    path = tmp_path / archive
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"half of it")
    with pytest.raises(DataError, match=r"is damaged or incomplete, delete it: its MD5 is not [0-9a-f]{32}") as caught:
        DATASETS[name]().load(tmp_path, CPU)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and path.read_bytes() == b"half of it"


@pytest.mark.usefixtures("no_network")
def test_damaged_idx_file_error_names_only_that_file(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / IDX_FILES[2]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"{IDX_FILES[2]} is damaged or incomplete; delete {IDX_FILES[2]} there") as caught:
        DATASETS["mnist"]().load(tmp_path, CPU)
    assert not any(name in str(caught.value) for name in (IDX_FILES[0], IDX_FILES[1], IDX_FILES[3]))
