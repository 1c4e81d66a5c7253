"""Tests that every rule has a reference implementation and documents its options."""

import inspect
import re

import pytest

from fa_bench.mechanisms.cut.rule import CutRule
from fa_bench.mechanisms.edge.rule import EdgeRule
from fa_bench.mechanisms.rule import Rule
from fa_bench.registry.options import option_fields
from fa_bench.registry.registries import ALGORITHMS

from .references import CASES, REFERENCES


def test_algorithms_registry_contains_basic_rules():
    assert {*ALGORITHMS} >= {"bp", "fa", "kp", "dfa"}


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_rule_has_reference_and_case(name):
    assert name in REFERENCES, f"{name} has no entry in REFERENCES (tests/rules/references)"
    assert any(rule == name for rule, _ in CASES.values()), f"{name} has a reference but no case (tests/rules/references)"


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_docstring_names_every_option(name: str) -> None:
    """The docstring of a rule, or of one of its base classes, must name every option of the rule.

    Options of `EdgeRule` and `CutRule` are exempt.
    """
    said = "\n".join(inspect.getdoc(cls) or "" for cls in ALGORITHMS[name].__mro__ if issubclass(cls, Rule))
    general = {field.name for field in option_fields(EdgeRule)} | {field.name for field in option_fields(CutRule)}
    for field in option_fields(ALGORITHMS[name]):
        assert field.name in general or re.search(rf"`{field.name}\b", said), field.name
