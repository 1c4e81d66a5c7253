"""Tests of properties that many rules share, for many kinds of layers, dtypes and memory formats.

If the feedback equals the weights, the gradients must be bitwise identical to those of backpropagation.
"""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fa_bench

from . import nets
from .helpers import (
    QUICK,
    STORED,
    assert_bitwise,
    backward,
    bp_grads,
    collect,
    copy_weights_into_feedback,
    cut_options,
    feedback_tensors,
    layer_names,
    rule_grads,
)

LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (6, 5)),
    "linear-leading-dims": (lambda: nn.Linear(5, 4), (2, 3, 5)),
    "linear-more-leading-dims": (lambda: nn.Linear(5, 4), (2, 3, 2, 5)),
    "linear-one-sample": (lambda: nn.Linear(5, 4), (5,)),
    "linear-no-bias": (lambda: nn.Linear(5, 4, bias=False), (2, 3, 5)),
    "conv1d-strided": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 8)),
    "conv1d-unbatched": (lambda: nn.Conv1d(3, 4, 3), (3, 8)),
    "conv2d": (lambda: nn.Conv2d(2, 5, (3, 2)), (2, 2, 6, 7)),
    "conv2d-no-bias": (lambda: nn.Conv2d(2, 5, 3, bias=False), (2, 2, 6, 7)),
    "conv2d-strided": (lambda: nn.Conv2d(2, 5, 3, stride=(2, 3), padding=(1, 0)), (2, 2, 7, 8)),
    "conv2d-input-left-over": (lambda: nn.Conv2d(2, 5, 3, stride=3), (2, 2, 8, 7)),
    "conv2d-dilated": (lambda: nn.Conv2d(2, 5, 3, dilation=2, padding=2), (2, 2, 6, 7)),
    "conv2d-grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 6, 7)),
    "conv2d-depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, stride=2), (2, 4, 6, 7)),
    "conv2d-1x1-strided": (lambda: nn.Conv2d(4, 6, 1, stride=2), (2, 4, 6, 7)),
    "conv2d-same": (lambda: nn.Conv2d(2, 5, 3, padding="same"), (2, 2, 6, 7)),
    "conv2d-same-even": (lambda: nn.Conv2d(2, 5, (2, 4), padding="same"), (2, 2, 6, 7)),
    "conv2d-same-dilated": (lambda: nn.Conv2d(2, 5, 3, padding="same", dilation=2), (2, 2, 6, 7)),
    "conv1d-same-even": (lambda: nn.Conv1d(3, 4, 4, padding="same"), (2, 3, 8)),
    "conv2d-valid": (lambda: nn.Conv2d(2, 5, 3, padding="valid"), (2, 2, 6, 7)),
    "conv2d-circular": (lambda: nn.Conv2d(2, 5, 3, padding=(1, 2), padding_mode="circular"), (2, 2, 6, 7)),
    "conv2d-reflect": (lambda: nn.Conv2d(2, 5, 3, padding=2, stride=2, padding_mode="reflect"), (2, 2, 6, 7)),
    "conv2d-replicate": (lambda: nn.Conv2d(2, 5, 3, padding=1, padding_mode="replicate"), (2, 2, 6, 7)),
    "conv2d-same-circular": (lambda: nn.Conv2d(2, 5, 3, padding="same", padding_mode="circular"), (2, 2, 6, 7)),
    "conv3d-strided-grouped": (lambda: nn.Conv3d(2, 4, 3, stride=2, padding=1, groups=2), (2, 2, 5, 6, 4)),
    "transposed1d": (lambda: nn.ConvTranspose1d(3, 4, 3, stride=2, output_padding=1), (2, 3, 5)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (2, 4, 5, 4)),
    "transposed2d-dilated": (lambda: nn.ConvTranspose2d(3, 5, 3, stride=2, dilation=2, output_padding=(1, 0)), (2, 3, 4, 5)),
    "transposed2d-unbatched": (lambda: nn.ConvTranspose2d(3, 5, 3, stride=2), (3, 4, 5)),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=2, bias=False), (2, 2, 3, 2, 4)),
}


BUILD = nets.NETS | {"residual": nets.residual, "inplace": lambda **kw: nets.convnet(nets.inplace_relu, batch_norm=True, **kw)}


def one_layer_pass(model, x, run):
    """The output of a model, and the gradients of its parameters and of its input, for a fixed error at the output."""
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y = model(x)
    error = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    run((y * error).sum(), y)
    return y.detach(), collect(model) | {"input": x.grad.clone()}


