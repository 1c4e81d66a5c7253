"""The model gets the picture that an image viewer shows: tests of orientation, transparency, bit depths and several frames."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fa_bench.data import image_files
from fa_bench.errors import DataError
from fa_bench.registry.registries import DATASETS
from tests.versions import YCBCR_IS_CUT_OFF

CPU = torch.device("cpu")
#: Maps each EXIF orientation (EXIF 2.32, 4.6.4 A) to a function that stores an upright picture as the camera would.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[:, ::-1],
}


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "_contents", {})
    monkeypatch.setattr(image_files, "_inspected", {})


def picture(height: int = 6, width: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def only(
    folder: Path,
    image: Image.Image,
    name: str = "0.png",
    limit: float = 1,
    save: dict[str, object] | None = None,
    **options: object,
):
    """Load a dataset with this image as its only training image, and a plain image in the test set."""
    for part in ("train", "test"):
        (folder / part / "a").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", image.size).save(folder / part / "a" / "0.png")
    (folder / "train/a/0.png").unlink()
    image.save(folder / "train/a" / name, **save or {})
    return load(folder, limit, **options)


def load(folder: Path, limit: float = 1, **options: object):
    options = {"validation": 0, "workers": 0, "memory_limit_gb": limit, "mean": [0.0], "std": [1 / 255], **options}
    return DATASETS["image_folder"].from_mapping(options).load(folder, CPU)


def png(levels: np.ndarray, bits: int, kind: int, *transparent: int) -> bytes:
    """Encode levels (H, W, C) as a PNG of a kind that Pillow cannot write; `kind` is its colour type, and `transparent` is the
    transparent level of each channel."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, _ = levels.shape
    digits = (levels.reshape(height, -1, 1) >> np.arange(bits)[::-1]) & 1
    rows = np.packbits(digits.reshape(height, -1).astype(np.uint8), axis=1)
    clear = chunk(b"tRNS", np.array(transparent, ">u2").tobytes()) if transparent else b""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
        + clear
        + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
        + chunk(b"IEND", b"")
    )


def seen(splits) -> np.ndarray:
    """The training image as an array (H, W, C) of values from 0 to 255."""
    x, _ = next(splits.train.batches(1))
    return x[0].permute(1, 2, 0).round().to(torch.uint8).numpy()


