"""Check the arrays of a dataset, and convert images to 8 bits if that is unambiguous.

Shapes: n samples, C channels, H and W pixels, F features, T positions, O outputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fa_bench.registry.kinds import CLASSES, FEATURES, IMAGES, NOUNS, POSITIONS, VALUES

#: Fractions outside the range 0 to 1 by up to the first number are accepted as rounding errors. With 8 bits, images whose maximum
#: is below the second number would have at most five grey levels.
_ROUNDING, _ALMOST_BLACK = 1e-3, 4 / 255
_ALLOWED = "allowed: whole numbers from 0 to 255, fractions from 0 to 1, True and False"


def checked(
    arrays: Any, notes: list[str], inputs: str = IMAGES, targets: str = CLASSES, other: str = "test"
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Check and convert training inputs and targets, test inputs and targets, and the names of classes, outputs or tokens.

    Args:
        arrays: these four arrays and the list of names. Images are whole numbers from 0 to 255, floats from 0 to 1, or bool, (n,
            C, H, W) or (n, H, W); features are finite numbers, (n, F); tokens are non-negative whole numbers below the number of
            names, (n, T). Labels are class indices, which may be stored as floats or as (n, 1); values are finite numbers, (n,)
            or (n, O); positions are labels for each token, (n, T), and may be negative for tokens that the objective ignores.
        notes: a sentence is appended to this list for each array of images converted from floats, and another if some classes
            have no training sample.
        inputs, targets: their kinds (`fa_bench.registry.kinds`).
        other: what messages call the part that is not for training.

    Returns:
        The four arrays, contiguous, and the list of names. Images are uint8 (n, C, H, W), features float32, tokens, labels and
        positions int64, and values float32 (n, O).

    Raises:
        ValueError: if an array or the list of names is invalid; the message names it and the problem.
    """
    if not isinstance(arrays, (tuple, list)) or len(arrays) != 5:
        raise ValueError(
            "arrays() should return training inputs and targets, test inputs and targets, and names; it returned "
            f"{f'{len(arrays)} values' if isinstance(arrays, (tuple, list)) else type(arrays).__name__}"
        )
    train_x, train_y, test_x, test_y, names = arrays
    if isinstance(names, str) or not hasattr(names, "__iter__"):
        raise ValueError(f"the names are {names!r:.40}, but should be a list of names of classes, outputs or tokens")
    classes = [str(name) for name in names]
    one, several = NOUNS[inputs]

    def checked_inputs(given: Any, part: str) -> np.ndarray:
        if inputs == IMAGES:
            return _images(given, part, notes)
        return _features(given, part) if inputs == FEATURES else _tokens(given, part, len(classes))

    def checked_targets(given: Any, part: str, of: np.ndarray) -> np.ndarray:
        if targets == VALUES:
            return _values(given, part, len(classes), len(of), several)
        if targets == POSITIONS:
            return _positions(given, part, len(classes), of.shape)
        labels = _labels(given, part, len(classes), one)
        check_labels(of, labels, classes, part, one)
        if len(lacking := sorted({*range(len(classes))} - {*labels.tolist()})) and part == "training":
            notes.append(
                f"no training {one} has label "
                f"{', '.join(f'{k}' if classes[k] == str(k) else f'{k} ({classes[k]})' for k in lacking[:5])}"
                f"{', ...' if len(lacking) > 5 else ''}{'' if lacking[0] else '; labels count from 0'}"
            )
        return labels

    train_x, test_x = (checked_inputs(x, part) for x, part in ((train_x, "training"), (test_x, other)))
    train_y = checked_targets(train_y, "training", train_x)
    test_y = checked_targets(test_y, other, test_x)
    if train_x.shape[1:] != test_x.shape[1:]:
        raise ValueError(f"training {several} have shape {train_x.shape[1:]}, but {other} {several} have {test_x.shape[1:]}")
    return train_x, train_y, test_x, test_y, classes


