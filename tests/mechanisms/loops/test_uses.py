"""A weight that is used outside its layer propagates the error itself; attach finds such uses, names them and suggests a
remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fa_bench
from fa_bench.errors import CoverageError
from tests.mechanisms.loops.chain import (
    COVERS_ALL,
    COVERS_BLOCKS,
    CUT_RULES,
    RULES,
    assert_same,
    attach,
    batch,
    gradients,
    state,
    train,
)

X, Y = batch()
# Rules whose errors pass through the weights themselves, so that weights may be used in any way.
FREE = ("bp", "bp_deepsup", "bp_fc", "frozen", "frozen_blocks")
COVERING = [name for name in RULES if name not in (*FREE, *COVERS_ALL, *COVERS_BLOCKS)]


class Multiply(torch.autograd.Function):
    """A user-defined matrix product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return g @ weight.t(), x.t() @ g


class Decoder(nn.Module):
    """Uses the weight of a layer that is not one of its submodules."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layers = [layer]

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.layers[0].weight.t())


class Net(nn.Module):
    """A net of widths 8-16-16, followed by `decode` to 8 features and a layer for 3 classes."""

    def __init__(self, decode: Callable[[Net, Tensor], Tensor] = lambda net, h: h[:, :8]) -> None:
        super().__init__()
        self.decode = decode
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.enc, self.mid, self.out = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(8, 3)
        self.act, self.act2 = nn.ReLU(), nn.ReLU()
        self.decoder = Decoder(self.enc)
        self.same = self.enc.weight  # a second name for a parameter of the model
        self.cut_points = self.blocks = ["act", "act2"]

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.decode(self, self.act2(self.mid(self.act(self.enc(x))))))


#: Maps a name to a function that decodes with the encoder's weight, and to the words that describe this use.
OUTSIDE: dict[str, tuple[Callable[[Net, Tensor], Tensor], str]] = {
    "F.linear": (lambda net, h: F.linear(h, net.enc.weight.t()), r"t\(\) in the model"),
    "matmul": (lambda net, h: h @ net.enc.weight, r"matmul\(\) in the model"),
    "einsum": (lambda net, h: torch.einsum("nf,fi->ni", h, net.enc.weight), r"einsum\(\)"),
    "einsum of a list": (lambda net, h: torch.einsum("nf,fi->ni", [h, net.enc.weight]), r"einsum\(\)"),
    "multi_dot": (lambda net, h: torch.linalg.multi_dot([h, net.enc.weight]), r"linalg_multi_dot\(\)"),
    "concatenated": (lambda net, h: h @ torch.cat([net.enc.weight[:8], net.enc.weight[8:]]), r"__getitem__\(\)"),
    "in a list": (lambda net, h: h @ torch.cat([net.enc.weight, net.enc.weight])[:16], r"cat\(\)"),
    "difference of scaled weights": (lambda net, h: h @ (3 * net.enc.weight - net.enc.weight / 2), r"rsub\(\)|mul\(\)"),
    "sum of weights": (lambda net, h: h @ (net.enc.weight + net.enc.weight), r"add\(\)"),
    "detached": (lambda net, h: h @ net.enc.weight.detach(), r"matmul\(\)"),
    "data": (lambda net, h: F.linear(h, net.enc.weight.data.t()), r"linear\(\)"),
    "function of one's own": (lambda net, h: Multiply.apply(h, net.enc.weight), r"Multiply\(\)"),
    "the model's own": (lambda net, h: h @ net.same, r"matmul\(\) in the model"),
    "another module": (lambda net, h: net.decoder(h), r"t\(\) in module 'decoder'"),
    "gate": (lambda net, h: h[:, :8] * net.enc.weight.sum(), r"sum\(\)"),
    "gate of each unit": (lambda net, h: h[:, :8] * net.enc.weight[0], r"mul\(\)|__getitem__\(\)"),
}


@pytest.mark.parametrize("how", OUTSIDE)
@pytest.mark.parametrize("name", COVERING)
def test_rejects_weight_used_outside_its_layer(name: str, how: str) -> None:
    decode, words = OUTSIDE[how]
    with pytest.raises(CoverageError, match=rf"enc\.weight \(used outside its layer, by {words}.*uncovered=\['enc\.weight'\]"):
        attach(Net(decode), name)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("name", COVERING)
def test_rejects_weight_used_before_its_layer_runs(name: str, by_name: bool) -> None:
    """The layer's weight is used to compute the layer's own input."""

    class Early(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.act(self.enc(x)) @ self.mid.weight
            return self.out(self.act2(self.mid(input=h) if by_name else self.mid(h))[:, :8])

    with pytest.raises(CoverageError, match=r"mid\.weight \(used outside its layer, by matmul\(\) in the model"):
        attach(Early(), name, sample_input=X)


@pytest.mark.parametrize("name", COVERING)
def test_rejects_weight_that_scales_output(name: str) -> None:
    class Scaled(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.enc.weight[0, :3]

    with pytest.raises(CoverageError, match=r"enc\.weight \(used outside its layer"):
        attach(Scaled(), name)


@pytest.mark.parametrize("name", COVERING)
def test_rejection_is_reported_once_and_model_is_unchanged(name: str) -> None:
    model = Net(OUTSIDE["matmul"][0])
    with pytest.raises(CoverageError) as refused:
        attach(model, name)
    assert str(refused.value).count("used outside") == 1
    assert type(model.enc) is nn.Linear and fa_bench.attached_rule(model) is None
    assert set(model.state_dict()) == set(Net().state_dict())


@pytest.mark.parametrize("allowed", [True, ["enc.weight"], ["enc.*"]], ids=str)
@pytest.mark.parametrize("name", COVERING)
def test_outside_use_allowed_by_name_or_pattern_trains(name: str, allowed: Any) -> None:
    model = Net(OUTSIDE["matmul"][0])
    rule = attach(model, name, allow_uncovered=allowed)
    assert list(rule.coverage.uncovered) == ["enc.weight"] and "used outside its layer" in str(rule.coverage)
    train(model, rule, X, Y)


@pytest.mark.parametrize("name", COVERING)
def test_allow_uncovered_of_other_weight_still_rejects(name: str) -> None:
    with pytest.raises(CoverageError, match=r"enc\.weight"):
        attach(Net(OUTSIDE["matmul"][0]), name, allow_uncovered=["mid.*"])


@pytest.mark.parametrize("name", FREE)
def test_backprop_rules_accept_weight_used_outside_its_layer(name: str) -> None:
    for decode, _ in OUTSIDE.values():
        attach(Net(decode), name)


@pytest.mark.parametrize("name", COVERS_BLOCKS)
def test_block_rules_accept_weight_used_outside_its_layer(name: str) -> None:
    assert attach(Net(OUTSIDE["matmul"][0]), name).coverage.uncovered == {}


# ------------------------------------------------------------------------------------------------ harmless uses
#: Maps a name to a use of a weight, in the forward pass, that propagates no error.
HARMLESS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "dtype": lambda net, h: h[:, :8].to(net.enc.weight.dtype),
    "device": lambda net, h: h[:, :8].to(net.enc.weight.device),
    "shape": lambda net, h: h[:, : net.enc.weight.shape[1]] / net.enc.weight.size(0),
    "to": lambda net, h: h[:, :8].to(net.enc.weight),
    "type_as": lambda net, h: h[:, :8].type_as(net.enc.weight),
    "to what is detached": lambda net, h: h[:, :8].to(net.enc.weight.detach()),
    "type_as of what is detached": lambda net, h: h[:, :8].type_as(net.enc.weight.data),
    "view_as of what is detached": lambda net, h: h[:, :8].view_as(net.enc.weight.detach()[:1].expand(len(h), 8)),
    "expand_as of what is detached": lambda net, h: h[:, :8].expand_as(net.enc.weight.detach()[:1].expand(len(h), 8)),
    "reshape_as of what is detached": lambda net, h: h[:, :8].reshape_as(net.enc.weight.detach()[:1].expand(len(h), 8)),
    "broadcast with what is detached": lambda net, h: torch.broadcast_tensors(h[:, :8], net.enc.weight.detach()[0])[0],
    "new_zeros": lambda net, h: h[:, :8] + net.enc.weight.new_zeros(8),
    "zeros_like": lambda net, h: h[:, :8] + torch.zeros_like(net.enc.weight)[0],
    "added": lambda net, h: h[:, :8] + net.enc.weight[0],
    "scaled and added": lambda net, h: h[:, :8] + 2 * net.enc.weight[0] / 3,
    "penalty that is kept": lambda net, h: setattr(net, "penalty", net.enc.weight.square().sum()) or h[:, :8],
    "statistic": lambda net, h: setattr(net, "norm", net.enc.weight.detach().norm().item()) or h[:, :8],
}


@pytest.mark.parametrize("how", HARMLESS)
@pytest.mark.parametrize("name", COVERING)
def test_reading_weight_without_error_path_is_accepted(name: str, how: str) -> None:
    model = Net(HARMLESS[how])
    assert attach(model, name).coverage.uncovered == {}


class Penalised(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), self.mid.weight.square().sum()


@pytest.mark.parametrize("name", [name for name in RULES if name not in ("frozen", "frozen_blocks", *COVERS_ALL)])
def test_weight_penalty_adds_its_gradient(name: str) -> None:
    """The penalty is computed outside the forward pass, or returned by it. Without the option `output`, cut rules refuse a model
    that returns the penalty."""
    model = Net()
    want = train(model, attach(model, name), X, Y, steps=1)
    want["mid.weight"] = want["mid.weight"] + 2 * Net().mid.weight.detach()
    for within in (False, True) if name not in CUT_RULES else (False,):
        model = Penalised() if within else Net()
        rule = attach(model, name)
        assert rule.coverage.uncovered == {}
        logits, penalty = model(X) if within else (model(X), model.mid.weight.square().sum())
        rule.backward(F.cross_entropy(logits, Y) + penalty, logits, Y, loss_scale=1.0, indices=torch.arange(len(Y)))
        assert_same(gradients(model), want, rel=1e-6)


# ------------------------------------------------------------------------------------------------ idle layers
class Idle(Net):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(5, 6)


@pytest.mark.parametrize("name", COVERING)
def test_unused_layer_is_reported(name: str) -> None:
    model = Idle()
    if name in CUT_RULES and name != "asfp_lc":
        with pytest.raises(CoverageError, match=r"spare\.weight \(its layer did not run in the forward pass of the sample\)"):
            attach(model, name)
        rule = attach(model, name, allow_uncovered=["spare.weight"])
    else:
        rule = attach(model, name)
        lines = [line for line in str(rule.coverage).splitlines() if "spare" in line]
        assert any("did not run in the forward pass of the sample" in line for line in lines)
    train(model, rule, X, Y)


@pytest.mark.parametrize("name", COVERING)
def test_rejects_functional_use_of_layer_weight(name: str) -> None:
    class Functional(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.act(self.enc(x))
            return self.out(self.act2(F.linear(h, self.mid.weight, self.mid.bias))[:, :8])

    with pytest.raises(CoverageError, match=r"mid\.weight(' is | \()used outside its layer"):
        attach(Functional(), name)


# ------------------------------------------------------------------------------------------------ no sample
class Autoencoding(nn.Module):
    """A convolution whose weight also decodes. attach cannot construct a sample for it, because the first layer is not linear."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.conv, self.out = nn.Conv1d(1, 4, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x.unsqueeze(1)).relu()
        return self.out(F.conv_transpose1d(h, self.conv.weight, padding=1).squeeze(1))


