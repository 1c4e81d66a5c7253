"""Compound modules that are decomposed into layers compute what PyTorch computes, and can be restored completely."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from fa_bench.mechanisms.compound.base import Compound
from fa_bench.mechanisms.compound.expansion import contract, expand
from fa_bench.mechanisms.graph import tensors_in
from fa_bench.mechanisms.weighted_layers import Mode

Call = Callable[[nn.Module], Any]


def layerwise(module: nn.Module) -> nn.Module:
    """A copy of a module that calls one layer for each weight."""
    copied = copy.deepcopy(module)
    expand(copied, Mode("test", layerwise=True))
    return copied


def outcome(module: nn.Module, call: Call) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The outputs of a call with seed 3, and the gradients of their inner product with fixed random numbers."""
    module.zero_grad()
    torch.manual_seed(3)
    outputs = [y for y in tensors_in(call(module)) if y.is_floating_point()]
    generator = torch.Generator().manual_seed(1)
    sum((y * torch.randn(y.shape, generator=generator, dtype=y.dtype)).sum() for y in outputs).backward()  # type: ignore
    return outputs, {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def require_equal(module: nn.Module, call: Call, rounding: float) -> None:
    """Require that the layerwise copy of a module has the outputs and gradients of the module itself.

    The results must be bitwise equal if `rounding` is 0. Otherwise, they may differ by `rounding` times the largest entry.
    """
    composed = layerwise(module)
    called: list[str] = []
    for path, child in composed.named_modules():
        if path:
            child.register_forward_hook(lambda *_, path=path: called.append(path))
    (y, grads), (composed_y, composed_grads) = outcome(module, call), outcome(composed, call)
    assert set(called) == {path for path, _ in composed.named_modules() if path}
    assert grads.keys() == composed_grads.keys() == {name for name, _ in module.named_parameters()}
    for one, other in zip([*y, *grads.values()], [*composed_y, *composed_grads.values()], strict=True):
        if rounding:
            assert (one - other).abs().max() <= rounding * one.abs().max()
        else:
            assert torch.equal(one, other)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CAUSAL = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
PADDED = torch.zeros(2, 4, dtype=torch.bool)
PADDED[1, 2:] = True
Q, K = randn(5, 2, 12), randn(4, 2, 12, seed=1)
ATTENTION: dict[str, Call] = {
    "self": lambda m: m(Q, Q, Q),
    "self without weights": lambda m: m(Q, Q, Q, need_weights=False),
    "weights of every head": lambda m: m(Q, Q, Q, average_attn_weights=False),
    "causal": lambda m: m(Q, Q, Q, need_weights=False, attn_mask=CAUSAL, is_causal=True),
    "causal with weights": lambda m: m(Q, Q, Q, attn_mask=CAUSAL, is_causal=True),
    "float mask of every head": lambda m: m(Q, Q, Q, need_weights=False, attn_mask=randn(6, 5, 5)),
    "cross": lambda m: m(Q, K, 2 * K),
    "keys are values": lambda m: m(Q, K, K, need_weights=False),
    "padding": lambda m: m(Q, K, 2 * K, key_padding_mask=PADDED),
    "padding and mask": lambda m: m(Q, K, 2 * K, need_weights=False, key_padding_mask=PADDED, attn_mask=randn(5, 4) > 1),
    "float padding and float mask": lambda m: m(Q, K, K, key_padding_mask=-3 * PADDED.float(), attn_mask=randn(5, 4)),
}


@pytest.mark.parametrize("call", ATTENTION)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"add_bias_kv": True, "add_zero_attn": True},
        {"dropout": 0.3},
    ],
    ids=str,
)
def test_attention_matches_torch(options: dict[str, Any], call: str) -> None:
    # If the keys are also the values, PyTorch projects them with one product.
    require_equal(
        nn.MultiheadAttention(12, 3, **options),
        ATTENTION[call],
        1e-6 if call in ("keys are values", "float padding and float mask") else 0,
    )


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_attention_masks_use_model_dtype(dtype: torch.dtype, need_weights: bool) -> None:
    q, k = Q.to(dtype), K.to(dtype)
    masks = {"key_padding_mask": PADDED, "attn_mask": CAUSAL[:, :4]}

    def call(attention: nn.Module) -> Any:
        return attention(q, k, 2 * k, need_weights=need_weights, **masks)

    require_equal(nn.MultiheadAttention(12, 3).to(dtype), call, 10 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("need_weights", [True, False])
def test_is_causal_without_mask_raises_like_torch(need_weights: bool) -> None:
    plain = nn.MultiheadAttention(12, 3)
    for module in (plain, layerwise(plain)):
        with pytest.raises(RuntimeError, match="is_causal"):
            module(Q, Q, Q, need_weights=need_weights, is_causal=True)


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_batch_first_kdim_and_unbatched_match_torch(need_weights: bool) -> None:
    q, k, v = randn(2, 5, 12), randn(2, 4, 7, seed=1), randn(2, 4, 9, seed=2)
    require_equal(nn.MultiheadAttention(12, 3, batch_first=True), lambda m: m(q, q, q, need_weights=need_weights), 0)
    own = nn.MultiheadAttention(12, 3, kdim=7, vdim=9, batch_first=True)
    require_equal(own, lambda m: m(q, k, v, PADDED, need_weights=need_weights), 0)
    require_equal(nn.MultiheadAttention(12, 3), lambda m: m(q[0], q[0], q[0], None, need_weights, CAUSAL), 1e-6)
    require_equal(nn.MultiheadAttention(12, 3, kdim=7, vdim=9), lambda m: m(q[1], k[1], v[1], PADDED[1], need_weights), 1e-6)


def test_attention_rejects_invalid_masks() -> None:
    module = layerwise(nn.MultiheadAttention(12, 3))
    for arguments in ({"attn_mask": CAUSAL[:1]}, {"attn_mask": randn(2, 5, 5)}, {"is_causal": True}):
        with pytest.raises(RuntimeError, match="attn_mask"):
            module(Q, Q, Q, **arguments)


SEQUENCES = [randn(length, 4, seed=length) for length in (3, 5, 2)]


def of_packed(module: nn.Module, initial: Any = None) -> Any:
    y, state = module(pack_sequence(SEQUENCES, enforce_sorted=False), initial)
    assert isinstance(y, PackedSequence)
    return y.data, state


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        *(
            (cls, options)
            for cls in (nn.LSTM, nn.GRU, nn.RNN)
            for options in (
                {},
                {"num_layers": 2, "dropout": 0.4},
                {"num_layers": 2, "bidirectional": True},
                {"batch_first": True, "bias": False},
            )
        ),
        (nn.LSTM, {"proj_size": 3, "num_layers": 2, "bidirectional": True}),
        (nn.RNN, {"nonlinearity": "relu"}),
    ],
    ids=str,
)
def test_recurrent_modules_match_torch(cls: Any, options: dict[str, Any]) -> None:
    module, x = cls(4, 6, **options), randn(3, 5, 4)
    depth = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)

    def initial(batch: int | None) -> Any:
        size = [depth, batch] if batch else [depth]
        h = randn(*size, options.get("proj_size", 6), seed=1)
        return (h, randn(*size, 6, seed=2)) if cls is nn.LSTM else h

    # PyTorch's fused kernels sum in a different order.
    batch, rounding = 3 if options.get("batch_first") else 5, 1e-5
    require_equal(module, lambda m: m(x), rounding)
    require_equal(module, lambda m: m(x, initial(batch)), rounding)
    require_equal(module, lambda m: m(x[0], initial(None)), rounding)
    require_equal(module, of_packed, rounding)
    require_equal(module, lambda m: of_packed(m, initial(3)), rounding)


