"""Tests of cut rules on outputs with positions, such as tokens (N, T, C) and pixels (N, C, H, W), whose errors must reach each
position of a cut."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fa_bench
from fa_bench.errors import CoverageError
from fa_bench.mechanisms.cut.positions import IGNORED, Layout, feature_axis, mean_loss, sample_losses
from fa_bench.mechanisms.loss_scale import is_unscaled, measured_scale
from fa_bench.metrics.meter import AlignmentMeter
from fa_bench.objectives.base import Objective
from fa_bench.objectives.mse import MSE
from fa_bench.objectives.token_cross_entropy import TokenCrossEntropy
from fa_bench.registry.kinds import POSITIONS
from fa_bench.registry.registries import OBJECTIVES

from . import nets
from .helpers import REL, array, arrays, assert_bitwise, assert_matches, collect, distance
from .reference import describe, gradients

N, T, C = 3, 4, 3
CUTS = {"cuts": ["act1", "act2"]}
BROADCASTING = ("dfa", "dkp", "drtp")


class TokenLoss(Objective):
    """The mean cross-entropy over all labelled positions."""

    name = "token_loss"
    targets = (POSITIONS,)

    def loss(self, outputs: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        return F.cross_entropy(outputs.movedim(-1, 1), target, reduction=reduction, ignore_index=IGNORED)


def tokens(length: int = T, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(N, length, 7, dtype=torch.float64, generator=generator),
        torch.randint(C, (N, length), generator=generator),
    )


def attached(name: str, model: nn.Module | None = None, x: Tensor | None = None, **options: Any) -> tuple[Any, Any]:
    model = nets.mlp() if model is None else model
    options = options if "cuts" in options else CUTS | options
    return model, fa_bench.attach(
        model, name, seed=0, sample_input=tokens()[0] if x is None else x, objective=TokenLoss(), **options
    )


def step(model: Any, rule: Any, x: Tensor, y: Tensor, scale: float = 1.0) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    logits = model(x)
    rule.backward(TokenLoss().loss(logits, y) * scale, logits, y)
    return collect(model)


# ------------------------------------------------------------------------------------------------ tokens
def test_dfa_over_tokens_matches_reference():
    """The layers act on each token separately, so the reference can treat all tokens as samples."""
    model, rule = attached("dfa")
    (x, y), plain = tokens(), nets.mlp()
    inject = {cut: array(rule.feedback[cut]["B"]) for cut in ("act1", "act2")}
    assert {cut: b.shape for cut, b in inject.items()} == {"act1": (C, 5), "act2": (C, 6)}
    want = gradients(describe(plain), arrays(plain), array(x.flatten(0, 1)), y.flatten().numpy(), inject=inject)
    assert_matches(step(model, rule, x, y), want)


def test_dkp_feedback_gradient_sums_over_samples_and_tokens():
    model, rule = attached("dkp")
    x, y = tokens()
    seen: dict[str, Tensor] = {}
    handle = model.act1.register_forward_hook(lambda module, args, output: seen.update(a=output.detach()), prepend=True)
    step(model, rule, x, y)
    handle.remove()
    plain = nets.mlp()
    z = plain(x)
    delta = torch.autograd.grad(TokenLoss().loss(z, y), z)[0]
    want = torch.zeros(C, 5, dtype=torch.float64)
    for n in range(N):
        for t in range(T):
            for c in range(C):
                want[c] += delta[n, t, c] * seen["a"][n, t]
    assert distance(rule.feedback["act1"]["B"].grad, want) < REL


@pytest.mark.parametrize("sign", [False, True])
def test_drtp_projects_label_of_each_token(sign: bool):
    """At act2 (N, T, 6), the error of a labelled token is proportional to B[label] or, with error_sign, to the sum of the other
    rows of B minus B[label]. The factor is the scale divided by the number of labelled tokens. The gradient of fc2's bias sums
    this error, multiplied by the derivative of tanh, over samples and tokens."""
    model, rule = attached("drtp", error_sign=sign, scale=2.0)
    x, y = tokens()
    y[0, 1] = y[2, 3] = IGNORED
    got, plain = step(model, rule, x, y), nets.mlp()
    b, want = rule.feedback["act2"]["B"], torch.zeros(6, dtype=torch.float64)
    hidden = plain.act2(plain.fc2(plain.act1(plain.fc1(x)))).detach()
    for n in range(N):
        for t in range(T):
            if (label := int(y[n, t])) == IGNORED:
                continue
            row = b.sum(0) - 2 * b[label] if sign else b[label]
            want += 2.0 * row / (N * T - 2) * (1 - hidden[n, t] ** 2)
    assert distance(got["fc2.bias"], want) < REL


@pytest.mark.parametrize("name", [*BROADCASTING, "local_error", "predsim", "dgl"])
def test_tokens_match_flattened_batch_of_samples(name: str):
    """Treating each token as a separate sequence, or removing the token axis, must give the same gradients up to the order of
    summation over the batch."""
    options = {"loss": "pred"} if name == "predsim" else {"auxiliary_net": "linear"} if name == "dgl" else {}
    x, y = tokens()
    one, rule = attached(name, x=x.flatten(0, 1).unsqueeze(1), **options)
    got = step(one, rule, x.flatten(0, 1).unsqueeze(1), y.flatten().unsqueeze(1))
    model = nets.mlp()
    plain = fa_bench.attach(model, name, seed=0, sample_input=x.flatten(0, 1), **CUTS, **options)
    logits = model(x.flatten(0, 1))
    plain.backward(F.cross_entropy(logits, y.flatten()), logits, y.flatten())
    assert {cut: {key: b.shape for key, b in tensors.items()} for cut, tensors in rule.feedback.items()} == {
        cut: {key: b.shape for key, b in tensors.items()} for cut, tensors in plain.feedback.items()
    }
    learned = [parameter.grad for parameter in plain.feedback_parameters()]
    for a, b in zip((parameter.grad for parameter in rule.feedback_parameters()), learned, strict=True):
        assert distance(a, b) < 1e-12
    assert_matches(got, {key: grad for key, grad in collect(model).items() if grad is not None}, rel=1e-12)
    several, rule = attached(name, **options)
    assert_matches(step(several, rule, x, y), {key: grad for key, grad in got.items() if grad is not None}, rel=1e-12)


@pytest.mark.parametrize("name", BROADCASTING)
def test_permuting_tokens_permutes_signals(name: str):
    model, rule = attached(name)
    (x, y), order, signals = tokens(), torch.tensor([2, 0, 3, 1]), []
    handle = model.act1.register_forward_hook(
        lambda module, args, output: output.register_hook(signals.append) and None, prepend=True
    )
    step(model, rule, x, y)
    step(model, rule, x[:, order], y[:, order])
    handle.remove()
    assert torch.allclose(signals[1], signals[0][:, order], rtol=1e-12) and not torch.allclose(signals[1], signals[0])


@pytest.mark.parametrize("name", [*BROADCASTING, "local_error"])
def test_sequences_of_other_lengths_use_same_feedback(name: str):
    """A rule attached with sequences of 4 tokens must train on sequences of 6 tokens as if it had been attached with 6."""
    x, y = tokens(6)
    (one, rule), (two, other) = attached(name), attached(name, x=x)
    assert_bitwise(step(one, rule, x, y), step(two, other, x, y))


@pytest.mark.parametrize("name", [*BROADCASTING, "local_error"])
def test_loss_scaling_and_gradient_accumulation_over_tokens(name: str):
    """The gradients of half the loss of each half of the batch add up to the gradients of the whole batch, even if the loss scale
    is inferred."""
    x, y = tokens()
    x, y = torch.cat([x, x.flip(1)]), torch.cat([y, y.flip(1)])
    (one, rule), (two, other) = attached(name), attached(name)
    want = step(one, rule, x, y)
    for part in (slice(0, 3), slice(3, 6)):
        logits = two(x[part])
        other.backward(TokenLoss().loss(logits, y[part]) / 2, logits, y[part])
    assert_matches(collect(two), {key: grad for key, grad in want.items() if grad is not None})
    assert_matches(step(two, other, x, y, 1024.0), {key: 1024 * grad for key, grad in want.items() if grad is not None})


@pytest.mark.parametrize("name", [*BROADCASTING, "local_error"])
def test_bfloat16_autocast_gradients_match_float32(name: str):
    """bfloat16 has 8 bits of precision, so the gradients agree to a few percent."""
    model = nets.mlp().float()
    x, y = tokens()
    _, rule = attached(name, model, x.float())
    want = step(model, rule, x.float(), y)
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x.float())
        loss = TokenLoss().loss(logits, y)
    rule.backward(loss, logits, y)
    for key, grad in collect(model).items():
        assert grad is not None and grad.dtype == torch.float32 and distance(grad, want[key]) < 0.1, key


def test_default_objective_treats_tokens_as_samples():
    x, y = tokens()
    (one, rule), two = attached("drtp"), nets.mlp()
    other = fa_bench.attach(two, "drtp", seed=0, sample_input=x, **CUTS)
    want = step(one, rule, x, y)
    logits = two(x)
    other.backward(F.cross_entropy(logits.flatten(0, 1), y.flatten()) * 3.0, logits, y)
    assert_matches(collect(two), {key: 3 * grad for key, grad in want.items() if grad is not None})


@pytest.mark.parametrize("name", ["drtp", "local_error"])
def test_default_objective_ignores_unlabelled_tokens(name: str):
    """Unlabelled tokens get no error, and the scale of the loss is inferred from the labelled tokens."""
    x, y = tokens()
    y[0, 1] = y[2, 3] = IGNORED
    gradients_of = []
    for objective, scale in ((None, 1.0), (None, 0.25), (TokenLoss(), 0.25)):
        model = nets.mlp()
        rule = fa_bench.attach(model, name, seed=0, sample_input=x, objective=objective, **CUTS)
        gradients_of.append(step(model, rule, x, y, scale))
    assert_matches(gradients_of[1], {key: gradient / 4 for key, gradient in gradients_of[0].items() if gradient is not None})
    assert_matches(gradients_of[1], gradients_of[2])


@pytest.mark.parametrize("size", [(N, T, C), (N, C, 2, 3)], ids=str)
def test_loss_scale_is_inferred_without_labels(size: tuple[int, ...]):
    """Under cross-entropy, the label is the only class with a negative error, so the scale can be measured without labels."""
    logits = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rows = logits if len(size) == 3 else logits.movedim(1, -1)
    delta = torch.autograd.grad(3.0 * F.cross_entropy(rows.flatten(0, -2), torch.arange(rows.numel() // C) % C), logits)[0]
    assert measured_scale("drtp", delta, logits.detach(), None) == pytest.approx(3, rel=1e-9)


def test_is_unscaled_detects_scaled_token_losses():
    logits, y = torch.randn(N, T, C, requires_grad=True), tokens()[1]
    assert is_unscaled(F.cross_entropy(logits.flatten(0, 1), y.flatten()), y) and is_unscaled(TokenLoss().loss(logits, y), y)
    assert not is_unscaled(F.cross_entropy(logits[:, :2].flatten(0, 1), y[:, :2].flatten()), y)
    for other in ({"ignore_index": int(y[0, 0])}, {"weight": torch.ones(C)}, {"reduction": "sum"}):
        assert not is_unscaled(F.cross_entropy(logits.movedim(-1, 1), y, **other), y)


def test_rejects_invalid_token_labels():
    model, rule = attached("drtp")
    x, y = tokens()
    with pytest.raises(ValueError, match=r"class indices of shape \(3, 4\), one for each position"):
        logits = model(x)
        rule.backward(logits.sum(), logits, y[:, 0])
    y[1, 2], y[0, 0] = 9, IGNORED
    with pytest.raises(ValueError, match="label 9 is out of range"):
        logits = model(x)
        rule.backward(logits.sum(), logits, y, loss_scale=1.0)


def test_predsim_rejects_similarity_of_tokens():
    with pytest.raises(CoverageError, match="label for each position; use loss='pred'") as refused:
        attached("predsim")
    attached("predsim", **refused.value.settings)


# ------------------------------------------------------------------------------------------------ pixels, and unequal positions
class Pixels(nn.Module):
    """A network with convolutions at half and full resolution that classifies every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.act1 = nn.Conv2d(2, 4, 2, stride=2), nn.Tanh()
        self.up, self.act2 = nn.ConvTranspose2d(4, 5, 2, stride=2), nn.Tanh()
        self.head = nn.Conv2d(5, C, 1)
        self.cut_points = ["act1", "act2"]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act2(self.up(self.act1(self.down(x)))))


