"""Tests of the control bp and of the floors frozen, bp_fc and frozen_blocks, which freeze layers."""

from typing import Any

import pytest
import torch
from torch import nn

import fa_bench
from fa_bench.errors import CoverageError
from fa_bench.registry.registries import ARCHITECTURES

from . import nets
from .helpers import assert_bitwise, bp_grads, rule_grads

CONV_LAYERS = {"conv1", "bn1", "conv2", "bn2"}


def learning(grads) -> set[str]:
    return {name for name, grad in grads.items() if grad is not None}


@pytest.mark.parametrize("net", nets.NETS)
def test_bp_matches_plain_backprop(net):
    model, (x, y) = nets.NETS[net](dtype=torch.float32), nets.batch(net, dtype=torch.float32)
    rule = fa_bench.attach(model, "bp", seed=0)
    assert_bitwise(rule_grads(model, rule, x, y), bp_grads(nets.NETS[net](dtype=torch.float32), x, y))


def test_frozen_trains_only_output_layer():
    model, (x, y) = nets.convnet(batch_norm=True), nets.batch("conv")
    grads = rule_grads(model, fa_bench.attach(model, "frozen", seed=0, sample_input=x), x, y)
    assert learning(grads) == {"fc2.weight", "fc2.bias"}


def test_frozen_trains_last_executed_not_last_registered_layer():
    model, (x, y) = nets.residual(), nets.batch("residual")
    grads = rule_grads(model, fa_bench.attach(model, "frozen", seed=0, sample_input=x), x, y)
    assert learning(grads) == {"head.weight", "head.bias"}


def test_frozen_trains_all_output_heads_summed_into_logits():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.one, self.two = nn.Linear(7, 5), nn.Linear(5, nets.CLASSES), nn.Linear(5, nets.CLASSES)

        def forward(self, x):
            hidden = self.fc1(x).tanh()
            return self.one(hidden) + self.two(hidden)

    model, (x, y) = TwoHeads().double(), nets.batch("mlp")
    grads = rule_grads(model, fa_bench.attach(model, "frozen", seed=0, sample_input=x), x, y)
    assert learning(grads) == {"one.weight", "one.bias", "two.weight", "two.bias"}


def test_bp_fc_trains_linear_layers_but_no_convolutions():
    model, (x, y) = nets.convnet(batch_norm=True), nets.batch("conv")
    grads = rule_grads(model, fa_bench.attach(model, "bp_fc", seed=0, sample_input=x), x, y)
    assert learning(grads) == {name for name in grads if name.split(".")[0] not in CONV_LAYERS}
    assert {"fc1.weight", "fc2.weight"} <= learning(grads)


@pytest.mark.parametrize("name", ["frozen", "bp_fc"])
def test_frozen_parameters_unchanged_by_momentum_and_decay(name):
    model, (x, y) = nets.convnet(batch_norm=True), nets.batch("conv")
    rule = fa_bench.attach(model, name, seed=0, sample_input=x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        rule_grads(model, rule, x, y)
        optimizer.step()
        rule.step()
    before = dict(nets.convnet(batch_norm=True).named_parameters())
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert moved == learning(dict((key, p.grad) for key, p in model.named_parameters()))
    assert "fc2.weight" in moved and "conv1.weight" not in moved


@pytest.mark.parametrize("name", ["frozen", "bp_fc"])
def test_batch_norm_of_frozen_layers_stays_in_training_mode(name):
    """Frozen BatchNorm uses batch statistics and updates the running ones, as it does under the rules that train it."""
    model, plain, (x, y) = nets.convnet(batch_norm=True), nets.convnet(batch_norm=True), nets.batch("conv")
    rule = fa_bench.attach(model, name, seed=0, sample_input=x)
    assert torch.equal(model(x), plain(x))
    rule_grads(model, rule, x, y)
    plain(x)
    assert model.bn1.training and model.bn1.num_batches_tracked == 2
    for key in ("bn1", "bn2", "bn3"):
        assert torch.equal(model.get_submodule(key).running_mean, plain.get_submodule(key).running_mean)


@pytest.mark.parametrize("name", ["frozen", "bp_fc"])
def test_detach_restores_requires_grad(name):
    model, (x, y) = nets.convnet(batch_norm=True), nets.batch("conv")
    model.conv1.bias.requires_grad_(False)  # detach must not change the user's own setting
    rule = fa_bench.attach(model, name, seed=0, sample_input=x)
    rule.detach()
    assert {key for key, p in model.named_parameters() if not p.requires_grad} == {"conv1.bias"}
    plain = nets.convnet(batch_norm=True)
    plain.conv1.bias.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    assert_bitwise({key: p.grad for key, p in model.named_parameters()}, bp_grads(plain, x, y))


def test_bp_fc_rejects_convolution_only_network():
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    with pytest.raises(ValueError):
        fa_bench.attach(model, "bp_fc", seed=0, sample_input=nets.batch("conv", dtype=torch.float32)[0])


def test_bp_fc_trains_normalisation_fed_by_linear_layer():
    class Joined(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.beside = torch.nn.Conv2d(1, 2, 3), torch.nn.Linear(16, 8)
            self.norm, self.head = torch.nn.LayerNorm(8), torch.nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.norm(self.conv(x).flatten(1) + self.beside(x.flatten(1))))

    model = Joined()
    fa_bench.attach(model, "bp_fc", seed=0, sample_input=torch.zeros(2, 1, 4, 4))
    frozen = {key.split(".")[0] for key, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"conv"}


def test_frozen_layers_have_no_weight_angle():
    """Frozen layers propagate errors but are not updated, so they have no angle between feedback and weight."""
    model, (x, _) = nets.convnet(batch_norm=True), nets.batch("conv")
    rule = fa_bench.attach(model, "bp_fc", seed=0, sample_input=x)
    assert set(rule.weight_pairs()) == {"fc1", "fc2"}
    assert all(torch.equal(*pair) for pair in rule.weight_pairs().values())


def test_bp_fc_without_convolutions_needs_no_sample_input():
    model = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 3))
    fa_bench.attach(model, "bp_fc", allow_uncovered=True)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "norm",
    [
        lambda: torch.nn.BatchNorm2d(4),
        lambda: torch.nn.GroupNorm(2, 4),
        lambda: torch.nn.LayerNorm([4, 2, 2]),
        lambda: torch.nn.InstanceNorm2d(4, affine=True),
    ],
    ids=["batch", "group", "layer", "instance"],
)
def test_bp_fc_freezes_normalisation_after_convolution(norm):
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), norm(), torch.nn.Flatten(), torch.nn.Linear(16, 3))
    fa_bench.attach(model, "bp_fc", seed=0, sample_input=torch.zeros(2, 1, 4, 4))
    assert [key for key, parameter in model.named_parameters() if parameter.requires_grad] == ["3.weight", "3.bias"]


