"""Tests of dkp, drtp and the rules with local losses on the registered models."""

import copy

import pytest
import torch

from .helpers import assert_bitwise, rule_grads, weights
from .registered import ACTIVATIONS, BLOCKS, MODELS, registered, trained_grads

LOCAL = ("local_error", "predsim", "dgl")
CUT_RULES = ("dkp", "drtp", *LOCAL)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", CUT_RULES)
def test_two_steps_train_every_layer(name, model):
    net, rule, x, y = registered(model, name, dtype=torch.float32)
    before = copy.deepcopy(net.state_dict())
    learned = [tensor.detach().clone() for tensor in rule.feedback_parameters()]
    optimizer = torch.optim.SGD(rule.parameter_groups(lr=0.1), momentum=0.9)
    for _ in range(2):
        rule_grads(net, rule, x, y)
        optimizer.step()
        rule.step()
        optimizer.zero_grad()
    for key, parameter in weights(net).items():
        assert torch.isfinite(parameter).all() and not torch.equal(parameter, before[key]), f"{key} did not learn"
    for old, tensor in zip(learned, rule.feedback_parameters(), strict=True):
        # A bias that precedes a normalisation has a gradient of zero.
        assert torch.isfinite(tensor).all() and (tensor.dim() == 1 or not torch.equal(tensor, old))
    assert not rule.coverage.uncovered and len(rule.coverage.covered) == {"mlp": 4, "conv2": 4, "resnet20": 14}[model]


@pytest.mark.parametrize("model", MODELS)
def test_default_cuts_are_activations_or_block_ends(model):
    """The cuts are all activations or, for dgl, the ends of all blocks except the last one."""
    assert list(registered(model, "dgl")[1].feedback) == BLOCKS[model]
    for name in ("local_error", "predsim"):
        cuts = list(registered(model, name)[1].feedback)
        assert len(cuts) == 13 if model == "resnet20" else cuts == ACTIVATIONS[model]


@pytest.mark.parametrize("name", ["drtp", *LOCAL])
@pytest.mark.parametrize("model", MODELS)
def test_gradients_do_not_depend_on_later_layers(name, model):
    """With update unlocking, changing the layers after a cut (and thus the output error) does not affect the gradients before it.

    The network is split at the last cut, and every parameter after it is changed, including those of normalisation layers.
    """
    net, rule, x, y = registered(model, name)
    last = list(rule.feedback)[-1]
    paths = [path for path, module in net.named_modules() if not list(module.children())]
    # A block ends with its last module.
    end = max(index for index, path in enumerate(paths) if path == last or path.startswith(f"{last}."))
    before = rule_grads(net, rule, x, y), {name: g if g is None else g.clone() for name, g in trained_grads(rule).items()}
    with torch.no_grad():
        above = [p for path in paths[end + 1 :] for p in net.get_submodule(path).parameters()]
        for parameter in above:
            parameter.mul_(-1.5).add_(0.3)
    rule_ids = {id(p) for p in above}
    for parameter in rule.feedback_parameters():
        parameter.grad = None
    after = rule_grads(net, rule, x, y)
    names = dict(net.named_parameters())
    below = [key for key in before[0] if id(names[key]) not in rule_ids]
    assert len(below) >= 4 and len(above) >= 2
    for key in below:
        assert torch.equal(after[key], before[0][key]), f"{key} depends on the layers after {last}"
    assert_bitwise(trained_grads(rule), before[1])
    assert any(not torch.equal(after[key], before[0][key]) for key in before[0] if key not in below)


def test_dfa_gradients_depend_on_output_layer():
    """Under dfa, the error is computed from the output, so changing the output layer changes every gradient."""
    net, rule, x, y = registered("mlp", "dfa")
    before = rule_grads(net, rule, x, y)
    with torch.no_grad():
        net.fc4.weight.mul_(-1.5)
    after = rule_grads(net, rule, x, y)
    assert not any(torch.equal(after[key], before[key]) for key in before)
