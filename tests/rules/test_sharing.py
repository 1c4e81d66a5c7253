"""Tests of asap and asfp: replacement and resizing of activations, frozen layers, and refused models."""

from collections import OrderedDict
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fa_bench
from fa_bench.mechanisms.edge.sharing import _feature_matcher, matcher
from fa_bench.registry.registries import ARCHITECTURES

from . import nets
from .helpers import (
    array,
    arrays,
    assert_bitwise,
    assert_matches,
    backward,
    bp_grads,
    collect,
    distance,
    feedback_arrays,
    rule_grads,
)
from .reference import describe
from .references import REFERENCES


def chain_net(linear: bool = False) -> nn.Sequential:
    """A network whose layers can share activations.

    By default, the network has convolutions with 2 -> 4 -> 4 (stride 2) -> 8 -> 8 (stride 2) -> 8 channels, for maps of 5x8
    pixels, and a linear output layer. If `linear`, it has linear layers of widths 7-4-8-4-2-3.
    """
    torch.manual_seed(0)
    if linear:
        widths = [7, 4, 8, 4, 2]
        stages = [(f"fc{n}", nn.Linear(a, b)) for n, (a, b) in enumerate(pairwise(widths), start=1)]
        stages.append(("fc5", nn.Linear(2, 3)))
    else:
        geometry = [(2, 4, 1), (4, 4, 2), (4, 8, 1), (8, 8, 2), (8, 8, 1)]
        stages = [(f"conv{n}", nn.Conv2d(a, b, 3, stride, padding=1)) for n, (a, b, stride) in enumerate(geometry, start=1)]
    named = [part for name, layer in stages for part in ((name, layer), (f"act{name}", nn.Tanh()))]
    if not linear:
        named += [("flat", nn.Flatten()), ("fc", nn.Linear(8 * 2 * 2, 3))]
    else:
        named = named[:-1]
    return nn.Sequential(OrderedDict(named)).double()


def data(linear: bool):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, *((7,) if linear else (2, 5, 8)), generator=generator, dtype=torch.float64)
    return x, torch.tensor([0, 1, 2, 1])


@pytest.mark.parametrize("rule", ["asap", "asfp"])
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("match", ["max_pool", "avg_pool"])
@pytest.mark.parametrize("k", [2, 4])
def test_copies_and_pooling_match_reference(rule, linear, match, k):
    """The nets cover odd map sizes (5 -> 3 -> 2 rows), channels that double, and features that double and halve."""
    x, y = data(linear)
    plain, model = chain_net(linear), chain_net(linear)
    attached = fa_bench.attach(model, rule, seed=0, sample_input=x, match=match, k=k)
    got = rule_grads(model, attached, x, y)
    learned = {f"{at}.{name}": t.grad for at, tensors in attached.feedback.items() for name, t in tensors.items()}
    want = REFERENCES[rule](describe(plain), arrays(plain), feedback_arrays(attached), array(x), y.numpy(), match=match, k=k)
    assert_matches(got | learned, want)


@pytest.mark.parametrize("rule", ["asap", "asfp"])
def test_sequences_match_flattened_batch(rule):
    """Layers with inputs of shape (N, T, F) must get the same gradients as layers with inputs of shape (N T, F)."""
    x, y = torch.randn(2, 3, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 1, 0])
    found = []
    for sample in (x, x.flatten(0, 1)):
        torch.manual_seed(0)
        model = nn.Sequential(*[part for _ in range(5) for part in (nn.Linear(4, 4), nn.Tanh())][:-1]).double()
        attached = fa_bench.attach(model, rule, seed=0, sample_input=sample)
        logits = model(sample)
        attached.backward(F.cross_entropy(logits.flatten(0, -2), y), logits)
        found.append({name: array(p.grad) for name, p in model.named_parameters() if p.grad is not None})
    assert any("feedback" in name for name in found[0])
    assert_matches(*found, rel=1e-12)