def test_frozen_without_sample_trains_last_registered_layer():
    model = nets.mlp()
    rule = fa_bench.attach(model, "frozen", seed=0)
    assert {key for key, parameter in model.named_parameters() if parameter.requires_grad} == {"fc3.weight", "fc3.bias"}
    assert [entry.feedback for entry in rule.coverage.covered] == ["trains nothing"] * 2 + ["passes through the weight"]


def test_bp_fc_trains_input_normalisation():
    """The normalisation of the image does not follow a convolution, so it is trained."""
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(1), torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 3))
    fa_bench.attach(model, "bp_fc", seed=0, sample_input=torch.zeros(2, 1, 4, 4))
    assert [key for key, p in model.named_parameters() if not p.requires_grad] == ["1.weight", "1.bias"]


# ------------------------------------------------------------------------------------------------ frozen_blocks
def registered(name: str, shape=(3, 8, 8), **options):
    torch.manual_seed(0)
    return ARCHITECTURES[name](**options).build(shape, 3), torch.randn(4, *shape), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("name", "options", "learns"),
    [
        ("residual_mlp", {"width": 6, "blocks": 2}, {"embed", "final_norm", "head"}),
        ("residual_mlp", {"width": 6, "blocks": 1, "final_norm": False}, {"embed", "head"}),
        ("vit_mini", {"width": 8, "heads": 2, "blocks": 2}, {"embed", "final_norm", "head"}),
        ("resnet20", {"width": 2, "blocks": 1}, {"conv1", "bn1", "fc"}),
        ("resnet18", {"width": 2, "blocks": [1, 1]}, {"conv1", "bn1", "fc", "bn_out"}),
        ("conv2", {"channels": 3, "hidden": 4}, {"conv1", "bn1", "fc2"}),
        ("mlp", {"widths": [6, 5, 4], "batch_norm": True}, {"fc1", "bn1", "fc4"}),
    ],
)
def test_frozen_blocks_trains_layers_outside_blocks_by_backprop(name, options, learns):
    model, x, y = registered(name, **options)
    plain, *_ = registered(name, **options)
    rule = fa_bench.attach(model, "frozen_blocks", sample_input=x)
    got, exact = rule_grads(model, rule, x, y), bp_grads(plain, x, y)
    assert {key.split(".")[0] for key in learning(got)} == learns
    assert learning(got) == {key for key in exact if key.split(".")[0] in learns}, "not all parameters of these modules learn"
    assert_bitwise({key: got[key] for key in learning(got)}, {key: exact[key] for key in learning(got)})


def test_frozen_blocks_trains_decoder_embedding_and_head():
    torch.manual_seed(0)
    model = ARCHITECTURES["decoder"](width=8, heads=2, depth=2).build((5,), 7)
    tokens = torch.randint(7, (4, 5))
    fa_bench.attach(model, "frozen_blocks", sample_input=tokens)
    learns = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert {key.split(".")[0] for key in learns} == {key.split(".")[0] for key, _ in model.named_parameters()} - {"layers"}
    assert not any(key.startswith("layers.") for key in learns)


