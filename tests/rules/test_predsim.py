"""Tests of predsim: the similarity measure, the terms of each loss, and the error of the output layer."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fa_bench
from fa_bench.rules.predsim import similarity

from . import nets
from .helpers import array, backward, distance, rule_grads
from .references.local import similarity_loss
from .registered import registered


@pytest.mark.parametrize("shape", [(5,), (5, 3, 4), (3, 3, 4), (5, 1, 6)], ids=str)
def test_similarity_reference_against_finite_differences(shape):
    """The reference's gradients match central differences of its loss. With h = 1e-6, the truncation error is of order h² and the
    rounding error of order 1e-16/h = 1e-10."""
    rng = np.random.default_rng(0)
    a, y = rng.normal(size=(4, *shape)), np.array([0, 1, 1, 2])
    weight = rng.normal(size=(shape[0], shape[0], 3, 3) if len(shape) == 3 else (shape[0], shape[0]))
    _, at_a, at_weight = similarity_loss(a, weight, y, 3)
    for array_, gradient in ((a, at_a), (weight, at_weight)):
        for index in [tuple(rng.integers(size) for size in array_.shape) for _ in range(4)]:
            kept = array_[index]
            losses = []
            for moved in (kept + 1e-6, kept - 1e-6):
                array_[index] = moved
                losses.append(similarity_loss(a, weight, y, 3)[0])
            array_[index] = kept
            assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(gradient[index], abs=1e-8)


def test_similarity_of_labels():
    """The similarity of two labels is 1 if they are equal and -1/(C-1) if they differ."""
    got = similarity(F.one_hot(torch.tensor([0, 2, 0]), 5).double())
    assert torch.allclose(got, torch.tensor([[1, -0.25, 1], [-0.25, 1, -0.25], [1, -0.25, 1]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("loss", "held"),
    [
        ("predsim", {"decoder.out.weight", "decoder.out.bias", "similarity.weight"}),
        ("pred", {"decoder.out.weight", "decoder.out.bias"}),
        ("sim", {"similarity.weight"}),
    ],
)
def test_loss_option_determines_auxiliary_tensors(loss, held):
    _, rule, _, _ = registered("conv2", "predsim", loss=loss)
    tensors = rule.feedback["act1"]
    assert set(tensors) == held
    if "similarity.weight" in held:
        assert tensors["similarity.weight"].shape == (4, 4, 3, 3)
        assert rule.feedback["act3"]["similarity.weight"].shape == (6, 6)
    if loss != "sim":
        assert not tensors["decoder.out.weight"].any() and tensors["decoder.out.bias"].any()


@pytest.mark.parametrize(("loss", "share"), [("predsim", 0.25), ("pred", 1.0), ("sim", 1.0)])
def test_output_layer_gradients_are_scaled_by_one_minus_beta(loss, share):
    """With loss=predsim, the gradients of the output layer's weight and bias are (1-β) times the true ones. A hook on the logits
    still sees the true error."""
    model, (x, y) = nets.mlp(), nets.batch("mlp")
    rule = fa_bench.attach(model, "predsim", seed=0, sample_input=x, cuts=["act1", "act2"], loss=loss, beta=0.75)
    got, seen = rule_grads(model, rule, x, y), []
    with rule.exact():
        exact = rule_grads(model, rule, x, y)
    for key in ("fc3.weight", "fc3.bias"):
        assert distance(got[key], array(share * exact[key])) < 1e-15
    logits = model(x)
    logits.register_hook(seen.append)
    backward(rule, F.cross_entropy(logits, y), logits, y)
    assert distance(seen[0], array((logits.softmax(1) - F.one_hot(y, 3)) / 4)) < 1e-14


@pytest.mark.parametrize(
    ("shape", "deviations"),
    [
        ((5, 2), True),
        ((4, 3, 4), True),
        ((4, 3, 1), True),
        ((4, 2, 1, 1), True),
        ((3, 3, 4), False),
        ((5, 1, 6), False),
        ((5, 1), False),
        ((5,), False),
    ],
    ids=str,
)
def test_similarity_uses_std_of_maps_with_more_than_three_channels(shape, deviations):
    """Maps with at most three channels or only one row are compared by all of their values, as in the paper's code."""
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = np.corrcoef(array(x.flatten(2).std(2) if deviations else x.flatten(1)))
    assert distance(similarity(x), want) < 1e-12