@pytest.mark.parametrize("k", [2, 4])
def test_residual_blocks_share_inputs_as_in_paper(k):
    """With k = 2, conv2 of block b and conv1 of block b + 1 use the input of block b. With k = 4, only the inputs of every other
    block are used (section 3 of asap's paper)."""
    torch.manual_seed(0)
    model = ARCHITECTURES["resnet20"](width=2, blocks=2).build((3, 8, 8), 3).double()
    x, y = torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2])
    blocks = [f"stages.layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1)]
    rule = fa_bench.attach(model, "asap", seed=0, sample_input=x, k=k)
    seen, errors = {}, {}
    hooks = []
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            hooks.append(layer.register_forward_pre_hook(lambda m, args, path=path: seen.__setitem__(path, args[0].detach())))
            hooks.append(layer.register_full_backward_hook(lambda m, gi, go, path=path: errors.__setitem__(path, go[0])))
    rule_grads(model, rule, x, y)
    inputs = [seen[f"{block}.conv1"] for block in blocks]
    handed = [0, 0, 1, 2, 3, 4] if k == 2 else [0, 0, 0, 2, 2, 4]  # the block whose input conv1 of each block uses
    kept = [0, 1, 2, 3, 4, 5] if k == 2 else [0, 0, 2, 2, 4, 4]  # the block whose input conv2 of each block uses
    for number, block in enumerate(blocks):
        for name, h in {"conv1": inputs[handed[number]], "conv2": inputs[kept[number]]}.items():
            layer, true = model.get_submodule(f"{block}.{name}"), seen[f"{block}.{name}"]
            copies, stride = true.shape[1] // h.shape[1], h.shape[2] // true.shape[2]
            h = F.max_pool2d(torch.cat([h] * copies, 1), stride) if stride > 1 else torch.cat([h] * copies, 1)
            want = torch.nn.grad.conv2d_weight(h, layer.weight.shape, errors[f"{block}.{name}"], layer.stride, layer.padding)
            assert distance(layer.weight.grad, array(want)) < 1e-12, f"{block}.{name}"
            assert torch.equal(layer.feedback_B.grad, layer.weight.grad)
    assert model.conv1.weight.grad is None and model.bn1.weight.grad is not None, (
        "expected a fixed stem and a normalisation that learns"
    )


def test_true_shared_input_and_weight_feedback_match_backprop():
    """If the replacement equals the true input and B = W, the gradients are those of backpropagation."""
    x, y = data(True)
    model, plain = chain_net(True), chain_net(True)
    rule = fa_bench.attach(model, "asap", seed=0, sample_input=x, match="random", freeze_stem=False)
    with torch.no_grad():
        for path, tensors in rule.feedback.items():
            tensors["B"].copy_(model.get_submodule(path).weight)
    other = rule_grads(model, rule, x, y)
    values = x
    for path, stage in plain.named_children():
        if path in ("fc3", "fc4", "fc5"):
            model.get_submodule(path).pathway.match = lambda layer, h=values: lambda _: h.detach()
        values = stage(values)
    got, want = rule_grads(model, rule, x, y), bp_grads(plain, x, y)
    assert_matches(got, want)
    assert distance(other["fc4.weight"], want["fc4.weight"]) > 1e-2


def convolution_and_linear(stem: str = "conv") -> nn.Sequential:
    """A network with a stem, three convolutions and two fully connected layers.

    The output of a linear stem is reshaped to a map.
    """
    torch.manual_seed(0)
    stages = (
        [("conv1", nn.Conv2d(2, 2, 3, padding=1))]
        if stem == "conv"
        else [("flat0", nn.Flatten()), ("fc0", nn.Linear(80, 80)), ("map", nn.Unflatten(1, (2, 5, 8)))]
    )
    for number in (2, 3, 4):
        stages += [(f"act{number}", nn.Tanh()), (f"conv{number}", nn.Conv2d(2, 2, 3, padding=1))]
    stages += [("flat", nn.Flatten()), ("act5", nn.Tanh()), ("fc1", nn.Linear(80, 80))]
    stages += [("act6", nn.Tanh()), ("fc2", nn.Linear(80, 3))]
    return nn.Sequential(OrderedDict(stages)).double()


TRANSPORT_NETS = {
    "conv": lambda: convolution_and_linear("conv"),
    "linear stem": lambda: convolution_and_linear("linear"),
    "mlp": lambda: chain_net(linear=True),
}


@pytest.mark.parametrize(
    ("net", "linear", "fixed"),
    [
        ("conv", "auto", {"fc1", "fc2"}),
        ("conv", "fa", {"fc1", "fc2"}),
        ("conv", "share", set()),
        ("linear stem", "auto", {"fc0", "fc1", "fc2"}),
        ("linear stem", "fa", {"fc0", "fc1", "fc2"}),
        ("linear stem", "share", set()),
        ("mlp", "auto", set()),
        ("mlp", "share", set()),
    ],
)
def test_transport_applies_to_convolutions_and_sharing_layers(net, linear, fixed):
    """Fully connected layers that use their own input keep their fixed B.

    The gradients equal those of the reference, which cannot describe the net with a linear stem.
    """
    x, y = data(net == "mlp")
    model, plain = TRANSPORT_NETS[net](), TRANSPORT_NETS[net]()
    rule = fa_bench.attach(model, "asap", seed=0, sample_input=x, transport=True, linear=linear)
    assert {path for path, tensors in rule.feedback.items() if "B" in tensors} == fixed
    assert all(0.9 < rule.feedback[path]["B"].abs().max() <= 1 for path in fixed) and not rule.feedback_parameters()
    for path in model.state_dict():
        layer = path.removesuffix(".weight")
        if path.endswith(".weight") and layer not in fixed:
            assert torch.equal(rule.effective_feedback(layer), model.get_submodule(layer).weight)
    got, exact = rule_grads(model, rule, x, y), bp_grads(plain, x, y)
    if net != "linear stem":
        want = REFERENCES["asap"](describe(plain), arrays(plain), feedback_arrays(rule), array(x), y.numpy(), linear=linear)
        assert_matches(got, want)
    shared = "fc3.weight" if net == "mlp" else "conv4.weight"
    assert distance(got[shared], exact[shared]) > 1e-2


def test_transport_with_excluded_linear_layers_uses_true_error():
    x, y = data(False)
    model = chain_net()
    rule = fa_bench.attach(model, "asap", seed=0, sample_input=x, transport=True, exclude=["fc"])
    assert not any("B" in tensors for tensors in rule.feedback.values())
    got, want = rule_grads(model, rule, x, y), bp_grads(chain_net(), x, y)
    assert distance(got["conv2.weight"], want["conv2.weight"]) < 1e-12, "conv2 does not have its true gradient"
    assert distance(got["conv4.weight"], want["conv4.weight"]) > 1e-2
    assert got["conv1.weight"] is None


@pytest.mark.parametrize("name", ["asap", "asfp"])
def test_excluded_layer_still_shares_its_input(name):
    """If every B is a copy of W, an excluded layer propagates the same error as before."""
    (x, y), results = data(False), []
    for others in ([], ["conv2"]):
        model = chain_net()
        rule = fa_bench.attach(model, name, seed=0, sample_input=x, b_init="copy_w", exclude=["fc", *others])
        assert ("B" in rule.feedback["conv2"]) == (not others)
        results.append((rule_grads(model, rule, x, y), rule.feedback["conv3"]["B"].grad))
    (want, want_b), (got, got_b) = results
    assert_matches(got, {key: grad for key, grad in want.items() if grad is not None}, rel=1e-12)
    assert distance(got_b, want_b) < 1e-12


@pytest.mark.parametrize("rule", ["asfp", "asfp_lc"])
def test_feedback_sharing_rules_reject_transport(rule):
    with pytest.raises(fa_bench.errors.OptionError, match="transport"):
        fa_bench.attach(chain_net(), rule, sample_input=data(False)[0], transport=True)


def test_transport_rejects_mlp_without_sharing_layers():
    with pytest.raises(fa_bench.errors.CoverageError, match="nothing to share"):
        fa_bench.attach(chain_net(linear=True), "asap", sample_input=data(True)[0], transport=True, linear="fa")


def test_linear_layers_of_convnet_have_fixed_uniform_feedback():
    x, _ = data(False)
    model = chain_net()
    rule = fa_bench.attach(model, "asap", seed=0, sample_input=x)
    b = rule.feedback["fc"]["B"]
    assert 0.9 < b.abs().max() <= 1 and all(b is not t for t in rule.feedback_parameters())
    model = chain_net()
    rule = fa_bench.attach(model, "asap", seed=0, sample_input=x, linear_b_init="xavier_uniform", b_init="copy_w")
    assert rule.feedback["fc"]["B"].abs().max() <= (6 / 35) ** 0.5
    assert torch.equal(rule.feedback["conv3"]["B"], model.conv3.weight)


def test_unshareable_model_error_suggests_alternative():
    x, _ = nets.batch("one")
    with pytest.raises(fa_bench.errors.CoverageError, match="It needs a deeper model"):
        fa_bench.attach(nets.one_hidden(), "asap", sample_input=x)
    x, _ = nets.batch("mlp")
    with pytest.raises(fa_bench.errors.CoverageError, match=r"fc3.*match='random'"):
        fa_bench.attach(nets.mlp(), "asfp", sample_input=x)  # an activation with 5 features would have to replace one with 6


def test_intermediate_forward_does_not_replace_shared_activations():
    x, y = data(False)
    other = x.flip(0) * 2
    model = chain_net()
    rule = fa_bench.attach(model, "asap", seed=0, sample_input=x)
    want = rule_grads(model, rule, x, y)
    model.zero_grad(set_to_none=True)
    logits = model(x)
    model(other)
    with torch.no_grad():
        model(other)
    backward(rule, F.cross_entropy(logits, y), logits, y)
    assert_bitwise(collect(model), want)


def test_rejects_inplace_change_of_shared_activation():
    class Changed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))

        def forward(self, x):
            for layer in self.layers[:3]:
                x = torch.tanh(layer(x)) * 1
            y = torch.tanh(self.layers[3](x))
            x.add_(1)  # x is the input of layers[3]; layers[4] shares x, but layers[3] does not save it
            return self.layers[4](y)

    model, x = Changed(), torch.randn(2, 4)
    rule = fa_bench.attach(model, "asap", sample_input=x)
    logits = model(x)
    with pytest.raises(RuntimeError, match="changed in place"):
        rule.backward(logits.sum(), logits)


