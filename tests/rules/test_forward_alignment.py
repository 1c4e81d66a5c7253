"""Tests of forward_alignment: the activation in the weight gradient, the second pass, and the theorem in its paper's appendix."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fa_bench
from fa_bench.analyses.forward_alignment_theorem import Linear, trajectory
from tests.versions import needs_compiler

from . import nets
from .helpers import array, assert_bitwise, assert_matches, backward, bp_grads, collect, distance, rule_grads


def test_random_weights_equal_to_weights_match_backprop():
    x, y = nets.batch("conv_bn")
    model, plain = (nets.convnet(batch_norm=True) for _ in range(2))
    for net in (model, plain):
        for layer in net:
            if getattr(layer, "bias", None) is not None and not isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.zeros_(layer.bias)
    rule = fa_bench.attach(model, "forward_alignment", seed=0, sample_input=x)
    other = rule_grads(model, rule, x, y)
    with torch.no_grad():
        for path, tensors in rule.feedback.items():
            tensors["C"].copy_(model.get_submodule(path).weight)
    want = bp_grads(plain, x, y)
    assert_matches(rule_grads(model, rule, x, y), want)
    assert distance(other["conv2.weight"], want["conv2.weight"]) > 1e-2
    assert distance(other["conv1.weight"], want["conv1.weight"]) < 1e-12, "the first layer does not have its true gradient"


def test_weight_pairs_are_c_then_w():
    """Each pair is (C, W), so the norm ratio is ‖C‖/‖W‖."""
    model, (x, _) = nets.mlp(), nets.batch("mlp")
    rule = fa_bench.attach(model, "forward_alignment", seed=0, sample_input=x, exclude=["fc2"])
    assert list(rule.weight_pairs()) == ["fc1", "fc3"]
    for path, (feedback, weight) in rule.weight_pairs().items():
        assert torch.equal(feedback, rule.feedback[path]["C"]) and torch.equal(weight, model.get_submodule(path).weight)


def test_residual_addition_sums_replacement_activations():
    """After a residual addition, the replacement activation is the sum of the outputs of the projection and of the branch.

    Both outputs are computed with C from the true inputs.
    """
    x, y = nets.batch("residual")
    model, plain = nets.residual(), nets.residual()
    rule = fa_bench.attach(model, "forward_alignment", seed=0, sample_input=x)
    got = rule_grads(model, rule, x, y)
    seen, errors = {}, {}
    for path, layer in plain.named_modules():
        if hasattr(layer, "weight") and not isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(lambda m, args, path=path: seen.__setitem__(path, args[0].detach().clone()))
            layer.register_forward_hook(
                lambda m, args, out, path=path: out.register_hook(lambda g: errors.__setitem__(path, g)) and None
            )
    F.cross_entropy(plain(x), y).backward()
    c = {path: tensors["C"] for path, tensors in rule.feedback.items()}
    with torch.no_grad():
        branch = plain.b_bn(F.conv2d(seen["b1"], c["b1"], stride=2, padding=1))
        h = torch.relu(branch + F.conv2d(seen["down"], c["down"], stride=2)).mean((2, 3))
        want = errors["head"].t() @ h
    assert distance(got["head.weight"], array(want)) < 1e-12
    assert distance(got["head.weight"], array(plain.head.weight.grad)) > 1e-2
    assert distance(got["stem.weight"], array(plain.stem.weight.grad)) < 1e-9


def test_second_pass_does_not_affect_buffers_rng_or_pending_pass():
    x, y = nets.batch("conv_bn")
    model, plain = nets.convnet(batch_norm=True), nets.convnet(batch_norm=True)
    rule = fa_bench.attach(model, "forward_alignment", seed=0, sample_input=x)
    before = torch.get_rng_state()
    logits = model(x)
    plain(x)
    assert_bitwise({k: v for k, v in model.state_dict().items() if "feedback" not in k}, dict(plain.state_dict()))
    model(x.flip(0))
    backward(rule, F.cross_entropy(logits, y), logits, y)
    fresh = nets.convnet(batch_norm=True)
    assert_bitwise(collect(model), rule_grads(fresh, fa_bench.attach(fresh, "forward_alignment", seed=0, sample_input=x), x, y))
    assert torch.equal(torch.get_rng_state(), before)


def test_layer_that_runs_twice_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))

    with pytest.raises(fa_bench.errors.CoverageError, match="'a'"):
        fa_bench.attach(Twice(), "forward_alignment", sample_input=torch.zeros(2, 4))


def tied(what: str) -> nn.Sequential:
    """A 5-4-4-4-4-3 net whose second and third layers share the parameters named in `what`.

    If `what` contains "three", the fourth layer has the same weight, too.
    """
    torch.manual_seed(0)
    layers = [nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)]
    model = nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())][:-1]).double()
    if "weight" in what:
        model[4].weight = model[2].weight
    if "bias" in what:
        model[4].bias = model[2].bias
    if "three" in what:
        model[6].weight = model[2].weight
    return model


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("weight", {}),
        ("bias", {}),
        ("weight bias", {}),
        ("weight", {"exclude": ["2"]}),
        ("three weights", {}),
        ("three weights", {"exclude": ["6"]}),
    ],
    ids=str,
)
def test_layers_with_shared_parameters_have_separate_c(what, options):
    """In the weight gradient of a layer with a C, h̃ replaces the layer's input.

    A layer with a C computes the next h̃ with C from its true input, and an excluded layer computes it with its weight from the
    previous h̃. The gradients of shared parameters add up.
    """
    model, plain = tied(what), tied(what)
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 2] * 2)
    rule = fa_bench.attach(model, "forward_alignment", seed=0, sample_input=x, **options)
    c = {path: tensors["C"] for path, tensors in rule.feedback.items() if "C" in tensors}
    assert set(c) == {"0", "2", "4", "6", "8"} - {*options.get("exclude", ())}
    got = rule_grads(model, rule, x, y)
    inputs, errors = {}, {}
    for path, layer in plain.named_children():
        layer.register_forward_pre_hook(lambda m, args, path=path: inputs.__setitem__(path, args[0].detach()))
        layer.register_forward_hook(
            lambda m, args, out, path=path: out.register_hook(lambda g: errors.__setitem__(path, g)) and None
        )
    F.cross_entropy(plain(x), y).backward()
    names = {id(p): name for name, p in plain.named_parameters()}
    want = {name: torch.zeros_like(p) for name, p in plain.named_parameters()}
    arrives = x
    for path in ("0", "2", "4", "6", "8"):
        layer = plain.get_submodule(path)
        want[names[id(layer.weight)]] += errors[path].t() @ (arrives if path in c else inputs[path])
        want[names[id(layer.bias)]] += errors[path].sum(0)
        arrives = torch.tanh(inputs[path] @ c[path].t() if path in c else layer(arrives)).detach()
    assert_matches(got, {name: array(grad) for name, grad in want.items()}, rel=1e-12)
    assert len(list(model.parameters())) == len(want), "parameters that were shared are now separate"


@pytest.mark.parametrize("hidden", [6, 9])
def test_linear_net_error_converges_to_zero(hidden):
    """As in appendix A.1 of the paper, y = W A x learns y = T x from white inputs, with C x for A x in the gradient of W.

    The error ‖T - W A‖ vanishes if there are at least as many hidden units as inputs. Throughout training, W and A follow the
    equations of the theorem.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, hidden, bias=False), nn.Linear(hidden, 4, bias=False)).double()
    with torch.no_grad():
        model[1].weight.zero_()
    teacher = torch.randn(4, 6, dtype=torch.float64)
    x = torch.linalg.qr(torch.randn(60, 6, dtype=torch.float64))[0] * 60**0.5  # white: xᵀ x / 60 = I
    rule = fa_bench.attach(model, "forward_alignment", seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    tensors = teacher, model[1].weight.detach(), model[0].weight.detach(), rule.feedback["0"]["C"]
    theory = trajectory(Linear(*(tensor.numpy().copy() for tensor in tensors), np.eye(6)), lr=0.05)
    errors = []
    for step, (w, a) in zip(range(1200), theory, strict=False):
        if step % 100 == 99:
            np.testing.assert_allclose(model[1].weight.detach(), w, atol=1e-9)
            np.testing.assert_allclose(model[0].weight.detach(), a, atol=1e-9)
        optimizer.zero_grad()
        z = model(x)
        rule.backward(0.5 * (z - x @ teacher.t()).square().sum() / 60, z)
        optimizer.step()
        errors.append((teacher - model[1].weight @ model[0].weight).norm().item())
    assert errors[0] > 3
    assert errors[-1] < 1e-6 * errors[0]


class Beside(nn.Module):
    """A net in which two layers use the net's input after dropout."""

    def __init__(self):
        super().__init__()
        self.drop, self.one, self.two, self.head = nn.Dropout(0.5), nn.Linear(7, 5), nn.Linear(7, 5), nn.Linear(5, 3)

    def forward(self, x):
        x = self.drop(x)
        return self.head(torch.tanh(self.one(x) + self.two(x)))


def test_layers_reading_image_use_true_input():
    """The true input of these layers includes the effect of dropout, although dropout is off in the second pass."""
    torch.manual_seed(0)
    model, (x, y) = Beside().double(), nets.batch("mlp")
    plain = Beside().double()
    plain.load_state_dict(model.state_dict())
    rule = fa_bench.attach(model, "forward_alignment", seed=0, sample_input=x)
    torch.manual_seed(1)
    got = rule_grads(model, rule, x, y)
    torch.manual_seed(1)
    F.cross_entropy(plain(x), y).backward()
    for path in ("one", "two"):
        assert distance(got[f"{path}.weight"], array(plain.get_submodule(path).weight.grad)) < 1e-12


def test_failed_forward_pass_is_not_repeated():
    class Fails(torch.nn.Sequential):
        calls, fails = 0, False

        def forward(self, x):
            self.calls += 1
            x = super().forward(x)
            if self.fails:
                raise KeyError("its own")
            return x

    x, _ = nets.batch("mlp")
    model = Fails(*nets.mlp().children())
    fa_bench.attach(model, "forward_alignment", seed=0)
    model(x)
    calls, model.fails = model.calls, True
    with pytest.raises(KeyError, match="its own"):
        model(x)
    assert model.calls == calls + 1


@needs_compiler
def test_compiled_model_can_be_evaluated_before_training():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    fa_bench.attach(model, "forward_alignment", seed=0)
    x = torch.ones(2, 4)
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))
