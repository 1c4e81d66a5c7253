"""Tests that errors about mistakes in a user's rule name the class, the layer or cut, and what is required."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fa_bench
from fa_bench.config.job import register_schemas
from fa_bench.errors import ComponentError, ConfigError, FaBenchError
from fa_bench.mechanisms.cut.local import LocalRule
from fa_bench.mechanisms.cut.passes import PassRule
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.utils.sampling import fill, sample


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def train(rule: fa_bench.Rule) -> None:
    """Attach a rule and run one step. After an error, detach the rule, assert that the model is unchanged and raise the error
    again."""
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
    """A rule that derives from `PassRule` but does not compute gradients."""


class WithoutLayers(LocalRule):
    """A local rule that does not create auxiliary layers."""


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
            r"class Typo \(.*test_own_rule_mistakes\) does not.*'pathway', .*EdgeRule needs; rename its 'pathwy' to 'pathway'\?",
        ),
        (Incomplete(), r"class WithoutFeedback .* does not implement the method 'effective', which FeedbackPathway needs$"),
        (WithoutGradients(cuts=["1"]), r"class WithoutGradients .* does not implement the method '\w+', which PassRule needs$"),
        (WithoutLayers(cuts=["1"]), r"class WithoutLayers .* does not implement the method 'auxiliary', which LocalRule needs$"),
    ],
)
def test_missing_rule_method_error_names_method(rule: fa_bench.Rule, message: str) -> None:
    with pytest.raises(ComponentError, match=message):
        train(rule)


@dataclasses.dataclass(eq=False)
class Unscheduled(fa_bench.Schedule):
    def rates(self, lr: float, done: int, total: int) -> float:
        return lr


def test_missing_schedule_method_error_names_method() -> None:
    with pytest.raises(ComponentError, match=r"class Unscheduled .*'rate', which Schedule needs; rename its 'rates'"):
        Unscheduled().rate(0.1, 0, 1)


# ------------------------------------------------------------------------------------------------ edge rules
class Transposed(fa_bench.FeedbackPathway):
    def effective(self, layer: Any) -> Any:
        return layer.weight.detach().t()


class Nothing(fa_bench.FeedbackPathway):
    def effective(self, layer: Any) -> Any:
        return None


@dataclasses.dataclass(eq=False)
class Given(fa_bench.EdgeRule):
    """A rule whose `pathway` creates the given tensors and returns the given value."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tensors: dict[str, Any] = {}
        self.returned: Any = None

    def pathway(self, layer: Any) -> Any:
        for name, value in self.tensors.items():
            layer.put(name, value)
        return self.returned


WRONG = torch.zeros(3, 3)


@pytest.mark.parametrize(
    ("returned", "tensors", "message"),
    [
        (None, {}, r"^Given\.pathway returned None for layer '0'; it must return an instance of fa_bench\.FeedbackPathway"),
        (
            fa_bench.FixedFeedback,
            {"B": "zeros"},
            r"returned <class .*FixedFeedback'> for layer '0'.*as fa_bench\.FixedFeedback\(\)$",
        ),
        (torch.zeros(3, 4), {}, r"returned a tensor of shape \(3, 4\) for layer '0'"),
        (fa_bench.FixedFeedback(), {}, r"^layer '0' has no feedback tensor 'B', which FixedFeedback uses; .*layer\.put\('B', "),
        (fa_bench.LearnedFeedback(), {"b": "zeros"}, r"^layer '0' has no feedback tensor 'B', which LearnedFeedback uses"),
        (
            fa_bench.FixedFeedback(),
            {"B": WRONG},
            r"layer '0': its feedback tensor 'B' is a tensor of shape \(3, 3\);.*weight, \(3, 4\)$",
        ),
        (
            fa_bench.LearnedFeedback(),
            {"B": WRONG},
            r"layer '0': its feedback tensor 'B' is a tensor of shape \(3, 3\);.*, \(3, 4\)$",
        ),
        (Transposed(), {}, r"layer '0': Transposed\.effective returned a tensor of shape \(4, 3\); .* the weight, \(3, 4\)$"),
        (Nothing(), {}, r"layer '0': Nothing\.effective returned None; .* the weight, \(3, 4\)$"),
    ],
    ids=[
        "None",
        "class",
        "tensor",
        "fixed without B",
        "learned without B",
        "fixed, shape",
        "learned, shape",
        "transposed",
        "nothing",
    ],
)
def test_rejects_invalid_pathways(returned: Any, tensors: dict[str, Any], message: str) -> None:
    rule = Given()
    rule.returned, rule.tensors = returned, tensors
    with pytest.raises(ComponentError, match=message):
        train(rule)