def test_rejects_channels_that_are_not_multiples():
    """Copies cannot turn 4 channels into 6, but a fixed random convolution works for any number of channels."""
    x, y = torch.randn(2, 1, 6, 6), torch.tensor([0, 1])

    def build():
        widths = [1, 4, 6, 6, 6]
        stages = [part for a, b in pairwise(widths) for part in (nn.Conv2d(a, b, 3, padding=1), nn.Tanh())]
        return nn.Sequential(*stages, nn.Flatten(), nn.Linear(216, 3))

    with pytest.raises(fa_bench.errors.CoverageError, match=r"6 channels are not a multiple of 4; match='random'"):
        fa_bench.attach(build(), "asap", sample_input=x)
    model = build()
    rule_grads(model, fa_bench.attach(model, "asap", sample_input=x, match="random"), x, y)


@pytest.mark.parametrize("name", ["asap", "asfp"])
def test_activations_that_were_made_in_place_are_shared(name):
    """Only changes after an activation's first use are refused, and an in-place ReLU runs before that use."""
    x, y = nets.batch("conv")
    found = []
    for activation in (nets.inplace_relu, nn.ReLU):
        layers = [part for channels in (2, 4, 4, 4) for part in (nn.Conv2d(channels, 4, 3, padding=1), activation())]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 6 * 7, 3)).double()
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) / 4)
        rule = fa_bench.attach(model, name, seed=0, sample_input=x, freeze_stem=False)
        found.append(rule_grads(model, rule, x, y))
    assert_bitwise(*found)