@pytest.mark.parametrize("limit", [1, 0])
@pytest.mark.parametrize("way", STORED)
@pytest.mark.parametrize("kind", ["png", "tif", "webp", "jpg"])
def test_exif_orientation_is_applied(tmp_path: Path, way: int, kind: str, limit: float) -> None:
    upright = np.kron(picture(2, 3), np.ones((8, 8, 1), np.uint8))  # uniform blocks, which JPEG hardly changes
    exif = Image.Exif()
    exif[0x0112] = way
    image = Image.fromarray(np.ascontiguousarray(STORED[way](upright)))
    (tmp_path / "test/a").mkdir(parents=True)
    options = {"png": {}, "tif": {}, "webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}[kind]
    splits = only(tmp_path, image, f"0.{kind}", limit, {"exif": exif, **options}, size=16)
    expected = upright[:, 4:20]  # the centre of an image of 16 rows and 24 columns
    assert np.abs(seen(splits).astype(int) - expected).max() <= (8 if kind == "jpg" else 0)
    assert [note for note in splits.notes if "EXIF" in note] == (
        [] if way == 1 else [f"{tmp_path / 'train'}: images rotated by their EXIF orientation: 1"]
    )


def test_sizes_are_compared_after_exif_rotation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    only(tmp_path, Image.fromarray(picture()))
    for part in ("train", "test"):
        Image.fromarray(picture(8, 6)).save(tmp_path / part / "a" / "1.png", exif=exif)
        assert load(tmp_path).input_shape == (3, 6, 8)
    (tmp_path / "train/a/0.png").unlink()  # the other images are compared with the size of the first one
    assert load(tmp_path).input_shape == (3, 6, 8)


def test_damaged_exif_is_ignored(tmp_path: Path) -> None:
    splits = only(tmp_path, Image.fromarray(picture()), save={"exif": b"Exif\0\0II*\0\xff\xff\xff\x7fgarbage"})
    assert (seen(splits) == picture()).all()


def drawing(mode: str) -> Image.Image:
    """A black square that is visible only in the alpha channel, because the colours are black everywhere."""
    alpha = np.zeros((6, 8), np.uint8)
    alpha[2:4, 2:4] = 255
    black = Image.new("RGB", (8, 6))
    black.putalpha(Image.fromarray(alpha))
    if mode == "P":  # a palette with one transparent entry
        indexed = Image.fromarray(np.where(alpha > 0, 1, 0).astype(np.uint8)).convert("P")
        indexed.putpalette([0, 0, 0] * 256)
        indexed.info["transparency"] = 0
        return indexed
    return black.convert(mode)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("limit", [1, 0])
@pytest.mark.parametrize(
    ("mode", "name", "save"),
    [
        ("RGBA", "0.png", {}),
        ("LA", "0.png", {}),
        ("RGBA", "0.webp", {"lossless": True, "exact": True}),
        ("RGBA", "0.tif", {}),
        ("P", "0.png", {}),
        ("P", "0.gif", {}),
        ("RGBA", "0.gif", {}),
        ("RGBA", "0.avif", {"quality": 100}),
    ],
)
def test_transparent_images_are_composited_on_background(
    tmp_path: Path, mode: str, name: str, save: dict[str, object], limit: float, channels: int
) -> None:
    splits = only(tmp_path, drawing(mode), name, limit, save, channels=channels)
    expected = np.full((6, 8, channels), 255)
    expected[2:4, 2:4] = 0
    assert np.abs(seen(splits).astype(int) - expected).max() <= (2 if name.endswith("avif") else 0)
    assert f"{tmp_path / 'train'}: transparent images composited on white (dataset.background): 1" in splits.notes
    assert not any("single colour" in note for note in splits.notes)


def test_images_invisible_on_background_are_noted(tmp_path: Path) -> None:
    splits = only(tmp_path, drawing("RGBA"), background=0)
    assert any("single colour on black (see dataset.background): 1" in note for note in splits.notes)
    assert (seen(splits) == 0).all()
    grey = seen(only(tmp_path, drawing("RGBA"), background=0.5))
    assert grey[0, 0, 0] == 128 and grey[2, 2, 0] == 0


@pytest.mark.parametrize("limit", [1, 0])
def test_half_transparent_pixel_is_blended(tmp_path: Path, limit: float) -> None:
    image = Image.new("RGBA", (8, 6), (200, 100, 0, 51))
    assert np.abs(seen(only(tmp_path, image, limit=limit))[0, 0].astype(int) - [244, 224, 204]).max() <= 1


def test_transparent_colour_shows_background(tmp_path: Path) -> None:
    image = Image.fromarray(np.full((6, 8, 3), 9, np.uint8))
    assert (seen(only(tmp_path, image, save={"transparency": (9, 9, 9)})) == 255).all()
    grey = Image.fromarray(np.full((6, 8), 9, np.uint8))
    assert (seen(only(tmp_path, grey, save={"transparency": 9})) == 255).all()


def test_opaque_alpha_changes_nothing(tmp_path: Path) -> None:
    image = Image.fromarray(picture())
    image.putalpha(255)
    splits = only(tmp_path, image)
    assert (seen(splits) == picture()).all() and splits.notes == []


@pytest.mark.parametrize("limit", [1, 0])
@pytest.mark.parametrize("name", ["0.png", "0.tif", "0.pgm"])
def test_16_bit_grey_is_reduced_to_8_bits(tmp_path: Path, name: str, limit: float) -> None:
    deep = np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8)
    splits = only(tmp_path, Image.fromarray(deep), name, limit, channels=1)
    assert (seen(splits)[..., 0] == deep >> 8).all()
    assert splits.notes == [f"{tmp_path / 'train'}: images reduced from 16 to 8 bits: 1"]


def test_16_bit_grey_supports_transparency_and_orientation(tmp_path: Path) -> None:
    deep = np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8)
    exif = Image.Exif()
    exif[0x0112] = 3
    got = seen(only(tmp_path, Image.fromarray(deep), save={"transparency": int(deep[0, 0]), "exif": exif}, channels=1))[..., 0]
    expected = (deep >> 8)[::-1, ::-1].copy()
    expected[-1, -1] = 255
    assert (got == expected).all()


