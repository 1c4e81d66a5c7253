"""Tests of pfa and pfa_o beyond their gradients: the distribution of B, relations to other rules, sparse masks, and the predicted
angles and ratios."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fa_bench
from fa_bench.metrics.angles import norm_ratio, weight_angle
from fa_bench.utils.sampling import sample, seed_for

from . import nets
from .helpers import array, assert_matches, backward, bp_grads, distance, rule_grads


def linear(outputs: int, inputs: int, rule: str, **options):
    model = nn.Sequential(nn.Linear(inputs, outputs))
    return model, fa_bench.attach(model, rule, seed=0, **options)


def test_feedback_path_equal_to_weight_matches_backprop():
    """The test sets R to the pseudo-inverse of B times W, so that B R = W in every layer of a net with strides, padding and
    groups."""
    x, y = nets.batch("conv")
    model = nets.convnet()
    rule = fa_bench.attach(model, "pfa", seed=0, ratio=2.0)
    other = rule_grads(model, rule, x, y)
    with torch.no_grad():
        for path, tensors in rule.feedback.items():
            layer, first, second = model.get_submodule(path), tensors["B"], tensors["R"]
            groups = getattr(layer, "groups", 1)
            for group, (b, r) in enumerate(zip(first.chunk(groups), second.chunk(groups), strict=True)):
                r.copy_((torch.linalg.pinv(b) @ layer.weight.chunk(groups)[group].flatten(1)).view(r.shape))
    got, want = rule_grads(model, rule, x, y), bp_grads(nets.convnet(), x, y)
    assert_matches(got, want)
    assert distance(other["conv1.weight"], want["conv1.weight"]) > 1e-2


def test_identity_first_hop_is_kolen_pollack_step_by_step():
    """With B = I, R plays the role of KP's B, so five steps of SGD with momentum and decay give the same weights and feedback."""
    models = [nets.convnet() for _ in range(2)]
    pfa = fa_bench.attach(models[0], "pfa_o", seed=0)
    kp = fa_bench.attach(models[1], "kp", seed=0)
    optimizers = []
    with torch.no_grad():
        for path, tensors in pfa.feedback.items():
            outputs, between = tensors["B"].shape
            groups = outputs // between
            tensors["B"].copy_(torch.eye(between).repeat(groups, 1))
            kp.feedback[path]["B"].copy_(tensors["R"])
    for model in models:
        optimizers.append(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01))
    for step in range(5):
        x, y = nets.batch("conv", seed=step)
        for model, rule, optimizer in zip(models, (pfa, kp), optimizers, strict=True):
            optimizer.zero_grad()
            logits = model(x)
            backward(rule, F.cross_entropy(logits, y), logits, y)
            optimizer.step()
            rule.step()
    for path, tensors in pfa.feedback.items():
        assert distance(array(tensors["R"]), array(kp.feedback[path]["B"])) < 1e-12
        assert distance(array(models[0].get_submodule(path).weight), array(models[1].get_submodule(path).weight)) < 1e-12


@pytest.mark.parametrize("net", ["mlp_tanh", "conv"])
def test_gradient_of_r_is_b_transposed_times_weight_gradient(net):
    x, y = nets.batch(net)
    model = nets.NETS[net]()
    rule = fa_bench.attach(model, "pfa", seed=0, ratio=2.0)
    grads = rule_grads(model, rule, x, y)
    for path, tensors in rule.feedback.items():
        groups = getattr(model.get_submodule(path), "groups", 1)
        parts = zip(tensors["B"].chunk(groups), grads[f"{path}.weight"].chunk(groups), strict=True)
        want = torch.cat([(b.t() @ g.flatten(1)).view(-1, *g.shape[1:]) for b, g in parts])
        assert distance(tensors["R"].grad, array(want)) < 1e-12


LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (3, 5)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2), (2, 4, 7, 6)),
    "transposed1d": (lambda: nn.ConvTranspose1d(3, 4, 3, stride=2, output_padding=1), (2, 3, 5)),
    "transposed2d grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 5, 3)),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 3, 2, bias=False), (2, 2, 3, 2, 4)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", ["pfa", "pfa_o"])
