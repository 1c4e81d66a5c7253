"""Decode image files as a viewer shows them: upright, only the first frame, on a background, and with 8 bits per channel."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import stat
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fa_bench.data.crops import ResizedCrop
from fa_bench.errors import DataError

#: The EXIF tag for the orientation, and for each orientation, the Pillow transposition that turns the image upright.
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
#: The TIFF tag for the bits per channel, the tag for the meaning of 0, and its value if 0 is white.
_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
#: The factors by which Pillow scales the grey levels of PNG images with 1, 2 and 4 bits. Pillow does not scale the level that
#: marks transparent pixels, except for 1-bit images since version 12.1.
_GREY_STEPS = {"1": 255, "L;2": 85, "L;4": 17}


#: The notes that an image file may get, and the text of each.
NOTES = {
    "rotated": "images rotated by their EXIF orientation",
    "transparent": "transparent images composited on {shade} (dataset.background)",
    "vanished": "transparent images that are a single colour on {shade} (see dataset.background)",
    "frames": "images with several frames or pages, only the first of which is used",
    "deep": "images reduced from 16 to 8 bits",
}


@dataclasses.dataclass
class Decoder:
    """Reads one image file into a uint8 array (C, H, W).

    Attributes:
        channels: 3 for colour, 1 for greyscale.
        height, width: the height and width of the result.
        resize: whether images of other sizes are cropped to the right aspect ratio and resized; otherwise they are refused.
        background: grey level, 0 to 255, behind transparent pixels.
        crop: how to crop and resize each image; None: as specified by `resize`.
    """

    channels: int
    height: int
    width: int
    resize: bool = False
    background: int = 255
    crop: ResizedCrop | None = None

    def __call__(self, path: Path, rng: np.random.Generator | None = None) -> np.ndarray:
        """Decode a file, and augment the image with `rng` if `rng` and `crop` are given; raises a DataError that names the file
        if it cannot be decoded."""
        with errors_named(path):
            return self._array(self._fit(self._open(path, path, Counter()), rng))

    def inspect(self, path: Path, keep: bool) -> tuple[np.ndarray | None, Counter[str], bytes]:
        """Read and decode a file once.

        Returns:
            The image (None unless `keep` is true), a count of 1 for each note in `NOTES` that applies, and the SHA-256 of the
            file.

        Raises:
            DataError: if the file cannot be decoded; the message names it.
        """
        notes: Counter[str] = Counter()
        with errors_named(path):
            content = path.read_bytes()
            image = self._open(path, io.BytesIO(content), notes)
            return self._array(self._fit(image, None)) if keep else None, notes, hashlib.sha256(content).digest()

    def _array(self, image: Any) -> np.ndarray:
        array = np.asarray(image)
        # Make the array contiguous, like the images of a ResidentSplit. Batches with channels last would use other kernels, which
        # round differently. In addition, some of oneDNN's kernels for channels-last batches write out of bounds (torch 2.15, seen
        # with a 7x7 convolution of 4 channels at 224 pixels).
        return array[None] if self.channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))

    def _open(self, path: Path, source: Path | io.BytesIO, notes: Counter[str]) -> Any:
        """The PIL image as a viewer shows it, with this decoder's channels and at the image's original size. Counts each note
        that applies in `notes`."""
        from PIL import Image

        with Image.open(source) as opened:
            # The other frames of an MPO file from a camera are a preview or the picture for the other eye.
            notes["frames"] += int(opened.format != "MPO" and getattr(opened, "is_animated", False))
            raw, deep = _storage(opened)
            tags = getattr(opened, "tag_v2", {})  # a TIFF's tags; Pillow rotates a TIFF while loading it
            rotated = tags.get(_ORIENTATION) in _UPRIGHT
            opened.load()
            if opened.format == "PNG" and "transparency" in opened.info:
                if deep and opened.mode == "RGB":
                    raise DataError(
                        f"{path}: 16-bit colours with one colour marked as transparent, which Pillow cannot read; "
                        "convert it to 8 bits, or use an alpha channel"
                    )
                if raw in _GREY_STEPS:
                    opened.info["transparency"] = min(255, opened.info["transparency"] * _GREY_STEPS[raw])
            image = upright(opened)
            notes["rotated"] += int(rotated or image is not opened)
            alpha = None
            notes["deep"] += int(deep or image.mode[0] in "IF")
            if image.mode[0] in "IF":
                image, alpha = self._eight_bits(path, opened, image)
            if not self.resize and image.size != (self.width, self.height):
                raise DataError(
                    f"{path}: {image.height}x{image.width} pixels, but the other images have {self.height}x{self.width}; "
                    "set dataset.size to resize all images"
                )
            mode = "RGB" if self.channels == 3 else "L"
            if alpha is None and (image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info):
                image = image.convert("RGBA")
                alpha = image.getchannel("A")
            if alpha is None or alpha.getextrema()[0] == 255:
                return image.convert(mode)
            notes["transparent"] += 1
            canvas: Any = Image.new("RGB", image.size, (self.background,) * 3)
            canvas.paste(image.convert("RGB"), mask=alpha)
            notes["vanished"] += int(all(low == high for low, high in canvas.getextrema()))
            return canvas.convert(mode)

    def _eight_bits(self, path: Path, opened: Any, image: Any) -> tuple[Any, Any]:
        """Reduce a grey image of more than 8 bits to 8 bits, so that its full range becomes 0 to 255. Returns the image and its
        alpha channel (None if no level is marked as transparent)."""
        from PIL import Image

        tags = getattr(opened, "tag_v2", {})
        if not (opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format in ("PNG", "PPM"))):
            raise DataError(
                f"{path}: pixel values without a maximum (mode {opened.mode}), so white is undefined; "
                "convert it to 8 or 16 bits per channel"
            )
        values = np.asarray(image)
        grey = (values >> (int(tags.get(_BITS, (16,))[0]) - 8)).astype(np.uint8)
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            grey = 255 - grey
        clear = opened.info.get("transparency")
        alpha = None if clear is None else Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
        return Image.fromarray(grey), alpha

    def _fit(self, image: Any, rng: np.random.Generator | None) -> Any:
        """The PIL image, cropped and resized to the size of the result if necessary."""
        from PIL import Image, ImageOps

        if self.crop is not None:
            return self.crop.decode_fixed(image) if rng is None else self.crop.decode_random(image, rng)
        if not self.resize or image.size == (self.width, self.height):
            return image
        return ImageOps.fit(image, (self.width, self.height), Image.Resampling.BILINEAR)


def _storage(opened: Any) -> tuple[str, bool]:
    """Pillow's raw mode for an opened image that is not loaded yet, and whether the image has 16 bits per channel."""
    arguments = opened.tile[0][3] if opened.tile else ""
    raw, *more = arguments if isinstance(arguments, tuple) else (arguments,)
    return str(raw), ";16" in str(raw) or (opened.format == "PPM" and more[:1] > [255])


