"""Files that cameras, operating systems and notebooks leave in image folders are either read, or skipped and counted, or refused
with a one-line error."""

from __future__ import annotations

import logging
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fa_bench.cli import main
from fa_bench.data import listing
from fa_bench.errors import DataError
from fa_bench.registry.registries import DATASETS
from tests.privileges import privileges_dropped

CPU = torch.device("cpu")


def image(path: Path, shade: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (shade,) * 3).save(path, "PNG" if path.suffix not in (".gif", ".bmp") else None)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two classes of two training images and one test image each."""
    root = tmp_path / "images"
    for name in ("cat", "dog"):
        image(root / "train" / name / "0.png")
        image(root / "train" / name / "1.png", 50)
        image(root / "test" / name / "0.png", 90)
    return root


def load(folder: Path, **options: object):
    return DATASETS["image_folder"].from_mapping({"validation": 0, "workers": 0, **options}).load(folder, CPU)


LEFT = {
    "Jupyter": (lambda f: image(f / "train/cat/.ipynb_checkpoints/0-checkpoint.png"), "hidden or system: 1"),
    "Jupyter beside the classes": (lambda f: image(f / "train/.ipynb_checkpoints/0.png"), "hidden or system: 1"),
    "Linux trash": (lambda f: image(f / "train/cat/.Trash-1000/files/0.png"), "hidden or system: 1"),
    "macOS in an archive": (lambda f: (f / "train/cat/._0.png").write_bytes(b"\0\5\x16\7"), "hidden or system: 1"),
    "macOS archive folder": (lambda f: image(f / "train/__MACOSX/cat/0.png"), "hidden or system: 1"),
    "Finder": (lambda f: (f / "train/cat/.DS_Store").write_bytes(b"Bud1"), "hidden or system: 1"),
    "Windows thumbnails": (lambda f: (f / "train/cat/Thumbs.db").write_bytes(b"x"), ".db: 1"),
    "Windows folder": (lambda f: (f / "train/cat/desktop.ini").write_bytes(b"x"), ".ini: 1"),
    "Windows trash": (lambda f: image(f / "train/$RECYCLE.BIN/S-1/0.png"), "hidden or system: 1"),
    "trash of Windows XP": (lambda f: image(f / "train/cat/RECYCLER/S-1/0.png"), "hidden or system: 1"),
    "recovered by Windows": (lambda f: image(f / "train/cat/FOUND.000/0.png"), "hidden or system: 1"),
    "macOS on network drives": (lambda f: image(f / "train/cat/Network Trash Folder/0.png"), "hidden or system: 1"),
    "macOS on old drives": (lambda f: image(f / "train/cat/Temporary Items/0.png"), "hidden or system: 1"),
    "snapshots": (lambda f: image(f / "train/cat/#snapshot/0.png"), "hidden or system: 1"),
    "snapshots of QNAP": (lambda f: image(f / "train/cat/@Recently-Snapshot/0.png"), "hidden or system: 1"),
    "snapshots of NetApp": (lambda f: image(f / "train/cat/~snapshot/0.png"), "hidden or system: 1"),
    "Synology": (lambda f: image(f / "train/cat/@eaDir/0.png/SYNOPHOTO_THUMB_XL.png"), "hidden or system: 1"),
    "a telephone's format": (lambda f: (f / "train/cat/2.HEIC").write_bytes(b"x"), ".heic: 1"),
    "a camera's raw format": (lambda f: (f / "train/cat/2.CR2").write_bytes(b"x"), ".cr2: 1"),
    "a download under way": (lambda f: (f / "train/cat/2.png.crdownload").write_bytes(b"x"), ".crdownload: 1"),
    "no extension": (lambda f: (f / "train/cat/README").write_bytes(b"x"), "no extension: 1"),
    "a loose image": (lambda f: image(f / "train/0.png"), "outside the class folders: 1"),
    "a link to nowhere": (lambda f: (f / "train/cat/more").symlink_to("nowhere"), "broken links: 1"),
    "a link to itself": (lambda f: (f / "train/cat/more").symlink_to("more"), "broken links: 1"),
    "a link to its own folder": (lambda f: (f / "train/cat/more").symlink_to("."), "links to a folder already read: 1"),
    "a link to all classes": (lambda f: (f / "train/cat/more").symlink_to(".."), "links to a folder already read: 1"),
    "a class that links to all classes": (lambda f: (f / "train/more").symlink_to("."), "links to a parent folder: 1"),
    "in test/": (lambda f: (f / "test/cat/.DS_Store").write_bytes(b"x"), "hidden or system: 1"),
}


@pytest.mark.parametrize("limit", [1, 0])
@pytest.mark.parametrize("name", LEFT)
def test_leftover_files_are_skipped_and_counted(folder: Path, name: str, limit: float) -> None:
    make, counted = LEFT[name]
    before = load(folder, memory_limit_gb=limit)
    make(folder)
    splits = load(folder, memory_limit_gb=limit)
    root = folder / ("test" if name == "in test/" else "train")
    assert splits.classes == ["cat", "dog"] and (len(splits.train), len(splits.test)) == (4, 2)
    assert splits.notes == [f"{root}: skipped 1 ({counted})"]
    assert splits.data_hash == before.data_hash


@pytest.mark.parametrize(
    ("add", "counted"),
    [
        (lambda f: image(f / "loose.png"), "outside the class folders: 1"),
        (lambda f: (f / ".DS_Store").write_bytes(b"Bud1"), "hidden or system: 1"),
        (lambda f: image(f / "__MACOSX/train/cat/0.png"), "hidden or system: 1"),
    ],
)
def test_files_beside_train_are_counted(folder: Path, add: Callable[[Path], Any], counted: str) -> None:
    add(folder)
    splits = load(folder)
    assert len(splits.train) == 4 and splits.notes == [f"{folder}: skipped 1 ({counted})"]


def test_class_called_recycled_is_accepted(folder: Path) -> None:
    for part in ("train", "test"):
        image(folder / part / "recycled/0.png")
    splits = load(folder)
    assert "recycled" in splits.classes and splits.notes == []


@pytest.mark.parametrize("name", ["2.jfif", "2.JPE", "2.PNG", "2.Jpeg", "2.apng", "2.bmp", "2.gif", "2.pjpeg", "deep/down/2.png"])
def test_common_image_extensions_are_read(folder: Path, name: str) -> None:
    image(folder / "train/cat" / name, 30)
    splits = load(folder)
    assert len(splits.train) == 5 and splits.notes == []


def test_linked_folders_and_files_are_read(folder: Path, tmp_path: Path) -> None:
    image(tmp_path / "elsewhere/more/2.png", 30)
    image(tmp_path / "elsewhere/3.png", 40)
    (folder / "train/cat/linked").symlink_to(tmp_path / "elsewhere/more")
    (folder / "train/cat/3.png").symlink_to(tmp_path / "elsewhere/3.png")
    (folder / "train/bird").symlink_to(tmp_path / "elsewhere")
    (folder / "test/bird").symlink_to(tmp_path / "elsewhere/more")
    splits = load(folder)
    assert splits.classes == ["bird", "cat", "dog"]
    assert splits.train.labels.tolist() == [0, 0, 1, 1, 1, 1, 2, 2] and splits.notes == []


def test_folder_with_many_links_is_read_once(folder: Path) -> None:
    inner = [folder / "train/cat" / name for name in "abcdefgh"]
    for path in inner:
        path.mkdir()
    for path in inner:
        for other in inner:  # there are more than 8! paths through the links
            (path / f"to-{other.name}").symlink_to(other)
    image(inner[0] / "2.png", 30)
    splits = load(folder)
    assert len(splits.train) == 5
    assert splits.notes == [f"{folder / 'train'}: skipped 64 (links to a folder already read: 64)"]


def test_order_is_by_name_not_directory_listing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.png", "B.png", "a/1.png", "10.png", "2.png"):
        image(folder / "train/cat" / name)
    before, original = load(folder).data_hash, os.scandir
    cats = folder / "train/cat"
    found = [path.relative_to(cats).as_posix() for path in listing.images_below(cats, Counter())]
    assert found == ["0.png", "1.png", "10.png", "2.png", "B.png", "a/1.png", "b.png"]

    class Reversed:
        def __init__(self, path: object) -> None:
            self.path = path

        def __enter__(self):
            with original(self.path) as entries:
                return iter(sorted(entries, key=lambda entry: entry.name, reverse=True))

        def __exit__(self, *exception: object) -> None:
            pass

    monkeypatch.setattr(listing.os, "scandir", Reversed)
    assert load(folder).data_hash == before


# ------------------------------------------------------------------------------------------------ train, val, test
def test_val_is_test_set_if_test_is_unlabelled(folder: Path) -> None:
    (folder / "test").rename(folder / "val")
    (folder / "test").mkdir()
    for name in (None, "test/0.png", "test/images/1.png"):
        if name:
            image(folder / name)
        splits = load(folder)
        assert len(splits.test) == 2 and splits.validation is None
        assert splits.notes == [
            f"{folder / 'test'}: skipped, because it has no folder named after a class in {folder / 'train'}",
            f"{folder / 'val'}: used as the test set",
        ]


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_val_is_validation_set_beside_train_and_test(folder: Path, name: str) -> None:
    for i in range(3):
        image(folder / name / "dog" / f"{i}.png", 200)
    splits = load(folder, validation=0.1)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (4, 3, 2)
    x, y = next(splits.validation.batches(9))
    assert y.tolist() == [1, 1, 1] and torch.allclose(x, torch.full_like(x, (200 / 255 - 0.5) / 0.5), atol=1e-5)
    assert splits.notes == [
        f"{folder / name}: used as the validation set; no training images are held out",
        f"{folder / name}: no images of 1 of 2 classes (cat)",
    ]
    streamed = load(folder, validation=0.1, memory_limit_gb=0)
    assert len(streamed.validation) == 3 and streamed.data_hash == splits.data_hash
    none = load(folder, validation=0)
    assert none.validation is None and none.notes == [f"{folder / name}: skipped, because dataset.validation=0"]
    trial = DATASETS["image_folder"].from_mapping({"workers": 0}).load(folder, CPU, (3, 1))
    assert (len(trial.train), len(trial.validation), len(trial.test)) == (3, 1, 1)


def test_unlabelled_val_is_skipped(folder: Path) -> None:
    image(folder / "val/0.png")
    splits = load(folder, validation=0.25)
    assert (len(splits.train), len(splits.validation)) == (3, 1)
    assert splits.notes == [f"{folder / 'val'}: skipped, because it has no folder named after a class in {folder / 'train'}"]


def test_other_folders_are_reported(folder: Path) -> None:
    image(folder / "extra/cat/0.png")
    (folder / "labels.csv").write_text("x")
    assert load(folder).notes == [f"{folder}: skipped 1 (outside the class folders: 1)", f"{folder}: skipped extra/"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda f: (image(f / "val/cat/0.png"), image(f / "valid/cat/0.png")),
            r"contains val/ and valid/, but only one folder may contain the validation set",
        ),
        (lambda f: (f / "test").rename(f / "Test"), r"contains no test/ or val/ folder, only Test/, train/"),
        (lambda f: (f / "test/cat").rename(f / "test/Cat"), r"contains classes that .*train does not: Cat; did you mean 'cat'\?"),
        (lambda f: (f / "train/bird").mkdir(), r"train/bird: contains no images \(\.apng, "),
        (
            lambda f: ((f / "train/bird").mkdir(), (f / "train/bird/1.heic").touch()),
            r"train/bird: contains no images \(skipped \.heic: 1\)",
        ),
        (lambda f: [p.unlink() for p in f.glob("test/*/*")], r"test: contains no images in folders of the classes of .*train"),
        (
            lambda f: ((f / "test").rename(f / "moved"), image(f / "test/0.png")),
            r"test: contains no folder named after a class in .*train \(cat, dog\); sort its images into such folders",
        ),
        (
            lambda f: (
                [p.rename(f / "train" / f"{p.parent.name}-{p.name}") for p in f.glob("train/*/*")]
                and [p.rmdir() for p in f.glob("train/*") if p.is_dir()]
            ),
            r"train: contains no class folders \(skipped outside the class folders: 4\)",
        ),
        (
            lambda f: (
                image(f / "train" / unicodedata.normalize("NFD", "é") / "0.png")
                and image(f / "train" / unicodedata.normalize("NFC", "é") / "0.png")
            ),
            "two class names look the same",
        ),
    ],
)
def test_invalid_layouts_are_rejected(folder: Path, make, message: str) -> None:
    make(folder)
    with pytest.raises(DataError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_empty_unknown_class_folder_in_test_is_accepted(folder: Path) -> None:
    (folder / "test/bird").mkdir()
    assert len(load(folder).test) == 2


def test_unicode_normal_forms_give_one_class(folder: Path) -> None:
    image(folder / "train" / unicodedata.normalize("NFD", "é") / "0.png")
    image(folder / "test" / unicodedata.normalize("NFC", "é") / "0.png")
    splits = load(folder)
    assert splits.test.labels.tolist() == [0, 1, 2] and len(splits.classes) == 3


# ------------------------------------------------------------------------------------------------ command line
def test_skipped_files_are_reported_and_logged(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (folder / "train/cat/.DS_Store").touch()
    line = "images/train: skipped 1 (hidden or system: 1)"
    command = ["dataset=image_folder", "data_dir=images", "architecture.widths=[8]", "epochs=1", "batch_size=2"]
    assert main(["--dry-run", *command]) == 0 and line in capsys.readouterr().out
    assert main([*command, "hydra.run.dir=out"]) == 0 and line in capsys.readouterr().out
    assert line in (tmp_path / "out/run.log").read_text()
    assert not logging.getLogger("fa_bench").handlers


#: Folders that are made unreadable, one at a time, for every user except root.
UNREADABLE = ["images", "images/test/dog", "images/train/cat/deep"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_control_characters_in_names_are_escaped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "train/cat/x.\x1b[31mt\nxt").touch()
    image(folder / "train/\x1b]0;title\x07/0.png")
    monkeypatch.chdir(tmp_path)
    options = ["dataset=image_folder", f"data_dir={folder}", "dataset.validation=0", "architecture.widths=[4]", "epochs=1"]
    for command in (["--dry-run", *options], [*options, "hydra.run.dir=run"]):
        assert main(command) == 0
        out = capsys.readouterr().out
        assert "skipped 1 (.\\x1b[31mt\\nxt: 1)" in out and "no images of 1 of 3 classes (\\x1b]0;title\\x07)" in out
        assert "\x1b" not in out
    assert "\x1b" not in (tmp_path / "run/run.log").read_text(encoding="utf-8")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
@pytest.mark.parametrize("place", UNREADABLE)
def test_unreadable_folder_gives_exit_code_2(folder: Path, tmp_path: Path, place: str) -> None:
    image(folder / "train/cat/deep/2.png")
    command = [
        sys.executable,
        "-m",
        "fa_bench.cli",
        "dataset=image_folder",
        f"data_dir={folder}",
        "architecture.widths=[8]",
        "epochs=1",
        "output_dir=out",
    ]
    done = privileges_dropped(command, tmp_path, tmp_path / place, 0o000)
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(rf"fa-bench: .*{re.escape(str(tmp_path / place))}.*cannot be read \(Permission denied\)\n", done.stderr)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
@pytest.mark.parametrize(("dataset", "mode"), [("mnist", 0o000), ("tiny_imagenet", 0o444)])
def test_unreadable_data_dir_is_reported(tmp_path: Path, dataset: str, mode: int) -> None:
    (tmp_path / "data/MNIST/raw").mkdir(parents=True)
    command = [sys.executable, "-m", "fa_bench.cli", f"dataset={dataset}", f"data_dir={tmp_path / 'data'}", "output_dir=out"]
    done = privileges_dropped(command, tmp_path, tmp_path / "data", mode)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert str(tmp_path / "data") in done.stderr and "Permission denied" in done.stderr and not (tmp_path / "out").exists()