# ------------------------------------------------------------------------------------------------ tensors
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (
            "xavier",
            ConfigError,
            r"'B': there is no initialiser 'xavier'; did you mean 'xavier_\w+'\? \(available: xavier_uniform, ",
        ),
        ("copyw", ConfigError, r"'B': there is no initialiser 'copyw'; did you mean 'copy_w'\?.*, copy_w\)$"),
        (np.zeros((3, 4)), ComponentError, r"'B': array\(.* is neither the name of an initialiser nor a torch tensor$"),
        (None, ComponentError, r"'B': None is neither the name of an initialiser nor a torch tensor$"),
    ],
    ids=["xavier", "copyw", "numpy", "None"],
)
def test_put_rejects_invalid_values(value: Any, error: type[Exception], message: str) -> None:
    edge, cut = Given(), Direct(cuts=["1"])
    edge.returned, edge.tensors, cut.arguments = fa_bench.FixedFeedback(), {"B": value}, (value, (2, 3))
    with pytest.raises(error, match=r"^layer '0', feedback tensor " + message):
        train(edge)
    with pytest.raises(error, match=r"^cut '1', feedback tensor " + message.partition(";")[0].removesuffix("$")):
        train(cut)


@pytest.mark.parametrize("function", [sample, lambda shape, init, seed: fill(torch.zeros(shape), init)])
def test_unknown_initialiser_suggests_nearest_name(function: Any) -> None:
    with pytest.raises(ConfigError, match=r"^there is no initialiser 'zero'; did you mean 'zeros'\? \(available: .*, zeros, "):
        function((2, 3), "zero", 0)
    with pytest.raises(ConfigError, match=r"^there is no initialiser \['zeros'\]"):
        function((2, 3), ["zeros"], 0)


@dataclasses.dataclass(eq=False)
class Direct(fa_bench.CutRule):
    """A rule that creates B at every cut with the given arguments, or creates no feedback if no arguments are given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.arguments: Any = ()

    def make_feedback(self, features: dict[str, tuple[int, ...]], classes: int) -> None:
        for cut in features if self.arguments else ():
            self.put(cut, "B", *self.arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), r"^cut '1' has no feedback tensor 'B', which Direct needs to project errors; .*make_feedback with self\.put\(cut"),
        ((torch.zeros(5, 3),), r"^cut '1': its feedback tensor 'B' has the shape \(5, 3\); it needs 2 rows"),
        (("zeros",), r"^cut '1', feedback tensor 'B': \(\) is not a shape"),
        (("zeros", (2, {"1": (3,)})), r"^cut '1', feedback tensor 'B': \(2, \{.* is not a shape .*math\.prod\(features\[cut\]\)"),
    ],
    ids=["none", "shape", "no shape", "no number"],
)
def test_rejects_invalid_cut_feedback(arguments: Any, message: str) -> None:
    rule = Direct(cuts=["1"])
    rule.arguments = arguments
    with pytest.raises(ComponentError, match=message):
        train(rule)


# ------------------------------------------------------------------------------------------------ options
def undecorated(base: type[Any]) -> type[Any]:
    class Plain(base):
        drop: float = fa_bench.option(0.5, "fraction", minimum=0)
        kinds_of_drop: list[str] = fa_bench.option(["a"], "kinds")

    return Plain


@pytest.mark.parametrize("base", [fa_bench.EdgeRule, fa_bench.Architecture])
def test_rejects_options_of_non_dataclass(base: type[Any]) -> None:
    message = (
        r"^class undecorated\.<locals>\.Plain \(.*\) declares options \(drop, kinds_of_drop\) but is not a dataclass; "
        r"write @dataclasses\.dataclass\(eq=False\) on the line above it$"
    )
    plain = undecorated(base)
    with pytest.raises(ComponentError, match=message):
        plain()
    with pytest.raises(ComponentError, match=message):
        plain.from_mapping({"drop": 0.1})
    derived = dataclasses.dataclass(eq=False)(type("Derived", (plain,), {}))
    with pytest.raises(ComponentError, match=message):
        derived()
    assert dataclasses.dataclass(eq=False)(plain)(drop=0.1).drop == 0.1


def test_registering_non_dataclass_rule_error_suggests_fix() -> None:
    fa_bench.register_rule("undecorated")(undecorated(fa_bench.EdgeRule))
    with pytest.raises(FaBenchError, match=r"undecorated.*\(drop, kinds_of_drop\) but is not a dataclass; write @dataclasses"):
        register_schemas()
    assert "undecorated" not in ALGORITHMS
    register_schemas()


def test_decorators_work_in_either_order() -> None:
    cls = dataclasses.dataclass(eq=False)(fa_bench.register_rule("reversed")(undecorated(fa_bench.EdgeRule)))
    try:
        assert ALGORITHMS["reversed"] is cls and cls.from_mapping({"drop": 0.1}).drop == 0.1
    finally:
        ALGORITHMS.drop("reversed")