def test_pooling_reduces_only_shrinking_axis():
    x = torch.arange(32.0).reshape(1, 2, 4, 4)
    matched = matcher((2, 4, 4), (4, 4, 2), "max_pool", None)(x)
    assert torch.equal(matched, torch.cat([x, x], 1)[..., 1::2])
    assert torch.equal(matcher((2, 4, 4), (2, 4, 2), "max_pool", torch.eye(2).view(2, 2, 1, 1))(x), x[..., ::2])


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_matcher_supports_one_to_three_spatial_dimensions(dims):
    """Maps with 4 pixels per side are reduced to 2 pixels per side. With pooling, each pixel is the maximum or
    the mean of 2^d pixels, and 2 channels are copied to 4. A random convolution uses every second pixel."""
    x = torch.randn(3, 2, *[4] * dims, generator=torch.Generator().manual_seed(0))
    blocks = x
    for axis in range(2, 2 + dims):  # split each axis into windows and the positions within a window
        blocks = blocks.unflatten(2 * (axis - 2) + 2, (2, 2))
    within = [3 + 2 * axis for axis in range(dims)]
    for kind, pooled in (("max_pool", blocks.amax(within)), ("avg_pool", blocks.mean(within))):
        got = matcher((2, *[4] * dims), (4, *[2] * dims), kind, None)(x)
        torch.testing.assert_close(got, torch.cat([pooled, pooled], 1))
    mixing = torch.randn(5, 2, *[1] * dims, generator=torch.Generator().manual_seed(1))
    every_second = x[(slice(None), slice(None), *[slice(None, None, 2)] * dims)]
    got = matcher((2, *[4] * dims), (5, *[2] * dims), "max_pool", mixing)(x)
    torch.testing.assert_close(got, torch.einsum("oi,ni...->no...", mixing.flatten(1), every_second))