# --- Mono-Forward --------------------------------------------------------------------------------------------------------------

MONO_FORWARD = {"loss": "pred", "decoder_init": "pytorch", "decoder_bias": False}


def test_decoder_init_and_bias_options():
    """The decoder has 3 x F entries, which are sampled from U(±1/√F).

    The largest of the 1,200 entries lies within 1 % of the bound.
    """
    model = torch.nn.Sequential(torch.nn.Linear(4, 400), torch.nn.ReLU(), torch.nn.Linear(400, 3))
    tensors = fa_bench.attach(model, "predsim", seed=0, cuts=["1"], **MONO_FORWARD).feedback["1"]
    assert set(tensors) == {"decoder.out.weight"}
    weight = tensors["decoder.out.weight"]
    assert weight.shape == (3, 400) and 0.99 * 0.05 < weight.abs().max() <= 0.05
    model = torch.nn.Sequential(torch.nn.Linear(4, 400), torch.nn.ReLU(), torch.nn.Linear(400, 3))
    wider = fa_bench.attach(model, "predsim", seed=0, cuts=["1"], decoder_init="uniform_one").feedback["1"]
    assert wider["decoder.out.weight"].abs().max() > 0.9 and "decoder.out.bias" in wider


def test_decoder_options_do_not_affect_similarity_weight():
    """The similarity's K is sampled after the decoder's D, but must not depend on the decoder's options."""
    kernels = [
        registered("conv2", "predsim", **options)[1].feedback["act1"]["similarity.weight"]
        for options in ({}, {"decoder_init": "pytorch"})
    ]
    assert torch.equal(*kernels)


def test_frozen_decoder_matches_local_error():
    """If the decoder does not learn, five steps with momentum must lead to the same weights as under local_error."""
    (one, x, y), two = (nets.mlp(), *nets.batch("mlp")), nets.mlp()
    rules = [
        fa_bench.attach(one, "predsim", seed=0, cuts=["act1", "act2"], **MONO_FORWARD),
        fa_bench.attach(two, "local_error", seed=0, cuts=["act1", "act2"]),
    ]
    for parameter in rules[0].feedback_parameters():
        parameter.requires_grad_(False)
    for cut, tensors in rules[1].feedback.items():
        tensors["M"].copy_(rules[0].feedback[cut]["decoder.out.weight"])
    for model, rule in zip((one, two), rules, strict=True):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        for _ in range(5):
            rule_grads(model, rule, x, y)
            optimizer.step()
            rule.step()
    for name in ("fc1.weight", "fc2.weight", "fc3.weight"):
        assert distance(array(one.get_parameter(name)), array(two.get_parameter(name))) < 1e-14
    assert distance(array(one.fc1.weight), array(nets.mlp().fc1.weight)) > 1e-2


def test_one_hidden_layer_with_output_weight_as_decoder_matches_backprop():
    """The decoder's weight starts equal to the output weight and gets the same gradient, so the two stay equal, and the hidden
    layer's error is that of backpropagation."""
    one, two, (x, y) = nets.one_hidden(), nets.one_hidden(), nets.batch("one")
    for model in (one, two):
        torch.nn.init.zeros_(model.fc2.bias)
        model.fc2.bias.requires_grad_(False)
    mono = fa_bench.attach(one, "predsim", seed=0, cuts=["act1"], **MONO_FORWARD)
    m = mono.feedback["act1"]["decoder.out.weight"]
    with torch.no_grad():
        m.copy_(one.fc2.weight)
    for model, rule in ((one, mono), (two, fa_bench.attach(two, "bp", seed=0))):
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(5):
            rule_grads(model, rule, x, y)
            optimizer.step()
            rule.step()
    for name in ("fc1.weight", "fc1.bias", "fc2.weight"):
        assert distance(array(one.get_parameter(name)), array(two.get_parameter(name))) < 1e-12
    assert distance(array(m), array(one.fc2.weight)) < 1e-12 and distance(array(m), array(nets.one_hidden().fc2.weight)) > 1e-2


