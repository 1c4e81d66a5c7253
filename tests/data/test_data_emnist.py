"""kmnist, emnist and stl10 are read from small files in their original formats; the archives of emnist and stl10 are unpacked."""

from __future__ import annotations

import gzip
import hashlib
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from fa_bench.data.emnist import EMNIST_SPLITS
from fa_bench.errors import DataError
from fa_bench.registry.registries import DATASETS

from .files import IDX_FILES, write_idx, write_mnist

CPU = torch.device("cpu")


def test_kmnist_is_read_unchanged(tmp_path: Path) -> None:
    arrays = write_mnist(tmp_path, "KMNIST")
    splits = DATASETS["kmnist"].from_mapping({"validation": 0}).load(tmp_path, CPU)
    x, y = next(splits.train.batches(100))
    np.testing.assert_allclose(x[:, 0].numpy(), arrays[IDX_FILES[0]] / 127.5 - 1, atol=1e-5)
    assert y.tolist() == arrays[IDX_FILES[1]].tolist() and splits.classes[:3] == ["o", "ki", "su"]


def emnist_arrays(split: str) -> dict[str, np.ndarray]:
    rng, classes = np.random.default_rng(0), EMNIST_SPLITS[split]
    return {
        f"emnist-{split}-{part}-{kind}-ubyte": array
        for part, count in (("train", 2 * classes), ("test", classes))
        for kind, array in (
            ("images-idx3", rng.integers(0, 256, (count, 28, 28))),
            ("labels-idx1", np.arange(count) % classes + (split == "letters")),
        )
    }


@pytest.mark.parametrize("split", ["balanced", "letters", "digits"])
def test_emnist_is_upright_with_zero_based_labels(tmp_path: Path, split: str) -> None:
    arrays = emnist_arrays(split)
    (tmp_path / "EMNIST" / "raw").mkdir(parents=True)
    for name, array in arrays.items():
        write_idx(tmp_path / "EMNIST" / "raw" / name, array)
    dataset = DATASETS["emnist"].from_mapping({"validation": 0, "split": split})
    splits = dataset.load(tmp_path, CPU)
    x, y = next(splits.test.batches(100))
    images = arrays[f"emnist-{split}-test-images-idx3-ubyte"]
    np.testing.assert_allclose(x[:, 0].numpy(), images.transpose(0, 2, 1) / 127.5 - 1, atol=1e-5)
    assert sorted(y.tolist()) == list(range(EMNIST_SPLITS[split])) and len(splits.classes) == EMNIST_SPLITS[split]
    assert dataset.shape() == ((1, 28, 28), EMNIST_SPLITS[split]) and "N/A" not in splits.classes


def test_emnist_class_counts_match_torchvision() -> None:
    names = datasets.EMNIST.classes_split_dict
    assert {split: len(set(names[split]) - {"N/A"}) for split in datasets.EMNIST.splits} == EMNIST_SPLITS


def test_emnist_archive_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tmp_path / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    with zipfile.ZipFile(raw / "gzip.zip", "w") as archive:
        for name, array in emnist_arrays("digits").items():
            write_idx(tmp_path / name, array)
            archive.writestr(f"gzip/{name}.gz", gzip.compress((tmp_path / name).read_bytes()))
    monkeypatch.setattr(datasets.EMNIST, "md5", hashlib.md5((raw / "gzip.zip").read_bytes()).hexdigest())
    splits = DATASETS["emnist"].from_mapping({"split": "digits", "validation": 0}).load(tmp_path, CPU)
    assert (len(splits.train), len(splits.test)) == (20, 10) and not (raw / "gzip").exists()
    with pytest.raises(DataError, match="emnist-letters-train-images-idx3-ubyte"):
        DATASETS["emnist"].from_mapping({"split": "letters"}).load(tmp_path, CPU)


def stl_files(folder: Path) -> np.ndarray:
    """Write the files of STL-10, with pixels in column order and labels from 1, and return the test images."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    test = np.empty(0)
    for part, count in (("train", 20), ("test", 10)):
        test = rng.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8)
        (folder / f"{part}_X.bin").write_bytes(test.transpose(0, 1, 3, 2).tobytes())
        (folder / f"{part}_y.bin").write_bytes((np.arange(count) % 10 + 1).astype(np.uint8).tobytes())
    return test


@pytest.mark.parametrize("packed", [False, True])
def test_stl10_is_read_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    """The data are read from the files or from the archive; the archive's unlabelled images do not remain in the folder."""
    images = stl_files(tmp_path / "stl10_binary")
    if packed:
        (tmp_path / "stl10_binary" / "unlabeled_X.bin").write_bytes(b"\0" * 99)
        with tarfile.open(tmp_path / "stl10_binary.tar.gz", "w:gz") as archive:
            archive.add(tmp_path / "stl10_binary", "stl10_binary")
        for file in (tmp_path / "stl10_binary").iterdir():
            file.unlink()
        digest = hashlib.md5((tmp_path / "stl10_binary.tar.gz").read_bytes()).hexdigest()
        monkeypatch.setattr(datasets.STL10, "tgz_md5", digest)
    splits = DATASETS["stl10"].from_mapping({"validation": 0}).load(tmp_path, CPU)
    x, y = next(splits.test.batches(10))
    np.testing.assert_allclose(x.numpy(), images / 127.5 - 1, atol=1e-5)
    assert y.tolist() == list(range(10)) and splits.input_shape == (3, 96, 96) and len(splits.train) == 20
    assert {file.name for file in (tmp_path / "stl10_binary").iterdir()} == {*DATASETS["stl10"].files}


def test_truncated_stl10_file_is_rejected(tmp_path: Path) -> None:
    stl_files(tmp_path / "stl10_binary")
    path = tmp_path / "stl10_binary" / "train_X.bin"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"train_X\.bin is damaged or incomplete"):
        DATASETS["stl10"]().load(tmp_path, CPU)
