"""Tests that check which layers a rule applies to, given layer patterns and the options for the output layer and the stem."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

import fa_bench

from . import nets
from .helpers import EDGE_RULES, array, assert_matches, bp_grads, distance, layer_names, rule_grads
from .reference import gradients

OPTIONS = {"asap": {"match": "random", "linear": "share"}, "asfp": {"match": "random", "linear": "share"}}
PATTERNS = [({"exclude": ["fc*"]}, {"fc1", "fc2"}), ({"include": ["conv*", "fc1"]}, {"fc2"}), ({"exclude": ["conv2"]}, {"conv2"})]


def attached(name: str, net: str = "conv_bn", **options):
    x, y = nets.batch(net)
    model = nets.NETS[net]()
    return model, fa_bench.attach(model, name, seed=0, sample_input=x, **OPTIONS.get(name, {}), **options), x, y


@pytest.mark.parametrize(("options", "plain"), PATTERNS)
def test_excluded_layers_propagate_error_through_weight(options, plain):
    from .reference import describe

    model, rule, x, y = attached("fa", **options)
    twin = nets.convnet(batch_norm=True)
    carry = {path: array(tensors["B"]) for path, tensors in rule.feedback.items() if "B" in tensors}
    assert set(carry) == set(layer_names(twin)) - plain
    params = {name: array(p) for name, p in twin.named_parameters()}
    assert_matches(rule_grads(model, rule, x, y), gradients(describe(twin), params, array(x), y.numpy(), carry=carry))
    for path in plain:
        assert torch.equal(rule.effective_feedback(path), model.get_submodule(path).weight)


@pytest.mark.parametrize("name", EDGE_RULES)
def test_every_edge_rule_supports_plain_last(name):
    model, rule, x, y = attached(name, "mlp_tanh", plain_last=True)
    got, exact = rule_grads(model, rule, x, y), bp_grads(nets.mlp(), x, y)
    assert distance(got["fc2.weight"], exact["fc2.weight"]) < 1e-12
    assert distance(got["fc1.weight"], exact["fc1.weight"]) > 1e-2


@pytest.mark.parametrize("name", ["bp", "fa", "pfa", "dfa"])
def test_freeze_stem_trains_all_layers_except_stem(name):
    options = {"cuts": ["act1", "act2", "act3"]} if name == "dfa" else {}
    model, rule, x, y = attached(name, freeze_stem=True, **options)
    free, free_rule, _, _ = attached(name, **options)
    got, want = rule_grads(model, rule, x, y), rule_grads(free, free_rule, x, y)
    assert got["conv1.weight"] is None and got["conv1.bias"] is None
    assert_matches(got, {key: value for key, value in want.items() if not key.startswith("conv1.")}, rel=1e-12)
    with rule.exact():
        assert model.conv1.weight.requires_grad
    assert not model.conv1.weight.requires_grad
    rule.detach()
    assert all(p.requires_grad for p in model.parameters())


def test_stem_is_first_executed_layer():
    x, _ = nets.batch("residual")
    model = nets.residual()  # this model registers its head before its other layers
    fa_bench.attach(model, "fa", seed=0, sample_input=x, freeze_stem=True)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["stem.weight", "stem.bias"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": ["convv1"]}, "include=convv1.*conv1"),
        ({"exclude": ["fc9"]}, "exclude=fc9.*fc"),
        ({"exclude": ["*"]}, "no layer"),
        ({"include": ["fc2"], "plain_last": True}, "no layer"),
    ],
)
def test_rejects_layer_patterns_without_effect(options, message):
    with pytest.raises(fa_bench.errors.CoverageError, match=message):
        attached("fa", **options)


@pytest.mark.parametrize("name", ["fa", "usf"])
def test_output_layer_is_last_executed_not_last_registered(name):
    x, _ = nets.batch("residual")
    rule = fa_bench.attach(nets.residual(), name, seed=0, sample_input=x, plain_last=True)
    assert layer_names(rule.model)[-1] != "head"
    assert [path for path, (effective, weight) in rule.weight_pairs().items() if torch.equal(effective, weight)] == ["head"]


@pytest.mark.parametrize("name", ["fa", "kp"])
def test_output_layer_without_sample_is_last_registered(name):
    """Without a sample, layers are taken in the order of their definition, even if the layer defined last runs first."""
    rule = fa_bench.attach(nets.convnet(batch_norm=True), name, seed=0, plain_last=True)
    assert [path for path, (effective, weight) in rule.weight_pairs().items() if torch.equal(effective, weight)] == ["fc2"]

    class Backwards(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = torch.nn.Linear(5, 5), torch.nn.Linear(5, 5)

        def forward(self, x):
            return self.last(self.first(x).relu())

    for sample, output in ((None, "first"), (torch.zeros(2, 5), "last")):
        rule = fa_bench.attach(Backwards(), name, seed=0, plain_last=True, sample_input=sample)
        assert [path for path, pair in rule.weight_pairs().items() if torch.equal(*pair)] == [output]


def test_names_may_contain_brackets():
    x = torch.randn(2, 4)

    def model():
        names = OrderedDict({"in[0]": nn.Linear(4, 3), "act[0]": nn.Tanh(), "out[0]": nn.Linear(3, 2)})
        return nn.Sequential(names)

    rule = fa_bench.attach(model(), "fa", exclude=["in[0]"])
    assert "through the weight" in rule.coverage.covered[0].feedback
    assert list(fa_bench.attach(model(), "dfa", cuts=["act[0]"], sample_input=x).feedback) == ["act[0]"]
    with pytest.raises(fa_bench.errors.CoverageError) as caught:
        fa_bench.attach(model(), "dfa", sample_input=x)
    assert caught.value.settings == {"cuts": ["act[0]"]}
    loose = nn.Sequential(OrderedDict({"a[0]": Loose(), "b": nn.Linear(4, 2)}))
    with pytest.raises(fa_bench.errors.CoverageError) as caught:
        fa_bench.attach(loose, "fa", sample_input=x)
    fa_bench.attach(loose, "fa", sample_input=x, **caught.value.settings)


class Loose(nn.Module):
    """A weight that belongs to no layer."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(4, 4))

    def forward(self, x):
        return x @ self.matrix


def test_uncovered_weights_are_weight_transport() -> None:
    model, (x, _) = nets.mlp(), nets.batch("mlp")
    rule = fa_bench.attach(model, "dfa", cuts=["act2"], allow_uncovered=True, sample_input=x)
    assert rule.coverage.all_transport() == ["through 1 uncovered weight (fc1.weight)"]
    rule.detach()
    rule = fa_bench.attach(model, "dfa", cuts=["act2"], within="block", sample_input=x)
    assert rule.coverage.all_transport() == list(rule.coverage.transport) != []


def test_coverage_without_trace_says_what_is_checked_later() -> None:
    convolutions = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    note = "Weights that are used outside their layers are found only in the first training pass; pass sample_input"
    assert note in str(fa_bench.attach(convolutions, "fa").coverage)
    fa_bench.attached_rule(convolutions).detach()
    assert note not in str(fa_bench.attach(convolutions, "fa", sample_input=torch.zeros(2, 1, 4, 4)).coverage)
    assert note not in str(fa_bench.attach(nets.mlp(), "fa").coverage)
