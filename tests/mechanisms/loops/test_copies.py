"""Copies of a model and reloaded models have the same parameters in the same groups."""

import copy
import gc

import pytest
import torch

import fa_bench
from fa_bench.registry.registries import ALGORITHMS

from .scripts import attached, steps


def groups(model) -> tuple[list[str], list[str], list[list[str]]]:
    """The names of the feedback, of the weights, and of the parameters in each group."""
    rule = fa_bench.attached_rule(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return (
        [names[id(one)] for one in rule.feedback_parameters()],
        [names[id(one)] for one in rule.weight_parameters()],
        [[names[id(one)] for one in group["params"]] for group in rule.parameter_groups(0.1)],
    )


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_parameter_groups_of_copied_and_reloaded_models(name):
    model, _ = attached(name)
    expected = groups(model)
    assert len(expected[0]) + len(expected[1]) == len(list(model.parameters()))
    copied = copy.deepcopy(copy.deepcopy(model))
    assert groups(copied) == expected
    for _ in range(3):  # later tensors may reuse the ids of freed ones
        model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
        gc.collect()
        assert groups(model) == expected
    optimizer = torch.optim.SGD(fa_bench.attached_rule(model).parameter_groups(0.01), momentum=0.9)
    steps(model, fa_bench.attached_rule(model), optimizer, 1)
    other = torch.optim.SGD(fa_bench.attached_rule(copied).parameter_groups(0.01), momentum=0.9)
    other.load_state_dict(optimizer.state_dict())
