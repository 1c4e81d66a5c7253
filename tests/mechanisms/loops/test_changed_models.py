"""If a model is changed after attach in a way that its rule does not support, an error is raised before any update."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fa_bench
from fa_bench.errors import CoverageError
from fa_bench.mechanisms.structure import PART_ATTRIBUTE
from fa_bench.registry.registries import ALGORITHMS

from .scripts import attached, data, net, sgd, steps


def nested() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Sequential(nn.Linear(8, 16), nn.ReLU()), nn.Sequential(nn.Linear(16, 16), nn.ReLU()), nn.Linear(16, 3)
    ).double()


def new_head(model):
    model[4] = nn.Linear(16, 3).double()


def new_hidden_layer(model):
    model[2] = nn.Linear(16, 16).double()


def one_more_layer(model):
    model.append(nn.Linear(3, 3).double())


def layer_taken_out(model):
    model[2] = nn.Identity()


def copied_layer(model):
    model[2] = copy.deepcopy(model[2])


CHANGES = [new_head, new_hidden_layer, one_more_layer, layer_taken_out]


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("trained_before", [0, 2])
def test_changed_layers_are_rejected_before_update(name, change, trained_before):
    model, rule = attached(name)
    steps(model, rule, sgd(p for p in model.parameters() if p.requires_grad), trained_before)
    change(model)
    optimizer = sgd(p for p in model.parameters() if p.requires_grad)
    weights = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(CoverageError, match=r"changed after attach.*Call rule\.detach\(\), attach again"):
        steps(model, rule, optimizer, 1)
    assert all(torch.equal(old, new) for old, new in zip(weights, model.parameters(), strict=True))
    # The remedy in the error message works.
    model = rule.detach()
    if change in (new_head, new_hidden_layer):  # after the other changes, some rules need other cuts or have nothing to share
        options = {"f3": {"samples": 32}, "dkp": {"b_lr_scale": 1.0}, "ldrl": {"b_lr_scale": 1.0}}
        rule = fa_bench.attach(model, name, seed=0, **options.get(name, {}))
        steps(model, rule, sgd(p for p in model.parameters() if p.requires_grad), 2)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("change", [new_hidden_layer, layer_taken_out])
def test_backward_rejects_layer_changed_after_forward(name, change):
    model, rule = attached(name)
    x, y = data()
    logits = model(x)
    change(model)
    with pytest.raises(CoverageError, match="changed after attach"):
        rule.backward(F.cross_entropy(logits, y), logits, y, indices=torch.arange(len(y)))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["kp", "fa", "dfa", "dkp"])
def test_rejects_block_replaced_by_copy(name):
    model = nested()
    rule = fa_bench.attach(model, name, seed=0, **({"cuts": ["0", "1"]} if name in ("dfa", "dkp") else {}))
    model[1] = copy.deepcopy(model[1])
    with pytest.raises(CoverageError, match="changed after attach"):
        steps(model, rule, sgd(model.parameters()), 1)


def test_allow_uncovered_accepts_added_but_not_replaced_layers():
    model, rule = attached("kp", allow_uncovered=True)
    one_more_layer(model)
    steps(model, rule, sgd(model.parameters()), 2)
    copied_layer(model)
    with pytest.raises(CoverageError, match="changed after attach"):
        steps(model, rule, sgd(model.parameters()), 1)


@pytest.mark.parametrize("name", ["kp", "dfa", "dgl", "asfp_lc"])
def test_accepts_added_modules_without_weights(name):
    """Wrappers may be added, too, provided that the wrapped layer is still in the model."""
    model, rule = attached(name)
    model.append(nn.LayerNorm(3, elementwise_affine=False))  # its parameters are None
    steps(model, rule, sgd(p for p in model.parameters() if p.requires_grad), 1)

    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    model[2] = Wrapper(model[2])
    steps(model, rule, sgd(p for p in model.parameters() if p.requires_grad), 2)
    assert type(rule.detach()[2].inner) is nn.Linear


@pytest.mark.parametrize("name", ["frozen", "fa", "dfa", "bp"])
@pytest.mark.parametrize("how", ["replaced", "unfrozen"])
def test_rejects_frozen_weight_made_trainable(name, how):
    model = net()
    rule = fa_bench.attach(model, name, seed=0, freeze_stem=name != "frozen")
    layer = model[0]
    if how == "replaced":
        layer.weight = nn.Parameter(layer.weight.detach().clone())
    else:
        layer.weight.requires_grad_(True)
    with pytest.raises(CoverageError, match=r"'0\.weight' was frozen by the rule, but has since been replaced"):
        steps(model, rule, sgd(p for p in model.parameters() if p.requires_grad), 1)


def test_accepts_frozen_weight_replaced_by_frozen_weight():
    model = net()
    rule = fa_bench.attach(model, "frozen", seed=0)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    steps(model, rule, sgd(p for p in model.parameters() if p.requires_grad), 2)
    assert all(p.requires_grad for p in rule.detach().parameters())


def test_exact_and_evaluation_passes_skip_change_check():
    model, rule = attached("kp")
    new_head(model)
    with torch.no_grad():
        model(torch.zeros(2, 8).double())
    with rule.exact():
        model(torch.zeros(2, 8).double()).sum().backward()


@pytest.mark.parametrize("name", ["kp", "dfa", "bp"])
def test_attach_rejects_inference_mode(name):
    with torch.inference_mode():
        model = net()
        with pytest.raises(CoverageError, match=r"inference_mode"):
            fa_bench.attach(model, name)


@pytest.mark.parametrize("name", ["dfa", "dkp", "dgl", "asfp_lc"])
def test_rejects_replaced_cut(name):
    """A cut must not be replaced, even by a module of the same class without weights."""
    model, rule = attached(name)
    model[1] = nn.ReLU()
    with pytest.raises(CoverageError, match=r"changed after attach \(1 replaced\)"):
        steps(model, rule, sgd(p for p in model.parameters() if p.requires_grad), 1)


@pytest.mark.parametrize("name", ["kp", "dfa"])
def test_added_layer_norm_learns(name):
    """A normalisation layer that is added after attach learns, because gains and biases do not need feedback."""
    model, rule = attached(name)
    model[3] = nn.Sequential(nn.LayerNorm(16).double(), model[3])
    before = model[3][0].bias.detach().clone()
    steps(model, rule, sgd(p for p in model.parameters() if p.requires_grad), 1)
    assert not torch.equal(model[3][0].bias, before)


def test_attach_rejects_submodule_but_accepts_its_copy():
    model = nested()
    rule = fa_bench.attach(model, "bp")
    with pytest.raises(CoverageError, match="is part of another model"):
        fa_bench.attach(model[0], "fa")
    fa_bench.attach(copy.deepcopy(model[0]), "fa")
    assert rule.model is model


def test_added_layer_belongs_to_model_until_detach():
    model, rule = attached("kp", allow_uncovered=True)
    one_more_layer(model)
    model(data()[0])
    with pytest.raises(CoverageError, match="is part of another model with the rule 'kp'"):
        fa_bench.attach(model[5], "fa")
    added = rule.detach()[5]
    fa_bench.attach(added, "fa")


def test_removed_layer_can_be_attached_after_detach():
    model, rule = attached("fa")
    old, model[2] = model[2], nn.Identity()
    rule.detach()
    other = fa_bench.attach(nn.Sequential(old, nn.Linear(16, 3).double()), "kp")
    assert rule.name == "fa" and list(other.feedback) == ["0", "1"]


def test_detach_unmarks_inserted_copies():
    model, rule = attached("fa")
    model[1] = copy.deepcopy(model[1])
    rule.detach()
    assert not any(PART_ATTRIBUTE in module.__dict__ for module in model.modules())
