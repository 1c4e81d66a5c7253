"""Tests of named feedback tensors: the rule supplies or initialises them, they are fixed or learned, and only one file accesses
their storage."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fa_bench
from fa_bench.mechanisms.cut.rule import CutRule
from fa_bench.mechanisms.edge.pathways import FeedbackPathway, FixedFeedback, LearnedFeedback
from fa_bench.mechanisms.edge.rule import EdgeRule, LayerContext
from fa_bench.mechanisms.feedback_tensors import feedback_tensor, fixed_tensor_reader
from fa_bench.mechanisms.rule import Rule

PACKAGE = Path(fa_bench.__file__).parent


@dataclasses.dataclass(eq=False)
class ReadyEdge(EdgeRule):
    """An edge rule whose B is a given tensor."""

    name = "ready_edge"
    learned = False

    def pathway(self, layer: LayerContext) -> FeedbackPathway:
        layer.put("B", torch.full(layer.module.weight.shape, 0.5, dtype=torch.float64))
        return LearnedFeedback() if self.learned else FixedFeedback()


@dataclasses.dataclass(eq=False)
class ReadyCut(CutRule):
    """A cut rule whose B is a given tensor."""

    name = "ready_cut"

    def make_feedback(self, features: dict[str, tuple[int, ...]], classes: int) -> None:
        for cut, shape in features.items():
            self.put(cut, "B", torch.full((classes, *shape), 0.5, dtype=torch.float64))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


@pytest.mark.parametrize(("rule", "where"), [(ReadyEdge(), "2"), (ReadyCut(cuts=["1"]), "1")])
def test_put_converts_tensor_to_model_dtype(rule: Rule, where: str) -> None:
    model, x, y = net(), torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    fa_bench.attach(model, rule, sample_input=x)
    assert rule.feedback[where]["B"].dtype == torch.float32 and (rule.feedback[where]["B"] == 0.5).all()
    delta = (F.softmax(model(x), 1) - F.one_hot(y, 3)) / 6
    hidden = (delta @ torch.full((3, 5), 0.5)) * (model[0](x) > 0)
    logits = model(x)
    rule.backward(F.cross_entropy(logits, y), logits, y)
    torch.testing.assert_close(model[0].weight.grad, hidden.t() @ x)


@pytest.mark.parametrize(("rule", "where"), [(ReadyEdge(), "2"), (ReadyCut(cuts=["1"]), "1")])
def test_put_detaches_tensor_from_graph(rule: Rule, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    full = torch.full
    monkeypatch.setattr(torch, "full", lambda *args, **kwargs: full(*args, **kwargs) * scale)
    model, x = net(), torch.randn(6, 4)
    fa_bench.attach(model, rule, sample_input=x)
    monkeypatch.undo()
    logits = model(x)
    rule.backward(F.cross_entropy(logits, torch.arange(6) % 3), logits)
    assert not rule.feedback[where]["B"].requires_grad and scale.grad is None


def test_feedback_tensor_detaches_only_learned_tensors() -> None:
    fixed, learned = net(), net()
    rule = ReadyEdge()
    rule.learned = True
    fa_bench.attach(fixed, ReadyEdge())
    fa_bench.attach(learned, rule)
    assert feedback_tensor(fixed[0], "B") is fixed[0].feedback_B is fixed_tensor_reader("B")(None, fixed[0])
    tensor = feedback_tensor(learned[0], "B")
    assert not tensor.requires_grad and tensor.data_ptr() == learned[0].feedback_B.data_ptr()
    assert isinstance(learned[0].feedback_B, nn.Parameter) and feedback_tensor(learned[0], "mask") is None


def test_only_one_file_accesses_stored_feedback_directly() -> None:
    written = re.compile(r"""["']feedback_(?:"|'|mask|auxiliary|[A-Z]\b)|\.feedback_[A-Z]\b|_buffers(?:\[|\.get)""")
    found = {
        path.relative_to(PACKAGE).as_posix(): match[0]
        for path in PACKAGE.rglob("*.py")
        if (match := written.search(path.read_text(encoding="utf-8"))) is not None
    }
    assert set(found) == {"mechanisms/feedback_tensors.py"}, found
