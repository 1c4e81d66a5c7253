"""Labels may have any integer type: every rule takes them as those of 64 bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from .chain import RULES, Chain, assert_same, attach, batch, draw_the_same_for_every_sample, gradients

X, Y = batch()


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16, torch.int8], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_labels_of_any_integer_type(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_the_same_for_every_sample(monkeypatch)
    found = []
    for labels in (Y, Y.to(dtype)):
        model = Chain()
        rule = attach(model, name)
        logits = model(X)
        rule.backward(F.cross_entropy(logits, Y), logits, labels, indices=torch.arange(len(Y)))
        found.append(gradients(model))
    assert_same(found[1], found[0])