def check_labels(inputs: np.ndarray, labels: np.ndarray, classes: list[str], part: str, noun: str = "image") -> None:
    """Raise a ValueError unless every sample has one label from 0 to len(classes) - 1; its message refers to a sample as
    `noun`."""
    if len(inputs) != len(labels):
        raise ValueError(f"{len(inputs)} {part} {noun}s have {len(labels)} labels, not one label for each {noun}")
    wrong = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(wrong):
        from_one = labels.min() == 1 and labels.max() == len(classes)
        raise ValueError(
            f"{part} {noun} {wrong[0]} has label {labels[wrong[0]]}, out of range for {len(classes)} classes "
            f"(allowed: 0 to {len(classes) - 1}{'; they count from 1: subtract 1' if from_one else ''})"
        )


def _images(given: Any, part: str, notes: list[str]) -> np.ndarray:
    images = _array(given, f"{part} images")
    shape = images.shape
    if 0 in shape or not shape:
        raise ValueError(f"there are no {part} images (shape {shape})")
    if images.ndim == 3:
        images = images[:, None]
    if images.ndim != 4:
        raise ValueError(
            f"{part} images have shape {shape} (allowed: (n, channels, height, width), or (n, height, width) for grey)"
        )
    _, first, second, last = images.shape
    # The channels probably come last if the two axes before the last one are longer than 4 and the last one has length 3. A last
    # axis of length 1 or 4 is assumed to hold the channels only if the two axes before it also have equal lengths.
    if first > 4 and second > 4 and (last == 3 or (last in (1, 4) and first == second)):
        raise ValueError(
            f"{part} images have shape {shape}, which looks like (n, height, width, channels); use images.transpose(0, 3, 1, 2)"
        )
    return np.ascontiguousarray(_eight_bits(images, f"{part} images", notes))


def _eight_bits(images: np.ndarray, what: str, notes: list[str]) -> np.ndarray:
    if images.dtype == np.bool_:
        return images.astype(np.uint8) * np.uint8(255)
    low, high = images.min(), images.max()
    problem = f"{what} are {images.dtype} from {low:.4g} to {high:.4g}"
    if not np.isfinite(low) or not np.isfinite(high):
        raise ValueError(f"{what} are {images.dtype} with values that are not finite; {_ALLOWED}")
    if images.dtype.kind in "iu":
        if low < 0 or high > 255:
            bits = "; for 16-bit images use images >> 8" if images.dtype == np.uint16 else ""
            raise ValueError(f"{problem}; {_ALLOWED}{bits}")
        if high == 1:
            raise ValueError(f"{problem}, which is almost black; multiply by 255 or convert to bool")
        return images.astype(np.uint8, copy=False)
    if 0 < high < _ALMOST_BLACK:
        raise ValueError(
            f"{problem}, which would be almost black with 8 bits; allowed fractions are from 0 to 1: multiply by 255 "
            "if they were divided twice"
        )
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        rounded = low >= 0 and 1 < high <= 255
        hint = (
            "use images.round().astype('uint8') if the range is 0 to 255"
            if rounded
            else "rescale to [0, 1] by (images - low) / (high - low), with the same low and high for training and test images; "
            "dataset.mean and dataset.std do the normalisation"
        )
        raise ValueError(f"{problem}; {_ALLOWED}; {hint}")
    notes.append(f"{what}: {images.dtype} from {low:.3g} to {high:.3g}, converted to 8 bits")
    # Convert one image at a time, because all images in float64 would take eight times the memory of the result.
    result = np.empty(images.shape, np.uint8)
    for source, target in zip(images, result, strict=True):
        target[...] = np.rint(source.astype(np.float64).clip(0, 1) * 255)
    return result


def _features(given: Any, part: str) -> np.ndarray:
    original = _array(given, f"{part} features")
    features = _float32(original)
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"{part} features have shape {features.shape} (allowed: (n, features))")
    if not np.isfinite(features).all():
        row, column = np.argwhere(~np.isfinite(features))[0]
        problem = "too large for float32" if np.isfinite(original[row, column]) else "not a finite number"
        raise ValueError(f"{part} features: row {row}, column {column} is {original[row, column]}, {problem}")
    return np.ascontiguousarray(features)


