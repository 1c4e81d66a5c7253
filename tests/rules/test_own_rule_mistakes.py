"""Mistakes in a user's own rule: errors name the class, the layer or cut, and what is wanted."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import fa_bench
from fa_bench.errors import ComponentError
from fa_bench.mechanisms.cut.local import LocalRule
from fa_bench.mechanisms.cut.passes import PassRule


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def train(rule: fa_bench.Rule) -> None:
    """Attach a rule and run one step; if this fails, the model is as it was."""
    model = net()
    keys = list(model.state_dict())
    try:
        rule.attach(model)
        x, y = torch.linspace(-1, 1, 20).view(5, 4), torch.arange(5) % 2
        logits = model(x)
        rule.backward(nn.functional.cross_entropy(logits, y), logits, y)
    except BaseException:
        if hasattr(rule, "model"):
            rule.detach()
        assert list(model.state_dict()) == keys and [type(layer) for layer in model] == [nn.Linear, nn.Tanh, nn.Linear]
        raise


# ------------------------------------------------------------------------------------------------ missing methods
class Typo(fa_bench.EdgeRule):
    def pathwy(self, layer: Any) -> fa_bench.FeedbackPathway:
        layer.put("B", "xavier_uniform")
        return fa_bench.FixedFeedback()


class WithoutGradients(PassRule):
    """A rule of passes that does not compute gradients."""


class WithoutLayers(LocalRule):
    """A local rule without auxiliary layers."""


class WithoutFeedback(fa_bench.FeedbackPathway):
    """A pathway that implements neither `effective` nor `context`."""


class Incomplete(fa_bench.EdgeRule):
    def pathway(self, layer: Any) -> fa_bench.FeedbackPathway:
        return WithoutFeedback()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            Typo(),
            r"class Typo \(.*test_own_rule_mistakes\) does not.*'pathway', which EdgeRule needs; rename its 'pathwy' to 'pathway'\?",
        ),
        (Incomplete(), r"class WithoutFeedback .* does not implement the method 'effective', which FeedbackPathway needs$"),
        (WithoutGradients(cuts=["1"]), r"class WithoutGradients .* does not implement the method '\w+', which PassRule needs$"),
        (WithoutLayers(cuts=["1"]), r"class WithoutLayers .* does not implement the method 'auxiliary', which LocalRule needs$"),
    ],
)
def test_a_missing_method_is_named(rule: fa_bench.Rule, message: str) -> None:
    with pytest.raises(ComponentError, match=message):
        train(rule)


@dataclasses.dataclass(eq=False)
class Unscheduled(fa_bench.Schedule):
    def rates(self, lr: float, done: int, total: int) -> float:
        return lr


def test_a_missing_method_of_another_component_is_named() -> None:
    with pytest.raises(ComponentError, match="class Unscheduled .*'rate', which Schedule needs; rename its 'rates'"):
        Unscheduled().rate(0.1, 0, 1)
