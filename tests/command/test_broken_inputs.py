"""Inputs that are broken or too large are named in a one-line error, and existing files are left unchanged."""

from __future__ import annotations

import os
import stat
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from fa_bench.cli import main
from fa_bench.data.fetch import unpack_zip
from fa_bench.errors import ConfigError, DataError, OptionError
from fa_bench.optim.sgd import SGD
from fa_bench.runs import outcome, train
from fa_bench.utils import memory_limits
from tests.data.files import IDX_FILES, write_idx, write_mnist
from tests.privileges import privileges_dropped

SMALL = ["dataset=synthetic", "dataset.samples=64", "dataset.test_samples=16", "architecture.widths=[8]", "epochs=1"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    assert main(arguments) == code
    said = [line for line in capsys.readouterr().err.strip().splitlines() if not line.startswith("Error executing job")]
    assert len(said) == 1, said
    return said[0]


# ------------------------------------------------------------------------------------------------ images
def png(path: Path, side: int) -> None:
    """Write a PNG that claims to have side x side pixels but contains no pixel data."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


def with_long_text(folder: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "a" * 2**21, zip=True)
    Image.new("RGB", (8, 8)).save(folder / "9.png", pnginfo=text)


def cut(folder: Path, name: str) -> None:
    Image.effect_noise((8, 8), 50).convert("RGB").save(folder / name)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) - 60])


IMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no bytes": (lambda f: (f / "9.png").write_bytes(b""), "9.png"),
    "text": (lambda f: (f / "9.png").write_text("hello"), "9.png"),
    "a web page": (lambda f: (f / "9.jpg").write_text("<html>not found</html>"), "9.jpg"),
    "cut PNG": (lambda f: cut(f, "9.png"), "9.png"),
    "cut JPEG": (lambda f: cut(f, "9.jpg"), "9.jpg"),
    "32 bits": (lambda f: Image.fromarray(np.zeros((8, 8), np.int32)).save(f / "9.tif"), "8 or 16 bits"),
    "another size": (lambda f: Image.new("RGB", (9, 8)).save(f / "9.png"), "8x9 pixels"),
    "a bomb that Pillow warns about": (lambda f: png(f / "9.png", 11_000), "9.png"),
    "a bomb that Pillow refuses": (lambda f: png(f / "9.png", 20_000), "9.png"),
    "a bomb of text": (with_long_text, "9.png"),
    "a folder": (lambda f: (f / "9.png").mkdir(), "9.png: not a readable image (a folder"),
    "a pipe": (lambda f: os.mkfifo(f / "9.png"), "9.png: not a readable image (a folder, pipe"),
    "a link to nowhere": (lambda f: (f / "9.png").symlink_to("nowhere"), "9.png"),
    "a newline in its name": (lambda f: (f / "a\nb.png").write_text("x"), r"a\nb.png"),
    "a name that is not UTF-8": (lambda f: Path(os.fsdecode(os.fsencode(f) + b"/\xff.png")).write_text("x"), r"\udcff.png"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_broken_image_is_reported(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test"):
        (folder / "data" / split / "a").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "data" / split / "a" / "0.png")
    breaks, named = IMAGES[name]
    try:
        breaks(folder / "data/train/a")
    except OSError:
        pytest.skip("this file system does not support such a file")
    assert named in refused(["dataset=image_folder", "data_dir=data", "architecture.widths=[8]"], capsys)
    assert not (folder / "outputs").exists()


# ------------------------------------------------------------------------------------------------ IDX files, archives
def idx(magic: tuple[int, int, int, int], lengths: tuple[int, ...], size: int) -> bytes:
    return bytes(magic) + struct.pack(f">{len(lengths)}I", *lengths) + bytes(size)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (0, idx((0, 0, 9, 3), (30, 28, 28), 30 * 784)),
        (0, idx((1, 0, 8, 3), (30, 28, 28), 30 * 784)),
        (0, idx((0, 0, 8, 1), (30,), 30)),
        (0, idx((0, 0, 8, 3), (30, 28, 28), 30 * 784 - 1)),
        (0, idx((0, 0, 8, 3), (30, 28, 28), 30 * 784 + 1)),
        (0, idx((0, 0, 8, 3), (2**32 - 1,) * 3, 100)),
        (0, idx((0, 0, 8, 3), (0, 28, 28), 0)),
        (0, b""),
        (0, b"\x1f\x8b\x08\x00cut"),
        (1, idx((0, 0, 8, 1), (30,), 29)),
        (1, idx((0, 0, 8, 3), (30, 1, 1), 30)),
        (1, idx((0, 0, 8, 1), (29,), 29)),
        (2, idx((0, 0, 8, 3), (10, 20, 20), 4000)),
    ],
)
def test_broken_idx_file_gives_short_error(file: int, content: bytes, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mnist(folder)
    (folder / "MNIST/raw" / IDX_FILES[file]).write_bytes(content)
    assert "dataset=mnist" in refused(["dataset=mnist", "data_dir=."], capsys)


def test_label_out_of_range_gives_short_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mnist(folder)
    write_idx(folder / "MNIST/raw" / IDX_FILES[1], np.full(30, 200))
    assert "label 200" in refused(["dataset=mnist", "data_dir=."], capsys)


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (stat.S_IFLNK, "a link or a device"),
        (stat.S_IFCHR, "a link or a device"),
        (stat.S_IFIFO, "a link or a device"),
        ("bomb", "would unpack to"),
        ("..", "outside"),
        (".", "outside"),
        ("/x", "outside"),
    ],
)
def test_unsafe_archive_members_are_rejected(kind: int | str, named: str, folder: Path) -> None:
    member = zipfile.ZipInfo("set/x" if isinstance(kind, int) or kind == "bomb" else kind)
    if isinstance(kind, int):
        member.external_attr = (kind | 0o777) << 16
    with zipfile.ZipFile(folder / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("set/a", "fine")
        archive.writestr(member, bytes(50_000_000) if kind == "bomb" else b"/etc/passwd", zipfile.ZIP_DEFLATED)
    with pytest.raises(DataError, match=named) as caught:
        unpack_zip(folder / "set.zip", folder / "set")
    assert "set.zip" in str(caught.value) and os.listdir(folder) == ["set.zip"]


# ------------------------------------------------------------------------------------------------ places
@pytest.mark.parametrize("grid", [[], ["-m"]])
@pytest.mark.parametrize(
    ("place", "named"),
    [
        ("file", "file: a file"),
        ("file/below", "file: a file"),
        ("dangling", "broken link"),
        ("dangling/x", "broken link"),
        ("loop", "loop"),
        ("/dev/null", "/dev/null: a file"),
        ("/dev/full", "/dev/full: a file"),
        ("/proc/x", "/proc"),
        ("n" * 300, "File name too long"),
        ("d/" * 3000, "File name too long"),
    ],
)
def test_unwritable_output_dir_is_reported(
    place: str, named: str, grid: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "file").write_text("mine")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    before = sorted(folder.iterdir())
    said = refused([*grid, *SMALL, f"output_dir={place}"], capsys)
    assert named in said and len(said) < 600
    assert sorted(folder.iterdir()) == before and (folder / "file").read_text() == "mine"


def test_directory_without_permission_is_reported(folder: Path) -> None:
    (folder / "locked").mkdir()
    command = [sys.executable, "-m", "fa_bench.cli", *SMALL, "output_dir=locked"]
    done = privileges_dropped(command, folder, folder / "locked", 0o500)
    assert done.returncode == 2 and "locked: no permission" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not list((folder / "locked").iterdir())


def test_full_disk_in_one_job_does_not_stop_others(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(train.Trainer, "fit", fit)
    monkeypatch.setattr(outcome, "record_failure", fit)
    assert main(["-m", *SMALL, "seed=0,1"]) != 0
    said = capsys.readouterr().err
    assert "[1/2]" in said and "[2/2]" in said and "No space left" in said and "Traceback" not in said


# ------------------------------------------------------------------------------------------------ memory
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you "
            "tried to allocate 4000 bytes. Error code 12\nframes"
        ),
    ],
    ids=["python", "torch"],
)
def test_out_of_memory_job_does_not_stop_others(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = SGD.build, []

    def build(self: object, *arguments: object, **more: object) -> object:
        calls.append(self)
        if len(calls) == 1:
            raise error
        return real(self, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(SGD, "build", build)
    assert main(["-m", *SMALL, "seed=0,1"]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 2 and "[1/2]" in said[0] and "memory" in said[0] and said[1].endswith("seed0")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["architecture.widths=[1000000000000]"], "1000000000000x64"),
        (["architecture.widths=[1000,1000000000000]"], "1000000000000x1000"),
        (["architecture.widths=[8]", "algorithm=pfa", "algorithm.ratio=1e12"], "memory"),
        (["architecture.widths=[8]", "algorithm=pfa", "algorithm.ratio=1e308"], "memory"),
        (["architecture=conv2", "architecture.channels=100000000000"], "memory"),
        (["architecture=resnet18", "architecture.width=100000000000"], "memory"),
        (["dataset.samples=1000000000000"], "dataset.samples"),
        (["dataset.size=10000000"], "dataset.size"),
        (["dataset.classes=1000000000000"], "dataset.classes"),
        (["architecture=resnet20", "architecture.blocks=100000"], "<= 1000"),
        (["seed=1000000000000000000000000000000"], "seed=10000"),
        (["optimizer.lr=1" + "0" * 400], "optimizer.lr=inf"),
        (["optimizer.lr=inf"], "not a finite number"),
        (["optimizer.lr=nan"], "optimizer.lr=nan"),
    ],
)
def test_oversized_options_are_rejected_before_allocation(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in refused(["dataset=synthetic", "scale=smoke", *arguments], capsys)


def test_require_memory_rejects_only_excess(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_limits, "available_memory", lambda: 10**8)
    memory_limits.require_memory(10**8, "this")
    with pytest.raises(ConfigError, match=r"this: needs 100 MB of memory, but only 100 MB is available"):
        memory_limits.require_memory(10**8 + 1, "this")

    @memory_limits.within_memory()
    def build(rows: int) -> torch.Tensor:
        return torch.nn.Linear(1000, rows, bias=False).weight

    assert build(20_000).shape == (20_000, 1000)
    with pytest.raises(ConfigError, match="30000x1000"):
        build(30_000)


def test_available_memory_is_plausible() -> None:
    assert memory_limits.available_memory() is None or 10**6 < memory_limits.available_memory() < 10**15


def test_long_option_values_are_truncated_in_errors() -> None:
    with pytest.raises(OptionError) as caught:
        SGD(lr="x" * 10_000)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 300


def test_single_run_prints_note_about_rising_loss(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "epochs=2", "optimizer.lr=1e4", "algorithm=frozen"]) == 0
    said = capsys.readouterr().out
    assert "\nnote: the training loss of the run rose, from " in said, said
    assert main([*SMALL, "epochs=2", "optimizer.lr=1e-3", "output_dir=calm"]) == 0
    assert "note: the training loss" not in capsys.readouterr().out
