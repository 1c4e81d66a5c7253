"""Small datasets in their original formats, with the structure of the real files and random images."""

from __future__ import annotations

import hashlib
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image
from torchvision.datasets import cifar, svhn

IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write an array of bytes in the format of MNIST: 0, 0, the type, the number of axes, the length of each axis, and the
    bytes."""
    path.write_bytes(struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes())


def write_mnist(root: Path, folder: str = "MNIST", seed: int = 0) -> dict[str, np.ndarray]:
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    arrays = {
        IDX_FILES[0]: rng.integers(0, 256, (30, 28, 28)),
        IDX_FILES[1]: np.arange(30) % 10,
        IDX_FILES[2]: rng.integers(0, 256, (10, 28, 28)),
        IDX_FILES[3]: np.arange(10)[::-1],
    }
    for name, array in arrays.items():
        write_idx(raw / name, array)
    return arrays


CIFAR_FILES = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py", [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], "batches.meta"),
    "cifar100": ("CIFAR100", "cifar-100-python", ["train", "test"], "meta"),
}


def write_cifar(
    root: Path, monkeypatch: pytest.MonkeyPatch, name: str = "cifar10", label: int | None = None
) -> list[dict[str, object]]:
    """Write training batches of 4 images and one test batch of 6, adapt the checksums in torchvision, and return the batches.

    If `label` is given, the last image of the test batch has this label.
    """
    of, folder_name, files, meta_name = CIFAR_FILES[name]
    classes = 10 if name == "cifar10" else 100
    label_key, meta_key = ("labels", "label_names") if name == "cifar10" else ("fine_labels", "fine_label_names")
    folder = root / folder_name
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name: str, content: dict[str, object]) -> str:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data, usedforsecurity=False).hexdigest()

    def batch(count: int) -> dict[str, object]:
        return {"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8), label_key: rng.integers(0, classes, count).tolist()}

    contents = [*(batch(4) for _ in files[1:]), batch(6)]
    if label is not None:
        contents[-1][label_key][-1] = label
    listed = [[file, write(file, content)] for file, content in zip(files, contents, strict=True)]
    meta = {"filename": meta_name, "key": meta_key, "md5": write(meta_name, {meta_key: [f"thing {i}" for i in range(classes)]})}
    monkeypatch.setattr(getattr(cifar, of), "train_list", listed[:-1])
    monkeypatch.setattr(getattr(cifar, of), "test_list", listed[-1:])
    monkeypatch.setattr(getattr(cifar, of), "meta", meta)
    return contents


def write_svhn(root: Path, monkeypatch: pytest.MonkeyPatch, label: int | None = None) -> dict[str, dict[str, np.ndarray]]:
    """Write 9 training and 5 test images, labelled 1 to 10 as in the published files, adapt the checksums in torchvision, and
    return the contents of the files. If `label` is given, one image of each part has this label."""
    folder = root / "SVHN"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    contents, listed = {}, dict(svhn.SVHN.split_list)
    for part, count in (("train", 9), ("test", 5)):
        contents[part] = {
            "X": rng.integers(0, 256, (32, 32, 3, count), dtype=np.uint8),
            "y": rng.integers(1, 11, (count, 1), dtype=np.uint8),
        }
        contents[part]["y"][0] = 10
        if label is not None:
            contents[part]["y"][1] = label
        path = folder / f"{part}_32x32.mat"
        scipy.io.savemat(path, contents[part])
        md5 = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        listed[part] = [f"no-such-scheme://{path.name}", path.name, md5]
    monkeypatch.setattr(svhn.SVHN, "split_list", listed)
    return contents


TINY = "tiny-imagenet-200"
#: The class names are not sorted, as in the published wnids.txt.
TINY_CLASSES = ["n03", "n01", "n02"]
#: The class of each validation image.
TINY_ANNOTATED = ["n02", "n01", "n03", "n01"]


def write_tiny_imagenet(root: Path) -> Path:
    """Write three classes with 4 training images each (one image is grey), 4 annotated validation images, and one unlabelled
    image in test/, and return the folder."""
    rng = np.random.default_rng(0)
    folder = root / TINY

    def save(path: Path, shape: tuple[int, ...] = (64, 64, 3)) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)

    for name in TINY_CLASSES:
        for i in range(4):
            save(folder / "train" / name / "images" / f"{name}_{i}.JPEG", (64, 64) if (name, i) == ("n01", 2) else (64, 64, 3))
        (folder / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t63\t63\n")
    for i in range(len(TINY_ANNOTATED)):
        save(folder / "val" / "images" / f"val_{i}.JPEG")
    lines = [f"val_{i}.JPEG\t{kind}\t0\t0\t63\t63\n" for i, kind in enumerate(TINY_ANNOTATED)]
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    save(folder / "test" / "images" / "test_0.JPEG")
    (folder / "wnids.txt").write_text("\n".join(TINY_CLASSES) + "\n")
    return folder


IMAGENET_CLASSES = ["n01440764", "n01443537"]


def write_imagenet(root: Path) -> None:
    """Write two classes with 4 training and 2 validation images each, in several sizes; in each part, one image is grey and one
    is in CMYK."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 2)):
        for name in IMAGENET_CLASSES:
            (root / "imagenet" / part / name).mkdir(parents=True)
            for i in range(count):
                shape = (40 + 10 * i, 70 - 10 * i, 3)
                image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
                mode = {("n01440764", 1): "L", ("n01443537", 1): "CMYK"}.get((name, i), "RGB")
                image.convert(mode).save(root / "imagenet" / part / name / f"{i}.JPEG")