def _tokens(given: Any, part: str, vocabulary: int) -> np.ndarray:
    tokens = _array(given, f"{part} tokens")
    if tokens.ndim != 2 or 0 in tokens.shape or tokens.dtype.kind not in "iu":
        raise ValueError(f"{part} tokens are {tokens.dtype} of shape {tokens.shape} (allowed: whole numbers (n, length))")
    wrong = np.argwhere((tokens < 0) | (tokens >= vocabulary))
    if len(wrong):
        row, column = wrong[0]
        raise ValueError(
            f"{part} sequence {row} has token {tokens[row, column]} at position {column} (allowed: 0 to {vocabulary - 1})"
        )
    return np.ascontiguousarray(tokens.astype(np.int64))


def _positions(given: Any, part: str, vocabulary: int, shape: tuple[int, ...]) -> np.ndarray:
    targets = _array(given, f"{part} targets")
    if targets.shape != shape or targets.dtype.kind not in "iu":
        raise ValueError(
            f"{part} targets are {targets.dtype} of shape {targets.shape}, not a whole number for each token {shape}"
        )
    wrong = np.argwhere(targets >= vocabulary)
    if len(wrong):
        row, column = wrong[0]
        raise ValueError(
            f"{part} sequence {row} has target {targets[row, column]} at position {column} (allowed: at most {vocabulary - 1})"
        )
    return np.ascontiguousarray(targets.astype(np.int64))


def _labels(given: Any, part: str, classes: int, noun: str) -> np.ndarray:
    labels = _array(given, f"{part} labels", text=" (numpy.unique(labels, return_inverse=True)[1] converts names)")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        one_hot = "; use labels.argmax(1) if they are one-hot" if labels.ndim == 2 and labels.shape[1] == classes else ""
        raise ValueError(f"{part} labels have shape {labels.shape}, not (n,){one_hot}")
    if labels.dtype.kind == "f":
        wrong = np.flatnonzero(~((abs(labels) < 2**53) & (labels == np.rint(labels))))
        if len(wrong):
            raise ValueError(
                f"{part} {noun} {wrong[0]} has label {labels[wrong[0]]:g}, which is not a class index "
                f"(allowed: 0 to {classes - 1})"
            )
    return np.ascontiguousarray(labels.astype(np.int64))


def _values(given: Any, part: str, outputs: int, rows: int, nouns: str) -> np.ndarray:
    values = _float32(_array(given, f"{part} targets"))
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or values.shape[1] != outputs:
        raise ValueError(f"{part} targets have shape {values.shape}, not (n, {outputs}), with a column for each named output")
    if not outputs:
        raise ValueError(f"{part} targets have shape {values.shape}, which has no column")
    if len(values) != rows:
        raise ValueError(f"{rows} {part} {nouns} have {len(values)} rows of targets, not one for each of them")
    if not np.isfinite(values).all():
        raise ValueError(f"{part} targets have values that are not finite, or too large for float32")
    return np.ascontiguousarray(values)


def _float32(array: np.ndarray) -> np.ndarray:
    """The array in single precision, in which numbers that are too large become infinite."""
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def _array(given: Any, what: str, text: str = "") -> np.ndarray:
    """Convert `given` to an array, and raise a ValueError unless it contains real numbers or booleans."""
    try:
        array = np.asarray(given)
    except (ValueError, TypeError, RuntimeError) as error:  # rows of different lengths, or a tensor on another device
        raise ValueError(f"{what} are not an array ({str(error).splitlines()[0]:.100})") from None
    if array.dtype.kind not in "biuf":
        hint = text if array.dtype.kind in "US" else ""
        raise ValueError(f"{what} are of type {array.dtype}, not numbers{hint}")
    return array
