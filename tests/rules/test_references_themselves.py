"""Tests of the reference implementations against torch: loop-based backpropagation equals autograd, and the FA surrogate equals
the loops."""

import pytest
import torch
import torch.nn.functional as F

from . import nets
from .helpers import REL, array, arrays, assert_matches, bp_grads, collect, distance, fa_surrogate
from .reference import conv_forward, conv_input_error, describe, forward, gradients, sgd_step, weighted
from .references.classic import usf_scale


@pytest.mark.parametrize("net", nets.NETS)
def test_forward_and_bp_equal_autograd(net):
    model, (x, y) = nets.NETS[net](), nets.batch(net)
    chain, params = describe(model), arrays(model)
    assert_matches({"logits": model(x).detach()}, {"logits": forward(chain, params, array(x))[-1]})
    assert_matches(bp_grads(model, x, y), gradients(chain, params, array(x), y.numpy()))


@pytest.mark.parametrize("net", nets.NETS)
def test_fa_reference_matches_surrogate(net):
    model, (x, y) = nets.NETS[net](), nets.batch(net)
    chain = describe(model)
    generator = torch.Generator().manual_seed(0)
    shapes = {name: model.get_submodule(name).weight.shape for name in weighted(chain)}
    feedback = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    want = gradients(chain, arrays(model), array(x), y.numpy(), carry={name: array(b) for name, b in feedback.items()})
    assert_matches(fa_surrogate(model, feedback, x, y), want)


def test_grouped_strided_conv_and_its_input_error():
    model = nets.convnet()
    stage = describe(model)[2]
    layer = model.conv2
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 5, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    out = layer(x)
    g = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    out.backward(g)
    assert distance(conv_forward(stage, array(x), array(layer.weight), array(layer.bias)), array(out)) < REL
    assert distance(conv_input_error(stage, array(g), array(layer.weight), tuple(x.shape)), array(x.grad)) < REL


@pytest.mark.parametrize("form", ["inject", "deliver"])
def test_direct_signals_equal_local_losses(form):
    """Autograd computes the same gradients as the loops if each tensor that gets a signal is detached and its inner product with
    the signal is added to the loss."""
    model, (x, y) = nets.convnet(), nets.batch("conv")
    chain, generator = describe(model), torch.Generator().manual_seed(5)
    delta = torch.autograd.grad(F.cross_entropy(z := model(x), y), z)[0].detach()
    places = ["act1", "act2"] if form == "inject" else ["conv2", "fc1"]
    shapes = [(3, 48), (3, 72)] if form == "inject" else [(3, 4, 3, 3), (3, 72)]
    feedback = {p: torch.randn(s, generator=generator, dtype=torch.float64) for p, s in zip(places, shapes, strict=True)}
    value, extra = x, torch.zeros((), dtype=torch.float64)
    for name, module in model.named_children():
        if form == "deliver" and name in feedback:
            if name == "fc1":
                signal = delta @ feedback[name]
            else:
                everywhere = delta[:, :, None, None].expand(-1, -1, *module(value).shape[2:])
                signal = F.conv_transpose2d(everywhere, feedback[name], padding=module.padding)
            extra, value = extra + (value * signal).sum(), value.detach()
        value = module(value)
        if form == "inject" and name in feedback:
            extra, value = extra + (value * (delta @ feedback[name]).reshape(value.shape)).sum(), value.detach()
    (F.cross_entropy(value, y) + extra).backward()
    want = gradients(chain, arrays(model), array(x), y.numpy(), **{form: {p: array(b) for p, b in feedback.items()}})
    assert_matches(collect(model), want)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_step_equals_torch(nesterov):
    p = torch.nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64))
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=nesterov)
    params, velocity = {"p": array(p)}, {}
    for step in range(4):
        p.grad = torch.sin(torch.arange(5.0, dtype=torch.float64) + step)
        sgd_step(params, velocity, {"p": array(p.grad)}, lr=0.1, momentum=0.9, decay=0.01, nesterov=nesterov)
        optimizer.step()
    assert_matches({"p": p.detach()}, params)


def test_usf_scales_match_initialiser_standard_deviations():
    """The scales match the standard deviations that torch's initialisers produce for a large weight. The tolerance of 1 % is at
    least four standard errors of a standard deviation estimated from 90 000 samples."""
    weight = torch.empty(100, 30, 5, 6)
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.xavier_uniform_(weight, generator=generator)
    assert weight.std().item() == pytest.approx(usf_scale(tuple(weight.shape), "xavier"), rel=0.01)
    torch.nn.init.kaiming_uniform_(weight, a=5**0.5, generator=generator)
    assert weight.std().item() == pytest.approx(usf_scale(tuple(weight.shape), "pytorch"), rel=0.01)
    torch.nn.init.kaiming_normal_(weight, mode="fan_out", generator=generator)
    assert weight.std().item() == pytest.approx(usf_scale(tuple(weight.shape), "xiao"), rel=0.01)
