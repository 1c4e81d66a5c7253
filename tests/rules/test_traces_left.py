"""Tests that the tensors returned by rules are detached, and that a detached rule leaves no trace in a model, regardless of the
order of its modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fa_bench
from fa_bench.mechanisms.cut.rule import CutRule
from fa_bench.mechanisms.graph import tensors_in

from . import nets
from .helpers import cut_options, rule_grads
from .registered import registered
from .test_lifecycle import VARIANTS, start

ORDER = ["fc1", "act1", "fc2", "act2", "fc3"]


class Rotated(nn.Module):
    """A 7-5-6-3 network whose modules run in `ORDER` but are registered in that order rotated by `first`."""

    def __init__(self, first: int) -> None:
        super().__init__()
        of_net = dict(nets.mlp().named_children())
        for name in (*ORDER[first:], *ORDER[:first]):
            self.add_module(name, of_net[name])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in ORDER:
            x = self.get_submodule(name)(x)
        return x


def traces(model: nn.Module) -> dict[str, tuple]:
    """The class, attributes, parameters, buffers and hook counts of every module, and which of its parameters require
    gradients."""
    return {
        path: (
            type(module),
            sorted(vars(module)),
            [*module._parameters],
            [*module._buffers],
            [len(hooks) for name, hooks in vars(module).items() if name.endswith("_hooks")],
            [p.requires_grad for p in module.parameters(recurse=False)],
        )
        for path, module in model.named_modules()
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_detach_restores_model_for_any_registration_order(variant: str) -> None:
    name, options = VARIANTS[variant]
    x, y = nets.batch("mlp_tanh")
    for first in range(len(ORDER)):
        model = Rotated(first)
        before = traces(model)
        rule = fa_bench.attach(model, name, seed=0, sample_input=x, **cut_options(name, nets.mlp(), options))
        rule_grads(model, rule, x, y)
        assert traces(model) != before or variant == "bp"
        rule.detach()
        assert traces(model) == before, f"detach left traces in the model that registers {ORDER[first - 1]} last"


@pytest.mark.parametrize("variant", VARIANTS)
def test_weight_pairs_and_readouts_do_not_require_grad(variant: str) -> None:
    _, rule, _, _ = start(variant)
    shown = [tensor for pair in rule.weight_pairs().values() for tensor in pair] + list(rule.readouts().values())
    shown += [rule.effective_feedback(layer) for layer in rule.weight_pairs() if not isinstance(rule, CutRule)]
    assert not any(tensor.requires_grad for tensor in shown)


@pytest.mark.parametrize("separate", [False, True])
def test_local_error_has_separate_feedback_only_if_requested(separate: bool) -> None:
    _, rule, _, _ = registered("mlp", "local_error", separate=separate)
    assert [set(tensors) for tensors in rule.feedback.values()] == 3 * [{"M", "K"} if separate else {"M"}]
    if separate:
        for tensors in rule.feedback.values():
            assert torch.equal(tensors["K"].sign(), tensors["M"].sign()) and not torch.equal(tensors["K"], tensors["M"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_groups_contain_weights_and_learned_feedback(variant: str) -> None:
    """The first parameter group contains the weights. A second group contains the learned feedback and exists only if the rule
    has any."""
    model, rule, _, _ = start(variant)
    learned = [id(tensor) for tensor in rule.feedback_parameters()]
    groups = [([id(tensor) for tensor in group["params"]], group["lr"]) for group in rule.parameter_groups(0.3)]
    weights = [id(parameter) for parameter in model.parameters() if id(parameter) not in learned]
    assert groups == [(weights, 0.3), *([(learned, 0.3 * rule.feedback_lr_scale)] if learned else [])]


@pytest.mark.parametrize("variant", VARIANTS)
def test_attach_accepts_sample_that_requires_grad(variant: str) -> None:
    """A sample input that requires gradients gives the same coverage and feedback as any other, and receives no gradient
    itself."""
    name, options = VARIANTS[variant]
    found = []
    for requires in (False, True):
        model, (x, _) = nets.NETS["conv_bn"](), nets.batch("conv_bn")
        sample = x.requires_grad_(requires)
        rule = fa_bench.attach(model, name, seed=0, sample_input=sample, **cut_options(name, model, options))
        found.append((str(rule.coverage), sorted(rule.feedback), sorted(rule.weight_pairs())))
        assert sample.grad is None
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["fa", "dfa"])
@pytest.mark.parametrize("kind", ["tensor", "by name", "dictionary", "list in a dictionary"])
def test_attach_preserves_sample_modified_by_model(name: str, kind: str) -> None:
    class Changes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.cut_points = nets.mlp(), ["net.act1", "net.act2"]

        def forward(self, x: Any) -> torch.Tensor:
            while not isinstance(x, torch.Tensor):
                x = x.pop(next(iter(x))) if isinstance(x, dict) else x.pop()
            return self.net(x.mul_(2))

    x, _ = nets.batch("mlp")
    before = x.clone()
    sample = {"tensor": x, "by name": {"x": x}, "dictionary": ({"a": x},), "list in a dictionary": ({"a": [x]},)}[kind]
    fa_bench.attach(Changes(), name, seed=0, sample_input=sample)
    assert torch.equal(x, before) and next(tensors_in(sample)) is x
