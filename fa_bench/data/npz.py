"""Your own arrays in an .npz file.

Shapes: n samples, C channels, H and W pixels, F features, T positions, O outputs.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fa_bench.data.array_checks import checked
from fa_bench.data.splits import ImageSplit, ResidentSplit, Splits
from fa_bench.data.vectors import VectorDataset, nonzero, standardise, standardise_option
from fa_bench.errors import DataError, FaBenchError, OptionError, names, nearest, printable
from fa_bench.registry.kinds import CLASSES, FEATURES, IMAGES, POSITIONS, TOKENS, VALUES
from fa_bench.registry.options import option
from fa_bench.registry.registries import DATASETS
from fa_bench.utils.lazy import torch
from fa_bench.utils.memory_limits import require_memory

T = TypeVar("T")
_REQUIRED, _VALIDATION = ("x_train", "y_train", "x_test", "y_test"), ("x_val", "y_val")
#: The memory that the name of a class or token takes while the arrays are checked.
_BYTES_OF_NAME = 200


@DATASETS.register("npz")
@dataclasses.dataclass(eq=False)
class Npz(VectorDataset):
    """Your own arrays in an .npz file: x_train, y_train, x_test, y_test, and optionally x_val and y_val.

    Inputs are images, features or tokens. Images have the shape (n, C, H, W) or (n, H, W) and are integers from 0 to 255, bools,
    or floats from 0 to 1. Features are floats of shape (n, F). Tokens are integers of more than 8 bits, of shape (n, T).

    Targets are classes, values (not for tokens) or, for tokens, one class per position. Classes are whole numbers that start at
    0, of shape (n,) or (n, 1), and values are floats of shape (n,) or (n, O). Classes per position are whole numbers of shape (n,
    T); positions labelled -100 are ignored.

    The types and shapes of x_train and y_train determine the kinds of inputs and targets, and the other arrays must match them.
    The vocabulary size is one more than the largest token or target in any array. With `standardise`, images are standardised per
    channel.

    numpy.savez("my.npz", x_train=..., y_train=..., x_test=..., y_test=...) writes such a file. Files with pickled objects are
    refused, since reading them could execute code.
    """

    path: str = option("", "the .npz file")
    standardise: bool = standardise_option()

    @property
    def inputs(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The kind of the inputs, which is determined from the file's headers."""
        return self._kinds[0]

    @property
    def targets(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The kind of the targets."""
        return self._kinds[1]

    @property
    def _kinds(self) -> tuple[str, str]:
        return self._opened(lambda path, state: kinds(path, state))

    def _opened(self, read: Callable[[Path, tuple[int, int]], T]) -> T:
        if not self.path:
            raise OptionError("dataset.path", "='': name the .npz file, for example dataset.path=my.npz")
        path = Path(self.path)
        try:
            state = path.stat()
            return read(path, (state.st_mtime_ns, state.st_size))
        except FaBenchError:
            raise
        except (OSError, ValueError, zipfile.BadZipFile, KeyError, EOFError) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0][:150] if str(error) else type(error).__name__
            raise DataError(f"dataset.path={printable(self.path)}: cannot be read as .npz ({printable(reason)})") from None

    def read(self, data_dir: Path, device: torch.device) -> Splits:
        def load(path: Path, state: tuple[int, int]) -> dict[str, np.ndarray]:
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in (*_REQUIRED, *_VALIDATION) if name in file.files}

        _ = self._kinds  # raises a DataError if arrays are missing
        arrays = self._opened(load)
        parts: dict[str, tuple[Any, Any]] = {
            "train": (arrays["x_train"], arrays["y_train"]),
            "test": (arrays["x_test"], arrays["y_test"]),
        }
        notes = []
        if "x_val" in arrays and self.validation > 0:
            parts["validation"] = arrays["x_val"], arrays["y_val"]
            notes.append("x_val: used as the validation set; no training samples are held out")
        elif "x_val" in arrays:
            notes.append("x_val: skipped, because dataset.validation=0")
        count = self._names(parts)
        of = [f"output{number}" if self.targets == VALUES else str(number) for number in range(count)]
        splits = self._images(parts, of, device) if self.inputs == IMAGES else self.splits_of(parts, of, device)
        splits.notes = [*notes, *splits.notes]
        return splits

    def _names(self, parts: dict[str, tuple[Any, Any]]) -> int:
        """The number of classes, outputs or tokens."""
        if self.targets == VALUES:
            y = parts["train"][1]
            return y.shape[1] if y.ndim > 1 else 1
        with_tokens = [x for x, _ in parts.values()] if self.inputs == TOKENS else []
        count = 1 + max(_largest(array) for array in (*(y for _, y in parts.values()), *with_tokens))
        what = f"dataset={self.name}: the largest label or token is {count - 1}; its {count} classes or tokens"
        require_memory(_BYTES_OF_NAME * count, what)
        return count

    def _images(self, parts: dict[str, tuple[Any, Any]], of: list[str], device: torch.device) -> Splits:
        """The splits of an image dataset, stored as 8-bit integers; for features and tokens, see `VectorDataset.splits_of`."""
        notes: list[str] = []
        digest, made = hashlib.sha256(), {}
        try:
            for name in (name for name in parts if name != "train"):
                arrays = (*parts["train"], *parts[name], of)
                train_x, train_y, x, y, _ = checked(arrays, notes, IMAGES, self.targets, name)
                made |= {"train": (train_x, train_y), name: (x, y)}
        except ValueError as error:
            raise DataError(f"dataset={self.name}: {error}") from None
        splits = {}
        for name, (x, y) in made.items():
            digest.update(x.data)
            digest.update(y.data)
            channels = x.shape[1]
            splits[name] = ResidentSplit(
                torch.from_numpy(x), torch.from_numpy(y), [0.0] * channels, [1.0] * channels, False, device
            )
        return Splits(
            splits["train"],
            splits.get("validation"),
            splits["test"],
            of,
            tuple(splits["train"].images.shape[1:]),
            digest.hexdigest(),
            list(dict.fromkeys(notes)),
        )

    def finished(self, splits: Splits) -> Splits:
        if self.standardise and self.inputs == FEATURES:
            standardise(splits)
        elif self.standardise and self.inputs == IMAGES and isinstance(splits.train, ResidentSplit):
            pixels = splits.train.images.double() / 255
            mean, std = pixels.mean((0, 2, 3)), nonzero(pixels.mean((0, 2, 3)), pixels.std((0, 2, 3), correction=0))
            for split in (splits.train, splits.validation, splits.test):
                if isinstance(split, ImageSplit):
                    split.mean, split.std = mean.tolist(), std.tolist()
        return splits


def _largest(array: np.ndarray) -> int:
    """The largest number in an array, or 0 if all are negative. Entries that `checked` will refuse, such as NaN, are ignored."""
    if array.dtype.kind not in "biuf":
        return 0
    if array.dtype.kind == "f":
        array = array[abs(array) < 2**53]
    return max(int(array.max()), 0) if array.size else 0


@functools.lru_cache(maxsize=8)
def kinds(path: Path, state: tuple[int, int]) -> tuple[str, str]:
    """The kinds of the inputs and targets in a file, determined from the headers of its arrays. The headers are read again only
    if the file's `state` has changed.

    Raises:
        DataError: if an array is missing, if the type and shape of x_train or y_train do not determine its kind, or if the
            targets of tokens are values.
    """
    where = f"dataset.path={printable(str(path))}"
    with zipfile.ZipFile(path) as archive:
        present = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        lacking = [name for name in _REQUIRED if name not in present]
        lacking += [name for name in _VALIDATION if name not in present and {*_VALIDATION} & {*present}]
        if lacking:
            raise DataError(f"{where}: lacks {names(lacking)}{nearest(lacking[0], present)} (arrays: {names(present) or 'none'})")
        (shape, dtype), (of_y, type_of_y) = (_header(archive, name) for name in ("x_train", "y_train"))
    for name, each in (("x_train", dtype), ("y_train", type_of_y)):
        if each.kind not in "biuf":
            raise DataError(f"{where}: {name} is of type {each}, not numbers; pickled objects are never read")
    if len(shape) in (3, 4):
        inputs = IMAGES
    elif len(shape) == 2 and dtype.kind == "f":
        inputs = FEATURES
    elif len(shape) == 2 and dtype.kind in "iu" and dtype.itemsize > 1:
        inputs = TOKENS
    else:
        raise DataError(
            f"{where}: x_train is {dtype} of shape {shape} (allowed: images (n, C, H, W) or (n, H, W); features, "
            "floats (n, F); tokens, whole numbers of more than 8 bits (n, T)); store features as floats"
        )
    if type_of_y.kind == "f" and inputs == TOKENS:
        raise DataError(
            f"{where}: x_train is {dtype} of shape {shape}, which are tokens, but y_train is {type_of_y}; values are "
            "not allowed as targets of tokens; store x_train as floats if it contains features, or y_train as whole numbers "
            "if it contains classes"
        )
    if type_of_y.kind == "f":
        targets = VALUES
    elif len(of_y) == 1 or (len(of_y) == 2 and of_y[1] == 1 and (inputs != TOKENS or shape[1] != 1)):
        targets = CLASSES
    elif inputs == TOKENS and of_y == shape:
        targets = POSITIONS
    else:
        raise DataError(
            f"{where}: y_train is {type_of_y} of shape {of_y} (allowed: classes, whole numbers (n,); values, floats "
            f"(n,) or (n, O){f'; for each token {shape}' if inputs == TOKENS else ''})"
        )
    return inputs, targets


def _header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """The shape and type of an array in an .npz file."""
    with archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    return shape, dtype
