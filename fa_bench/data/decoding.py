"""One image file as a viewer shows it: turned upright, its first frame, transparency over a background, 8 bits a channel."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import stat
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fa_bench.data.crops import ResizedCrop
from fa_bench.errors import DataError

#: Of EXIF: the tag, and how a camera held in each of its ways is turned upright, by the name of Pillow's transposition.
_ORIENTATION = 0x0112
_UPRIGHT = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
            8: "ROTATE_90"}
#: Of TIFF: bits a channel, and whether 0 is white.
_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
#: Of PNG: the factors by which Pillow scales grey levels of 2 and 4 bits, but not the level that is declared transparent.
_GREY_STEPS = {"L;2": 85, "L;4": 17}


@dataclasses.dataclass
class Facts:
    """What was found in one image file, or the sums over several.

    Attributes:
        turned: whether its EXIF orientation turned it.
        transparent: whether something shows through.
        vanished: whether nothing of it is seen on the background.
        frames: whether it has more frames or pages than the first.
        deep: whether it has more than 8 bits a channel, of which the upper ones are kept.
    """

    turned: int = 0
    transparent: int = 0
    vanished: int = 0
    frames: int = 0
    deep: int = 0


@dataclasses.dataclass
class Decoder:
    """Reads one image file as uint8 (C, H, W).

    Attributes:
        channels: 3 for colour, 1 for grey.
        height, width: of what is returned.
        resize: bring images of another size to it; else they are refused.
        background: grey, 0 to 255, that transparent pixels are laid over.
    """

    channels: int
    height: int
    width: int
    resize: bool = False
    background: int = 255

    def __call__(self, path: Path, rng: np.random.Generator | None = None) -> np.ndarray:
        """Decode a file, with augmentation that `rng` decides where the decoder has one; raises DataError naming it."""
        with _naming(path):
            return self._array(self._bring(self._seen(path, path, Facts()), rng))

    def inspect(self, path: Path, keep: bool) -> tuple[np.ndarray | None, Facts, bytes]:
        """Read and decode a file once: the image where it is to be kept, what was found in it, and the SHA-256 of its bytes.

        Raises:
            DataError: naming the file.
        """
        facts = Facts()
        with _naming(path):
            content = path.read_bytes()
            image = self._seen(path, io.BytesIO(content), facts)
            return self._array(self._bring(image, None)) if keep else None, facts, hashlib.sha256(content).digest()

    def _array(self, image: Any) -> np.ndarray:
        array = np.asarray(image)
        # Contiguous, as images that stay on the device are: a batch with channels last would take other kernels and other bits,
        # and oneDNN's for few channels write out of bounds (torch 2.15, seen with a 7x7 convolution of 4 channels at 224 pixels).
        return array[None] if self.channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))

    def _seen(self, path: Path, source: Path | io.BytesIO, facts: Facts) -> Any:
        """The PIL image in the channels asked for, as a viewer shows it, at its own size; `facts` is filled in."""
        from PIL import Image

        with Image.open(source) as opened:
            # A camera's MPO holds its preview, or the other eye's picture, behind the picture.
            facts.frames = int(opened.format != "MPO" and getattr(opened, "is_animated", False))
            raw, deep = _stored(opened)
            tags = getattr(opened, "tag_v2", {})  # of a TIFF, which Pillow turns as it loads it
            turned = tags.get(_ORIENTATION) in _UPRIGHT
            opened.load()
            facts.deep = int(deep)
            if opened.format == "PNG" and "transparency" in opened.info:
                if deep and opened.mode == "RGB":
                    raise DataError(f"{path}: colours of 16 bits, one of which is transparent; Pillow does not read these: "
                                    "convert it to 8 bits, or to an alpha channel")
                if raw in _GREY_STEPS:
                    opened.info["transparency"] *= _GREY_STEPS[raw]
            image = upright(opened)
            facts.turned = int(turned or image is not opened)
            alpha = None
            if image.mode[0] in "IF":
                facts.deep = 1
                image, alpha = self._eight_bits(path, opened, image)
            if not self.resize and image.size != (self.width, self.height):
                raise DataError(f"{path}: {image.height}x{image.width} pixels, others have {self.height}x{self.width}; "
                                "set dataset.size to bring all to one size")
            mode = "RGB" if self.channels == 3 else "L"
            if alpha is None and (image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info):
                image = image.convert("RGBA")
                alpha = image.getchannel("A")
            if alpha is None or alpha.getextrema()[0] == 255:
                return image.convert(mode)
            facts.transparent = 1
            canvas: Any = Image.new("RGB", image.size, (self.background,) * 3)
            canvas.paste(image.convert("RGB"), mask=alpha)
            facts.vanished = int(all(low == high for low, high in canvas.getextrema()))
            return canvas.convert(mode)

    def _eight_bits(self, path: Path, opened: Any, image: Any) -> tuple[Any, Any]:
        """A grey image of more than 8 bits in 8, over its whole range as viewers show it, and its alpha or None."""
        from PIL import Image

        tags = getattr(opened, "tag_v2", {})
        if not (opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format in ("PNG", "PPM"))):
            raise DataError(f"{path}: pixels without a largest value (mode {opened.mode}), so that nothing says what is white; "
                            "convert it to 8 or 16 bits a channel")
        values = np.asarray(image)
        grey = (values >> (int(tags.get(_BITS, (16,))[0]) - 8)).astype(np.uint8)
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            grey = 255 - grey
        clear = opened.info.get("transparency")
        alpha = None if clear is None else Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
        return Image.fromarray(grey), alpha

    def _bring(self, image: Any, rng: np.random.Generator | None) -> Any:
        """The PIL image at the size to be returned."""
        from PIL import Image, ImageOps

        if not self.resize or image.size == (self.width, self.height):
            return image
        return ImageOps.fit(image, (self.width, self.height), Image.Resampling.BILINEAR)


class CroppingDecoder(Decoder):
    """Reads a random part of an image, or its centre, at one size.

    Args:
        channels, height, width, background: as for Decoder.
        crop: what cuts the image.
    """

    def __init__(self, channels: int, height: int, width: int, background: int, crop: ResizedCrop) -> None:
        super().__init__(channels, height, width, True, background)
        self.crop = crop

    def _bring(self, image: Any, rng: np.random.Generator | None) -> Any:
        return self.crop.decode_fixed(image) if rng is None else self.crop.decode_random(image, rng)


def _stored(opened: Any) -> tuple[str, bool]:
    """How the pixels of a file that is not yet loaded are stored: Pillow's raw mode, and whether with 16 bits a channel."""
    arguments = opened.tile[0][3] if opened.tile else ""
    raw, *more = arguments if isinstance(arguments, tuple) else (arguments,)
    return str(raw), ";16" in str(raw) or (opened.format == "PPM" and more[:1] > [255])