# torch warns once that an even kernel with padding='same' needs a padded copy of the input.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", ["fa", "frsf", "kp"])
def test_feedback_equal_to_weight_matches_backprop(name, layer):
    build, shape = LAYERS[layer]
    torch.manual_seed(0)
    x, plain = torch.randn(shape), nn.Sequential(OrderedDict(layer=build()))
    want_y, want = one_layer_pass(plain, x, lambda loss, y: loss.backward())
    rule = fa_bench.attach(plain, name, seed=0)
    y, random = one_layer_pass(plain, x, lambda loss, y: backward(rule, loss, y))
    assert torch.equal(y, want_y), "the rule changes the forward pass"
    assert_bitwise(*({key: value for key, value in grads.items() if key != "input"} for grads in (random, want)))
    other = (random["input"] - want["input"]).abs().max()
    assert other > 1e-2 * want["input"].abs().max(), "random feedback propagates almost the same error as the weight"
    copy_weights_into_feedback(plain, rule)
    y, got = one_layer_pass(plain, x, lambda loss, y: backward(rule, loss, y))
    assert torch.equal(y, want_y)
    assert_bitwise(got, want)


@pytest.mark.parametrize("net", BUILD)
@pytest.mark.parametrize("name", ["fa", "brsf", "frsf", "kp"])
def test_networks_with_feedback_equal_to_weights_match_backprop(name, net):
    """The networks include residual additions, projections, in-place ReLU and BatchNorm.

    The rule brsf is tested in evaluation mode, in which it does not resample its magnitudes.
    """
    build = BUILD[net]
    plain, model = build(dtype=torch.float32), build(dtype=torch.float32)
    x, y = nets.batch(net, dtype=torch.float32)
    rule = fa_bench.attach(model, name, seed=0, sample_input=x)
    other = rule_grads(model, rule, x, y)
    model.load_state_dict(plain.state_dict(), strict=False)  # running statistics from before the pass
    for module in (plain, model):
        module.train(name != "brsf")
    copy_weights_into_feedback(model, rule)
    want = bp_grads(plain, x, y)
    assert_bitwise(rule_grads(model, rule, x, y), want)
    assert any(not torch.allclose(other[key], want[key], rtol=1e-2) for key in want), (
        "with random feedback, the gradients are those of backpropagation"
    )


@pytest.mark.parametrize("name", ["fa", "frsf", "kp"])
@pytest.mark.parametrize("net", ["mlp_bn", "conv_bn", "residual"])
def test_bfloat16_autocast_matches_backprop(name, net):
    build = BUILD[net]
    plain, model = build(dtype=torch.float32), build(dtype=torch.float32)
    x, y = nets.batch(net, dtype=torch.float32)
    rule = fa_bench.attach(model, name, seed=0)

    def run(net, finish):
        net.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = net(x)
            loss = F.cross_entropy(logits, y)
        assert logits.dtype == torch.bfloat16
        finish(loss, logits)
        return collect(net)

    want = run(plain, lambda loss, logits: loss.backward())
    random = run(model, lambda loss, logits: backward(rule, loss, logits, y))
    copy_weights_into_feedback(model, rule)
    assert_bitwise(run(model, lambda loss, logits: backward(rule, loss, logits, y)), want)
    assert not all(torch.equal(random[key], want[key]) for key in want)
    assert all(grad.dtype == torch.float32 for grad in random.values())