@pytest.mark.parametrize("limit", [1, 0])
@pytest.mark.parametrize(("bits", "level"), [(bits, level) for bits in (1, 2, 4) for level in (0, 1, 2**bits - 1)])
def test_low_bit_grey_supports_transparent_level(tmp_path: Path, bits: int, level: int, limit: float) -> None:
    levels = np.arange(48).reshape(6, 8) % 2**bits
    only(tmp_path, Image.fromarray(picture()))
    (tmp_path / "train/a/0.png").write_bytes(png(levels[..., None], bits, 0, level))
    splits = load(tmp_path, limit, channels=1, background=0.2)
    assert (seen(splits)[..., 0] == np.where(levels == level, 51, levels * 255 // (2**bits - 1))).all()
    assert splits.notes == [f"{tmp_path / 'train'}: transparent images composited on grey 0.2 (dataset.background): 1"]


@pytest.mark.parametrize("limit", [1, 0])
@pytest.mark.parametrize(("kind", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_16_bit_colour_and_alpha_are_reduced_and_counted(tmp_path: Path, kind: int, channels: int, limit: float) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (6, 8, channels))
    if channels != 3:
        deep[..., -1] = 65535  # opaque alpha
    only(tmp_path, Image.fromarray(picture()))
    (tmp_path / "train/a/0.png").write_bytes(png(deep, 16, kind))
    splits = load(tmp_path, limit)
    assert (seen(splits) == (deep[..., :3] if channels > 2 else deep[..., :1]) >> 8).all()
    assert splits.notes == [f"{tmp_path / 'train'}: images reduced from 16 to 8 bits: 1"]


def test_16_bit_transparent_colour_is_rejected(tmp_path: Path) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (6, 8, 3))
    only(tmp_path, Image.fromarray(picture()))
    (tmp_path / "train/a/0.png").write_bytes(png(deep, 16, 2, *deep[0, 0]))
    with pytest.raises(DataError, match=r"train/a/0\.png: 16-bit colours.*convert it"):
        load(tmp_path)


def test_16_bit_white_is_zero_is_not_inverted(tmp_path: Path) -> None:
    deep = np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8)
    splits = only(tmp_path, Image.fromarray(deep), "0.tif", save={"tiffinfo": {262: 0}}, channels=1)
    with Image.open(tmp_path / "train/a/0.tif") as opened:
        assert opened.tag_v2[262] == 0
        raw = np.asarray(opened)
    assert (seen(splits)[..., 0] == 255 - (raw >> 8)).all()


@pytest.mark.parametrize("mode", ["I", "F"])
@pytest.mark.parametrize("limit", [1, 0])
def test_modes_without_maximum_value_are_rejected(tmp_path: Path, mode: str, limit: float) -> None:
    with pytest.raises(DataError, match=r"0\.tif: pixel values without a maximum") as caught:
        only(tmp_path, Image.fromarray(picture()[..., 0]).convert(mode), "0.tif", limit)
    assert str(tmp_path / "train/a/0.tif") in str(caught.value)


@pytest.mark.parametrize("mode", ["CMYK", "1", "L", "P", "YCbCr"])
def test_other_modes_are_converted_to_rgb(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(np.full((6, 8, 3), 255, np.uint8)).convert(mode)
    if mode == "YCbCr" and YCBCR_IS_CUT_OFF:
        with pytest.raises(DataError, match=r"0\.tif: not a readable image"):
            only(tmp_path, image, "0.tif")
        return
    assert (seen(only(tmp_path, image, "0.tif")) >= 254).all()


@pytest.mark.parametrize(("name", "save"), [("0.gif", {}), ("0.png", {}), ("0.webp", {"lossless": True}), ("0.tif", {})])
@pytest.mark.parametrize("limit", [1, 0])
def test_first_of_several_frames_is_used_and_noted(tmp_path: Path, name: str, save: dict[str, object], limit: float) -> None:
    first, second = Image.new("RGB", (8, 6), (255, 0, 0)), Image.new("RGB", (8, 6), (0, 0, 255))
    splits = only(tmp_path, first, name, limit, {"save_all": True, "append_images": [second], **save})
    assert (seen(splits) == [255, 0, 0]).all()
    assert splits.notes == [f"{tmp_path / 'train'}: images with several frames or pages, only the first of which is used: 1"]


def test_embedded_camera_preview_is_not_counted_as_frame(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 6), (200, 0, 0))
    content = io.BytesIO()
    image.save(content, "MPO", save_all=True, append_images=[Image.new("RGB", (4, 3))])
    only(tmp_path, image)
    (tmp_path / "train/a/0.png").unlink()
    (tmp_path / "train/a/0.JPG").write_bytes(content.getvalue())
    with Image.open(tmp_path / "train/a/0.JPG") as opened:
        assert opened.format == "MPO" and opened.is_animated
    assert load(tmp_path).notes == []


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "bmp", "tif", "webp", "ppm"])
@pytest.mark.parametrize("options", [{}, {"limit": 0}, {"size": 4, "crop": "resized"}])
def test_truncated_image_is_reported_before_training(tmp_path: Path, kind: str, options: dict[str, object]) -> None:
    only(tmp_path, Image.fromarray(picture(32, 32)))
    bad = tmp_path / "train/a" / f"1.{kind}"
    Image.fromarray(picture(32, 32)).save(bad)
    bad.write_bytes(bad.read_bytes()[:-90])
    with pytest.raises(DataError, match=r"not a readable image .*replace or remove it") as caught:
        load(tmp_path, **options)
    assert str(bad) in str(caught.value) and "\n" not in str(caught.value)


def test_image_above_pillow_pixel_limit_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(tmp_path, Image.fromarray(picture()))
    for most in (40, 10):  # Pillow warns above this limit, and refuses images above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        with pytest.raises(DataError, match=r"more pixels than Pillow allows.*make it smaller"):
            load(tmp_path)


def test_streamed_images_are_reread_only_after_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(tmp_path, Image.fromarray(picture()))
    image_files._inspected.clear()
    asked: list[Path] = []
    original = image_files.Decoder.inspect
    monkeypatch.setattr(
        image_files.Decoder, "inspect", lambda self, path, keep: (asked.append(path), original(self, path, keep))[1]
    )
    first = load(tmp_path, 0)
    assert sorted(asked) == [tmp_path / "test/a/0.png", tmp_path / "train/a/0.png"]
    assert load(tmp_path, 0).data_hash == first.data_hash and len(asked) == 2
    Image.fromarray(255 - picture()).save(tmp_path / "train/a/0.png")
    assert load(tmp_path, 0).data_hash != first.data_hash and len(asked) == 3
    assert load(tmp_path, 0, channels=1).data_hash and len(asked) == 5  # the number of channels has changed