@pytest.mark.parametrize("name", ["fa", "usf", "brsf", "frsf", "kp", "pfa", "pfa_o", "ldfa", "mixed"])
def test_training_forward_without_sample_rejects_outside_use(name: str) -> None:
    model = Autoencoding()
    rule = attach(model, name)
    before = state(model)
    with torch.no_grad():
        model(X)  # a pass without gradients is not refused
    for _ in range(2):  # as if a notebook cell were run twice
        with pytest.raises(CoverageError, match=r"conv\.weight \(used outside its layer, by conv_transpose1d\(\)"):
            train(model, rule, X, Y)
    assert not gradients(model)
    # brsf already sampled its magnitudes in the pass that was refused.
    drawn = [key for key in before if key.endswith("feedback_M")] if name == "brsf" else []
    assert_same(
        {key: tensor for key, tensor in state(model).items() if key not in drawn},
        {key: tensor for key, tensor in before.items() if key not in drawn},
    )


class TrainingOnly(nn.Module):
    """A net of widths 8-8-8-3 that uses its first weight a second time before the first activation, but only in training."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.enc, self.mid, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.act, self.act2 = nn.ReLU(), nn.ReLU()
        self.cut_points = self.blocks = ["act", "act2"]

    def forward(self, x: Tensor) -> Tensor:
        h = self.enc(x)
        h = F.linear(h, self.enc.weight) if self.training else h
        return self.out(self.act2(self.mid(self.act(h))))


@pytest.mark.parametrize("name", COVERING)
def test_first_training_pass_rejects_outside_use_only_in_training(name: str) -> None:
    model = TrainingOnly()
    rule = attach(model, name, freeze_stem=False)
    with pytest.raises(CoverageError, match=r"enc\.weight \(used outside its layer, by linear\(\) in the model"):
        train(model, rule, X, Y)


@pytest.mark.parametrize("name", ["fa", "kp"])
def test_rejects_frozen_weight_used_outside_its_layer(name: str) -> None:
    """The error passes through the frozen weight to the bias of the weight's own layer, which learns."""
    model = Autoencoding()
    model.conv.weight.requires_grad_(False)
    rule = attach(model, name)
    with pytest.raises(CoverageError, match=r"conv\.weight \(used outside its layer, by conv_transpose1d\(\)"):
        train(model, rule, X, Y)