def test_frozen_blocks_parameters_unchanged_while_others_learn():
    model, x, y = registered("vit_mini", width=8, heads=2, blocks=2)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    rule = fa_bench.attach(model, "frozen_blocks", sample_input=x)
    optimizer = torch.optim.AdamW(rule.parameter_groups(lr=0.01), weight_decay=0.1)
    rule_grads(model, rule, x, y)
    optimizer.step()
    moved = {key for key, parameter in model.named_parameters() if not torch.equal(parameter, before[key])}
    assert moved == {key for key in before if not key.startswith("layers.")}
    assert {"embed.token", "embed.positions"} <= moved
    assert {layer: "trains nothing" in entry for layer, entry in ((c.layer, c.feedback) for c in rule.coverage.covered)} == {
        layer: layer.startswith("layers.") for layer in (c.layer for c in rule.coverage.covered)
    }


def test_frozen_blocks_freezes_parameters_of_uncalled_modules():
    """Attention uses the weight of out_proj without calling that module."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = torch.nn.Linear(5, 4), torch.nn.Linear(4, 3)
            self.layers = torch.nn.Sequential(*(torch.nn.TransformerEncoderLayer(4, 2, 6, batch_first=True) for _ in range(2)))
            self.blocks = ["layers.0", "layers.1"]

        def forward(self, x):
            return self.head(self.layers(self.embed(x))[:, 0])

    model = Net()
    fa_bench.attach(model, "frozen_blocks", sample_input=torch.randn(2, 3, 5), allow_uncovered=True)
    learns = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert learns == {"embed.weight", "embed.bias", "head.weight", "head.bias"}


def test_frozen_blocks_without_blocks_suggests_valid_blocks():
    model, (x, _) = nets.mlp(), nets.batch("mlp")
    with pytest.raises(CoverageError, match=r"blocks=\['fc2'\], or set model\.blocks"):
        fa_bench.attach(model, "frozen_blocks", sample_input=x)
    fa_bench.attach(model, "frozen_blocks", sample_input=x, blocks=["fc2"])
    assert {key for key, p in model.named_parameters() if not p.requires_grad} == {"fc2.weight", "fc2.bias"}


def test_frozen_blocks_suggests_attention_without_its_layers():
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.fc = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
            self.attn = torch.nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = torch.nn.Linear(8, 3)

        def forward(self, x):
            h = self.embed(x)
            return self.head(self.fc(h + self.attn(h, h, h, need_weights=False)[0]).mean(1))

    for blocks in (["attn"], ["attn", "fc"]):
        model, x = Net(), torch.randn(2, 5, 8)
        with pytest.raises(CoverageError, match=r"blocks=\['fc', 'attn'\], or set"):
            fa_bench.attach(model, "frozen_blocks", sample_input=x)
        fa_bench.attach(model, "frozen_blocks", sample_input=x, blocks=blocks)


def test_frozen_blocks_rejects_single_block_missing_sample_and_typo():
    model, x, _ = registered("mlp", widths=[6])
    with pytest.raises(CoverageError, match="only the block 'act1', which is its embedding; use rule 'frozen'"):
        fa_bench.attach(model, "frozen_blocks", sample_input=x)
    with pytest.raises(CoverageError, match="needs sample_input"):
        fa_bench.attach(registered("conv2")[0], "frozen_blocks")
    with pytest.raises(CoverageError, match=r"blocks=atc1: .*did you mean 'act1'"):
        fa_bench.attach(model, "frozen_blocks", sample_input=x, blocks=["atc1"])


def test_frozen_blocks_does_not_suggest_attention_at_the_ends():
    class Residual(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = torch.nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, h):
            return h + self.attn(h, h, h, need_weights=False)[0]

    model = torch.nn.Sequential(Residual(), torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), Residual())
    with pytest.raises(CoverageError, match=r"blocks=\['1', '2'\], or set"):
        fa_bench.attach(model, "frozen_blocks", sample_input=torch.randn(2, 5, 8))


def test_frozen_blocks_suggests_whole_recurrent_modules():
    torch.manual_seed(0)
    model: Any = ARCHITECTURES["lstm"]().build((5,), 7)
    del model.blocks, model.cut_points
    tokens = torch.randint(7, (4, 5))
    with pytest.raises(CoverageError, match=r"blocks=\['rnn'\], or set"):
        fa_bench.attach(model, "frozen_blocks", sample_input=tokens)
    fa_bench.attach(model, "frozen_blocks", sample_input=tokens, blocks=["rnn"])
    assert {key.split(".")[0] for key, p in model.named_parameters() if p.requires_grad} == {"read", "head"}
    with pytest.raises(CoverageError, match=r"list the modules that end them in the option blocks, or set") as caught:
        fa_bench.attach(torch.nn.LSTM(4, 5, 2), "frozen_blocks", sample_input=torch.zeros(2, 3, 4))
    assert not caught.value.settings, "blocks are suggested, although the model itself has no path"
    idle = nets.mlp()
    idle.spare = torch.nn.ModuleDict({"layer": torch.nn.Linear(2, 2)})
    idle.forward = lambda x: idle.fc3(idle.fc2(idle.fc1(x)))
    with pytest.raises(CoverageError, match=r"no module that ends a block was called.*\(blocks: spare\.layer\)"):
        fa_bench.attach(idle, "frozen_blocks", sample_input=nets.batch("mlp")[0], blocks=["spare.layer"])
