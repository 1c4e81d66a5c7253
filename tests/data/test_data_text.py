"""Tests of text datasets: parts, windows, units, unknown characters, and the built-in book."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from fa_bench.data import text as module
from fa_bench.data.text import BUILT_IN, UNKNOWN, Text, WindowSplit
from fa_bench.errors import FaBenchError, OptionError

CPU = torch.device("cpu")


def decoded(tokens: torch.Tensor, vocabulary: list[str]) -> str:
    return "".join(vocabulary[number] for number in tokens.flatten().tolist())


def test_built_in_book_is_complete_without_header() -> None:
    text = BUILT_IN.read_text(encoding="ascii")
    assert (len(text), len(set(text))) == (148_331, 70) and text.split()[:2] == ["CHAPTER", "I"]
    assert text.split()[-2:] == ["THE", "END"] and "gutenberg" not in text.lower() and "\r" not in text


def test_parts_are_consecutive_and_targets_are_next_tokens() -> None:
    text = BUILT_IN.read_text()
    splits = Text(context=50, validation=0.2, test=0.1).load(Path(), CPU)
    assert (splits.inputs, splits.targets, splits.input_shape) == ("tokens", "positions", (50,))
    assert splits.validation is not None and splits.classes[0] == UNKNOWN
    for split, begin in ((splits.train, 0), (splits.validation, 0.7), (splits.test, 0.9)):
        x, y = next(split.batches(len(split)))
        assert x.dtype == torch.int64 and torch.equal(x.flatten()[1:], y.flatten()[:-1]) and split.characters == 1
        start = round(begin * len(text))
        assert decoded(x[:2], splits.classes).replace(UNKNOWN, "?") == text[start : start + 100]


def test_training_windows_depend_on_seed_and_epoch() -> None:
    split = WindowSplit(torch.arange(103), 10, True, CPU, 1.0)
    firsts = {
        (seed, epoch): [int(x[0]) for batch, _ in split.batches(4, seed=seed, epoch=epoch) for x in batch]
        for seed, epoch in itertools.product((0, 1), (0, 1, 2))
    }
    assert firsts[0, 1] == [int(x[0]) for batch, _ in split.batches(4, seed=0, epoch=1) for x in batch]
    assert len(set(map(str, firsts.values()))) == 6
    assert len({first % 10 for of_epoch in firsts.values() for first in of_epoch}) > 2, "the offset of the windows should vary"
    for of_epoch in firsts.values():
        assert len({first % 10 for first in of_epoch}) == 1 and len(of_epoch) == len(split) == 9
        assert sorted(first // 10 for first in of_epoch) == list(range(9)), "windows overlap or are missing"
        assert max(of_epoch) + 10 < 103
    later = [x for x, _ in split.batches(4, seed=0, epoch=1, start=1)]
    assert torch.equal(later[0], list(split.batches(4, seed=0, epoch=1))[1][0]), "start=1 does not begin with the second batch"
    assert [int(x[0]) for batch, _ in split.batches(4) for x in batch] == list(range(0, 90, 10))
    counts = [len(WindowSplit(torch.arange(length), 10, False, CPU, 1.0)) for length in (100, 101)]
    assert counts == [9, 10], "the last token of a window needs a target"
    assert [int(x[0, 0]) for x, _ in split.subset(torch.tensor([3, 5])).batches(1)] == [30, 50]


def test_unseen_characters_are_unknown_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcde" * 16 + "fghij" * 4, encoding="utf-8")
    splits = Text(path=str(tmp_path / "a.txt"), context=3).load(Path(), CPU)
    assert splits.classes == [UNKNOWN, *"abcde"]
    assert [note.split()[0] + note.split()[2] for note in splits.notes] == ["validation10", "test10"]
    assert next(splits.test.batches(1))[0].tolist() == [[0, 0, 0]]


def test_byte_tokens_and_text_folders(tmp_path: Path) -> None:
    for name, content in (("b.txt", "ж" * 60), ("a.txt", "x\r\n" * 30), ("c.md", "!")):
        (tmp_path / name).write_bytes(content.encode())
    splits = Text(path=str(tmp_path), unit="bytes", context=4, validation=0.2, test=0.2).load(Path(), CPU)
    assert len(splits.classes) == 256
    assert next(splits.train.batches(1))[0].tolist() == [[*b"x\nx\n"]], "wrong order of files, or line ends not converted"
    assert splits.test.characters == 0.5
    before = splits.data_hash
    (tmp_path / "b.txt").write_text("щ" * 60, encoding="utf-8")
    assert Text(path=str(tmp_path), unit="bytes", context=4, validation=0.2, test=0.2).hash_of(Path()) != before


def test_bpe_is_trained_only_on_training_part(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    dataset = Text(unit="bpe", vocabulary=400, context=16)
    splits, again = dataset.load(Path(), CPU), dataset.load(Path(), CPU)
    assert len(splits.classes) == 400 and splits.data_hash == again.data_hash and 1.3 < (splits.test.characters or 0) < 3
    other = BUILT_IN.read_text()
    (tmp_path / "other.txt").write_text(other[: len(other) * 8 // 10 + 1] + "zq" * (len(other) // 10))
    assert (
        Text(path=str(tmp_path / "other.txt"), unit="bpe", vocabulary=400, context=16).load(Path(), CPU).classes[:256]
        == splits.classes[:256]
    )


def test_bpe_without_tokenizers_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"pip install fa_bench\[text\]"):
        Text(unit="bpe")


@pytest.mark.parametrize(
    ("content", "options", "problem"),
    [
        (b"\xff\xfe", {}, "not UTF-8 .byte 0"),
        (b"", {}, "no text in"),
        (b"abc" * 9, {"context": 20}, "part has only"),
        (None, {}, "cannot be read"),
    ],
)
def test_unusable_texts_are_refused(tmp_path: Path, content: bytes | None, options: dict, problem: str) -> None:
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FaBenchError, match=problem) as caught:
        Text(path=str(path), **options).load(Path(), CPU)
    assert len(str(caught.value).splitlines()) == 1


def test_validation_part_is_optional_but_training_is_not() -> None:
    splits = Text(validation=0).load(Path(), CPU)
    assert splits.validation is None and len(splits.train) == 2084
    with pytest.raises(OptionError, match="leave nothing for training"):
        Text(validation=0.5, test=0.5)
    assert module.read_text(BUILT_IN) == BUILT_IN.read_text()
