"""Labels may have any integer type, and every rule treats them like 64-bit integers.

Rules that use the labels refuse invalid ones, with an error that names the cause.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .chain import RULES, Chain, assert_same, attach, batch, draw_the_same_for_every_sample, gradients

X, Y = batch()


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16, torch.int8], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_all_integer_label_types_match_int64(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_the_same_for_every_sample(monkeypatch)
    found = []
    for labels in (Y, Y.to(dtype)):
        model = Chain()
        rule = attach(model, name)
        logits = model(X)
        rule.backward(F.cross_entropy(logits, Y), logits, labels, indices=torch.arange(len(Y)))
        found.append(gradients(model))
    assert_same(found[1], found[0])


#: Maps a kind of invalid labels to a function that makes them from valid ones, and to a pattern that matches the error.
WRONG: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "ignored": (lambda y: y.index_fill(0, torch.tensor([0]), -100), "label -100 is out of range: .* remove unlabelled samples"),
    "class 7": (lambda y: y.index_fill(0, torch.tensor([0]), 7), "label 7 is out of range: this model has 3 classes"),
    "five": (lambda y: y[:5], r"shape \(5,\)"),
    "two": (lambda y: torch.stack([y, y], 1), r"shape \(12, 2\)"),
    "numbers": (lambda y: y.float(), r"numbers of shape \(12,\)"),
    "one-hot": (lambda y: F.one_hot(y, 3), r"class indices of shape \(12, 3\)"),
}


@pytest.mark.parametrize("scale", [None, 0.25], ids=["measured", "given"])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", RULES)
def test_invalid_labels_error_names_rule_and_cause(name: str, wrong: str, scale: float | None) -> None:
    change, message = WRONG[wrong]
    model = Chain()
    rule = attach(model, name)
    logits = model(X)
    try:
        rule.backward(F.cross_entropy(logits, Y) / 4, logits, change(Y), scale, torch.arange(len(Y)))
    except ValueError as error:
        assert not gradients(model)
        needs_target = "requires labels" in str(error) and "class indices of shape (N,)" in str(error)
        not_theirs = "is not a multiple of that of the mean cross-entropy" in str(error)  # because the loss was computed from Y
        assert f"rule '{name}'" in str(error)
        assert needs_target or not_theirs or re.search(message, str(error)), error


def test_np_feedback_rejects_all_invalid_labels() -> None:
    for change, message in WRONG.values():
        for scale in (None, 0.25):
            model = Chain()
            rule = attach(model, "np_feedback")
            logits = model(X)
            with pytest.raises(ValueError, match=f"rule 'np_feedback': .*{message}"):
                rule.backward(F.cross_entropy(logits, Y) / 4, logits, change(Y), scale)
