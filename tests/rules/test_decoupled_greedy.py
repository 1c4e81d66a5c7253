"""Tests of dgl: modules that learn by backpropagation of their own losses, and the division of a net into modules."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fa_bench

from . import nets
from .helpers import array, assert_matches, collect, rule_grads
from .registered import BLOCKS, MODELS, registered, trained_grads


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", ["mlp_sr", "mlp", "linear"])
def test_module_gradients_match_backprop_of_local_loss(model, kind):
    """The gradients equal those of plain torch if modules are detached at their ends and their auxiliary losses are added."""
    net, rule, x, y = registered(model, "dgl", auxiliary_net=kind)
    nets_of_cuts = {cut: copy.deepcopy(rule.auxiliary_at(cut)) for cut in rule.feedback}
    got = rule_grads(net, rule, x, y)
    mine = trained_grads(rule)
    plain = rule.detach()
    losses = []

    def ends(cut):
        def hook(module, args, output):
            losses.append(F.cross_entropy(nets_of_cuts[cut](output), y))
            return output.detach()

        return hook

    handles = [plain.get_submodule(cut).register_forward_hook(ends(cut)) for cut in nets_of_cuts]
    plain.zero_grad(set_to_none=True)
    (F.cross_entropy(plain(x), y) + sum(losses)).backward()
    for handle in handles:
        handle.remove()
    assert len(losses) == len(BLOCKS[model])
    # Convolutions sum in the same order, so only the order in which the errors at a shortcut are added may differ.
    assert_matches(got, {key: array(grad) for key, grad in collect(plain).items() if grad is not None}, rel=1e-12)
    theirs = {f"{cut}.{key}": array(p.grad) for cut, held in nets_of_cuts.items() for key, p in held.named_parameters()}
    assert_matches(mine, theirs, rel=1e-12)


def test_cuts_define_custom_modules():
    """Module 1 consists of fc1 and fc2, and module 2 of fc3 and the output layer.

    Because fc1 learns by backpropagation within its module, it counts as covered.
    """
    net, rule, x, y = registered("mlp", "dgl", cuts=["act2", "act3"])
    assert list(rule.feedback) == ["act2"]
    said = {entry.layer: entry.feedback for entry in rule.coverage.covered}
    assert "cut at act2" in said["fc2"] and all("within its block (weight transport)" in said[layer] for layer in ("fc1", "fc3"))
    assert rule_grads(net, rule, x, y)["fc1.weight"].any()
    with pytest.raises(fa_bench.errors.CoverageError, match="fc1"):
        registered("mlp", "predsim", cuts=["act2", "act3"])


def test_attention_inside_module_is_covered():
    """Attention stores its input projections outside linear layers, but within a module these weights learn like any others."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    model = nn.Sequential(nn.Linear(4, 6), Attention(), nn.Flatten(), nn.Linear(18, 5), nn.ReLU(), nn.Linear(5, 3))
    x, y = torch.randn(4, 3, 4), torch.tensor([0, 1, 2, 0])
    rule = fa_bench.attach(model, "dgl", seed=0, cuts=["2"], sample_input=x)
    assert not rule.coverage.uncovered
    assert all(grad is not None for grad in rule_grads(model, rule, x, y).values())


def test_requires_at_least_two_modules():
    with pytest.raises(fa_bench.errors.CoverageError, match=r"two modules.*act3.*fc4"):
        registered("mlp", "dgl", cuts=["act3"])
    with pytest.raises(fa_bench.errors.CoverageError, match=r"model\.blocks"):
        fa_bench.attach(nets.mlp(), "dgl", seed=0)


def test_auxiliary_net_layer_shapes():
    """A 4 x 8 x 8 map is averaged to 2 x 2 pixels, so the linear layers that follow are 16 wide.

    After a flat activation of 9 features, the linear layers are 9 wide.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in registered("conv2", "dgl")[1].feedback["act1"].items()}
    assert shapes["conv1.weight"] == shapes["conv3.weight"] == (4, 4, 1, 1) and "conv1.bias" not in shapes
    assert shapes["fc1.weight"] == shapes["fc3.weight"] == (16, 16) and shapes["out.weight"] == (3, 16)
    layers = {f"{part}{number}" for part in ("conv", "conv_bn", "fc", "fc_bn") for number in (1, 2, 3)}
    assert {key.split(".")[0] for key in shapes} == layers | {"out"}
    shapes = {key: tuple(tensor.shape) for key, tensor in registered("mlp", "dgl")[1].feedback["act1"].items()}
    assert shapes["fc2.weight"] == (9, 9) and "conv1.weight" not in shapes
    linear = registered("conv2", "dgl", auxiliary_net="linear")[1].feedback["act1"]
    assert set(linear) == {"out.weight", "out.bias"} and linear["out.weight"].shape == (3, 16)


@pytest.mark.parametrize(
    ("size", "first", "second"),
    [
        ((32, 20), (8, 5), (2, 2)),
        ((9, 8), (3, 2), (2, 2)),
        ((4, 9), (1, 3), (1, 2)),
        ((1, 1), (1, 1), (1, 1)),
    ],
    ids=str,
)
def test_auxiliary_net_pools_to_quarter_then_two_by_two(size, first, second):
    """Maps are never enlarged."""
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(3 * size[0] * size[1], 5), nn.ReLU(), nn.Linear(5, 3)
    )
    rule = fa_bench.attach(model, "dgl", seed=0, cuts=["1"], sample_input=torch.zeros(2, 1, *size))
    net, seen = rule.auxiliary_at("1"), {}
    for name, module in net.named_children():
        module.register_forward_hook(lambda module, args, output, name=name: seen.__setitem__(name, tuple(output.shape[2:])))
    net(torch.zeros(2, 3, *size))
    assert (seen["pool1"], seen["pool2"]) == (first, second)


@pytest.mark.parametrize("net", ["mlp", "conv2"])
def test_auxiliary_nets_have_no_running_statistics(net):
    """Auxiliary nets run only in training and use the statistics of the batch."""
    model, rule, *_ = registered(net, "dgl")
    kept = [key for key in model.state_dict() if "auxiliary" in key and ("running" in key or "num_batches" in key)]
    assert not kept and rule.feedback["act1"]
