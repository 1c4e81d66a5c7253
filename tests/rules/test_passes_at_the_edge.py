"""Tests of dfc with frozen weights, of forward_forward with unusual sizes, and of f3 with indices of the wrong type."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fa_bench


def make(name: str, **options: object) -> tuple[nn.Sequential, fa_bench.Rule, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4))
    x, y = torch.randn(8, 7), torch.randint(4, (8,))
    return model, fa_bench.attach(model, name, cuts=["1"], **options), x, y


def test_dfc_without_trainable_weights_learns_output_feedback():
    model, rule, x, y = make("dfc")
    for layer in (model[0], model[2]):
        layer.requires_grad_(False)
    logits = model(x)
    rule.backward(F.cross_entropy(logits, y), logits, y)
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {"1.feedback_B_output"}


def test_forward_forward_threshold_ignores_sample_input_size():
    torch.manual_seed(0)
    gradients = []
    for size in (2, 4):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(4, 3, 1), nn.ReLU(), nn.Conv2d(3, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        model.append(nn.Linear(5, 3))
        x, y = torch.rand(6, 4, 2, 2), torch.arange(6) % 3
        rule = fa_bench.attach(
            model, "forward_forward", cuts=["1", "3"], peer_norm=0.0, sample_input=torch.rand(2, 4, size, size)
        )
        logits = model(x)
        rule.backward(F.cross_entropy(logits, y), logits, y)
        gradients.append(model[0].weight.grad)
    torch.testing.assert_close(*gradients)


def test_forward_forward_rejects_cut_size_different_from_sample():
    model = nn.Sequential(nn.Conv2d(4, 3, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    rule = fa_bench.attach(model, "forward_forward", cuts=["1"], sample_input=torch.rand(2, 4, 4, 4))
    logits = model(torch.rand(6, 4, 2, 2))
    y = torch.arange(6) % 3
    with pytest.raises(fa_bench.FaBenchError, match=r"cut '1'.*sample_input of the same size as the training data"):
        rule.backward(F.cross_entropy(logits, y), logits, y)


def test_f3_rejects_list_of_indices():
    model, rule, x, y = make("f3", samples=8)
    logits = model(x)
    with pytest.raises(ValueError, match="indices are a list, not a tensor"):
        rule.backward(F.cross_entropy(logits, y), logits, y, indices=list(range(8)))