@pytest.mark.parametrize("cls", [nn.LSTMCell, nn.GRUCell, nn.RNNCell, lambda *sizes: nn.RNNCell(*sizes, nonlinearity="relu")])
def test_recurrent_cells_match_torch(cls: Any) -> None:
    module, x, h = cls(4, 6), randn(3, 4), randn(3, 6, seed=1)
    require_equal(module, lambda m: m(x), 1e-6)
    require_equal(module, lambda m: m(x, (h, 2 * h) if isinstance(m, nn.LSTMCell) else h), 1e-6)
    require_equal(module, lambda m: m(x[0]), 1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_bilinear_matches_torch(bias: bool) -> None:
    require_equal(nn.Bilinear(3, 4, 5, bias=bias), lambda m: m(randn(2, 7, 3), randn(2, 7, 4, seed=1)), 1e-5)


def test_layers_run_only_in_training_of_layerwise_rules() -> None:
    module = nn.MultiheadAttention(12, 3)
    composed, mode = copy.deepcopy(module), Mode("test", layerwise=True)
    expand(composed, mode)
    called: list[Any] = []
    composed.in_proj.register_forward_hook(lambda *_: called.append(1))  # type: ignore[union-attr]
    with torch.no_grad():
        assert torch.equal(composed(Q, Q, Q)[0], module(Q, Q, Q)[0]) and not called
        mode.training = True
        assert torch.equal(composed(Q, Q, Q)[0], module(Q, Q, Q)[0]) and called.pop()
    mode.training, mode.layerwise = False, False
    assert composed(Q, Q, Q)[0].requires_grad and not called


@pytest.mark.parametrize(
    ("module", "call"),
    [
        (nn.MultiheadAttention(12, 3, dropout=0.5), lambda m: m(Q, Q, Q)[0]),
        (nn.MultiheadAttention(12, 3, dropout=0.5), lambda m: m(Q, Q, Q, need_weights=False)[0]),
        (nn.LSTM(12, 6, num_layers=2, dropout=0.5), lambda m: m(Q)[0]),
    ],
    ids=["attention with weights", "attention", "LSTM"],
)
def test_evaluation_with_gradients_has_no_dropout(module: nn.Module, call: Any) -> None:
    composed = layerwise(copy.deepcopy(module.eval()))
    torch.testing.assert_close(call(composed), call(module))


def test_layers_are_in_the_order_of_use() -> None:
    assert [name for name, _ in layerwise(nn.MultiheadAttention(12, 3)).named_children()] == ["in_proj", "out_proj"]


def test_module_with_custom_forward_is_unchanged() -> None:
    """A user's forward function may use the weights in any way, so the module is left unchanged."""
    module = nn.Bilinear(3, 4, 5)
    module.forward = lambda one, two: one.sum() + two.sum()  # type: ignore[method-assign]
    expand(module, Mode("test", layerwise=True))
    assert type(module) is nn.Bilinear and not list(module.children())


def test_expanded_model_is_copyable_and_contract_restores_it() -> None:
    parts = nn.ModuleList([nn.LSTM(4, 6), nn.GRUCell(4, 6), nn.Bilinear(3, 4, 5)])
    model: Any = nn.Sequential(nn.TransformerEncoderLayer(12, 3, 8), parts)
    before = {
        path: (type(module), {key for key in vars(module) if key != "_modules"}, list(module._modules))
        for path, module in model.named_modules()
    }
    parameters = dict(model.named_parameters())
    expand(model, Mode("test", layerwise=True))
    assert sum(isinstance(module, Compound) for module in model.modules()) == 4
    assert list(model.state_dict()) == list(parameters) and dict(model.named_parameters()).keys() == parameters.keys()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied[1][0].ih_l0.weight is copied[1][0].weight_ih_l0
        assert copied[1][0].ih_l0.weight is not parameters["1.0.weight_ih_l0"]
    contract(model)
    assert before == {
        path: (type(module), {key for key in vars(module) if key != "_modules"}, list(module._modules))
        for path, module in model.named_modules()
    }
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
