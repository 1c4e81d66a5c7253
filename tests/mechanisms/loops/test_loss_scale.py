"""If a loss is divided for gradient accumulation or multiplied by a gradient scaler, every error is scaled in the same way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fa_bench.mechanisms.cut import delivery
from fa_bench.mechanisms.loss_scale import is_unscaled, measured_scale
from fa_bench.objectives.cross_entropy import CrossEntropy
from tests.mechanisms.loops.chain import (
    LOCAL_LOSSES,
    RULES,
    SETTLING,
    Chain,
    assert_same,
    attach,
    batch,
    draw_the_same_for_every_sample,
    gradients,
)

X, Y = batch(12)
#: Maps the name of a variant to its rule and options.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in RULES} | {
    "drtp sign": ("drtp", {"error_sign": True}),
    "predsim pred": ("predsim", {"loss": "pred"}),
    "dgl linear": ("dgl", {"auxiliary_net": "linear"}),
    "dfc voltage": ("dfc", {"learning_rule": "voltage_difference"}),
}
#: Rules whose errors depend on the whole batch, because of similarities between pairs of samples, batch normalisation in
#: auxiliary nets, or a cosine.
TOGETHER = ("predsim", "dgl", "asfp_lc", "grape")
#: Rules that sample their feedback again in every forward pass.
REDRAWN = ("brsf",)
#: Variants whose hidden errors are computed from the labels, and therefore do not scale with the loss by themselves. In fdfa and
#: grape, only the gradients of the feedback are computed in this way.
OF_LABELS = (
    "drtp",
    "drtp sign",
    "f3",
    "local_error",
    "predsim",
    "predsim pred",
    "bp_deepsup",
    "dgl",
    "dgl linear",
    "asfp_lc",
    "node_perturbation",
    "weight_perturbation",
    "pepita",
    "forward_forward",
    "fdfa",
    "grape",
    *SETTLING,
)
#: Rules in OF_LABELS that compute even the error of the output layer from the labels.
WHOLLY_OF_LABELS = ("node_perturbation", "weight_perturbation", "pepita", *SETTLING)
#: Maps a variant in OF_LABELS to the parts that learn from the error at the output; for variants that are not listed, only the
#: head does. In the first step of bp_deepsup, the classifiers are zero, so the hidden parts get no other error. In fdfa and
#: grape, only the gradient of the feedback has to be scaled.
OWN: dict[str, tuple[str, ...]] = {
    **{name: ("head", "c.") for name in ("dgl", "dgl linear", "asfp_lc")},
    **{name: ("head", "a.fc", "b.fc", "c.fc") for name in ("bp_deepsup", "fdfa", "grape")},
    "forward_forward": ("head", "b.act"),
    **dict.fromkeys(WHOLLY_OF_LABELS, ()),
}


@pytest.fixture(autouse=True)
def noise(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_the_same_for_every_sample(monkeypatch)


Loss = Callable[[Tensor, Tensor], Tensor]


def chain(variant: str, dtype: torch.dtype = torch.float64) -> tuple[Chain, Any]:
    name, options = VARIANTS[variant]
    model = Chain().to(dtype)
    return model, attach(model, name, **options)


def found(variant: str, losses: list[tuple[Tensor, Tensor, Loss]], **scale: float) -> dict[str, Tensor]:
    """The gradients accumulated over parts of a batch, each with its own loss."""
    model, rule = chain(variant, losses[0][0].dtype)
    indices = torch.arange(sum(len(y) for _, y, _ in losses)).split([len(y) for _, y, _ in losses])
    for (x, y, loss), part in zip(losses, indices, strict=True):
        logits = model(x)
        rule.backward(loss(logits, y), logits, y, **scale, indices=part)
    return gradients(model)


def times(factor: float) -> Loss:
    return lambda logits, y: F.cross_entropy(logits, y) * factor


def hidden(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if not key.startswith("head")}


X64 = X.double()


@pytest.mark.parametrize("sizes", [(3, 3, 3, 3), (5, 4, 2, 1)], ids=["equal", "unequal"])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in (*TOGETHER, *REDRAWN)])
def test_accumulated_gradients_match_whole_batch(variant: str, sizes: tuple[int, ...]) -> None:
    whole = found(variant, [(X64, Y, F.cross_entropy)])
    parts = [(x, y, times(len(y) / len(Y))) for x, y in zip(X64.split(sizes), Y.split(sizes), strict=True)]
    assert_same(found(variant, parts), whole, rel=1e-6)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in REDRAWN])
def test_four_quarter_losses_match_whole_loss(variant: str) -> None:
    whole = found(variant, [(X64, Y, F.cross_entropy)])
    assert_same(found(variant, [(X64, Y, lambda logits, y: F.cross_entropy(logits, y) / 4)] * 4), whole, rel=1e-6)


@pytest.mark.parametrize("factor", [1024.0, 3.0, 2.0**-8])
@pytest.mark.parametrize("variant", VARIANTS)
def test_scaled_loss_scales_every_gradient(variant: str, factor: float) -> None:
    """In single precision, the rounding error is about 1e-7 of the largest summand. If the factor is a power of two, the
    gradients divided by it are identical to those of the loss without the factor."""
    plain, scaled = found(variant, [(X, Y, F.cross_entropy)]), found(variant, [(X, Y, times(factor))])
    exact = factor != 3
    assert_same({key: tensor / factor for key, tensor in scaled.items()}, plain, rel=0.0 if exact else 1e-5)
    assert_same(found(variant, [(X, Y, times(factor))], loss_scale=factor), scaled, rel=0.0 if exact else 1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_grad_scaler_matches_unscaled_gradients(variant: str) -> None:
    plain = found(variant, [(X, Y, F.cross_entropy)])
    model, rule = chain(variant, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    logits = model(X)
    rule.backward(scaler.scale(F.cross_entropy(logits, Y)), logits, Y, indices=torch.arange(len(Y)))
    scaler.unscale_(optimizer)
    assert_same(gradients(model), plain)
    before = model.head.weight.detach().clone()
    scaler.step(optimizer)
    rule.step()
    scaler.update()
    assert not torch.equal(model.head.weight, before)


# One term in the gradient of np_feedback's B is quadratic in the error, and the gradients of dfc are not linear in it either.
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in ("np_feedback", "dfc", "dfc voltage")])
def test_explicit_loss_scale_multiplies_label_errors(variant: str) -> None:
    plain, twice = found(variant, [(X64, Y, F.cross_entropy)]), found(variant, [(X64, Y, F.cross_entropy)], loss_scale=2.0)
    factor = 2.0 if variant in OF_LABELS else 1.0  # an error computed from the loss's gradient already has its scale
    own = OWN.get(variant, ("head",))
    want = {key: tensor if key.startswith(own) else factor * tensor for key, tensor in plain.items()}
    if variant in ("ddtp_linear", "ldrl"):  # the feedback of these rules learns from noise, not from the loss
        want |= {key: 2 * tensor for key, tensor in plain.items() if "feedback" in key}
    if variant in LOCAL_LOSSES:
        want = {key: 2 * tensor if "feedback_B" in key else tensor for key, tensor in plain.items()}
    assert_same(twice, want, rel=1e-12)


# ------------------------------------------------------------------------------------------------ other losses
WEIGHTS = torch.tensor([1.0, 2.0, 0.5])
#: Maps a name to a loss and to the ratio of its gradient to that of the mean cross-entropy (None if the gradient is not a
#: multiple).
LOSSES: dict[str, tuple[Loss, float | None]] = {
    "sum": (lambda logits, y: F.cross_entropy(logits, y, reduction="sum"), 12.0),
    "mean by hand": (lambda logits, y: F.cross_entropy(logits, y, reduction="none").mean(), 1.0),
    "log_softmax": (lambda logits, y: F.nll_loss(logits.log_softmax(1), y), 1.0),
    "with a constant": (lambda logits, y: F.cross_entropy(logits, y) + 3.0, 1.0),
    "double": (lambda logits, y: F.cross_entropy(logits.double(), y), 1.0),
    "half of it twice": (lambda logits, y: F.cross_entropy(logits, y) / 2 + F.cross_entropy(logits, y) / 2, 1.0),
    "label smoothing": (lambda logits, y: F.cross_entropy(logits, y, label_smoothing=0.2), None),
    "class weights": (lambda logits, y: F.cross_entropy(logits, y, WEIGHTS), None),
    "squares": (lambda logits, y: F.mse_loss(logits, F.one_hot(y, 3).float()), None),
    "squares, doubled": (lambda logits, y: 2 * F.mse_loss(logits, F.one_hot(y, 3).float()), None),
    "entropy bonus": (lambda logits, y: F.cross_entropy(logits, y) + 0.1 * logits.square().mean(), None),
}


def true_head(loss: Loss) -> dict[str, Tensor]:
    """The output layer's gradient by backpropagation in the plain net."""
    model = Chain()
    loss(model(X), Y).backward()
    return {f"head.{key}": parameter.grad for key, parameter in model.head.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("variant", [*OF_LABELS, "fa", "kp", "dfa", "dkp", "wm"])
def test_other_losses_are_correct_or_rejected_with_working_fix(variant: str, kind: str) -> None:
    """Except in WHOLLY_OF_LABELS, the output layer learns from the loss itself. Errors computed from labels are those of the mean
    cross-entropy times the scale of the loss."""
    loss, factor = LOSSES[kind]
    try:
        got, scale = found(variant, [(X, Y, loss)]), factor or 1.0
    except ValueError as error:
        assert variant in OF_LABELS and factor is None
        if variant in WHOLLY_OF_LABELS:  # these rules cannot learn from other losses
            assert "attach it with the objective that you train with, objective=" in str(error) and "loss_scale" not in str(error)
            with pytest.raises(ValueError, match=r"not a multiple of that of the mean cross-entropy.*objective="):
                found(variant, [(X, Y, loss)], loss_scale=1.0)
            return
        assert "rule.backward(loss, logits, target, loss_scale=1.0)" in str(error)
        got, scale = found(variant, [(X, Y, loss)], loss_scale=1.0), 1.0
    if variant in WHOLLY_OF_LABELS or variant == "forward_forward":  # forward_forward classifies different activations
        assert_same(
            got,
            {
                key: scale * tensor
                for key, tensor in found(variant, [(X, Y, F.cross_entropy)]).items()
                if variant != "forward_forward" or not key.startswith("head")
            }
            | {key: got[key] for key in got if variant == "forward_forward" and key.startswith(("head", "b.act"))},
            rel=1e-5,
        )
        return
    head = {key: tensor * (0.01 if variant == "predsim" else 1.0) for key, tensor in true_head(loss).items()}  # predsim: 1 - beta
    assert_same({key: got[key] for key in head}, head, rel=1e-5)
    if variant in OF_LABELS and variant not in ("drtp sign", *OWN):
        plain = found(variant, [(X, Y, F.cross_entropy)])
        assert_same(hidden(got), {key: scale * tensor for key, tensor in hidden(plain).items()}, rel=1e-5)


@pytest.mark.parametrize("variant", OF_LABELS)
def test_rejected_loss_leaves_no_gradient(variant: str) -> None:
    model, rule = chain(variant, torch.float32)
    logits = model(X)
    with pytest.raises(ValueError, match=r"not a multiple of that of the mean cross-entropy"):
        rule.backward(F.cross_entropy(logits, Y, label_smoothing=0.2), logits, Y, indices=torch.arange(len(Y)))
    assert not gradients(model)


@pytest.mark.parametrize("variant", WHOLLY_OF_LABELS)
def test_accepts_explicit_scale_for_objective_losses(variant: str) -> None:
    """A given scale is used even if the gradient at the logits is zero or not finite. The rule may also have an objective other
    than the default."""
    for factor in (1.0, 2.0**16, 0.0, float("inf")):
        model, rule = chain(variant, torch.float32)
        logits = model(X)
        rule.backward(F.cross_entropy(logits, Y) * factor, logits, Y, loss_scale=factor)
        assert gradients(model)
    rule = attach(Chain(), variant, objective=CrossEntropy(label_smoothing=0.2))
    logits = rule.model(X)
    rule.backward(F.cross_entropy(logits, Y, label_smoothing=0.2) / 4, logits, Y, loss_scale=0.25)
    assert gradients(rule.model)


@pytest.mark.parametrize("variant", WHOLLY_OF_LABELS)
def test_loss_is_checked_only_in_first_passes(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rule = chain(variant, torch.float32)
    compared = []
    real = delivery.is_other_loss
    monkeypatch.setattr(delivery, "is_other_loss", lambda *given: compared.append(1) or real(*given))
    for _ in range(5):
        logits = model(X)
        rule.backward(F.cross_entropy(logits, Y), logits, Y, loss_scale=1.0)
    assert len(compared) == 3


@pytest.mark.parametrize("factor", [1.0, 4.0, 0.25])
@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_autocast_infers_exact_scale(variant: str, factor: float) -> None:
    """A power of two is inferred exactly even though the gradient at the logits is rounded to 8 bits."""
    results = []
    for multiple, known in ((1.0, 1.0), (factor, None)):
        model, rule = chain(variant, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(X)
            loss = F.cross_entropy(logits, Y) * multiple
        rule.backward(loss, logits, Y, loss_scale=known, indices=torch.arange(len(Y)))
        results.append({key: tensor / multiple for key, tensor in gradients(model).items()})
    assert_same(results[1], results[0], rel=0.0)


# ------------------------------------------------------------------------------------------------ saturated logits
def saturate(model: Chain, x: Tensor) -> Tensor:
    """Multiply the head's weight by a large factor, and return the predicted labels. Every probability is then 0 or 1, so with
    these labels, the gradient at the logits is 0."""
    with torch.no_grad():
        model.head.weight.mul_(1e6)
        return model(x).argmax(1)


@pytest.mark.parametrize("variant", OF_LABELS)
def test_zero_error_reuses_last_loss_scale(variant: str) -> None:
    """A gradient of zero does not determine the scale, so errors computed from labels keep the scale of the previous batch."""
    results = []
    for multiple in (1.0, 0.25):
        model, rule = chain(variant, torch.float32)
        logits = model(X)
        rule.backward(F.cross_entropy(logits, Y) * multiple, logits, Y, indices=torch.arange(len(Y)))
        target = saturate(model, X)
        model.zero_grad()
        logits = model(X)
        rule.backward(F.cross_entropy(logits, target) * multiple, logits, target, indices=torch.arange(len(Y)))
        results.append({key: tensor / multiple for key, tensor in hidden(gradients(model)).items()})
    assert all(torch.isfinite(tensor).all() for tensor in results[0].values())
    assert_same(results[1], results[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_scale_is_inferred_from_single_nonzero_error(variant: str) -> None:
    results = []
    for multiple in (1.0, 0.25, 1024.0):
        model, rule = chain(variant, torch.float32)
        target = saturate(model, X).clone()
        target[0] = (target[0] + 1) % 3
        logits = model(X)
        rule.backward(F.cross_entropy(logits, target) * multiple, logits, target, indices=torch.arange(len(Y)))
        results.append({key: tensor / multiple for key, tensor in gradients(model).items()})
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@pytest.mark.parametrize("variant", OF_LABELS)
def test_handwritten_mean_loss_matches_cross_entropy(variant: str) -> None:
    """If the mean is written out by hand, the gradient at the logits is rounded differently, but the inferred scale is still
    1."""

    def by_hand(logits: Tensor, y: Tensor) -> Tensor:
        return (logits.exp().sum(1).log() - logits.gather(1, y.view(-1, 1)).squeeze(1)).mean()

    own = OWN.get(variant, ("head",))
    got, want = (
        ({key: tensor for key, tensor in found(variant, [(X, Y, loss)]).items() if not key.startswith(own)})
        for loss in (by_hand, F.cross_entropy)
    )
    assert_same(got, want)


@pytest.mark.parametrize("variant", OF_LABELS)
def test_overflow_is_visible_in_every_gradient(variant: str) -> None:
    """After an overflow, every nonzero gradient contains inf or NaN, so code that checks only some gradients also skips the
    update."""
    tensors = found(variant, [(X, Y, times(torch.inf))])
    assert not [key for key, tensor in tensors.items() if tensor.any() and torch.isfinite(tensor).all()]


@pytest.mark.parametrize("variant", VARIANTS)
def test_backward_inside_autocast_matches_backward_outside(variant: str) -> None:
    """Calling the backward pass inside autocast must not round the products that a rule computes in it. The forward pass runs
    inside autocast in both cases."""

    def within(inside: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model, rule = chain(variant, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(X.float())
            loss = F.cross_entropy(logits, Y)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            rule.backward(loss, logits, Y, indices=torch.arange(len(Y)))
        return gradients(model)

    assert_same(within(True), within(False), 0.0)


def test_is_unscaled_accepts_only_batch_means() -> None:
    """The batch mean of any kind of loss counts as unscaled, not only that of the cross-entropy. A sum of losses counts as
    scaled, and so does a mean that leaves out samples."""
    logits, squares = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).requires_grad_(True), torch.zeros(6, 3)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    for function, target in ((F.mse_loss, squares), (F.cross_entropy, labels), (F.binary_cross_entropy_with_logits, squares)):
        assert is_unscaled(function(logits, target), labels)
        assert not is_unscaled(function(logits, target, reduction="sum"), labels)
        assert not is_unscaled(function(logits, target) / 2, labels)
    assert not is_unscaled(F.cross_entropy(logits, labels, torch.ones(3)), labels)
    assert not is_unscaled(F.cross_entropy(logits[:4], labels[:4]), labels)
    assert not is_unscaled(F.cross_entropy(logits, labels, ignore_index=1), labels)
    assert is_unscaled(F.cross_entropy(logits, labels, ignore_index=7), labels), "counted as scaled, although no label is ignored"


def test_scale_is_inferred_for_each_backward_pass() -> None:
    """A plain backward pass infers its own scale, even after another pass with labels; drtp with error_sign needs no labels."""
    model, rule = chain("drtp sign")
    logits = model(X64)
    rule.backward(F.cross_entropy(logits, Y), logits, Y, indices=torch.arange(len(Y)))
    model.zero_grad()
    times(0.25)(model(X64), Y).backward()
    assert_same(gradients(model), found("drtp sign", [(X64, Y, times(0.25))]), rel=1e-6)


def test_infinite_scale_is_returned_as_infinity() -> None:
    """An infinite scale may come from an overflow, after which a gradient scaler skips the update."""
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0])
    delta = (logits.softmax(1) - F.one_hot(labels, 3)) * math.inf
    assert measured_scale("drtp", delta, logits, labels) == math.inf


@pytest.mark.parametrize("multiple", [1.0, 0.25, 64.0])
def test_scale_is_inferred_from_small_bfloat16_errors(multiple: float) -> None:
    """bfloat16 rounds probabilities near 1 by up to 1/512. In this test, the error δ of a label, which is the difference between
    its probability and 1, is on average only about three times as large."""
    labels = torch.arange(256) % 3
    logits = 6 * F.one_hot(labels, 3).float() + 0.3 * torch.randn(256, 3, generator=torch.Generator().manual_seed(0))
    delta = ((logits.softmax(1).bfloat16() - F.one_hot(labels, 3)) / 256 * multiple).bfloat16()
    true = (logits.softmax(1) - F.one_hot(labels, 3)) / 256 * multiple
    assert (delta.float() - true).norm() / true.norm() > 0.05
    assert measured_scale("drtp", delta, logits, labels) == pytest.approx(multiple, rel=0.2)


@pytest.mark.parametrize(
    ("dtype", "error", "is_noticed"),
    [
        (torch.float32, 0.01, True),
        (torch.float64, 0.01, True),
        (torch.bfloat16, 0.01, False),
        (torch.float16, 0.01, False),
        (torch.bfloat16, 0.2, True),
        (torch.float32, 1e-4, False),
    ],
    ids=str,
)
def test_other_loss_is_distinguished_from_rounding(dtype: torch.dtype, error: float, is_noticed: bool) -> None:
    """The added error is orthogonal to that of the cross-entropy. A relative error of up to 0.05 in half precision, and of
    up to 1e-3 otherwise, is attributed to rounding."""
    logits = torch.linspace(-1, 1, 36).view(12, 3)
    delta = (logits.softmax(1) - F.one_hot(Y, 3)) / 12
    other = delta.roll(1, 1)
    other = other - (other * delta).sum() / delta.square().sum() * delta
    given = (delta + error * delta.norm() / other.norm() * other).to(dtype)
    if is_noticed:
        with pytest.raises(ValueError, match="is not a multiple"):
            measured_scale("drtp", given, logits.to(dtype), Y)
    else:
        assert measured_scale("drtp", given, logits.to(dtype), Y) == 1.0


@pytest.mark.parametrize("variant", VARIANTS)
def test_deliver_matches_backward_with_inferred_scale(variant: str) -> None:
    got = []
    for method in ("backward", "deliver"):
        model, rule = chain(variant)
        logits = model(X64)
        with rule.of_samples(torch.arange(len(Y))):
            known = {"indices": rule.indices} if method == "backward" else {}
            getattr(rule, method)(F.cross_entropy(logits, Y) / 4, logits, Y, **known)
        got.append(gradients(model))
    assert_same(*got)


def test_loss_times_zero_has_scale_zero() -> None:
    logits, labels = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_(True), torch.arange(4) % 3
    (delta,) = torch.autograd.grad(0 * F.cross_entropy(logits, labels), logits)
    assert measured_scale("drtp", delta, logits.detach(), labels) == 0


#: Losses that differ from the objective. A rule accepts such a loss without further arguments, accepts it only with the scale, or
#: refuses it.
OTHERS: dict[str, Loss] = {
    "mse": lambda z, y: F.mse_loss(z, F.one_hot(y, 3).to(z)),
    "huber": lambda z, y: F.huber_loss(z, F.one_hot(y, 3).to(z)),
    "bce": lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, 3).to(z)),
    "temperature": lambda z, y: F.cross_entropy(z / 3, y),
}


@pytest.mark.parametrize("loss", OTHERS)
@pytest.mark.parametrize("name", RULES)
def test_other_losses_are_rejected_as_documented(name: str, loss: str) -> None:
    """Rules accept or refuse other losses as documented in docs/training_loops.md."""
    for scale in ({}, {"loss_scale": 1.0}):
        by_objective = name in ("node_perturbation", "weight_perturbation", "pepita", *SETTLING)
        if by_objective or (name in ("f3", "np_feedback") and not scale):
            with pytest.raises(ValueError, match="is not a multiple of that of the mean cross-entropy"):
                found(name, [(X, Y, OTHERS[loss])], **scale)
        else:
            assert found(name, [(X, Y, OTHERS[loss])], **scale)