@pytest.mark.parametrize("name", ["fa", "kp", "mixed"])
def test_first_training_pass_adds_allowed_use_to_coverage(name: str) -> None:
    model = Autoencoding()
    rule = attach(model, name, allow_uncovered=["conv.*"])
    assert not rule.coverage.uncovered
    train(model, rule, X, Y)
    assert list(rule.coverage.uncovered) == ["conv.weight"]


@pytest.mark.parametrize("name", ["fa", "kp"])
def test_model_without_sample_runs_once_per_call(name: str) -> None:
    """The first training forward pass is observed while it runs; it is not repeated."""
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))
    rule, calls = attach(model, name), []
    model[1].register_forward_hook(lambda *_: calls.append(1) and None)
    x, y = torch.randn(12, 2, 8), batch()[1]
    for training in (False, True, False, True, True):
        calls.clear()
        with torch.set_grad_enabled(training):
            logits = model(x)
        assert len(calls) == 1
        if training:
            rule.backward(F.cross_entropy(logits, y), logits, y)


class Attentive(nn.Module):
    """A net with attention between two cuts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act, self.out = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)
        self.attention, self.act2 = nn.MultiheadAttention(8, 2, batch_first=True), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.stem(x))
        return self.out(self.act2(self.attention(h, h, h, need_weights=False)[0]).mean(1))


@pytest.mark.parametrize("name", ["dfa", "dkp"])
def test_cut_rules_accept_fused_attention(name: str) -> None:
    """With cuts around attention, training passes use a fused function that does not call the layers, unlike the sample's
    pass."""
    model, x, y = Attentive(), torch.randn(2, 5, 4), torch.tensor([0, 1])
    rule = attach(model, name, sample_input=x, cuts=["act", "act2"], allow_uncovered=["attention.in_proj_weight"])
    rule.backward(F.cross_entropy(model(x), y))
    assert list(rule.coverage.uncovered) == ["attention.in_proj_weight"]