def upright(image: Any) -> Any:
    """A loaded PIL image turned as its EXIF orientation says; the image itself where that says nothing that can be read."""
    from PIL import Image

    try:
        way = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF raises errors of many kinds; viewers show the picture as it is stored
        way = None
    return image if way is None else image.transpose(Image.Transpose[way])


def upright_size(path: Path) -> tuple[int, int]:
    """(height, width) of an image file, as a viewer shows it."""
    from PIL import Image

    with _naming(path), Image.open(path) as opened:
        opened.load()  # a PNG may have its orientation behind its pixels
        image = upright(opened)
        return image.height, image.width


def regular(path: Path) -> os.stat_result:
    """What the system says of a file; raises DataError naming it where it is none."""
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(f"{path}: not a readable image ({error.strerror}); replace or remove it") from None
    if not stat.S_ISREG(found.st_mode):  # a pipe would make the run wait for ever
        raise DataError(f"{path}: not a readable image (a folder, pipe or device); replace or remove it")
    return found


def quiet() -> None:
    """Make Pillow refuse an image that would fill the memory, instead of warning, and not warn of damaged metadata."""
    from PIL import Image

    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def total(found: Iterable[Facts]) -> Facts:
    """The sums of what was found in several files."""
    sums = Facts()
    for facts in found:
        for field in dataclasses.fields(Facts):
            setattr(sums, field.name, getattr(sums, field.name) + getattr(facts, field.name))
    return sums


def said(facts: Facts, part: str, background: int) -> list[str]:
    """Which images of `part` are not trained on as they are stored, a sentence for each reason."""
    shade = {0: "black", 255: "white"}.get(background, f"grey {background / 255:.2g}")
    lines = [
        (facts.turned, "images rotated by their EXIF orientation"),
        (facts.transparent, f"transparent images composited on {shade} (dataset.background)"),
        (facts.vanished, f"transparent images that are a single colour on {shade} (see dataset.background)"),
        (facts.frames, "images with several frames or pages, only the first of which is used"),
        (facts.deep, "images reduced from 16 to 8 bits"),
    ]
    return [f"{part}: {what}: {number:,}" for number, what in lines if number]


class _naming:
    """Turns whatever an image reader raises into a DataError that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        regular(self.path)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, DataError):
            return
        if "DecompressionBomb" in type(error).__name__:
            raise DataError(f"{self.path}: more pixels than Pillow opens without asking, {str(error).split(',')[0].lower()}; "
                            "make it smaller or remove it") from None
        why = "cut off" if "truncated" in str(error).lower() else getattr(error, "strerror", None) or type(error).__name__
        raise DataError(f"{self.path}: not a readable image ({why}); replace or remove it") from None