# --- precision -----------------------------------------------------------------------------------------------------------------

ROWS = {
    "ordinary": lambda x: x,
    "dead sample": lambda x: torch.cat([torch.zeros_like(x[:1]), x[1:]]),
    "huge": lambda x: x / x.abs().max() * 6e4,  # sums of squares, and some norms, overflow float16
    "small": lambda x: x * 1e-3,  # float16 cannot represent the squares of such numbers accurately
    "almost dead sample": lambda x: torch.cat([x[:1] * 1e-6, x[1:]]),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5,), (5, 3, 4), (3, 3, 4)], ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_half_precision_similarity_matches_float64(rows, shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x = ROWS[rows](torch.randn(4, *shape, generator=generator)).to(dtype).requires_grad_(True)
    labels = F.one_hot(torch.tensor([0, 1, 1, 2]), 3)
    got, want = similarity(x), similarity(x.detach().double())
    if rows == "almost dead sample":  # whether this sample varies at all depends on the precision
        got, want = got[1:, 1:], want[1:, 1:]
    assert torch.allclose(got.double(), want, atol=1e-5)
    (gradient,) = torch.autograd.grad(F.mse_loss(similarity(x), similarity(labels.to(dtype))), x)
    assert torch.isfinite(gradient).all() and gradient.dtype == dtype and gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", ROWS)
def test_similarity_matches_plain_formula(rows, dtype):
    generator = torch.Generator().manual_seed(0)
    for shape in ((5,), (5, 3, 4)):
        x = ROWS[rows](torch.randn(4, *shape, generator=generator)).to(dtype)
        flat = x.flatten(2).std(2) if len(shape) > 1 else x
        centred = flat - flat.mean(1, keepdim=True)
        norms = centred.norm(dim=1, keepdim=True)
        want = torch.where(norms > 1e-8, centred / norms.clamp_min(1e-8), 0.0)
        assert torch.equal(similarity(x), want.mm(want.t()))


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", ["model", "autocast"])
def test_half_precision_trains_with_dead_sample(how, dtype, inside):
    model, rule, x, y = registered("conv2", "predsim", dtype=torch.float32)
    assert isinstance(model.bn1, torch.nn.BatchNorm2d)
    model.bn1, model.bn2, model.bn3 = (torch.nn.Identity() for _ in range(3))
    x[2] = 0.0
    with torch.no_grad():
        for bias in (model.conv1.bias, model.conv2.bias, model.fc1.bias):
            bias.fill_(-1e-3)  # the dead sample stays 0 after every ReLU
    if how == "model":
        model.to(dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=how == "autocast"):
        logits = model(x.to(dtype) if how == "model" else x)
        loss = F.cross_entropy(logits, y)
        if inside:
            backward(rule, loss, logits, y)
    if not inside:
        backward(rule, loss, logits, y)
    grads = [p.grad for p in [*model.parameters(), *rule.feedback_parameters()] if p.grad is not None]
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert model.conv1.weight.grad.any() and rule.feedback["act1"]["similarity.weight"].grad.any()


def test_float64_model_computes_loss_in_float64():
    """With four classes, the similarity of different labels is -1/3. Rounding it to single precision would change the loss by
    more than the tolerance."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4)).double()
    rule = fa_bench.attach(model, "predsim", seed=0, cuts=["1"], loss="sim")
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 1, 0])
    with torch.no_grad():
        activation = model[1](model[0](x))
    net = rule.auxiliary_at("1")
    same = (y[:, None] == y).double()
    want = (similarity(net["similarity"](activation)) - (4 * same - 1) / 3).square().mean()
    assert rule.local_loss("1", net, activation, y).item() == pytest.approx(want.item(), rel=1e-14)
