"""Users' own arrays are accepted if their meaning is unambiguous; others are refused with a one-line error that says what is
wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fa_bench.data.array_checks import checked
from fa_bench.data.base import ArrayDataset
from fa_bench.errors import DataError

NOWHERE, CPU = Path("/nowhere"), torch.device("cpu")
X = np.random.default_rng(0).integers(0, 256, (6, 1, 5, 4), dtype=np.uint8)
X.flat[:2] = 0, 255
Y = np.array([0, 1, 2, 0, 1, 2])


def load(x: object = X, y: object = Y, test_x: object = X, test_y: object = Y, classes: object = ("a", "b", "c")):
    class Own(ArrayDataset):
        name = "own"

        def arrays(self, data_dir: Path):
            return x, y, test_x, test_y, classes

    return Own(validation=0.0).load(NOWHERE, CPU)


@pytest.mark.parametrize("dtype", [np.int64, np.int16, np.uint16])
def test_integer_dtypes_give_same_images(dtype: type) -> None:
    splits = load(X.astype(dtype), test_x=X.tolist())
    assert (splits.train.images.numpy() == X).all() and (splits.test.images.numpy() == X).all() and splits.notes == []
    assert splits.data_hash == load().data_hash


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_floats_in_unit_interval_are_converted_to_8_bits(dtype: type) -> None:
    splits = load((X / 255).astype(dtype), test_x=torch.from_numpy(X / 255))
    difference = np.abs(splits.train.images.numpy().astype(int) - X)
    assert difference.max() <= (dtype is np.float16) and (splits.test.images.numpy() == X).all()
    assert splits.notes == [
        f"training images: {np.dtype(dtype)} from 0 to 1, converted to 8 bits",
        "test images: float64 from 0 to 1, converted to 8 bits",
    ]


def test_rounding_errors_beyond_unit_interval_are_accepted() -> None:
    splits = load(X / 255 * (1 + 1e-7), test_x=X / 255 - 1e-7)
    assert (splits.train.images.numpy() == X).all() and (splits.test.images.numpy() == X).all()


def test_boolean_true_is_white() -> None:
    assert (load(X > 100).train.images.numpy() == np.where(X > 100, 255, 0)).all()


def test_grey_images_may_omit_channel_axis() -> None:
    splits = load(X[:, 0], test_x=X[:, 0] / 255)
    assert splits.input_shape == (1, 5, 4) and splits.data_hash == load().data_hash


def test_array_views_are_accepted() -> None:
    assert load(X[::-1][::-1], Y[::-1][::-1]).data_hash == load().data_hash
    assert load(np.broadcast_to(X[:1], X.shape)).train.images.shape == X.shape


@pytest.mark.parametrize("y", [Y.astype(float), Y.astype(np.uint8), Y[:, None], Y.tolist(), torch.from_numpy(Y)])
def test_label_types_give_same_hash(y: object) -> None:
    assert load(y=y).data_hash == load().data_hash


def test_class_names_accept_array_or_range() -> None:
    assert load(classes=np.array(["a", "b", "c"])).classes == ["a", "b", "c"]
    assert load(classes=range(3)).classes == ["0", "1", "2"]


COLOUR = np.repeat(X, 3, 1)
BAD: dict[str, tuple[dict[str, object], str]] = {
    "standardised": ({"x": X / 127.5 - 1}, r"training images are float64 from -1 to 1; allowed: .*rescale to \[0, 1\]"),
    "floats of 0 to 255": (
        {"test_x": X.astype(float)},
        r"test images are float64 from 0 to 255; .*images\.round\(\)\.astype\('uint8'\)",
    ),
    "NaN": ({"x": np.full(X.shape, np.nan)}, r"training images are float64 with values that are not finite"),
    "infinite": ({"x": np.where(X > 250, np.inf, 0.5)}, r"not finite"),
    "16 bits": ({"x": X.astype(np.uint16) * 257}, r"training images are uint16 from .*images >> 8"),
    "negative": ({"x": X.astype(int) - 1}, r"training images are int64 from -1 to"),
    "divided twice": ({"x": X / 255**2}, r"training images are float64 from 0 to 0\.0039\d*, .*almost black.*multiply by 255"),
    "0 and 1": ({"x": (X > 100).astype(np.uint8)}, r"training images are uint8 from 0 to 1, .*multiply by 255"),
    "text": ({"x": np.full(X.shape, "a")}, r"training images are of type <U1, not numbers"),
    "complex": ({"x": X * 1j}, r"of type complex128"),
    "rows of several lengths": ({"x": [[1], [1, 2]]}, r"training images are not an array \(.*inhomogeneous"),
    "objects": ({"x": np.array([None] * 6)}, r"of type object"),
    "flat": ({"x": X.reshape(6, -1)}, r"training images have shape \(6, 20\) \(allowed: \(n, channels, height, width\)"),
    "five axes": ({"x": X[None]}, r"training images have shape \(1, 6, 1, 5, 4\)"),
    "no images": ({"x": X[:0], "y": Y[:0]}, r"there are no training images \(shape \(0, 1, 5, 4\)\)"),
    "none at all": ({"x": np.array(3)}, r"there are no training images"),
    "channels last": ({"x": np.zeros((6, 8, 9, 3), np.uint8)}, r"shape \(6, 8, 9, 3\), .*images\.transpose\(0, 3, 1, 2\)"),
    "one channel last": ({"x": np.zeros((6, 28, 28, 1), np.uint8)}, r"images\.transpose\(0, 3, 1, 2\)"),
    "other channels": ({"test_x": COLOUR}, r"training images have shape \(1, 5, 4\), but test images have \(3, 5, 4\)"),
    "fractions": ({"y": Y + 0.5}, r"training image 0 has label 0\.5, which is not a class index \(allowed: 0 to 2\)"),
    "label beyond 64 bits": ({"y": np.where(Y == 2, 1e300, Y)}, r"training image 2 has label 1e\+300, which is not"),
    "label infinite": ({"y": np.where(Y == 2, np.inf, Y)}, r"training image 2 has label inf"),
    "label NaN": ({"test_y": np.where(Y == 2, np.nan, Y)}, r"test image 2 has label nan"),
    "names": ({"y": np.array(["a", "b", "c"] * 2)}, r"training labels are of type <U1, not numbers \(numpy\.unique\(labels, "),
    "one-hot": ({"y": np.eye(3)[Y]}, r"training labels have shape \(6, 3\), not \(n,\); use labels\.argmax\(1\)"),
    "from 1": ({"y": Y + 1}, r"training image 2 has label 3, out of range .*they count from 1: subtract 1"),
    "too many": ({"y": np.r_[Y, 0]}, r"6 training images have 7 labels"),
    "number of classes": ({"classes": 3}, r"the names are 3, but should be a list"),
    "one name": ({"classes": "abc"}, r"the names are 'abc', but should be a list"),
}


@pytest.mark.parametrize("name", BAD)
def test_ambiguous_arrays_are_rejected_with_advice(name: str) -> None:
    arrays, message = BAD[name]
    with pytest.raises(DataError, match=rf"^dataset=own: .*{message}") as caught:
        load(**arrays)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(("returned", "said"), [((X, Y, X, Y), "4 values"), (None, "NoneType"), (X, "ndarray")])
def test_invalid_return_type_of_arrays_is_reported(returned: object, said: str) -> None:
    class Own(ArrayDataset):
        name = "own"

        def arrays(self, data_dir: Path):
            return returned

    with pytest.raises(DataError, match=rf"dataset=own: arrays\(\) should return .*it returned {said}"):
        Own().load(NOWHERE, CPU)


def test_narrow_images_with_many_channels_are_accepted() -> None:
    """12-lead signals, for example, are accepted as images with 12 channels and one column."""
    x = np.random.default_rng(0).integers(0, 256, (6, 12, 50, 1), dtype=np.uint8)
    assert load(x, test_x=x).input_shape == (12, 50, 1)


@pytest.mark.parametrize("what", ["x", "y", "test_x", "test_y"])
def test_hash_of_matches_load_and_detects_changes(what: str) -> None:
    class Own(ArrayDataset):
        name = "own"
        held = {"x": X.copy(), "y": Y.copy(), "test_x": X.copy(), "test_y": Y.copy()}

        def arrays(self, data_dir: Path):
            return *self.held.values(), ["a", "b", "c"]

    before = Own().load(NOWHERE, CPU).data_hash
    assert Own().hash_of(NOWHERE) == before == Own(validation=0.5).hash_of(NOWHERE)
    Own.held[what].flat[-1] -= 1
    assert Own().hash_of(NOWHERE) != before


def test_os_errors_are_reported() -> None:
    class Own(ArrayDataset):
        name = "own"

        def arrays(self, data_dir: Path):
            raise PermissionError(13, "Permission denied", str(data_dir / "a.npz"))

    for reads in (lambda: Own().load(NOWHERE, CPU), lambda: Own().hash_of(NOWHERE)):
        with pytest.raises(DataError, match=r"^dataset=own: /nowhere/a\.npz: cannot be read \(Permission denied\)$"):
            reads()


def test_class_without_training_images_is_noted() -> None:
    """A class has no training image if, for example, the labels count from 1, although classes are numbered from 0."""
    x, notes = np.full((4, 2, 2), 200, np.uint8), []
    checked((x, np.array([1, 2, 1, 2]), x, np.array([1, 2, 1, 2]), ["a", "b", "c"]), notes)
    assert notes == ["no training image has label 0 (a); labels count from 0"]
    checked((x, np.arange(4) % 3, x, np.arange(4) % 3, ["a", "b", "c"]), more := [])
    assert more == []