@pytest.mark.parametrize("net", ["mlp_bn", "conv"])
def test_autocast_does_not_affect_float64(net):
    """torch's autocast does not affect float64 tensors, and attached layers must not change that."""
    plain, model, (x, _) = BUILD[net](), BUILD[net](), nets.batch(net)
    fa_bench.attach(model, "fa", seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want, got = plain(x), model(x)
    assert want.dtype == got.dtype == torch.float64
    assert torch.equal(got, want)


@pytest.mark.parametrize("net", ["conv", "conv_bn", "residual"])
def test_channels_last_matches_backprop(net):
    build = BUILD[net]
    plain, model = (build(dtype=torch.float32).to(memory_format=torch.channels_last) for _ in range(2))
    x, y = nets.batch(net, dtype=torch.float32)
    x = x.to(memory_format=torch.channels_last)
    rule = fa_bench.attach(model, "fa", seed=0)
    copy_weights_into_feedback(model, rule)
    assert_bitwise(rule_grads(model, rule, x, y), bp_grads(plain, x, y))


def test_seeded_feedback_is_independent_of_memory_format():
    """The sampled feedback does not depend on the memory format, so a model may be converted to channels_last before or after
    attach."""
    before, after = nets.residual().to(memory_format=torch.channels_last), nets.residual()
    one, two = (fa_bench.attach(model, "fa", seed=0) for model in (before, after))
    after.to(memory_format=torch.channels_last)
    for name in layer_names(nets.residual()):
        assert torch.equal(one.feedback[name]["B"], two.feedback[name]["B"])


@pytest.mark.parametrize("name", ["kp", "pfa", "mixed"])
def test_learned_feedback_gradients_have_feedback_strides(name):
    """A fused update traverses a tensor and its gradient in memory order, so their layouts must agree.

    A step in channels_last must then equal a step in the contiguous format.
    """
    models = [nets.residual(dtype=torch.float32) for _ in range(2)]
    models[0].to(memory_format=torch.channels_last)
    rules = [fa_bench.attach(model, name, seed=0) for model in models]
    for model, rule in zip(models, rules, strict=True):
        x, y = nets.batch("residual", dtype=torch.float32)
        rule_grads(model, rule, x.contiguous(memory_format=torch.channels_last) if model is models[0] else x, y)
        learned = rule.feedback_parameters()
        for tensor in learned:
            # The stride of a dimension of length 1 is never used.
            strides = zip(tensor.shape, tensor.grad.stride(), tensor.stride(), strict=True)
            assert all(size == 1 or of_grad == own for size, of_grad, own in strides)
        torch.optim.SGD(learned, lr=1.0, fused=True).step()
    for one, two in zip(*(rule.feedback_parameters() for rule in rules), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)  # float32 sums in a different order


def options_for(name: str, x, model) -> dict:
    return cut_options(name, model, {"sample_input": x} | QUICK.get(name, {}))


COPIES = [("fa", {"b_init": "copy_w"}), ("kp", {"b_init": "copy_w"})]


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in (*STORED, "predsim", "dgl")), *COPIES], ids=str)
def test_feedback_shares_no_storage(name, options):
    """A feedback tensor shares no storage with a weight or another feedback tensor, even after the model's dtype has changed."""
    x, _ = nets.batch("conv")
    model = nets.convnet(batch_norm=True)
    rule = fa_bench.attach(model, name, seed=0, **options, **options_for(name, x, model))
    for dtype in (torch.float64, torch.float32, torch.float64):
        model.to(dtype)
        tensors = feedback_tensors(rule)
        pointers = [tensor.untyped_storage().data_ptr() for tensor in tensors.values()]
        assert len(set(pointers)) == len(pointers) > 0
        assert not set(pointers) & {p.untyped_storage().data_ptr() for p in rule.weight_parameters()}
        assert all(tensor.dtype == dtype for tensor in tensors.values())


@pytest.mark.parametrize("name", [*STORED, "predsim", "dgl"])
def test_feedback_is_determined_by_seed(name):
    x, _ = nets.batch("conv")
    draws = []
    for seed in (0, 0, 1):
        model = nets.convnet()
        rule = fa_bench.attach(model, name, seed=seed, **options_for(name, x, model))
        draws.append({key: tensor.detach().clone() for key, tensor in feedback_tensors(rule).items()})
    assert_bitwise(draws[0], draws[1])
    drawn = [key for key, tensor in draws[0].items() if tensor.unique().numel() > 1]  # gains start at 1, some weights at 0
    assert len(drawn) >= 2
    assert all(not torch.equal(draws[0][key], draws[2][key]) for key in drawn)


@pytest.mark.parametrize("name", ["bp", "frozen", "bp_fc", "usf", *STORED, "predsim", "dgl"])
def test_attach_does_not_change_global_rng_or_model(name):
    """When attach runs the sample input, dropout must not draw random numbers, and BatchNorm must not update its statistics."""
    x, y = nets.batch("conv")
    model = nets.convnet(batch_norm=True)
    model.act1 = nn.Sequential(nn.ReLU(), nn.Dropout(0.5))
    before = torch.get_rng_state()
    buffers = {key: value.clone() for key, value in model.state_dict().items()}
    rule = fa_bench.attach(model, name, seed=0, **options_for(name, x, model))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and all(module.training for module in model.modules())
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in buffers.items())
    assert all(p.grad is None for p in model.parameters())
    model.act1[1].p = 0.0  # dropout would draw from the global generator itself
    for _ in range(2):
        rule_grads(model, rule, x, y)
        rule.step()
    assert torch.equal(torch.get_rng_state(), before), "a training pass draws from the global generator"