def pixels(size: tuple[int, int] = (4, 6)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 2, *size, dtype=torch.float64, generator=generator), torch.randint(C, (2, *size), generator=generator)


@pytest.mark.parametrize("name", ["weight_perturbation", "drtp"])
def test_rejects_pixel_labels_beyond_number_of_classes(name: str):
    """Label 4 is out of range for three classes, although it would be a valid index of one of the six columns of pixels."""
    x, y = pixels()
    y[1, 2, 3] = 4
    rule = fa_bench.attach(pixel_net(), name, sample_input=x)
    logits = rule.model(x)
    with pytest.raises(ValueError, match="label 4 is out of range: this model has 3 classes"):
        rule.backward(logits.sum(), logits, y, loss_scale=1.0)


def pixel_net() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Pixels().double()


def test_dkp_errors_reach_pixels_and_coarser_map():
    """At act1, each cell of the 2 x 3 map gets the sum of the errors of the 2 x 2 pixels that it covers."""
    (x, y), model, plain = pixels(), pixel_net(), pixel_net()
    rule = fa_bench.attach(model, "dkp", seed=0, sample_input=x)
    b1, b2 = (rule.feedback[cut]["B"] for cut in ("act1", "act2"))
    assert b1.shape == (C, 4) and b2.shape == (C, 5)
    logits = model(x)
    rule.backward(F.cross_entropy(logits, y), logits, y)
    low = plain.act1(plain.down(x))
    high = plain.act2(plain.up(low.detach()))
    z = plain.head(high.detach())
    F.cross_entropy(z, y).backward()
    delta = torch.autograd.grad(F.cross_entropy(z2 := plain.head(high), y), z2)[0]
    at_high, at_low, gradient = torch.zeros_like(high), torch.zeros_like(low), torch.zeros_like(b1)
    for n in range(2):
        for row in range(4):
            for column in range(6):
                at_high[n, :, row, column] = delta[n, :, row, column] @ b2
                at_low[n, :, row // 2, column // 2] += delta[n, :, row, column] @ b1
                gradient += torch.outer(delta[n, :, row, column], low.detach()[n, :, row // 2, column // 2])
    high.backward(at_high.detach())
    low.backward(at_low.detach())
    assert_matches(collect(model), {key: array(grad) for key, grad in collect(plain).items() if grad is not None})
    assert distance(b1.grad, gradient.detach()) < REL


def test_drtp_sums_labels_covered_by_coarser_position():
    (x, y), model, plain = pixels(), pixel_net(), pixel_net()
    rule = fa_bench.attach(model, "drtp", seed=0, sample_input=x)
    logits = model(x)
    rule.backward(F.cross_entropy(logits, y), logits, y)
    low, b = plain.act1(plain.down(x)), rule.feedback["act1"]["B"]
    error = torch.zeros_like(low)
    for n in range(2):
        for row in range(4):
            for column in range(6):
                error[n, :, row // 2, column // 2] += b[int(y[n, row, column])] / y.numel()
    low.backward(error.detach())
    assert distance(model.down.weight.grad, plain.down.weight.grad) < REL


def test_local_error_of_pixels_uses_their_labels():
    (x, y), model, plain = pixels(), pixel_net(), pixel_net()
    rule = fa_bench.attach(model, "local_error", seed=0, sample_input=x, cuts=["act2"], allow_uncovered=True)
    logits = model(x)
    rule.backward(F.cross_entropy(logits, y), logits, y)
    matrix = rule.feedback["act2"]["M"]
    assert matrix.shape == (C, 5)
    high = plain.act2(plain.up(plain.act1(plain.down(x))))
    loss = (
        sum(
            F.cross_entropy(matrix @ high[n, :, row, column], y[n, row, column])
            for n in range(2)
            for row in range(4)
            for column in range(6)
        )
        / y.numel()
    )
    loss.backward()
    assert distance(model.up.weight.grad, plain.up.weight.grad) < REL


class Pooled(nn.Module):
    """A network on tokens (N, T, F) that applies the module `inner` between the first layer and the head."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.act, self.inner, self.head = nn.Linear(7, 6), nn.Tanh(), inner, nn.Linear(6, C)
        self.cut_points = ["act"]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.act(self.first(x))))


class Pairs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, ::2] + x[:, 1::2]


def test_finer_cut_gets_copied_errors():
    x = tokens()[0]
    model = Pooled(Pairs()).double()
    rule = fa_bench.attach(model, "dkp", seed=0, sample_input=x, objective=TokenLoss())
    signals, captured = [], []
    model.act.register_forward_hook(
        lambda module, args, out: captured.append(out.detach()) or (out.register_hook(signals.append) and None), prepend=True
    )
    logits, y = model(x), torch.tensor([[0, 1], [2, 2], [1, 0]])
    delta = torch.autograd.grad(TokenLoss().loss(logits, y), logits, retain_graph=True)[0]
    rule.backward(TokenLoss().loss(logits, y), logits, y)
    b = rule.feedback["act"]["B"]
    gradient = torch.zeros_like(b)
    for t in range(T):
        assert distance(signals[-1][:, t], (delta[:, t // 2] @ b).detach()) < REL
        gradient += delta[:, t // 2].t() @ captured[-1][:, t]
    assert distance(b.grad, gradient) < REL


class Spread(nn.Module):
    """A network that computes one vector per sample and derives the outputs at all positions from it."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.sizes = sizes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.fc, self.act, self.place = nn.Linear(7, 6), nn.ReLU(), nn.Parameter(torch.randn(6, *sizes))
            self.head = nn.Linear(6, C) if len(sizes) == 1 else nn.Conv2d(6, C, 1)
        self.cut_points = ["act"]

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.fc(x)).view(len(x), 6, *[1] * len(self.sizes)) + self.place
        return self.head(h.movedim(1, -1) if len(self.sizes) == 1 else h)


@pytest.mark.parametrize("sizes", [(4,), (2, 3)], ids=str)
def test_cut_without_positions_gets_summed_errors(sizes: tuple[int, ...]):
    x = tokens()[0][:, 0]
    model = Spread(*sizes).double()
    rule = fa_bench.attach(model, "dkp", seed=0, sample_input=x, allow_uncovered=True)
    signals: list[Tensor] = []
    model.act.register_forward_hook(lambda module, args, out: out.register_hook(signals.append) and None, prepend=True)
    logits = model(x)
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)  # the error at the output
    rule.backward((weight * logits).sum(), logits)
    total = weight.flatten(1, -2).sum(1) if len(sizes) == 1 else weight.flatten(2).sum(2)
    b, activation = rule.feedback["act"]["B"], model.fc(x).relu().detach()
    assert distance(signals[-1], (total @ b).detach()) < REL
    assert distance(b.grad, total.t() @ activation) < REL


class Reversed(nn.Module):
    def __init__(self, keep: int) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : self.keep].flip(1)


def test_rejects_mismatched_positions():
    with pytest.raises(CoverageError, match=r"cut 'act' .* shape \(3, 4, 6\).*errors at \(3,\) positions.*multiple"):
        fa_bench.attach(Pooled(Reversed(3)), "dfa", sample_input=tokens()[0].float())
    model = Pooled(Reversed(4)).double()
    rule = fa_bench.attach(model, "dfa", sample_input=tokens()[0])
    logits = model(tokens(7)[0])
    with pytest.raises(CoverageError, match=r"cut 'act' .*\(3, 7, 6\).*errors at \(4,\) positions"):
        rule.backward(logits.sum(), logits)
    with pytest.raises(CoverageError, match=r"cut 'act' .*labels at \(2,\) positions: a local loss needs the same"):
        fa_bench.attach(Pooled(Pairs()).double(), "local_error", sample_input=tokens()[0], objective=TokenLoss())


def test_rejects_cut_without_batch_first():
    """The cut has shape (T, N, F) for two samples and four tokens. The second axis of the cut could be mistaken for positions,
    because four is a multiple of two."""
    model = nn.Sequential(nn.Linear(7, 5), Swapped(), nn.Tanh(), Swapped(), nn.Linear(5, C))
    with pytest.raises(CoverageError, match=r"cut '2' has activations of shape \(4, 2, 5\).*the batch must come first"):
        fa_bench.attach(model, "dfa", cuts=["2"], sample_input=torch.randn(2, 4, 7))
    with pytest.raises(CoverageError, match="the batch must come first"):
        Layout("act", 2).matched(torch.zeros(2, 4, C), torch.Size((4, 2, 5)))


class Swapped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1)