def test_two_hops_match_wide_layer_followed_by_mixing_layer(name, layer):
    """The input error and the gradient of R equal those that autograd computes for a layer with weight R and M units per group,
    followed by a layer with weight B (O, M)."""
    build, shape = LAYERS[layer]
    torch.manual_seed(0)
    plain = build().double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    model = nn.Sequential(plain)
    rule = fa_bench.attach(model, name, seed=0, ratio=2.0)
    b, r = rule.feedback["0"]["B"], rule.feedback["0"]["R"]
    y = model(x)
    g = torch.randn(y.shape, dtype=torch.float64)
    rule.backward((y * g).sum(), y)
    got, other, of_r = x.grad, x.detach().requires_grad_(True), r.detach().requires_grad_(True)
    if layer == "linear":
        z = other @ of_r.t() @ b.t()
        assert r.shape == (8, 5)
    else:
        transposed, dims = "transposed" in layer, x.dim() - 2
        convolve = getattr(F, f"conv{'_transpose' if transposed else ''}{dims}d")
        extra = {"output_padding": plain.output_padding} if transposed else {}
        wide = convolve(other, of_r, stride=plain.stride, padding=plain.padding, groups=plain.groups, **extra)
        assert wide.shape[1] == 2 * y.shape[1], "the layer with weight R is not twice as wide as the output"
        z = getattr(F, f"conv{dims}d")(wide, b.view(*b.shape, *[1] * dims), groups=plain.groups)
    (z * g).sum().backward()
    assert distance(got, array(other.grad)) < 1e-12
    assert distance(r.grad, array(of_r.grad)) < 1e-12


@pytest.mark.parametrize("net", ["mlp_tanh", "conv"])
@pytest.mark.parametrize("name", ["pfa", "mixed"])
def test_r_learns_with_frozen_weight(net, name):
    x, y = nets.batch(net)
    learned = []
    for frozen in (False, True):
        model = nets.NETS[net]()
        rule = fa_bench.attach(model, name, seed=0)
        path = list(rule.feedback)[1]
        model.get_submodule(path).weight.requires_grad_(not frozen)
        rule_grads(model, rule, x, y)
        learned.append(rule.feedback[path]["R"].grad)
    assert torch.equal(*learned)
    assert learned[0].abs().sum() > 0


def test_b_has_unit_mean_gram_with_and_without_mask():
    """Because E[B Bᵀ] = I, the mean of 200 squared row norms of 2000 terms each is near 1.

    The standard error of this mean is 0.0014 for dense B and 0.0035 for sparse B.
    """
    for density, tolerance in ((1.0, 0.01), (0.3, 0.015)):
        _, rule = linear(200, 20, "pfa", density=density)
        b = rule.feedback["0"]["B"]
        assert b.shape == (200, 2000)
        assert (b @ b.t()).diagonal().mean().item() == pytest.approx(1, abs=tolerance)
        assert (b != 0).float().mean().item() == pytest.approx(density, abs=0.01)
        assert b.abs().max().item() == pytest.approx(math.sqrt(3 / (2000 * density)), rel=1e-2)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0, 1.5, 3.0])
def test_b_is_semi_orthogonal(ratio):
    _, rule = linear(40, 20, "pfa_o", ratio=ratio)
    b = rule.feedback["0"]["B"].double()
    assert b.shape == (40, round(40 * ratio))
    short = b if ratio >= 1 else b.t()
    assert (short @ short.t() - torch.eye(len(short))).abs().max() < 1e-6  # float32
    assert b.mean().abs() < 5 / b.numel() ** 0.5, "the mean of B is too large"


def test_semi_orthogonal_b_is_qr_factor_with_positive_diagonal():
    """The QR factorisation of a Gaussian matrix is unique if the diagonal of R is positive. With the signs that LAPACK returns,
    some entries of the diagonal would be negative."""
    _, rule = linear(12, 20, "pfa_o", ratio=2.0)
    gaussian = sample((24, 12), "normal_fan_out", seed_for(0, "0", "B"))
    r = rule.feedback["0"]["B"].double() @ gaussian.double()
    assert r.tril(-1).abs().max() < 1e-5 and (r.diagonal() > 0).all()


def test_semi_orthogonal_b_has_no_preferred_direction():
    """With one row, B is a Gaussian vector divided by its norm, and its entries have a kurtosis of 3.

    For uniform entries, the kurtosis would be 1.8.
    """
    _, rule = linear(1, 20, "pfa_o", ratio=4000.0)
    b = rule.feedback["0"]["B"].double() * math.sqrt(4000)
    assert b.pow(4).mean().item() == pytest.approx(3, abs=0.6)


@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_ratio_below_one_projects_weight_to_random_subspace(ratio):
    """B R converges to B Bᵀ W, whose angle to W is arccos(‖Bᵀ W‖ / ‖W‖). For weights that are independent of B, the angle is
    about arccos √ratio."""
    _, rule = train("pfa_o", ratio=ratio)
    for path, (effective, weight) in rule.weight_pairs().items():
        b = rule.feedback[path]["B"]
        assert distance(effective, array(b @ b.t() @ weight)) < 1e-4
        cosine = ((b.t() @ weight).norm() / weight.norm()).item()
        assert weight_angle(effective, weight) == pytest.approx(math.degrees(math.acos(cosine)), abs=0.02)
        blind = math.degrees(math.acos(math.sqrt(ratio)))
        other = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
        assert weight_angle(b @ b.t() @ other, other) == pytest.approx(blind, abs=1)


