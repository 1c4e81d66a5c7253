"""Tangents at the output match autograd, use the state of the training pass, and are refused if PyTorch cannot compute them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fa_bench
from fa_bench.errors import CoverageError
from fa_bench.mechanisms import tangents
from fa_bench.mechanisms.tangents import DIFFERENCE, FORWARD, output_tangent
from tests.rules import nets

NETS = {"mlp_bn": ["act1", "act2"], "conv_bn": ["act1", "act2", "act3"], "residual": ["stem_bn", "b_bn"]}


def attached(model: nn.Module, cuts: list[str], x: Tensor, **options: Any) -> Any:
    return fa_bench.attach(model, "fdfa", seed=0, sample_input=x, cuts=cuts, allow_uncovered=True, **options)


def first_pass(rule: Any, x: Tensor) -> tuple[Any, Any]:
    """Run a training pass, and return its record and its output."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(rule), "broadcast", lambda rule, delta, target: seen.append(rule.first_pass) or delta)
        patch.setattr(type(rule), "feedback_gradients", lambda rule, *_: [None])
        out = rule.model(x)
        logits = out if isinstance(out, Tensor) else out["logits"]
        rule.backward(logits.sum(), logits, None, 1.0)
    return seen[0], out


def directions(shapes: dict[str, Tensor]) -> dict[str, Any]:
    return {cut: lambda x, p=p: p for cut, p in shapes.items()}


def noise_at(model: nn.Module, cuts: list[str], x: Tensor) -> dict[str, Tensor]:
    shapes: dict[str, Any] = {}
    handles = [
        model.get_submodule(cut).register_forward_hook(lambda _, __, out, cut=cut: shapes.update({cut: out.shape}))
        for cut in cuts
    ]
    with torch.no_grad():
        model.eval()(x)
    model.train()
    for handle in handles:
        handle.remove()
    generator = torch.Generator().manual_seed(5)
    return {cut: torch.randn(shape, generator=generator, dtype=x.dtype) for cut, shape in shapes.items()}


def moved(model: nn.Module, x: Tensor, noise: dict[str, Tensor], step: Tensor) -> Tensor:
    """The output of a plain model with `step` times the noise added at the cuts; autograd can differentiate it with respect to
    `step`."""
    handles = [model.get_submodule(cut).register_forward_hook(lambda _, __, out, p=p: out + step * p) for cut, p in noise.items()]
    try:
        return model(x)
    finally:
        for handle in handles:
            handle.remove()


def by_autograd(model: nn.Module, x: Tensor, noise: dict[str, Tensor]) -> Tensor:
    """The derivative with respect to the step at 0, computed for one output at a time."""
    step = torch.zeros((), dtype=x.dtype, requires_grad=True)
    out = moved(model, x, noise, step)
    parts = [torch.autograd.grad(one, step, retain_graph=True)[0] for one in out.flatten()]
    return torch.stack(parts).view(out.shape)


@pytest.mark.parametrize("method", [FORWARD, DIFFERENCE])
@pytest.mark.parametrize("net", NETS)
def test_tangent_matches_autograd_derivative(net: str, method: str) -> None:
    """The nets have in-place ReLUs, shortcuts and batch statistics. Away from kinks, the error of central differences is
    proportional to the square of the step, which is 0.001."""
    build: Any = nets.NETS.get(net, nets.residual)
    x, _ = nets.batch(net)
    noise = noise_at(build(), NETS[net], x)
    want = by_autograd(build(), x, noise)
    model = build()
    rule = attached(model, NETS[net], x)
    first, _ = first_pass(rule, x)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    kept = {cut: p.clone() for cut, p in noise.items()}
    got = output_tangent(rule, first, method, directions(noise))
    rel = 1e-12 if method == FORWARD else 2e-2 if net == "residual" else 1e-2
    assert (got - want).abs().max() <= rel * want.abs().max()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(torch.equal(p, kept[cut]) for cut, p in noise.items()), "an in-place module changed the noise"
    assert not got.requires_grad


def test_difference_matches_outputs_at_plus_and_minus_step() -> None:
    x, _ = nets.batch("mlp_tanh")
    noise = noise_at(nets.mlp(), ["act1", "act2"], x)
    plus, minus = (moved(nets.mlp(), x, noise, torch.tensor(step, dtype=x.dtype)) for step in (tangents.STEP, -tangents.STEP))
    rule = attached(nets.mlp(), ["act1", "act2"], x)
    got = output_tangent(rule, first_pass(rule, x)[0], DIFFERENCE, directions(noise))
    assert torch.allclose(got, (plus - minus) / (2 * tangents.STEP), rtol=1e-9)


def test_differences_sample_each_direction_once() -> None:
    x, _ = nets.batch("mlp_tanh")
    rule, calls = attached(nets.mlp(), ["act1"], x), []
    output_tangent(rule, first_pass(rule, x)[0], DIFFERENCE, {"act1": lambda a: calls.append(a) or torch.ones_like(a)})
    assert len(calls) == 1


def dropped_out() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Dropout(0.5), nn.Linear(40, 3)).double()


@pytest.mark.parametrize("method", [FORWARD, DIFFERENCE])
def test_tangent_reuses_dropout_masks_of_training_pass(method: str) -> None:
    """The noise passes only through the mask and the output layer, so the derivative reveals the mask."""
    model, x = dropped_out(), torch.randn(5, 6, dtype=torch.float64)
    rule, masks = attached(model, ["1"], x), []
    handle = model[2].register_forward_hook(lambda _, args, out: masks.append((out != 0).double() * 2))
    first, _ = first_pass(rule, x)
    handle.remove()
    torch.rand(3)
    state = torch.get_rng_state()
    got = output_tangent(rule, first, method, {"1": torch.ones_like})
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.allclose(got, masks[0] @ model[3].weight.t(), rtol=1e-8) and 0.3 < (masks[0] == 0).double().mean() < 0.7


