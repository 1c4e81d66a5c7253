"""Tests of tables and users' own arrays: features are scaled with the statistics of the training samples, and unsuitable data are
refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fa_bench.data.array_checks import checked
from fa_bench.data.npz import Npz
from fa_bench.data.tabular import Tabular
from fa_bench.errors import DataError, FaBenchError, OptionError

CPU = torch.device("cpu")


def whole(split: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return next(split.batches(len(split)))


# ------------------------------------------------------------------------------------------------ tables
@pytest.mark.parametrize(
    ("table", "targets", "features", "outputs"),
    [("diabetes", "values", 10, 1), ("wine", "classes", 13, 3), ("breast_cancer", "classes", 30, 2)],
)
def test_bundled_tables_are_scaled_by_training_rows(table: str, targets: str, features: int, outputs: int) -> None:
    splits = Tabular(table=table).load(Path(), CPU)
    x, y = whole(splits.train)
    assert (splits.inputs, splits.targets, splits.input_shape, len(splits.classes)) == ("features", targets, (features,), outputs)
    assert x.dtype == torch.float32 and (y.shape[1:] == (1,) if targets == "values" else y.dtype == torch.int64)
    torch.testing.assert_close(x.mean(0), torch.zeros(features), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(features), atol=1e-5, rtol=0)
    assert whole(splits.test)[0].mean(0).abs().max() > 1e-3, "the test set is scaled by its own rows"
    plain = Tabular(table=table, standardise=False).load(Path(), CPU)
    assert plain.train.inputs.abs().max() > 0 and not torch.allclose(plain.train.inputs, x)
    other = Tabular(table=table, test_seed=1).load(Path(), CPU)
    assert other.data_hash != splits.data_hash == Tabular(table=table, validation=0.3).load(Path(), CPU).data_hash


def write_csv(folder: Path, text: str) -> str:
    (folder / "my.csv").write_text(text)
    return str(folder / "my.csv")


ROWS = "".join(f"{i},{i % 3},{'yes' if i % 2 else 'no'},{i / 4}\n" for i in range(40))


def test_custom_csv_file(tmp_path: Path) -> None:
    path = write_csv(tmp_path, "a,b,c,d\n" + ROWS)
    with pytest.raises(DataError, match="non-numeric values in column c"):
        Tabular(table=path).load(Path(), CPU)
    path = write_csv(tmp_path, "a,b,c\n" + "".join(f"{i},{i % 3},{'yes' if i % 2 else 'no'}\n" for i in range(40)))
    splits = Tabular(table=path, validation=0).load(Path(), CPU)
    assert (splits.targets, splits.classes, splits.input_shape) == ("classes", ["no", "yes"], (2,))
    assert whole(splits.test)[1].bincount().tolist() == [4, 4], "the test set is not stratified by class"
    with pytest.raises(OptionError, match=r"dataset.task=null: column 'b' has whole numbers.*dataset.task=classification"):
        _ = Tabular(table=write_csv(tmp_path, "a,b\n1,2\n3,4\n5,6\n")).targets
    assert Tabular(table=str(tmp_path / "my.csv"), task="regression").targets == "values"
    path = write_csv(tmp_path, "a,b\n" + "".join(f"{i},{i / 7:.3f}\n" for i in range(30)))
    splits = Tabular(table=path, target="b").load(Path(), CPU)
    assert (splits.targets, splits.classes) == ("values", ["b"])


def test_classes_that_are_numbers_have_distinct_names(tmp_path: Path) -> None:
    for names in (["1000001", "1000002"], ["0.1234567", "0.1234568"], ["1", "2"], ["0.5", "2"]):
        path = write_csv(tmp_path, "a,b\n" + "".join(f"{i},{names[i % 2]}\n" for i in range(20)))
        assert Tabular(table=path, task="classification").load(Path(), CPU).classes == names


@pytest.mark.parametrize(
    ("text", "options", "problem"),
    [
        ("a,b\n1,2.5\n,3.5\n", {}, "no value in column 'a' of row 2"),
        ("a,b\n1,2.5\n2,3.5\n", {"target": "bb"}, "dataset.target=bb.*did you mean 'b'"),
        ("a,b\n1,x\n2,y\n", {"task": "regression"}, "column 'b' is not numeric"),
        ("a\n1.5\n2\n", {}, "a feature and a target are needed"),
        ("", {}, "cannot be read as CSV"),
        ("a,b\n1,2.5\n2,inf\n", {}, "inf in column 'b' of row 2"),
    ],
)
def test_unusable_csv_files_are_refused(tmp_path: Path, text: str, options: dict, problem: str) -> None:
    with pytest.raises(FaBenchError, match=problem) as caught:
        Tabular(table=write_csv(tmp_path, text), **options).load(Path(), CPU)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"table": "wines"}, "did you mean 'wine'"),
        ({"target": "x"}, "target=x is for a CSV file"),
        ({"table": "no.csv"}, "no.csv: cannot be read"),
    ],
)
def test_unknown_tables_are_refused(options: dict, problem: str) -> None:
    with pytest.raises(FaBenchError, match=problem):
        _ = Tabular(**options).targets


# ------------------------------------------------------------------------------------------------ own arrays
RNG = np.random.default_rng(0)
FLOATS, IMAGES = RNG.normal(5, 3, (20, 4)), RNG.integers(0, 256, (20, 5, 5), dtype=np.uint8)
TOKENS, LABELS = RNG.integers(0, 9, (20, 6)), np.arange(20) % 3


def write_npz(folder: Path, x: np.ndarray, y: np.ndarray, **more: np.ndarray) -> Npz:
    np.savez(folder / "my.npz", x_train=x[:14], y_train=y[:14], x_test=x[14:], y_test=y[14:], **more)
    return Npz(path=str(folder / "my.npz"))


@pytest.mark.parametrize(
    ("x", "y", "kinds", "shape", "names"),
    [
        (FLOATS, LABELS, ("features", "classes"), (4,), 3),
        (FLOATS, LABELS[:, None], ("features", "classes"), (4,), 3),
        (FLOATS, FLOATS[:, 0], ("features", "values"), (4,), 1),
        (FLOATS.astype(np.float32), FLOATS[:, :2], ("features", "values"), (4,), 2),
        (IMAGES, LABELS, ("images", "classes"), (1, 5, 5), 3),
        (IMAGES / 255, FLOATS[:, 0], ("images", "values"), (1, 5, 5), 1),
        (TOKENS, TOKENS, ("tokens", "positions"), (6,), 9),
        (TOKENS, LABELS, ("tokens", "classes"), (6,), 9),
    ],
)
def test_input_and_target_kinds_are_inferred_from_arrays(
    tmp_path: Path, x: np.ndarray, y: np.ndarray, kinds: tuple[str, str], shape: tuple, names: int
) -> None:
    dataset = write_npz(tmp_path, x, y)
    assert (dataset.inputs, dataset.targets) == kinds
    splits = dataset.load(Path(), CPU)
    assert (splits.inputs, splits.targets, splits.input_shape, len(splits.classes)) == (*kinds, shape, names)
    seen, target = whole(splits.test)
    if kinds[0] == "tokens":
        assert seen.tolist() == x[14:].tolist() and (kinds[1] == "classes" or target.tolist() == y[14:].tolist())
    else:
        train = whole(splits.train)[0]
        axes = (0, 2, 3) if kinds[0] == "images" else 0
        torch.testing.assert_close(train.mean(axes), torch.zeros(shape[0]), atol=1e-5, rtol=0)
        torch.testing.assert_close(train.std(axes, correction=0), torch.ones(shape[0]), atol=1e-4, rtol=0)


def test_npz_validation_set_is_used(tmp_path: Path) -> None:
    dataset = write_npz(tmp_path, FLOATS, LABELS, x_val=FLOATS[:5], y_val=LABELS[:5])
    splits = dataset.load(Path(), CPU)
    assert (len(splits.train), len(splits.validation or ())) == (14, 5) and "x_val: used" in splits.notes[0]
    without = Npz(path=dataset.path, validation=0).load(Path(), CPU)
    assert without.validation is None and "x_val: skipped" in without.notes[0]


def test_position_targets_may_be_negative_but_not_exceed_vocabulary() -> None:
    ignored, large, vocabulary = np.where(TOKENS > 7, -100, TOKENS), np.where(TOKENS > 7, 9, TOKENS), list("abcdefghi")
    *_, targets, _ = checked((TOKENS, TOKENS, TOKENS, ignored, vocabulary), [], "tokens", "positions")
    assert targets.tolist() == ignored.tolist()
    with pytest.raises(ValueError, match=r"test sequence \d+ has target 9 at position \d \(allowed: at most 8\)"):
        checked((TOKENS, TOKENS, TOKENS, large, vocabulary), [], "tokens", "positions")


@pytest.mark.parametrize(
    ("x", "y", "more", "problem"),
    [
        (FLOATS.astype(object), LABELS, {}, "pickled objects are never read"),
        (FLOATS, LABELS.astype(str), {}, "y_train is of type <U"),
        (IMAGES[:, 0], LABELS, {}, r"x_train is uint8 of shape \(14, 5\)"),
        (TOKENS, TOKENS[:, :3], {}, r"y_train is int64 of shape \(14, 3\)"),
        (FLOATS, LABELS, {"x_val": FLOATS}, "lacks y_val"),
        (np.where(FLOATS > 5, np.nan, FLOATS), LABELS, {}, "not a finite number"),
        (FLOATS, LABELS - 1, {}, "training sample 0 has label -1"),
        (TOKENS - 1, TOKENS, {}, "has token -1"),
        (TOKENS, FLOATS[:, 0], {}, "values are not allowed as targets of tokens"),
        (FLOATS * 1e300, LABELS, {}, r"is -?\d\S*e\+\d+, too large for float32"),
        (FLOATS, FLOATS[:, :0], {}, "which has no column"),
        (FLOATS, LABELS * 10**15, {}, "the largest label or token is 2000000000000000; .* needs .* of memory"),
        (FLOATS, LABELS, {"x_val": FLOATS[:0], "y_val": LABELS[:0]}, r"validation features have shape \(0, 4\)"),
        (IMAGES, LABELS, {"x_val": IMAGES[:2], "y_val": LABELS[:3]}, "2 validation images have 3 labels"),
    ],
)
def test_arrays_that_cannot_be_used_are_refused(tmp_path: Path, x: Any, y: Any, more: dict, problem: str) -> None:
    dataset = write_npz(tmp_path, x, y, **more)
    with pytest.raises(FaBenchError, match=problem) as caught:
        _ = dataset.inputs, dataset.load(Path(), CPU)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("y", "problem"),
    [
        (np.array([0, np.nan]), "test sample 1 has label nan"),
        (np.array([0, np.inf]), "test sample 1 has label inf"),
        (np.array(["0", "1"]), "test labels are of type <U1"),
    ],
)
def test_test_labels_of_another_type_are_refused(tmp_path: Path, y: np.ndarray, problem: str) -> None:
    path = tmp_path / "my.npz"
    np.savez(path, x_train=FLOATS, y_train=LABELS, x_test=FLOATS[:2], y_test=y)
    with pytest.raises(DataError, match=problem):
        Npz(path=str(path)).load(Path(), CPU)


def test_load_names_missing_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "my.npz", x_train=FLOATS, y_train=LABELS, x_test=FLOATS)
    for read in (lambda dataset: dataset.load(Path(), CPU), lambda dataset: dataset.hash_of(Path())):
        with pytest.raises(DataError, match="lacks y_test"):
            read(Npz(path=str(tmp_path / "my.npz")))


def test_channel_that_is_constant_in_training_is_not_rescaled(tmp_path: Path) -> None:
    """For this grey level, the computed standard deviation of the training images is a rounding error."""
    images = np.full(IMAGES.shape, 5, np.uint8)
    images[14:] += 1
    splits = write_npz(tmp_path, images, LABELS).load(Path(), CPU)
    torch.testing.assert_close(whole(splits.test)[0], torch.full((len(IMAGES) - 14, 1, 5, 5), 1 / 255))


def test_missing_and_damaged_npz_files_are_rejected(tmp_path: Path) -> None:
    cases = ("", "name the .npz file"), (str(tmp_path / "no.npz"), "No such file"), (__file__, "cannot be read as .npz")
    for path, problem in cases:
        with pytest.raises(FaBenchError, match=problem):
            _ = Npz(path=path).inputs


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("1,2.5\n2,3.5\n3,4.5\n", "first row has only numbers .*add a header"),
        ("a;b\n1;2.5\n2;3.5\n", "1 column;.*separated by commas, not by ';'"),
        ("a,b\n1,2.5\ninf,3.5\n", "inf in column 'a' of row 2"),
        (",a,b\n0,1,2.5\n1,2,3.5\n", r"my\.csv: column 1 of 3 has no name .*index=False\), or name the column"),
        ("a,,b,\n0,1,2.5,1\n1,2,3.5,2\n", "columns 2, 4 of 4 have no name"),
        ("Unnamed: 0.1,a\n0,1.5\n1,2.5\n", "column 1 of 2 has no name"),
        ("a,b\n0,1,2.5\n1,2,3.5\n", "my.csv: rows have more values than the header has names"),
        ("a,b\n1,x\n2,x\n3,x\n", "column 'b' has the same class, x"),
        ("a,b\n1,x\n2,x\n3,y\n", "1 of 2 classes occurs only once .y."),
    ],
)
def test_malformed_csv_errors_describe_problem(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(DataError, match=problem) as caught:
        Tabular(table=write_csv(tmp_path, text)).load(Path(), CPU)
    assert len(str(caught.value).splitlines()) == 1
