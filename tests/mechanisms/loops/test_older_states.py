"""States from versions in which learned feedback was a buffer, and auxiliary layers were in the rule's state, can still be
loaded."""

import pytest
import torch

from fa_bench.errors import StateError
from fa_bench.registry.registries import ALGORITHMS
from tests.rules.helpers import assert_bitwise

from .scripts import LEARNED, attached, sgd, state, steps

AUXILIARY = ("predsim", "bp_deepsup", "dgl", "asfp_lc")


def older(model, rule, name):
    """The states of model and rule as older versions saved them, with all auxiliary layers in the rule's state."""
    own = {key: value for key, value in state(model).items() if "feedback_auxiliary_" not in key}
    if name not in AUXILIARY:
        return own, rule.state_dict()
    local = rule._local if name == "asfp_lc" else rule
    layers = {cut: dict(local.auxiliary_at(cut).state_dict()) for cut in local._auxiliary}
    layers = {cut: {key: value.clone() for key, value in tensors.items()} for cut, tensors in layers.items()}
    return own, {"classifiers": layers} if name == "asfp_lc" else layers


@pytest.mark.parametrize("name", LEARNED)
def test_training_continues_identically_from_older_state(name):
    model, rule = attached(name)
    steps(model, rule, sgd(model.parameters()), 3)
    saved = older(model, rule, name)
    fresh, other = attached(name)
    steps(fresh, other, sgd(fresh.parameters()), 1)  # the state then differs from the saved one
    fresh.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    assert_bitwise(state(fresh), state(model))
    other.load_state_dict(other.state_dict())  # accepted, because the auxiliary layers have been loaded
    for one, two in ((model, rule), (fresh, other)):
        steps(one, two, sgd(one.parameters()), 2)
    assert_bitwise(state(fresh), state(model))


@pytest.mark.parametrize("name", LEARNED)
def test_state_dict_keys_have_not_changed(name):
    """Keys still have the form {layer or cut}.feedback_{name}, except those of auxiliary layers, which are new."""
    model, rule = attached(name)
    local = rule._local if name == "asfp_lc" else rule
    expected = {
        f"{place}.feedback_{key}"
        for place, tensors in rule.feedback.items()
        for key in tensors
        if name not in AUXILIARY or place not in local._auxiliary
    }
    assert {key for key in model.state_dict() if "feedback_" in key and "auxiliary" not in key} == expected


@pytest.mark.parametrize("name", [name for name in LEARNED if name not in AUXILIARY])
def test_state_dict_keys_follow_creation_order(name):
    """Learned and fixed feedback have one common order of keys, so the hash of a state does not depend on which tensors learn."""
    model, rule = attached(name)
    for place, tensors in rule.feedback.items():
        assert [key for key in model.state_dict() if key.startswith(f"{place}.feedback_")] == [
            f"{place}.feedback_{key}" for key in tensors
        ]
    if name == "mixed":
        assert list(rule.feedback["0"]) == ["B", "R", "F", "K", "mask_pfa", "mask_fa", "mask_kp"]


@pytest.mark.parametrize("name", AUXILIARY)
def test_rejects_state_without_auxiliary_layers(name):
    model, rule = attached(name)
    own, _ = older(model, rule, name)
    fresh, other = attached(name)
    fresh.load_state_dict(own)
    with pytest.raises(StateError, match="has the auxiliary layers of cut '1'"):
        other.load_state_dict({})
    with pytest.raises(RuntimeError, match="feedback_auxiliary"):  # with only some of its keys, the state is corrupt
        some = next(key for key in model.state_dict() if "feedback_auxiliary_" in key)
        fresh.load_state_dict(own | {some: model.state_dict()[some]})


@pytest.mark.parametrize("name", ALGORITHMS)
def test_rules_with_feedback_reject_state_without_feedback(name):
    """A state without feedback is refused, because the feedback would keep its random values. The rule's own state is complete,
    including its update count."""
    model, rule = attached(name)
    plain = {key: value for key, value in state(model).items() if "feedback" not in key}
    if len(plain) == len(model.state_dict()):  # a rule without feedback accepts it
        model.load_state_dict(plain)
        return
    with pytest.raises((StateError, RuntimeError), match=r"feedback_|auxiliary layers of cut '1'"):
        model.load_state_dict(plain)
        rule.load_state_dict(rule.state_dict())


@pytest.mark.parametrize("name", LEARNED)
def test_current_state_round_trips(name, tmp_path):
    model, rule = attached(name)
    steps(model, rule, sgd(model.parameters()), 2)
    torch.save({"model": model.state_dict(), "rule": rule.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    fresh, other = attached(name)
    fresh.load_state_dict(saved["model"])
    other.load_state_dict(saved["rule"])
    assert_bitwise(state(fresh), state(model))
