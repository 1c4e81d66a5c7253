"""Tests of models with two outputs: which layers are trained by rules that run their own passes, and what the coverage reports
about the others."""

from __future__ import annotations

from collections import UserDict
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fa_bench
from fa_bench.objectives.cross_entropy import CrossEntropy
from fa_bench.registry.registries import ALGORITHMS

#: For each rule that replaces the whole backward pass, its options, and what the coverage says about the other output's layers.
PASSES: dict[str, tuple[dict[str, Any], str]] = {
    "epc": ({}, "not trained"),
    "pc": ({}, "not trained"),
    "pepita": ({}, "not trained"),
    "dfc": ({}, "not trained"),
    "forward_gradient": ({"form": "weight"}, "not trained"),
    "weight_perturbation": ({}, "gets only noise"),
}
#: Rules under which each output receives its own gradient.
OTHERS = ("dfa", "drtp", "forward_forward", "node_perturbation", "dgl", "ldrl")


class TwoHeads(nn.Module):
    """A 6-5-5 network with two outputs of 3 features, returned as a dictionary or a tuple. The second output has a gain
    parameter."""

    def __init__(self, is_dict: bool = True) -> None:
        super().__init__()
        self.fc1, self.act1, self.fc2, self.act2 = nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh()
        self.main, self.other, self.gain, self.is_dict = nn.Linear(5, 3), nn.Linear(5, 3), nn.Parameter(torch.ones(3)), is_dict
        self.cut_points = self.blocks = ["act1", "act2"]

    def forward(self, x: Tensor) -> Any:
        h = self.act2(self.fc2(self.act1(self.fc1(x))))
        main, other = self.main(h), self.other(h) * self.gain
        return {"main": main, "other": other} if self.is_dict else (main, other)


def trained(name: str, is_dict: bool, options: dict[str, Any]) -> tuple[fa_bench.Rule, dict[str, Tensor]]:
    """The rule, and the gradients of a loss on both outputs."""
    torch.manual_seed(0)
    model = TwoHeads(is_dict)
    x, y = torch.randn(8, 6), torch.randint(3, (8,))
    rule = fa_bench.attach(model, name, sample_input=x, output="main" if is_dict else 0, **options)
    result = model(x)
    main, other = result.values() if is_dict else result
    rule.backward(F.cross_entropy(main, y) + F.cross_entropy(other, y), main, y, loss_scale=1.0)
    return rule, {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def row(rule: fa_bench.Rule, layer: str) -> str:
    return next(entry.feedback for entry in rule.coverage.covered if entry.layer == layer)


@pytest.mark.parametrize("is_dict", [True, False], ids=["dictionary", "tuple"])
@pytest.mark.parametrize("name", PASSES)
def test_coverage_reports_untrained_head(name: str, is_dict: bool) -> None:
    options, says = PASSES[name]
    rule, gradients = trained(name, is_dict, options)
    assert ("other.weight" in gradients) == ("gain" in gradients) == (name == "weight_perturbation")
    assert {"main.weight", "fc1.weight"} <= set(gradients)
    output = "main" if is_dict else "0"
    assert row(rule, "other") == f"is not computed: {says}, because output '{output}' does not depend on it"
    assert f"{says.capitalize()}, because output '{output}' does not depend on them: gain." in rule.coverage.notes
    assert all(says not in row(rule, path) for path in ("fc1", "fc2", "main"))


@pytest.mark.parametrize("name", OTHERS)
def test_coverage_reports_both_heads_as_trained(name: str) -> None:
    rule, gradients = trained(name, True, {})
    assert gradients["other.weight"].any() and gradients["main.weight"].any()
    assert row(rule, "other") == row(rule, "main") == "is the true one (output layer)"


def test_forward_gradient_ignores_loss_of_other_output() -> None:
    """With form=weight, the gradients are noise times one scalar, which must not depend on the loss of the other output."""
    found = []
    for factor in (0.0, 5.0):
        torch.manual_seed(0)
        model = TwoHeads()
        x, y = torch.randn(8, 6), torch.randint(3, (8,))
        rule = fa_bench.attach(model, "forward_gradient", sample_input=x, output="main", form="weight")
        result = model(x)
        rule.backward(F.cross_entropy(result["main"], y) + factor * F.cross_entropy(result["other"], y), result["main"], y)
        found.append(model.fc1.weight.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize(("name", "learns"), [("pepita", True), ("pc", True), ("dfc", True), ("epc", False)])
def test_branch_with_cut_learns_except_under_epc(name: str, learns: bool) -> None:
    class Branch(TwoHeads):
        def __init__(self) -> None:
            super().__init__()
            self.fc3, self.act3 = nn.Linear(5, 5), nn.Tanh()
            self.cut_points = self.blocks = ["act1", "act2", "act3"]

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = self.act1(self.fc1(x))
            return {"main": self.main(self.act2(self.fc2(h))), "other": self.other(self.act3(self.fc3(h))) * self.gain}

    torch.manual_seed(0)
    model, x, y = Branch(), torch.randn(8, 6), torch.randint(3, (8,))
    rule = fa_bench.attach(model, name, sample_input=x, output="main")
    main = model(x)["main"]
    rule.backward(F.cross_entropy(main, y), main, y)
    gradient = model.fc3.weight.grad
    assert (gradient is not None and bool(gradient.any())) == learns
    assert ("not trained" not in row(rule, "fc3")) == learns and "not trained" in row(rule, "other")


@pytest.mark.parametrize("kind", [UserDict, MappingProxyType])
def test_errors_reach_cuts_if_model_returns_other_mapping(kind: Any) -> None:
    class Wrapped(TwoHeads):
        def forward(self, x: Tensor) -> Any:
            return kind(super().forward(x))

    x, found = torch.randn(8, 6), []
    for cls in (TwoHeads, Wrapped):
        torch.manual_seed(0)
        model = cls()
        fa_bench.attach(model, "dfa", sample_input=x, output="main")
        model(x)["main"].square().sum().backward()
        found.append(model.fc1.weight.grad)
    assert found[0] is not None and found[1] is not None and torch.equal(*found)


def test_rule_object_takes_output_of_each_objective() -> None:
    rule, x = ALGORITHMS["dfa"](), torch.randn(8, 6)
    for output in ("main", "other"):
        rule.attach(TwoHeads(), sample_input=x, objective=CrossEntropy(output=output))
        assert rule.output == output
        rule.detach()
        assert rule.output is None
