"""Tests of the rules whose feedback learns by local losses: fixed points, inputs of the losses, and the tensors that change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fa_bench
from fa_bench.errors import CoverageError, StateError
from fa_bench.mechanisms.edge.alignment import AlignmentLoss

from . import nets
from .helpers import array, assert_bitwise, collect, distance, feedback_tensors, rule_grads

RULES = ["symmetric_alignment", "activation_alignment", "regularized_mirror", "information_alignment"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def converged(name: str, x: Tensor, layer: nn.Module | None = None, steps: int = 3000, lr: float = 1.0, **options: Any):
    """B and W of a layer after gradient descent on the local loss without a task loss, and the initial B."""
    torch.manual_seed(0)
    model = nn.Sequential((layer or nn.Linear(6, 4, bias=False)).double())
    rule = fa_bench.attach(model, name, sample_input=x[:2], **options)
    feedback, weight = rule.feedback["0"]["B"], model[0].weight
    first = feedback.detach().clone()
    optimizer = torch.optim.SGD(rule.feedback_parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        y = model(x)
        rule.backward(0 * y.sum(), y, loss_scale=1.0)
        optimizer.step()
        rule.step()
    return feedback.detach(), weight.detach(), first


def white(rows: int, columns: int) -> Tensor:
    """Inputs for which the mean of x xᵀ is the identity."""
    return torch.linalg.qr(random(rows, columns))[0] * rows**0.5


# ------------------------------------------------------------------------------------------------ fixed points
@pytest.mark.parametrize(("alpha", "beta", "ratio"), [(0.1, 0.2, 1.0), (0.1, 0.1, 0.5), (0.2, 0.1, 0.25)])
def test_symmetric_alignment_converges_to_scaled_weight(alpha: float, beta: float, ratio: float) -> None:
    feedback, weight, _ = converged("symmetric_alignment", random(5, 6), steps=200, alpha=alpha, beta=beta)
    assert distance(array(feedback), array(ratio * weight)) < 1e-9


@pytest.mark.parametrize(("alpha", "beta", "ratio"), [(0.1, 0.2, 1.0), (0.1, 0.1, 0.5)])
def test_activation_alignment_learns_only_in_input_subspace(alpha, beta, ratio) -> None:
    axes = torch.linalg.qr(random(6, 6, seed=1))[0]
    x = random(50, 3) @ axes[:, :3].t()
    feedback, weight, first = converged("activation_alignment", x, alpha=alpha, beta=beta)
    assert distance(array(feedback @ axes[:, :3]), array(ratio * weight @ axes[:, :3])) < 1e-9
    assert distance(array(feedback @ axes[:, 3:]), array(first @ axes[:, 3:])) < 1e-12


@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 0.1), (0.2, 0.1)])
def test_regularized_mirror_converges_to_weight_times_input_covariance(alpha: float, beta: float) -> None:
    x = random(50, 6)
    feedback, weight, _ = converged("regularized_mirror", x, steps=500, alpha=alpha, beta=beta)
    assert distance(array(feedback), array(beta / (2 * alpha) * weight @ x.t() @ x / 50)) < 1e-9
    feedback, weight, _ = converged("regularized_mirror", white(50, 6), steps=500, alpha=alpha, beta=beta)
    assert distance(array(feedback), array(beta / (2 * alpha) * weight)) < 1e-9


@pytest.mark.parametrize("gamma", [0.05, 0.2])
def test_information_alignment_converges_to_regularized_inverse(gamma: float) -> None:
    """The fixed point is (W C Wᵀ + (γ / β) I)⁻¹ W C, where C is the mean of x xᵀ."""
    x, beta = random(50, 6), 0.2
    feedback, weight, _ = converged("information_alignment", x, steps=3000, alpha=2 * beta, beta=beta, gamma=gamma)
    c = x.t() @ x / 50
    want = torch.linalg.solve(weight @ c @ weight.t() + gamma / beta * torch.eye(4, dtype=torch.float64), weight @ c)
    assert distance(array(feedback), array(want)) < 1e-9


def test_information_alignment_white_inputs_converge_to_pseudo_inverse() -> None:
    feedback, weight, _ = converged("information_alignment", white(50, 6), steps=6000, alpha=0.8, beta=0.4, gamma=0.0)
    assert distance(array(feedback), array(torch.linalg.pinv(weight).t())) < 1e-6
    assert distance(array(feedback), array(weight)) > 0.1


def test_convolution_feedback_converges_to_kernel() -> None:
    """Despite padding and a stride, the input patches span the whole space, so every entry of the feedback converges."""
    feedback, weight, _ = converged(
        "activation_alignment", random(20, 2, 6, 5), nn.Conv2d(2, 3, 3, stride=2, padding=1), steps=1500, alpha=0.1, beta=0.2
    )
    assert distance(array(feedback), array(weight)) < 1e-6


def test_regularized_mirror_with_noise_converges_to_half_weight() -> None:
    """The inputs are zero, so the feedback learns only from noise.

    The feedback effectively averages over 100 updates with 100 noise samples each, so the second moments of the noise differ
    from I by about 1/√10000.
    """
    feedback, weight, _ = converged(
        "regularized_mirror", 0 * random(3, 6), steps=800, lr=0.1, alpha=0.05, beta=0.05, signal="noise", noise_batch=100
    )
    assert distance(array(feedback), array(weight / 2)) < 0.05


# ------------------------------------------------------------------------------------------------ gradients
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 4), (3, 5)),
    "tokens": (lambda: nn.Linear(5, 4), (3, 2, 5)),
    "same": (lambda: nn.Conv2d(2, 3, 3, padding="same", padding_mode="circular"), (2, 2, 5, 4)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2), (2, 4, 7, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 5, 3)),
    "transposed1d": (lambda: nn.ConvTranspose1d(3, 4, 3, stride=2, output_padding=1), (2, 3, 5)),
}


def literal_loss(loss: AlignmentLoss, layer: Any, weight: Tensor, feedback: Tensor, x: Tensor) -> Tensor:
    """The sum of the losses, written as in the equations and computed with the layer itself and autograd."""

    def run(kernel: Tensor, x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": kernel, **({"bias": torch.zeros_like(layer.bias)})}, (x,))

    z_w, z_b = run(weight, x), run(feedback, x)
    rows = z_w.numel() / z_w.shape[-1 if isinstance(layer, nn.Linear) else 1]
    leaf = x.clone().requires_grad_(True)
    # z_W B is the vector-Jacobian product of z_W with the layer whose weight is B.
    (back,) = torch.autograd.grad(run(feedback, leaf), leaf, z_w, create_graph=True)
    return (
        loss.decay * (weight.square().sum() + feedback.square().sum())
        - loss.amp * (z_w * z_b).sum() / rows
        + loss.null * back.square().sum() / rows
        - loss.self_ * (weight * feedback).sum()
        + loss.sparse * (z_w.square().sum() + z_b.square().sum()) / rows
    )


# For circular padding, the null loss is not compared, because the rule computes z_W B for the padded input.
@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (loss, name)
        for loss in (
            AlignmentLoss(decay=0.7),
            AlignmentLoss(amp=0.7),
            AlignmentLoss(self_=0.7),
            AlignmentLoss(sparse=0.7),
            AlignmentLoss(null=0.7),
            AlignmentLoss(0.2, 0.3, 0.4, 0.5, 0.6),
        )
        for name in LAYERS
        if name != "same" or not loss.null
    ],
    ids=str,
)
def test_gradients_match_literal_losses(loss: AlignmentLoss, name: str, monkeypatch) -> None:
    from fa_bench.rules.activation_alignment import ActivationAlignment

    monkeypatch.setattr(ActivationAlignment, "alignment_loss", lambda rule: loss)
    build, shape = LAYERS[name]
    torch.manual_seed(0)
    plain = build().double()
    x = random(*shape)
    weight = plain.weight.detach().clone().requires_grad_(True)
    feedback = random(*weight.shape, seed=3).requires_grad_(True)
    want = torch.autograd.grad(literal_loss(loss, plain, weight, feedback, x), [weight, feedback], allow_unused=True)
    model = nn.Sequential(plain)
    rule = fa_bench.attach(model, "activation_alignment", update_forward=True)
    with torch.no_grad():
        rule.feedback["0"]["B"].copy_(feedback)
    y = model(x)
    rule.backward(0 * y.sum(), y, loss_scale=0.5)
    for got, wanted in zip((plain.weight.grad, rule.feedback["0"]["B"].grad), want, strict=True):
        assert got is not None and wanted is not None
        assert distance(array(2 * got), array(wanted)) < 1e-12


@pytest.mark.parametrize("name", RULES)
def test_local_losses_do_not_change_weight_gradients(name: str) -> None:
    """All weights have the same gradients as under fa with the same feedback."""
    x, y = nets.batch("conv")
    models = [nets.convnet() for _ in range(2)]
    rule, fa = fa_bench.attach(models[0], name, seed=0, alpha=5.0), fa_bench.attach(models[1], "fa", seed=0)
    assert all(torch.equal(tensor, feedback_tensors(fa)[key]) for key, tensor in feedback_tensors(rule).items())
    assert_bitwise(rule_grads(models[0], rule, x, y), rule_grads(models[1], fa, x, y))
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in rule.feedback_parameters())


def test_b_lr_scale_multiplies_weight_lr() -> None:
    model = nets.mlp()
    rule = fa_bench.attach(model, "symmetric_alignment", b_lr_scale=3.0)
    assert [group["lr"] for group in rule.parameter_groups(0.1)] == pytest.approx([0.1, 0.3])
    assert {learned.lr_scale for learned in rule.learned_feedback()} == {3.0}


@pytest.mark.parametrize("net", ["mlp_tanh", "conv"])
def test_feedback_of_frozen_weights_gets_gradient(net: str) -> None:
    model, (x, y) = nets.NETS[net](), nets.batch(net)
    rule = fa_bench.attach(model, "symmetric_alignment", update_forward=True)
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))][1:]
    for layer in layers:
        layer.weight.requires_grad_(False)
    rule_grads(model, rule, x, y)
    assert layers and all(layer.weight.grad is None for layer in layers)
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in rule.feedback_parameters())


# ------------------------------------------------------------------------------------------------ the scale of the loss
def grads(rule: Any, model: nn.Module, make: Any, y: Tensor | None, **scale: float) -> list[Tensor]:
    x, labels = nets.batch("mlp_tanh")
    model.zero_grad()
    logits = model(x)
    rule.backward(make(logits, labels), logits, y, **scale)
    return [tensor.grad.clone() for tensor in rule.feedback_parameters()]


def test_loss_scale_is_inferred_or_required() -> None:
    model, (x, y) = nets.mlp(), nets.batch("mlp_tanh")
    rule = fa_bench.attach(model, "activation_alignment")
    plain = grads(rule, model, F.cross_entropy, y)
    for target in (y, None):
        for got, want in zip(grads(rule, model, lambda z, t: 8 * F.cross_entropy(z, t), target), plain, strict=True):
            assert distance(array(got), array(8 * want)) < 1e-12
    squares = grads(rule, model, lambda z, t: F.mse_loss(z, z.detach() + 1) * 3, y, loss_scale=2.0)
    for got, want in zip(squares, plain, strict=True):
        assert distance(array(got), array(2 * want)) < 1e-12
    logits = model(x)
    with pytest.raises(ValueError, match=r"cannot infer the factor without the logits; call rule\.backward\(loss, "):
        rule.backward(2 * F.cross_entropy(logits, y))
    with pytest.raises(ValueError, match=r"needs the scale of the loss and cannot infer it"):
        rule.backward(2 * F.mse_loss(logits, F.one_hot(y, 3).double()), logits, y)
    with pytest.raises(StateError, match=r"call rule\.backward\(loss, logits, target\), not loss\.backward\(\)"):
        F.cross_entropy(logits, y).backward()


def test_zero_error_reuses_last_loss_scale() -> None:
    """If every label has probability 1, the gradient at the logits is zero and cannot determine the scale.

    The rule then uses the last known scale.
    """
    model, (x, y) = nets.mlp(), nets.batch("mlp_tanh")
    rule = fa_bench.attach(model, "activation_alignment")
    found = []
    for scale in (1.0, 8.0):
        grads(rule, model, lambda z, t, scale=scale: scale * F.cross_entropy(z, t), y)
        model.zero_grad()
        logits = model(x)
        sure = logits + 1e4 * F.one_hot(y, 3)
        rule.backward(scale * F.cross_entropy(sure, y), sure, y)
        found.append([tensor.grad.clone() for tensor in rule.feedback_parameters()])
    for plain, scaled in zip(*found, strict=True):
        assert plain.any() and distance(array(scaled), array(8 * plain)) < 1e-12


def test_failed_backward_resets_loss_scale() -> None:
    model, (x, y) = nets.mlp(), nets.batch("mlp_tanh")
    rule = fa_bench.attach(model, "symmetric_alignment")
    logits = model(x)
    loss = F.cross_entropy(logits, y)
    rule.backward(loss, logits, y)
    with pytest.raises(RuntimeError):
        rule.backward(loss, logits, y)  # the graph of the loss has been freed
    with pytest.raises(StateError):
        F.cross_entropy(model(x), y).backward()


# ------------------------------------------------------------------------------------------------ noise
NOISE = {"signal": "noise", "noise_batch": 3}


def noises(rule: Any) -> list[Tensor]:
    return [tensors["noise"].clone() for tensors in rule.feedback.values()]


def test_noise_depends_on_seed_layer_and_update() -> None:
    x, y = nets.batch("conv")
    found = []
    for seed, batch in ((0, x), (0, x[:2]), (1, x)):
        model = nets.convnet()
        rule = fa_bench.attach(model, "regularized_mirror", seed=seed, sample_input=batch, **NOISE)
        first = noises(rule)
        assert [tuple(one.shape) for one in first] == [(3, 2, 6, 7), (3, 4, 3, 4), (3, 72)]
        rule_grads(model, rule, x, y)
        assert all(torch.equal(*pair) for pair in zip(noises(rule), first, strict=True)), "the noise changed before the update"
        rule.step()
        assert not any(torch.equal(*pair) for pair in zip(noises(rule), first, strict=True))
        with fa_bench.mechanisms.contexts.set_temporarily([rule.mode], "freeze_random", True):
            frozen = noises(rule)
            rule.step()
            assert all(torch.equal(*pair) for pair in zip(noises(rule), frozen, strict=True))
        found.append((first, frozen))
    for one, two in zip(found[0], found[1], strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, two, strict=True))
    assert not any(torch.equal(*pair) for pair in zip(found[0][0], found[2][0], strict=True))


def test_layers_with_equal_input_shapes_get_different_noise() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    first, second = noises(fa_bench.attach(model, "regularized_mirror", sample_input=torch.zeros(2, 4), **NOISE))
    assert first.shape == second.shape and not torch.equal(first, second)


def test_noise_continues_from_state_dict() -> None:
    x, y = nets.batch("conv")
    rules = []
    for seed in (0, 5):
        model = nets.convnet()
        rules.append(fa_bench.attach(model, "information_alignment", seed=seed, sample_input=x, **NOISE))
    whole, other = rules
    whole.step()
    other.model.load_state_dict(whole.model.state_dict())
    other.load_state_dict(whole.state_dict())
    for rule in rules:
        rule_grads(rule.model, rule, x, y)
        rule.step()
        rule_grads(rule.model, rule, x, y)
    assert all(
        torch.equal(one.grad, two.grad) for one, two in zip(whole.feedback_parameters(), other.feedback_parameters(), strict=True)
    )
    assert whole.state_dict() == other.state_dict() == {"draws": 2, "seed": 0}


def test_convolution_noise_requires_sample_input() -> None:
    with pytest.raises(CoverageError, match=r"signal=noise needs sample_input, one input batch, .* the convolution 'conv1'"):
        fa_bench.attach(nets.convnet(), "activation_alignment", **NOISE)
    rule = fa_bench.attach(nets.mlp(), "activation_alignment", **NOISE)
    assert [tuple(one.shape) for one in noises(rule)] == [(3, 7), (3, 5), (3, 6)]


@pytest.mark.parametrize(("name", "options"), [("symmetric_alignment", {}), ("information_alignment", NOISE)])
def test_feedback_gradients_of_input_free_losses_ignore_batch(name: str, options: dict[str, Any]) -> None:
    found = []
    for seed in (0, 1):
        model, (x, y) = nets.convnet(), nets.batch("conv", seed=seed)
        rule = fa_bench.attach(model, name, sample_input=x, **options)
        rule_grads(model, rule, x, y)
        found.append([tensor.grad for tensor in rule.feedback_parameters()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("net", ["mlp_tanh", "conv"])
@pytest.mark.parametrize("name", RULES)
def test_empty_batch_keeps_input_independent_loss_terms(name: str, net: str) -> None:
    """All gradients are finite and come from the two terms that need no inputs: decay, and similarity of feedback and weight."""
    model, (x, y) = nets.NETS[net](), nets.batch(net)
    rule = fa_bench.attach(model, name, seed=0, sample_input=x, update_forward=True)
    logits = model(x[:0])
    rule.backward(logits.sum(), logits, y[:0], loss_scale=1.0)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients) == (name != "activation_alignment")


def test_packed_attention_weight_has_loss_per_row_block() -> None:
    """In this model, the 4 query rows of the packed weight see only the first two tokens; the other 8 rows see all tokens."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x[:, :2], x, x, need_weights=False)[0]

    model, x = Net(), random(3, 5, 4)
    rule = fa_bench.attach(model, "regularized_mirror", update_forward=True, alpha=0.5, beta=0.3)
    path = next(path for path in rule.feedback if rule.feedback[path]["B"].shape[0] == 12)
    weight, feedback = model.attention.in_proj_weight, rule.feedback[path]["B"]
    y = model(x)
    rule.backward(0 * y.sum(), y, loss_scale=1.0)
    for rows, seen in ((slice(0, 4), x[:, :2].flatten(0, 1)), (slice(4, 12), x.flatten(0, 1))):
        c = seen.t() @ seen / len(seen)
        assert distance(array(feedback.grad[rows]), array((feedback - 0.3 * weight @ c)[rows])) < 1e-12
        assert distance(array(weight.grad[rows]), array((weight - 0.3 * feedback @ c)[rows])) < 1e-12