def test_parameter_tangents_match_autograd() -> None:
    """Every use of a shared parameter contributes to the tangent, and parameters without a direction do not contribute. After the
    call, the model has its own parameters again."""
    torch.manual_seed(0)
    shared = nn.Linear(5, 5)
    model: Any = nn.Sequential(shared, nn.Tanh(), shared, nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    rule = fa_bench.attach(model, "forward_gradient", form="weight", sample_input=x)
    generator = torch.Generator().manual_seed(1)
    moved_ones = {
        parameter: torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        for name, parameter in model.named_parameters()
        if name != "4.bias"
    }
    parameters = dict(model.named_parameters())
    first = tangents.FirstPass("forward_gradient", model, (x,), {})
    for method, rel in ((FORWARD, 1e-12), (DIFFERENCE, 1e-4)):
        got = output_tangent(rule, first, method, {}, moved_ones)
        with rule.exact():
            out = model(x)
        want = torch.stack(
            [
                sum(
                    (gradient * moved_ones[p]).sum()
                    for p, gradient in zip(moved_ones, torch.autograd.grad(one, list(moved_ones), retain_graph=True), strict=True)
                )
                for one in out.flatten()
            ]
        )
        assert (got - want.view(got.shape)).abs().max() < rel * want.abs().max()
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert isinstance(model[0].weight, nn.Parameter)


def test_tangent_has_single_precision_under_autocast() -> None:
    model, x = nets.mlp(dtype=torch.float32), torch.randn(4, 7)
    rule = attached(model, ["act1", "act2"], x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, _ = first_pass(rule, x)
    assert output_tangent(rule, first, FORWARD, {"act1": torch.ones_like}).dtype == torch.float32


# --- refusals -----------------------------------------------------------------------------------------------------------------


class Own(torch.autograd.Function):
    """A user-defined function without a forward-mode derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Own.apply(x)


class LastState(nn.LSTM):
    """A user-defined class that rules leave unchanged."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x[:, None])[0][:, 0]


@pytest.mark.parametrize(
    ("module", "said"), [(Doubled(), r"an autograd\.Function without a jvp"), (LastState(5, 5), "mkldnn_rnn_layer")], ids=str
)
def test_operation_without_derivative_suggests_working_fix(module: nn.Module, said: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), module, nn.Linear(5, 3)), torch.randn(6, 4)
    with pytest.raises(
        CoverageError,
        match=rf"rule 'fdfa': PyTorch has no forward-mode derivative for {said}; .*"
        r"tangents='difference'",
    ) as refused:
        attached(model, ["1"], x)
    assert refused.value.settings == {"tangents": "difference"}
    assert fa_bench.attached_rule(model) is None
    rule = attached(model, ["1"], x, **refused.value.settings)
    logits = model(x)
    rule.backward(F.cross_entropy(logits, torch.arange(6) % 3), logits, torch.arange(6) % 3)
    assert rule.feedback["1"]["B"].grad.any()


def test_rejects_output_independent_of_cuts() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.act(self.fc1(x)).detach())

    with pytest.raises(CoverageError, match="the model's output depends on none of its cuts"):
        attached(Apart(), ["act"], torch.randn(2, 4))


@pytest.mark.parametrize("fast", [True, False])
def test_tangent_of_attention_avoids_fused_kernel(fast: bool) -> None:
    """In evaluation mode without gradients, torch runs a whole encoder layer as one kernel, which has no forward-mode derivative.

    The user's setting for the fast path is restored afterwards.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        _attention_has_a_derivative(fast)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _attention_has_a_derivative(fast: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), layer, nn.Linear(8, 3))
    x = torch.randn(2, 5, 4)
    rule = attached(model, ["1"], x)
    model.eval()
    first, out = first_pass(rule, x)
    got = output_tangent(rule, first, FORWARD, {"1": torch.ones_like})
    want = output_tangent(rule, first, DIFFERENCE, {"1": torch.ones_like})
    assert got.shape == out.shape and (got - want).abs().max() < 1e-2 * want.abs().max()
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_tangent_uses_logits_if_other_output_is_detached() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            a = self.act(self.fc1(x))
            return {"seen": a.detach(), "logits": self.fc2(a)}

    model, x = Two(), torch.randn(2, 4)
    rule = attached(model, ["act"], x)
    first, _ = first_pass(rule, x)
    assert torch.allclose(output_tangent(rule, first, FORWARD, {"act": torch.ones_like}), model.fc2.weight.sum(1).expand(2, 3))


class Plain(nn.Module):
    """A net with one step of PyTorch's LSTM, which runs as a fused kernel if no gradients are required."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.act, self.lstm, self.out = nn.Linear(4, 5), nn.Tanh(), nn.LSTM(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(self.act(self.fc(x))[None])[0][0])


def test_tangent_of_lstm_avoids_fused_kernel() -> None:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    rule = attached(Plain(), ["act"], x)
    first, _ = first_pass(rule, x)
    got, want = (output_tangent(rule, first, method, {"act": torch.ones_like}) for method in (FORWARD, DIFFERENCE))
    assert (got - want).abs().max() < 1e-2 * want.abs().max() and want.any()
