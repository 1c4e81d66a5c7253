"""torch's layers accept batches without samples, and so do the rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .chain import RULES, attach

#: Rules that refuse models with an output for each position.
WITHOUT_POSITIONS = ("dfc", "f3", "forward_forward", "ldrl", "pepita", "predsim")


class Tokens(nn.Module):
    """Classifies each of four tokens, optionally with attention that may return its weights."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act1, self.second, self.act2 = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True) if attention != "none" else None
        self.needs_weights, self.head = attention == "with weights", nn.Linear(8, 3)
        self.cut_points = self.blocks = ["act1", "act2"]

    def forward(self, x: Tensor) -> Tensor:
        h = self.act1(self.first(x))
        if self.attention is not None:
            h = self.attention(h, h, h, need_weights=self.needs_weights)[0]
        return self.head(self.act2(self.second(h)))


@pytest.mark.parametrize("attention", ["none", "alone", "with weights"])
@pytest.mark.parametrize("name", [name for name in RULES if name not in WITHOUT_POSITIONS])
def test_empty_token_batch_has_finite_gradients(name: str, attention: str) -> None:
    model = Tokens(attention)
    options: dict[str, Any] = {"allow_uncovered": True} if attention != "none" else {}
    rule = attach(model, name, sample_input=torch.randn(2, 4, 6), **options)
    logits = model(torch.zeros(0, 4, 6))
    labels = torch.zeros(0, 4, dtype=torch.int64)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    rule.backward(loss, logits, labels, loss_scale=1.0)
    assert logits.shape == (0, 4, 3)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