def test_metrics_include_local_loss_in_weight_gradient() -> None:
    """The gradient of a weight includes that of the local loss, but the error at the layer's input does not."""
    x, y = nets.batch("conv")
    model = nets.convnet()
    rule = fa_bench.attach(model, "regularized_mirror", update_forward=True, alpha=0.5, sample_input=x)
    want = rule_grads(model, rule, x, y)
    rule.mode.freeze_random = True
    assert_bitwise(rule_grads(model, rule, x, y), want)
    g = random(4, 6, 3, 4, seed=1)
    error = rule.input_error("conv2", random(4, 4, 3, 4), g, g)
    fixed = fa_bench.attach(nets.convnet(), "fa", sample_input=x)
    assert torch.equal(error, fixed.input_error("conv2", random(4, 4, 3, 4), g, g))


def test_exact_pass_has_no_local_loss() -> None:
    x, y = nets.batch("conv")
    model = nets.convnet()
    rule = fa_bench.attach(model, "activation_alignment", update_forward=True)
    with rule.exact():
        rule.backward(F.cross_entropy(model(x), y))
    want = collect(model)
    plain = nets.convnet()
    F.cross_entropy(plain(x), y).backward()
    assert_bitwise(want, collect(plain))
    assert all(tensor.grad is None for tensor in rule.feedback_parameters())