@pytest.mark.parametrize("name", ["fa", "kp", "usf"])
@pytest.mark.parametrize("net", ["mlp_bn", "conv_bn"])
def test_float16_autocast_keeps_activations_and_errors_in_float16(name, net):
    """Activations and errors have the dtype of the caller's autocast."""
    model, (x, y) = BUILD[net](dtype=torch.float32), nets.batch(net, dtype=torch.float32)
    rule = fa_bench.attach(model, name, seed=0)
    seen = []

    def look(module, args, output):
        seen.append(output.dtype)
        output.register_hook(lambda error: seen.append(error.dtype))

    for path in layer_names(model):
        model.get_submodule(path).register_forward_hook(look)
    with torch.autocast("cpu", dtype=torch.float16):
        logits = model(x)
        loss = F.cross_entropy(logits, y)
    backward(rule, loss, logits, y)
    assert set(seen) == {torch.float16} and len(seen) == 2 * len(layer_names(model))
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_second_derivatives_match_formulas():
    """The test differentiates twice: first the loss Σ y²/2 with y = W x and g = y, and then Σ e with the input error e = gᵀ B.

    The derivative of the second loss with respect to g is B 1, which propagates to W and, through B, to x.
    """
    torch.manual_seed(0)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    model = nn.Sequential(nn.Linear(5, 4, bias=False)).double()
    b = fa_bench.attach(model, "fa", seed=0).feedback["0"]["B"]
    (error,) = torch.autograd.grad(model(x).square().sum() / 2, x, create_graph=True)
    of_weight, of_x = torch.autograd.grad(error.sum(), [model[0].weight, x])
    torch.testing.assert_close(of_weight, b.sum(1).outer(x.detach().sum(0)))
    torch.testing.assert_close(of_x, (b.sum(1) @ b).expand(3, 5))
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False)).double()
    b = fa_bench.attach(model, "fa", seed=0).feedback["0"]["B"]
    (error,) = torch.autograd.grad(model(x).square().sum() / 2, x, create_graph=True)
    (of_weight,) = torch.autograd.grad(error.sum(), model[0].weight)
    want = torch.nn.grad.conv2d_weight(x, b.shape, F.conv2d(torch.ones_like(x), b, padding=1), padding=1)
    torch.testing.assert_close(of_weight, want.detach())


@pytest.mark.parametrize("name", ["fa", "kp", "frsf", "pfa"])
@pytest.mark.parametrize(
    ("build", "last"),
    [
        (lambda: nn.Conv2d(4, 6, 3), torch.channels_last),
        (lambda: nn.Conv3d(4, 6, 3), torch.channels_last_3d),
        (lambda: nn.ConvTranspose2d(4, 6, 3), torch.channels_last),
    ],
    ids=["2d", "3d", "transposed"],
)
def test_feedback_has_memory_format_of_weight(name, build, last):
    """A different memory format would cost a copy in every step."""
    for wanted in (last, torch.contiguous_format):
        model = nn.Sequential(build()).to(memory_format=wanted)
        rule = fa_bench.attach(model, name, seed=0)
        found = [tensor for tensor in rule.feedback["0"].values() if tensor.dim() > 2]
        assert found and all(tensor.is_contiguous(memory_format=wanted) for tensor in found)


@pytest.mark.parametrize("name", ["fa", "kp", "pfa"])
@pytest.mark.parametrize(
    ("build", "shape", "sizes"),
    [
        (lambda: nn.ConvTranspose1d(3, 4, 3, stride=2, padding=1), (2, 3, 4), ([7], [8])),
        (lambda: nn.ConvTranspose2d(3, 4, 3, stride=(2, 3)), (2, 3, 4, 3), ([9, 9], [10, 11])),
    ],
    ids=["1d", "2d"],
)
def test_transposed_convolution_respects_output_size(name, build, shape, sizes):
    """For every requested size, the output and the weight's gradient are those of the plain layer."""
    torch.manual_seed(0)
    plain, x = build().double(), torch.randn(shape, dtype=torch.float64)

    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.size = copy.deepcopy(plain), None

        def forward(self, x):
            return self.up(x, output_size=self.size)

    model = Sized()
    fa_bench.attach(model, name, seed=0, sample_input=x)
    for size in sizes:
        model.size = size
        y, want = model(x.requires_grad_()), plain(x, output_size=size)
        assert list(y.shape[2:]) == size and torch.equal(y, want)
        error = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=y.dtype)
        got = torch.autograd.grad((y * error).sum(), model.up.weight)[0]
        torch.testing.assert_close(got, torch.autograd.grad((want * error).sum(), plain.weight)[0])


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_autocast_with_padding_other_than_zeros(mode):
    x, found = torch.randn(2, 2, 6, 6), []
    for attached in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode), nn.Tanh(), nn.Conv2d(3, 2, 3, padding=1))
        if attached:
            fa_bench.attach(model, "kp", b_init="copy_w")
        input = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input).float().square().mean()
        loss.backward()
        found.append(model[0].weight.grad)
    assert torch.equal(*found)