def test_matcher_flattens_map_for_linear_layer():
    x = torch.randn(3, 2, 2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(matcher((2, 2, 3), (12,), "max_pool", None)(x), x.flatten(1))
    assert torch.equal(matcher((2, 2, 3), (24,), "max_pool", None)(x), x.flatten(1).repeat(1, 2))
    assert torch.equal(matcher((2, 2, 3), (4,), "max_pool", None)(x), x.reshape(3, 4, 3).amax(2))
    torch.testing.assert_close(matcher((2, 2, 3), (4,), "avg_pool", None)(x), x.reshape(3, 4, 3).mean(2))


@pytest.mark.parametrize(("shape", "wanted"), [((2, 2, 2), (2, 4, 4)), ((2, 7, 8), (2, 5, 4)), ((2, 8, 7), (2, 4, 5))])
def test_matcher_rejects_sizes_unreachable_by_pooling(shape, wanted):
    """Pooling cannot produce larger maps, nor 5 pixels from 7: with windows of two pixels, 4 are left."""
    for mixing in (None, torch.zeros(2, 2, 1, 1)):
        with pytest.raises(ValueError, match="pooling does not reduce"):
            matcher(shape, wanted, "max_pool", mixing)


# torch warns once that an even kernel with padding='same' needs a padded copy of the input.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("mode", ["circular", "reflect", "zeros"])
@pytest.mark.parametrize(("name", "options"), [("asap", {}), ("asap", {"transport": True}), ("asfp", {})])
def test_shared_activation_is_padded_like_layer_input(name, options, mode):
    torch.manual_seed(0)
    kernel, padding = ((2, 4), "same") if mode == "zeros" else (3, 1)  # even kernels need more padding at the end
    layers = [
        part
        for channels in (1, 2, 2, 2)
        for part in (nn.Conv2d(channels, 2, kernel, padding=padding, padding_mode=mode), nn.Tanh())
    ]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(2 * 5 * 6, 3)).double()
    x, y = torch.randn(4, 1, 5, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 1])
    rule = fa_bench.attach(model, name, seed=0, sample_input=x, **options)
    seen, errors = {}, {}
    model[2].register_forward_pre_hook(lambda m, args: seen.__setitem__("h", args[0].detach()))
    model[4].register_full_backward_hook(lambda m, gi, go: errors.__setitem__("g", go[0]))
    rule_grads(model, rule, x, y)
    twin = nn.Conv2d(2, 2, kernel, padding=padding, padding_mode=mode).double()
    (want,) = torch.autograd.grad(twin(seen["h"]), twin.weight, errors["g"])
    learned = model[4].feedback_B if name == "asfp" else model[4].weight
    assert distance(learned.grad, array(want)) < 1e-12


@pytest.mark.parametrize("name", ["asap", "asfp", "forward_alignment"])
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("single", [False, True])
def test_bfloat16_autocast_gradients_match_float32(name, linear, single):
    """The gradients match those of single precision to within 5 % in norm, even if nonlinearities return single precision."""

    class Single(nn.Tanh):
        def forward(self, x):
            return super().forward(x.float())

    x, y = data(linear)
    found = []
    for autocast in (False, True):
        model = chain_net(linear).float()
        for path in [path for path, part in model.named_children() if single and isinstance(part, nn.Tanh)]:
            model._modules[path] = Single()
        rule = fa_bench.attach(model, name, seed=0, sample_input=x.float())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits = model(x.float())
            loss = F.cross_entropy(logits, y)
        assert (logits.dtype == torch.bfloat16) == autocast
        backward(rule, loss, logits, y)
        found.append({key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 6
    for key, want in found[0].items():
        assert found[1][key].dtype == torch.float32
        assert (found[1][key] - want).norm() <= 0.05 * want.norm(), key


def test_linear_sharing_is_suggested_only_if_sufficient():
    x = torch.zeros(2, 1, 6, 6)
    for widths, suggested in (([32, 3], False), ([32, 8, 3], True)):
        linear = [part for a, b in pairwise([2 * 6 * 6, *widths]) for part in (nn.ReLU(), nn.Linear(a, b))]
        model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), *(linear[:2] if not suggested else linear))
        with pytest.raises(fa_bench.errors.CoverageError, match="nothing to share") as refused:
            fa_bench.attach(model, "asap", sample_input=x)
        assert refused.value.settings == ({"linear": "share"} if suggested else {})
        assert ("deeper model" in str(refused.value)) != suggested


