"""If user-defined modules update buffers in their forward pass, additional passes see the same buffers as the first one."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fa_bench
from fa_bench.mechanisms.second_pass import again
from fa_bench.metrics.meter import AlignmentMeter
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.rules.dfa import DFA

from .chain import Chain, assert_same, attach, batch, gradients

X, Y = batch(12)
#: Rules that run the model again in the backward pass or, in the case of forward_alignment, after the forward pass.
RUN_AGAIN = [name for name, rule in ALGORITHMS.items() if rule.repeats] + ["forward_alignment"]
HOW = ["in place", "replaced"]


class Centred(nn.Module):
    """Subtracts a running mean, which it updates in place or replaces, and counts its calls in training mode, possibly in a
    buffer that it shares with other modules."""

    mean: Tensor
    calls: Tensor
    scale: Tensor

    def __init__(self, calls: Tensor, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("calls", calls)
        self.register_buffer("scale", torch.ones(16))  # autograd saves this buffer

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.calls.add_(1)
                mean = self.mean.lerp(x.mean(0), 0.5)
                if self.how == "in place":
                    self.mean.copy_(mean)
                    self.scale.mul_(0.9)
                else:
                    self.mean = mean
        return (x - self.mean) * self.scale


def net(how: str) -> Chain:
    """The chain with a `Centred` module after the linear layer of each of its first two parts."""
    model, calls = Chain(), torch.zeros(())
    for name in ("a", "b"):
        plain: Any = model.get_submodule(name)
        setattr(model, name, nn.Sequential(OrderedDict(fc=plain.fc, own=Centred(calls, how), act=plain.act)))
    return model


def own_buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "feedback" not in name}


def learn(model: nn.Module, rule: Any) -> None:
    logits = model(X)
    rule.backward(F.cross_entropy(logits, Y), logits, Y)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", RUN_AGAIN)
def test_buffers_are_updated_once_in_every_step(name: str, how: str) -> None:
    model = net(how)
    rule = attach(model, name, sample_input=X[:2])
    plain = copy.deepcopy(model)
    fa_bench.attached_rule(plain).detach()  # type: ignore[union-attr]
    for step in range(1, 4):
        learn(model, rule)
        if name != "forward_forward":  # the first pass of forward_forward has another input
            plain(X)
            assert_same(own_buffers(model), own_buffers(plain))
        assert own_buffers(model)["a.own.calls"] == 2 * step


@dataclasses.dataclass(eq=False)
class Repeating(DFA):
    """An unregistered rule that stores the outputs of two additional passes."""

    name = "repeating"
    repeats = True

    def broadcast(self, delta: Tensor, target: Tensor | None) -> Tensor:
        assert self.first_pass is not None
        self.seen = [again(self.model, self.mode, self.first_pass) for _ in range(2)]
        return delta


@pytest.mark.parametrize("how", HOW)
def test_repeated_passes_reproduce_output_bitwise(how: str) -> None:
    """Additional passes reproduce the output bitwise from the first step on. The outputs are also reproduced after evaluation
    mode, in a copy, and after later changes to the buffers."""
    model = net(how)
    rule = Repeating().attach(model, sample_input=X[:2])
    model.eval()
    learn(model, rule)
    model.train()
    for number in range(4):
        if number == 2:
            model = copy.deepcopy(model)
            rule = fa_bench.attached_rule(model)
        logits = model(X)
        if number == 3:
            model.get_buffer("a.own.mean").add_(1)
        before = own_buffers(model)
        F.cross_entropy(logits, Y).backward()
        assert isinstance(rule, Repeating)
        assert all(torch.equal(seen, logits) for seen in rule.seen)
        assert_same(own_buffers(model), before)


def test_copy_learns_like_original() -> None:
    """A copy has not run a pass that updates buffers, but it learns in the same way as the original."""
    model = net("in place")
    rule = attach(model, "epc", sample_input=X[:2])
    learn(model, rule)
    model.zero_grad()
    other = copy.deepcopy(model)
    for one in (model, other):
        learn(one, fa_bench.attached_rule(one))
    assert_same(gradients(model), gradients(other))


@pytest.mark.parametrize("how", HOW)
def test_alignment_measurement_does_not_update_buffers(how: str) -> None:
    model = net(how)
    rule = attach(model, "fa", sample_input=X[:2])
    learn(model, rule)
    before = own_buffers(model)
    AlignmentMeter(rule, X, Y).measure()
    assert_same(own_buffers(model), before)