@pytest.mark.parametrize("length", [C, 6])
@pytest.mark.parametrize("is_activated", [False, True])
def test_rejects_sequences_with_classes_first(length: int, is_activated: bool):
    """With outputs of shape (N, C, T), time steps would be treated as classes, and no error would be raised if C equals T."""
    model = nn.Sequential(nn.Conv1d(2, 4, 1), nn.Tanh(), nn.Conv1d(4, C, 1), *([nn.Softplus()] if is_activated else []))
    with pytest.raises(CoverageError, match=rf"\(N, T, C\).*returns \(2, {C}, {length}\) from the convolution '2'.*transpose"):
        fa_bench.attach(model, "dfa", cuts=["1"], sample_input=torch.randn(2, 2, length))
    transposed = nn.Sequential(*model, Transposed())
    rule = fa_bench.attach(transposed, "dfa", cuts=["1"], sample_input=torch.randn(2, 2, length))
    assert rule.feedback["1"]["B"].shape == (C, 4)


class Transposed(nn.Module):
    """A module that transposes (N, C, T) to (N, T, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


@pytest.mark.parametrize(
    ("shape", "positions", "layer", "output", "axis"),
    [
        ((2, 5, 7), (5,), nn.Linear(3, 7), (2, 5, 7), 2),
        ((2, 7, 5), (5,), nn.Conv1d(3, 7, 1), (2, 7, 5), 1),
        ((2, 5, 5), (5,), nn.Linear(3, 5), (2, 5, 5), 2),
        ((2, 5, 5), (5,), nn.Conv1d(3, 5, 1), (2, 5, 5), 1),
        ((2, 5, 5), (), nn.Conv2d(3, 5, 1), (2, 5, 5, 1), 2),
        ((2, 4, 4, 4), (4, 4), nn.Conv2d(3, 4, 1), (2, 4, 4, 4), 1),
        ((2, 4, 4, 4), (4, 4), nn.Linear(3, 4), (2, 4, 4, 4), 3),
        ((2, 4, 6, 8), (4, 6), nn.Conv2d(3, 8, 1), (2, 8, 4, 6), 3),
        ((2, 8, 2, 3), (4, 6), nn.Conv2d(3, 8, 1), (2, 8, 2, 3), 1),
        ((2, 2, 3, 8), (4, 6), nn.Linear(3, 8), (2, 2, 3, 8), 3),
        ((2, 4, 3), (3,), nn.Linear(3, 3), (2, 4, 3), 2),
        ((2, 8, 16), (8,), nn.Linear(3, 8), (2, 8, 8), 2),
        ((2, 9), (5,), nn.Linear(3, 9), (2, 9), 1),
        # In the remaining cases, the positions or the output contradict the layer's usual axis, or the layer is not known.
        ((2, 7, 5), (5,), nn.Linear(3, 3), (2, 5, 3), 1),
        ((2, 5, 7), (3,), nn.Linear(3, 5), (2, 3, 5), 1),
        ((2, 5, 7), (5,), nn.Conv1d(3, 3, 1), (2, 3, 5), 2),
        ((2, 8, 16), (8,), nn.Conv1d(3, 8, 1), (2, 8, 16), 1),
        ((2, 5, 5), (5,), None, None, 2),
        ((2, 7, 5), (5,), None, None, 1),
        ((2, 7, 5), (), None, None, 2),
    ],
    ids=str,
)
def test_feature_axis(shape: Any, positions: Any, layer: Any, output: Any, axis: int):
    assert feature_axis(shape, positions, None if layer is None else (layer, output)) == axis


# ------------------------------------------------------------------------------------------------ positions only at the cut
class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


@pytest.mark.parametrize("name", ["dfa", "dkp"])
def test_shared_positions_send_one_signal_to_all_tokens(name: str):
    x, y = tokens()[0], torch.tensor([0, 2, 1])
    models = [Pooled(Mean()).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    own, shared = (
        fa_bench.attach(model, name, seed=0, sample_input=x, positions=positions)
        for model, positions in zip(models, ("own", "shared"), strict=True)
    )
    assert own.feedback["act"]["B"].shape == (C, T * 6) and shared.feedback["act"]["B"].shape == (C, 6)
    with torch.no_grad():
        own.feedback["act"]["B"].copy_(shared.feedback["act"]["B"].repeat(1, T))
    for model, rule in zip(models, (own, shared), strict=True):
        logits = model(x)
        rule.backward(F.cross_entropy(logits, y), logits, y)
    assert_matches(collect(models[1]), {key: grad for key, grad in collect(models[0]).items() if grad is not None})
    if name == "dkp":
        parts = own.feedback["act"]["B"].grad.unflatten(1, (T, 6))
        assert distance(shared.feedback["act"]["B"].grad, parts.sum(1)) < REL
    logits = models[1](tokens(6)[0])  # shared feedback supports any number of tokens
    shared.backward(F.cross_entropy(logits, y), logits, y)


def test_mean_loss_of_float_targets_matches_objective():
    outputs, numbers = torch.randn(2, 4, C), torch.randn(2, 4, C)
    assert torch.equal(mean_loss(MSE(), outputs, numbers), MSE().loss(outputs, numbers))


def test_dfa_projects_regression_error():
    x, target = nets.batch("mlp")[0], torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
    model = nets.mlp()
    rule = fa_bench.attach(model, "dfa", seed=0, sample_input=x, **CUTS)
    out = model(x)
    rule.backward((out - target).square().sum() / 8, out)
    plain, b = nets.mlp(), rule.feedback["act2"]["B"]
    hidden = plain.act2(plain.fc2(plain.act1(plain.fc1(x)))).detach()
    want = (((out.detach() - target) / 4) @ b * (1 - hidden**2)).sum(0)
    assert distance(model.fc2.bias.grad, want) < REL


# ------------------------------------------------------------------------------------------------ metrics
@pytest.mark.parametrize("name", [*BROADCASTING, "local_error"])
def test_alignment_metrics_on_tokens(name: str):
    _, rule = attached(name)
    x, y = tokens()
    values = AlignmentMeter(rule, x, y).measure()
    assert set(values["delta_angle"]) == {"fc1", "fc2", "fc3"} and 0 < values["delta_angle"]["fc1"] < 180
    assert set(values["output_angle"]) == (set() if name == "local_error" else {"fc1", "fc2"})
    assert set(values["weight_angle"]) == (set() if name == "local_error" else {"fc3"})


def test_output_angle_is_mean_over_tokens():
    _, rule = attached("dfa")
    x, y = tokens()
    plain = copy.deepcopy(nets.mlp())
    a = plain.act1(plain.fc1(x))
    cosines = F.cosine_similarity(a @ rule.feedback["act1"]["B"].t(), plain(x), dim=-1)
    want = torch.rad2deg(cosines.acos()).mean().item()
    assert AlignmentMeter(rule, x, y, ["output_angle"]).measure()["output_angle"]["fc1"] == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("name", ["drtp", "local_error"])
def test_custom_ignore_index_gets_no_error(name: str) -> None:
    def learned(ignored: int) -> dict[str, Tensor | None]:
        model, objective = nets.mlp(), TokenCrossEntropy(ignore_index=ignored)
        rule: Any = fa_bench.attach(model, name, sample_input=tokens()[0], objective=objective, **CUTS)
        x, y = tokens()
        y = y.masked_fill(torch.arange(T) > 1, ignored)
        logits = model(x)
        rule.backward(3 * objective.loss(logits, y), logits, y)
        return collect(model)

    assert_bitwise(learned(C + 4), learned(-100))


OUTPUTS = {"sequences": (4, 3, 3), "as many tokens as classes": (3, 3, 3), "maps": (4, 3, 2, 5), "volumes": (2, 3, 2, 2, 2)}


@pytest.mark.parametrize("objective", ["cross_entropy", "token_cross_entropy"])
@pytest.mark.parametrize("shape", OUTPUTS.values(), ids=OUTPUTS)
def test_sample_losses_average_over_labelled_positions(shape: tuple[int, ...], objective: str):
    """The mean of the samples' losses must be the mean over all labelled positions, so each sample is weighted by its number of
    labels."""
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(shape, generator=generator, dtype=torch.float64)
    axis = 2 if len(shape) == 3 else 1
    target = torch.randint(3, (*shape[:axis], *shape[axis + 1 :]), generator=generator)
    target[0].view(-1)[:2] = IGNORED
    rows, labels = outputs.movedim(axis, -1), target
    losses = [
        sum(
            -rows[n].log_softmax(-1).reshape(-1, 3)[at, label] for at, label in enumerate(labels[n].flatten()) if label != IGNORED
        )
        for n in range(len(target))
    ]
    expected = torch.stack([torch.as_tensor(loss) for loss in losses]) * len(target) / (target != IGNORED).sum()
    chosen = OBJECTIVES[objective]()
    assert torch.allclose(sample_losses(chosen, outputs, target), expected, rtol=1e-12)
    assert torch.allclose(mean_loss(chosen, outputs, target), expected.mean(), rtol=1e-12)


@pytest.mark.parametrize("kind", ["tokens", "maps"])
@pytest.mark.parametrize("name", ["node_perturbation", "np_feedback", "weight_perturbation"])
def test_perturbation_rules_accept_outputs_with_positions(name: str, kind: str):
    """The default objective and token_cross_entropy give the same losses and therefore the same gradients, even if some positions
    are ignored."""

    def learned(objective: str | None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        if kind == "tokens":
            model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).double()
            x, y = torch.randn(4, 4, 7).double(), torch.randint(3, (4, 4))
        else:
            model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1)).double()
            x, y = torch.randn(4, 2, 5, 5).double(), torch.randint(3, (4, 5, 5))
        options = {"cuts": ["1"]} if name == "node_perturbation" else {}
        rule = fa_bench.attach(model, name, sample_input=x[:2], objective=objective, **options)
        y[1].view(-1)[:3] = IGNORED
        logits = model(x)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten()) if kind == "tokens" else F.cross_entropy(logits, y)
        rule.backward(loss, logits, y)
        return {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}

    one, two = learned(None), learned("token_cross_entropy")
    assert all(gradient.abs().sum() > 0 for gradient in one.values())
    for key in one:
        # The gradients contain a difference of losses divided by 2 sigma, which amplifies rounding.
        assert torch.allclose(one[key], two[key], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["node_perturbation", "np_feedback", "weight_perturbation", "epc", "pc"])
@pytest.mark.parametrize("shape", [(N, 7), (N, T, 7), (N, 7, 2, 2)])
def test_targets_may_be_numbers_in_shape_of_output(name: str, shape: tuple[int, ...]) -> None:
    layer: Any = nn.Linear if len(shape) < 4 else lambda inputs, outputs: nn.Conv2d(inputs, outputs, 1)
    model: Any = nn.Sequential(layer(7, 5), nn.Tanh(), layer(5, C))
    x, objective = torch.randn(shape), MSE()
    model.cut_points = model.blocks = ["1"]
    rule = fa_bench.attach(model, name, sample_input=x, objective=objective)
    outputs = model(x)
    target = torch.randn_like(outputs)
    loss = objective.loss(outputs, target)
    losses = sample_losses(objective, outputs, target)
    assert losses.shape == (N,) and torch.allclose(losses.mean(), loss)
    rule.backward(loss, outputs, target)
    assert model[0].weight.grad.abs().sum() > 0
