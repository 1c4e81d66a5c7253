"""A rule cannot be added without a reference to hold it to."""

from pathlib import Path

import pytest

from .references import CASES, REFERENCES

FOLDER = Path(__file__).resolve().parents[2] / "conf" / "algorithm"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def test_the_rules_were_found():
    assert set(NAMES) >= {"bp", "fa", "kp", "dfa"}, f"found {NAMES} in {FOLDER}"


@pytest.mark.parametrize("name", NAMES)
def test_rule_has_a_reference_that_is_used(name):
    assert name in REFERENCES, f"conf/algorithm/{name}.yaml has no entry in REFERENCES (tests/rules/references)"
    assert any(rule == name for rule, _ in CASES.values()), f"{name} has a reference but no case (tests/rules/references)"
