"""Tests of Tiny ImageNet from a small archive in its original format: unpacking, the validation folder, and errors about
damage."""

from __future__ import annotations

import functools
import hashlib
import http.server
import os
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fa_bench.data import tiny_imagenet as module
from fa_bench.data.base import ResidentSplit
from fa_bench.data.image_files import StreamedSplit
from fa_bench.errors import DataError
from fa_bench.registry.registries import DATASETS

from .files import TINY, TINY_CLASSES, write_tiny_imagenet

CPU = torch.device("cpu")


class Server(http.server.ThreadingHTTPServer):
    """A server that waits for its threads when it is closed, so that none of their sockets is open during a later test."""

    daemon_threads = False


@pytest.fixture(autouse=True)
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Serve the temporary folder, from which the archive is downloaded."""
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    monkeypatch.setenv("no_proxy", "*")
    with Server(("127.0.0.1", 0), functools.partial(handler, directory=str(tmp_path))) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(DATASETS["tiny_imagenet"], "url", f"http://127.0.0.1:{httpd.server_port}/server/{TINY}.zip")
        yield
        httpd.shutdown()


def write_zip(root: Path, monkeypatch: pytest.MonkeyPatch, extra: str | None = None) -> Path:
    """Write a small Tiny ImageNet to an archive, make the archive's checksum the expected one, and return the archive's path.
    `extra` is the name of an additional member."""
    folder, archive = write_tiny_imagenet(root / "source"), root / "server" / f"{TINY}.zip"
    archive.parent.mkdir(parents=True)
    with zipfile.ZipFile(archive, "w") as opened:
        for path in sorted(folder.rglob("*")):
            opened.write(path, str(path.relative_to(folder.parent)))
        if extra is not None:
            opened.writestr(extra, "bad")
    expect(archive, monkeypatch)
    return archive


def expect(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    md5 = hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setattr(DATASETS["tiny_imagenet"], "md5", md5)


def place(archive: Path, data_dir: Path) -> Path:
    data_dir.mkdir(exist_ok=True)
    (data_dir / archive.name).write_bytes(archive.read_bytes())
    return data_dir / archive.name


def load(data_dir: Path, **options: object):
    return DATASETS["tiny_imagenet"].from_mapping({"validation": 0, "workers": 0, **options}).load(data_dir, CPU)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)


def test_images_are_loaded_with_class_labels(tmp_path: Path) -> None:
    folder = write_tiny_imagenet(tmp_path)
    splits = load(tmp_path)
    assert splits.classes == sorted(TINY_CLASSES) and splits.input_shape == (3, 64, 64)
    assert isinstance(splits.train, ResidentSplit) and splits.train.images.dtype == torch.uint8
    files = [folder / "train" / name / "images" / f"{name}_{i}.JPEG" for name in sorted(TINY_CLASSES) for i in range(4)]
    mean, std = (np.array(values)[:, None, None] for values in ([0.480, 0.448, 0.398], [0.277, 0.269, 0.282]))
    x, y = next(splits.train.batches(100))
    np.testing.assert_allclose(x.numpy(), (np.stack([pixels(path) for path in files]) / 255 - mean) / std, atol=1e-5)
    assert y.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    x, y = next(splits.test.batches(100))
    expected = np.stack([pixels(folder / "val" / "images" / f"val_{i}.JPEG") for i in range(4)])
    np.testing.assert_allclose(x.numpy(), (expected / 255 - mean) / std, atol=1e-5)
    assert y.tolist() == [1, 0, 2, 0]


def test_streamed_and_resident_batches_are_identical(tmp_path: Path) -> None:
    write_tiny_imagenet(tmp_path)
    for options in ({}, {"crop": "resized"}, {"size": 32}, {"size": 80, "crop": "resized"}):
        resident, streamed = load(tmp_path, **options), load(tmp_path, memory_limit_gb=0, **options)
        assert isinstance(streamed.train, StreamedSplit) and resident.input_shape == streamed.input_shape
        for how in ({}, {"seed": 1}):
            for (x, y), (u, v) in zip(resident.train.batches(5, **how), streamed.train.batches(5, **how), strict=True):
                assert torch.equal(x, u) and torch.equal(y, v)
                assert x.shape[1:] == resident.input_shape


def test_archive_is_downloaded_verified_unpacked_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_zip(tmp_path, monkeypatch)
    assert len(load(tmp_path / "data").train) == 12
    assert names(tmp_path / "data") == [TINY] and capfd.readouterr() == ("", "")
    (tmp_path / "server" / f"{TINY}.zip").unlink()
    assert len(load(tmp_path / "data").test) == 4


def test_local_archive_needs_no_network_and_is_not_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place(write_zip(tmp_path, monkeypatch), tmp_path / "data")
    monkeypatch.setattr(DATASETS["tiny_imagenet"], "url", "no-such-scheme://")
    assert len(load(tmp_path / "data").train) == 12
    assert names(tmp_path / "data") == [TINY, f"{TINY}.zip"]


def test_failed_download_is_reported_and_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = write_zip(tmp_path, monkeypatch)
    archive.write_bytes(archive.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"dataset=tiny_imagenet: missing .*the download failed") as caught:
        load(tmp_path / "data")
    assert str(tmp_path / "data" / TINY) in str(caught.value) and "\n" not in str(caught.value)
    archive.unlink()
    with pytest.raises(DataError, match="the download failed"):
        load(tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_truncated_archive_is_reported_and_not_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = place(write_zip(tmp_path, monkeypatch), tmp_path / "data")
    archive.write_bytes(archive.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"is damaged or incomplete .*delete it to download it again") as caught:
        load(tmp_path / "data")
    assert str(archive) in str(caught.value) and names(tmp_path / "data") == [archive.name]


@pytest.mark.parametrize("damage", ["tail", "member"])
def test_damaged_archive_with_valid_checksum_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    """The expected checksum is that of the damaged archive, so the damage is found only while unpacking."""
    archive = place(write_zip(tmp_path, monkeypatch), tmp_path / "data")
    content = bytearray(archive.read_bytes())
    if damage == "tail":
        content = content[:-30]
    else:
        content[content.index(b"\xff\xd8") + 100] ^= 255
    archive.write_bytes(content)
    expect(archive, monkeypatch)
    with pytest.raises(DataError, match=r"damaged .*delete it to download it again") as caught:
        load(tmp_path / "data")
    assert str(archive) in str(caught.value) and names(tmp_path / "data") == [archive.name]


@pytest.mark.parametrize("member", ["../evil.txt", "/evil.txt", f"{TINY}/../../evil.txt", "..\\evil.txt", "C:\\evil.txt"])
def test_archive_member_outside_target_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, member: str) -> None:
    archive = place(write_zip(tmp_path, monkeypatch, member), tmp_path / "data")
    with pytest.raises(DataError, match=r"evil\.txt' would be unpacked outside of") as caught:
        load(tmp_path / "data")
    assert str(archive) in str(caught.value) and names(tmp_path / "data") == [archive.name]
    assert not list(tmp_path.rglob("evil.txt"))


def test_archive_of_other_content_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / f"{TINY}.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("other/file.txt", "text")
    expect(archive, monkeypatch)
    with pytest.raises(DataError, match=f"contains no folder {TINY}"):
        load(tmp_path)


def test_interrupted_unpacking_restarts_from_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_zip(tmp_path, monkeypatch)
    original, count = zipfile.ZipFile.extract, []

    def interrupted(self: zipfile.ZipFile, *args: object) -> str:
        count.append(1)
        if len(count) == 10:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(zipfile.ZipFile, "extract", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path / "data")
    # A second attempt starts from the verified archive.
    assert names(tmp_path / "data") == [f"{TINY}.zip"]
    assert (len(load(tmp_path / "data").train), len(load(tmp_path / "data").test)) == (12, 4)


def test_interrupted_download_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(_url: str, _md5: str, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "download", half)
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path)
    assert names(tmp_path) == []


def test_concurrent_unpacking_is_tolerated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = place(write_zip(tmp_path, monkeypatch), tmp_path / "data")
    original = os.replace

    def late(source: Path, target: Path) -> None:
        if Path(target).name == TINY:
            write_tiny_imagenet(tmp_path / "data")
        original(source, target)

    monkeypatch.setattr(os, "replace", late)
    assert len(load(tmp_path / "data").train) == 12
    assert names(tmp_path / "data") == [TINY, archive.name]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("val_1.JPEG\tn01", "val_1.JPEG\tn09", r"val_annotations\.txt:2: no class 'n09' in .*wnids\.txt; did you mean"),
        ("val_1.JPEG\tn01", "val_1.JPEG", r"val_annotations\.txt:2: no class '0'"),
        ("val_1.JPEG\tn01", "val_9.JPEG\tn01", r"val_annotations\.txt:2: no image 'val_9\.JPEG'"),
        ("val_1.JPEG\tn01\t0\t0\t63\t63\n", "", r"val_annotations\.txt: no line for val_1\.JPEG"),
    ],
)
def test_inconsistent_annotations_are_reported(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = write_tiny_imagenet(tmp_path) / "val" / "val_annotations.txt"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path)
    assert str(path) in str(caught.value) and "to download it again" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["wnids.txt", "train", "val/images", "val/val_annotations.txt"])
def test_missing_part_is_reported(tmp_path: Path, part: str) -> None:
    folder = write_tiny_imagenet(tmp_path)
    (folder / part).rename(folder / "elsewhere")
    with pytest.raises(DataError, match=r"is missing; delete .* to download it again") as caught:
        load(tmp_path)
    assert str(folder / part) in str(caught.value)


def test_class_without_images_is_reported(tmp_path: Path) -> None:
    folder = write_tiny_imagenet(tmp_path)
    (folder / "train" / "n02").rename(folder / "elsewhere")
    with pytest.raises(DataError, match="contains no images") as caught:
        load(tmp_path)
    assert str(folder / "train" / "n02") in str(caught.value)


@pytest.mark.parametrize("limit", [1, 0])
@pytest.mark.parametrize("content", [b"not an image", None])
def test_broken_image_is_reported(tmp_path: Path, content: bytes | None, limit: float) -> None:
    """The error names a file that is truncated or not an image, whether the images are loaded into memory or streamed."""
    bad = write_tiny_imagenet(tmp_path) / "val" / "images" / "val_2.JPEG"
    bad.write_bytes(bad.read_bytes()[:1500] if content is None else content)
    with pytest.raises(DataError, match="not a readable image") as caught:
        list(load(tmp_path, memory_limit_gb=limit).test.batches(4))
    assert str(bad) in str(caught.value) and "\n" not in str(caught.value)


def test_image_of_other_size_is_reported(tmp_path: Path) -> None:
    odd = write_tiny_imagenet(tmp_path) / "train" / "n01" / "images" / "n01_1.JPEG"
    Image.fromarray(np.zeros((60, 64, 3), np.uint8)).save(odd)
    with pytest.raises(DataError, match="60x64 pixels") as caught:
        load(tmp_path)
    assert str(odd) in str(caught.value)