def test_spectrum_and_angle_of_random_b_at_ratio_ten():
    """By the Marchenko-Pastur law, the eigenvalues of B Bᵀ have mean 1 and standard deviation √0.1 and lie between (1 - √0.1)²
    and (1 + √0.1)². The angle between W and B Bᵀ W is 17.5°."""
    deviations, angles = [], []
    for seed in range(5):
        model = nn.Sequential(nn.Linear(256, 100))
        rule = fa_bench.attach(model, "pfa", seed=seed)
        b, w = rule.feedback["0"]["B"].double(), torch.randn(100, 256, generator=torch.Generator().manual_seed(seed)).double()
        gram = b @ b.t()
        values = torch.linalg.eigvalsh(gram)
        assert values.mean().item() == pytest.approx(1, abs=0.01)
        assert 0.42 < values.min() < values.max() < 1.80
        deviations.append(values.std().item())
        angles.append(weight_angle(gram @ w, w))
    assert np.mean(deviations) == pytest.approx(math.sqrt(0.1), rel=0.03)
    assert np.mean(angles) == pytest.approx(17.55, abs=0.5)


def train(rule_name: str, steps: int = 400, **options):
    """A two-layer model trained on random targets, and its rule. Weight decay has multiplied the initial values by
    exp(-40)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(80, 200), nn.Tanh(), nn.Linear(200, 150, bias=False))
    rule = fa_bench.attach(model, rule_name, seed=0, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(128, 80, generator=generator), 3 * torch.randn(128, 150, generator=generator)
    for _ in range(steps):
        optimizer.zero_grad()
        z = model(x)
        rule.backward(F.mse_loss(z, t, reduction="sum") / 128, z)
        optimizer.step()
        rule.step()
    return model, rule


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_trained_angle_and_norm_ratio_match_theory(density):
    """The angle between W and B R is arctan √(λ/d), and ‖B R‖/‖W‖ is d √(1 + λ/d), where λ = 1/10 and d is the density of B.

    The tolerances are one degree for the angle and 5 % for the ratio, or 10 % if B is sparse. The ratio is a mean over the few
    directions that W has learned, each of which has a standard deviation of √(2/1500) = 4 %.
    """
    _, rule = train("pfa", density=density)
    for effective, weight in rule.weight_pairs().values():
        spread = 0.1 / density
        assert weight_angle(effective, weight) == pytest.approx(math.degrees(math.atan(math.sqrt(spread))), abs=1.0)
        assert norm_ratio(effective, weight) == pytest.approx(density * math.sqrt(1 + spread), rel=0.05 / density)


def test_pfa_o_feedback_converges_to_weight():
    _, rule = train("pfa_o")
    for effective, weight in rule.weight_pairs().values():
        assert weight_angle(effective, weight) < 0.01
        assert norm_ratio(effective, weight) == pytest.approx(1, abs=1e-4)


def test_mask_holds_at_every_step_and_b_never_moves():
    x, y = nets.batch("conv")
    model = nets.convnet()
    rule = fa_bench.attach(model, "pfa", seed=0, ratio=4.0, density=0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = {path: (t["B"].clone(), t["R"] != 0, t["R"].clone()) for path, t in rule.feedback.items()}
    for _ in range(3):
        optimizer.zero_grad()
        logits = model(x)
        backward(rule, F.cross_entropy(logits, y), logits, y)
        optimizer.step()
        rule.step()
        for path, tensors in rule.feedback.items():
            b, kept, r = before[path]
            assert torch.equal(tensors["B"], b)
            assert torch.equal(tensors["R"] != 0, kept) and not torch.equal(tensors["R"], r)


@pytest.mark.parametrize("name", ["pfa", "pfa_o", "mixed"])
@pytest.mark.parametrize("net", ["mlp_tanh", "conv"])
def test_bfloat16_autocast_gradients_match_float32(name, net):
    """bfloat16 has 8 bits of precision, so the gradients lie within 5 % in norm of the float32 ones. All gradients are stored in
    float32."""
    model, (x, y) = nets.NETS[net](nn.Tanh, dtype=torch.float32), nets.batch(net, dtype=torch.float32)
    rule = fa_bench.attach(model, name, seed=0, sample_input=x)
    found = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            logits = model(x)
            loss = F.cross_entropy(logits, y)
        backward(rule, loss, logits, y)
        found.append({key: parameter.grad for key, parameter in model.named_parameters()})
    for key, want in found[0].items():
        assert found[1][key].dtype == torch.float32 and want.any()
        assert (found[1][key] - want).norm() <= 0.05 * want.norm(), key


@pytest.mark.parametrize(("ratio", "between"), [(1.0, 5), (1.55, 8), (2.3, 12), (0.1, 1), (0.01, 1)])
def test_intermediate_units_are_rounded_to_nearest_integer(ratio, between):
    """The number of units is the ratio times the number of outputs, rounded to the nearest integer, and is at least one."""
    _, rule = linear(5, 4, "pfa", ratio=ratio)
    assert rule.feedback["0"]["B"].shape == (5, between) and rule.feedback["0"]["R"].shape == (between, 4)