def upright(image: Any) -> Any:
    """A loaded PIL image rotated or mirrored according to its EXIF orientation, or the same image if it is upright."""
    from PIL import Image

    try:
        transposition = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF data raise many kinds of errors; viewers ignore them
        transposition = None
    return image if transposition is None else image.transpose(Image.Transpose[transposition])


def upright_size(path: Path) -> tuple[int, int]:
    """(height, width) of an image file, as a viewer shows it."""
    from PIL import Image

    with errors_named(path), Image.open(path) as opened:
        opened.load()  # a PNG may store its orientation after its pixels
        image = upright(opened)
        return image.height, image.width


def regular(path: Path) -> os.stat_result:
    """The status of a regular file; for anything else, raises a DataError that names the path."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: not a readable image ({error.strerror}); replace or remove it") from None
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would block forever
        raise DataError(f"{path}: not a readable image (a folder, pipe or device); replace or remove it")
    return status


def configure_warnings() -> None:
    """Make Pillow refuse very large images instead of only warning about them, and suppress its warnings about damaged
    metadata."""
    from PIL import Image

    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def describe(notes: Counter[str], part: str, background: int) -> list[str]:
    """One sentence for each note that applies to images of `part`, with the number of those images."""
    shade = {0: "black", 255: "white"}.get(background, f"grey {background / 255:.2g}")
    return [f"{part}: {text.format(shade=shade)}: {notes[key]:,}" for key, text in NOTES.items() if notes[key]]


@contextlib.contextmanager
def errors_named(path: Path) -> Iterator[None]:
    """Convert any error from an image reader to a DataError that names the file."""
    regular(path)
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        if "DecompressionBomb" in type(error).__name__:
            raise DataError(
                f"{path}: more pixels than Pillow allows, {str(error).split(',')[0].lower()}; make it smaller or remove it"
            ) from None
        why = "truncated" if "truncated" in str(error).lower() else getattr(error, "strerror", None) or type(error).__name__
        raise DataError(f"{path}: not a readable image ({why}); replace or remove it") from None