def test_rejects_activation_from_call_outside_model():
    """The layer that uses the activation first is called outside the model and does not run in the model's next pass."""

    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.skips = nn.ModuleList(nn.Linear(4, 4) for _ in range(4)), False

        def forward(self, x):
            x = torch.tanh(self.layers[0](x))
            if not self.skips:
                x = torch.tanh(self.layers[1](x))
            return self.layers[3](torch.tanh(self.layers[2](x)))

    model, x = Skips(), torch.randn(2, 4)
    fa_bench.attach(model, "asap", sample_input=x)
    model.skips = True
    model.layers[1](x)
    with pytest.raises(fa_bench.errors.CoverageError, match=r"the input of 'layers\.1', which did not run before"):
        model(x)


@pytest.mark.parametrize("samples", [4, 5])
def test_attention_input_is_shared_with_batch_first_layers(samples: int) -> None:
    """The layers inside attention use inputs of shape (L, N, E). Samples and positions must not be confused, even if their
    numbers are equal."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.fc, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.attn = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.h = self.stem(x).tanh()
            self.y = self.fc(self.attn(self.h, self.h, self.h)[0].tanh())
            self.y.retain_grad()
            return self.out(self.y.tanh())

    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(samples, 5, 6, dtype=torch.float64)
    rule = fa_bench.attach(model, "asap", sample_input=x, k=4)
    assert "shares the input of attn.in_proj" in next(entry.feedback for entry in rule.coverage.covered if entry.layer == "fc")
    model(x).square().sum().backward()
    assert_matches({"fc": model.fc.weight.grad}, {"fc": torch.einsum("nto,nti->oi", model.y.grad, model.h.detach())})


@pytest.mark.parametrize("kind", ["max_pool", "avg_pool"])
def test_token_features_are_pooled_per_token(kind):
    match = _feature_matcher(6, 3, kind, None)
    x = torch.arange(24.0).reshape(2, 2, 6)
    pairs = x.reshape(2, 2, 3, 2)
    torch.testing.assert_close(match(x), pairs.amax(-1) if kind == "max_pool" else pairs.mean(-1), rtol=0, atol=0)
    torch.testing.assert_close(match(x[0]), match(x)[0], rtol=0, atol=0)


class Merges(nn.Module):
    """A network that merges its tokens in pairs before layer `c`."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.stem, self.a, self.b = (nn.Linear(6, 6) for _ in range(3))
            self.c, self.d, self.out = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        h = torch.tanh(self.b(torch.tanh(self.a(torch.tanh(self.stem(x))))))
        return self.out(torch.tanh(self.d(torch.tanh(self.c(h.unflatten(1, (-1, 2)).flatten(2))))))


@pytest.mark.parametrize("name", ["asap", "asfp"])
def test_layers_with_other_positions_do_not_share_and_are_reported(name):
    model, x = Merges(), torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    rule = fa_bench.attach(model, name, sample_input=x, linear="share")
    assert any("not those of the activation that they would share: c." in note for note in rule.coverage.notes)
    assert [entry.layer for entry in rule.coverage.covered if "shares the input" in entry.feedback] == ["b", "d", "out"]


def test_rejected_model_has_no_leftover_feedback():
    """Feedback is created before the shapes of activations are compared, so a refusal must remove it again."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3))
    before = list(model.state_dict())
    with pytest.raises(fa_bench.errors.CoverageError, match="input of '4': 3 channels are not a multiple of 2"):
        fa_bench.attach(model, "asap", seed=0, sample_input=torch.zeros(2, 1, 9, 9))
    assert list(model.state_dict()) == before


@pytest.mark.parametrize("match", ["max_pool", "avg_pool", "random"])
@pytest.mark.parametrize("name", ["asap", "asfp"])
def test_an_activation_is_not_resized_to_a_map_with_more_or_fewer_dimensions(name, match):
    flat_to_map = nn.Sequential(
        nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 36), nn.Unflatten(1, (4, 3, 3)), nn.Conv2d(4, 3, 3), nn.Flatten()
    )
    plane_to_line = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 4, 3), nn.Flatten(2), nn.Conv1d(4, 3, 3), nn.Flatten()
    )
    for model, sample in ((flat_to_map, torch.zeros(2, 8)), (plane_to_line, torch.zeros(2, 1, 7, 7))):
        with pytest.raises(fa_bench.errors.CoverageError, match=r"input of '4': .*cannot be resized to a map of shape \(4, "):
            fa_bench.attach(model, name, linear="share", match=match, sample_input=sample)
