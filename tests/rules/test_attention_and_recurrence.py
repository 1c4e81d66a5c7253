"""Tests of edge rules on attention, recurrent and bilinear modules, compared with plain loops and with backpropagation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fa_bench import attach
from fa_bench.errors import CoverageError
from fa_bench.mechanisms.weighted_layers import bias_name, weight_name
from tests.versions import needs_compiler

from .sequences import Layer, Rows, added, attention, bilinear, gru, lstm, packed, rnn

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
]
RULES: dict[str, dict[str, Any]] = {
    "fa": {},
    "kp": {},
    "usf": {"density": 0.7},
    "pfa": {"ratio": 1.5},
    "mixed": {"pfa": 0.4, "fa": 0.3, "kp": 0.3},
}


class Attends(nn.Module):
    """A model with a 4-6 linear layer, attention with two heads, and a 6-3 linear layer.

    With cross-attention, separate linear layers compute the keys and the values from all time steps except the last.
    """

    def __init__(self, cross: bool, **options: Any) -> None:
        super().__init__()
        self.first, self.core, self.last = nn.Linear(4, 6), nn.MultiheadAttention(6, 2, **options), nn.Linear(6, 3)
        self.cross = cross
        if cross:
            self.keys = nn.Linear(4, options.get("kdim", 6))
            self.values = nn.Linear(4, options.get("vdim", 6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        k, v = (self.keys(x[:-1]), self.values(x[:-1])) if self.cross else (h, h)
        return self.last(self.core(h, k, v, need_weights=False)[0])


class Recurs(nn.Module):
    """A model with a 4-5 linear layer, a recurrent module with `width` outputs, and a linear layer to 2 features."""

    def __init__(self, core: nn.Module, width: int = 3) -> None:
        super().__init__()
        self.first, self.core, self.last = nn.Linear(4, 5), core, nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.core(self.first(x))[0])


class Multiplies(nn.Module):
    """A model with two linear layers (4-3 and 4-5) and a bilinear module that combines their outputs into 2 features."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.core = nn.Linear(4, 3), nn.Linear(4, 5), nn.Bilinear(3, 5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.core(self.first(x), self.second(x))


X = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def made(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = make().double()
        for name, parameter in model.named_parameters():
            if "bias" in name:  # attention initialises its biases to zero
                nn.init.normal_(parameter)
    return model


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy().copy()


def effective(name: str, tensors: dict[str, Tensor], weight: np.ndarray) -> np.ndarray:
    """The effective feedback of a layer, computed from the rule's equations."""
    t = {key: array(value) for key, value in tensors.items()}
    if name in ("fa", "kp"):
        return t["B"]
    if name == "usf":
        scale = np.sqrt(2 / sum(weight.shape))
        return scale * np.sign(weight) * t["mask"]
    if name == "pfa":
        return t["B"] @ t["R"]
    return t["mask_pfa"] * (t["B"] @ t["R"]) + t["mask_fa"] * t["F"] + t["mask_kp"] * t["K"]


def layers_of(model: nn.Module, rule: Any, name: str) -> dict[str, Layer]:
    layers = {}
    for path, tensors in rule.feedback.items():
        module: Any = model.get_submodule(path)
        layers[path] = Layer(array(module.weight), array(module.bias), effective(name, tensors, array(module.weight)))
    return layers


def errors(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=y.dtype)


def require_gradients(model: nn.Module, rule: Any, name: str, layers: dict[str, Layer]) -> None:
    """Require that the gradients of weights, biases and learned feedback equal those of the reference."""
    for path, layer in layers.items():
        module: Any = model.get_submodule(path)
        weight = model.get_parameter(weight_name(path, module)).grad
        bias = model.get_parameter(bias_name(path, module) or "").grad
        assert weight is not None and bias is not None
        np.testing.assert_allclose(weight.flatten(1), layer.grad_weight, rtol=1e-9, atol=1e-12)
        rows = getattr(module, "bias_rows", None) or slice(None)
        np.testing.assert_allclose(bias[rows], layer.grad_bias, rtol=1e-9, atol=1e-12)
        learned = {key: tensor.grad for key, tensor in rule.feedback[path].items() if tensor.grad is not None}
        wanted = {"B": layer.grad_weight} if name == "kp" else {}
        if name in ("pfa", "mixed"):
            wanted["R"] = array(rule.feedback[path]["B"]).T @ layer.grad_weight
        if name == "mixed":
            wanted["K"] = layer.grad_weight
        assert learned.keys() == wanted.keys()
        for key, gradient in learned.items():
            np.testing.assert_allclose(gradient, wanted[key], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("cross", "sizes"), [(False, {}), (True, {}), (True, {"kdim": 5, "vdim": 7})], ids=str)
def test_attention_matches_reference(name: str, cross: bool, sizes: dict[str, int]) -> None:
    model = made(lambda: Attends(cross, **sizes))
    rule = attach(model, name, sample_input=X, **RULES[name])
    layers = layers_of(model, rule, name)
    projections = [(layers[f"core.{part}_proj"], range(6)) for part in "qkv"] if sizes else packed(layers["core.in_proj"])
    y = model(X)
    delta = errors(y)
    (y * delta).sum().backward()
    for n in range(X.shape[1]):
        x = [[*map(float, row)] for row in X[:, n]]
        h = [layers["first"].forward(row) for row in x]
        k, v = ([layers[part].forward(row) for row in x[:-1]] if cross else h for part in ("keys", "values"))
        contexts = attended(projections, layers["core.out_proj"], h, k, v)
        g = [layers["last"].backward(context, [*map(float, row)]) for context, row in zip(contexts, delta[:, n], strict=True)]
        g_q, g_k, g_v = attention(projections, layers["core.out_proj"], h, k, v, 2, g)
        if not cross:
            g_q = [added(*three) for three in zip(g_q, g_k, g_v, strict=True)]
        for t, row in enumerate(x):
            layers["first"].backward(row, g_q[t])
            if cross and t < len(k):
                layers["keys"].backward(row, g_k[t])
                layers["values"].backward(row, g_v[t])
    require_gradients(model, rule, name, layers)


def attended(projections: list[Rows], output: Layer, q: list, k: list, v: list) -> list[list[float]]:
    """The outputs of attention with two heads of three features."""
    results = []
    q, k, v = ([layer.forward(x, rows) for x in sequence] for (layer, rows), sequence in zip(projections, (q, k, v), strict=True))
    for query in q:
        context: list[float] = []
        for head in (range(3), range(3, 6)):
            scores = np.array([sum(query[f] * key[f] for f in head) for key in k]) / np.sqrt(3)
            weights = np.exp(scores) / np.exp(scores).sum()
            context += [float(sum(w * value[f] for w, value in zip(weights, v, strict=True))) for f in head]
        results.append(output.forward(context))
    return results


#: Maps each module to the function that creates it, the names of its layers, and its reference implementation.
RECURRENT: dict[str, tuple[Callable[[], nn.Module], tuple[str, str], Callable[..., Any]]] = {
    "LSTM": (lambda: nn.LSTM(5, 3), ("core.ih_l0", "core.hh_l0"), lstm),
    "GRU": (lambda: nn.GRU(5, 3), ("core.ih_l0", "core.hh_l0"), gru),
    "RNN": (lambda: nn.RNN(5, 3), ("core.ih_l0", "core.hh_l0"), rnn),
    "LSTM cell": (lambda: Steps(nn.LSTMCell(5, 3)), ("core.cell.ih", "core.cell.hh"), lstm),
    "GRU cell": (lambda: Steps(nn.GRUCell(5, 3)), ("core.cell.ih", "core.cell.hh"), gru),
    "RNN cell": (lambda: Steps(nn.RNNCell(5, 3)), ("core.cell.ih", "core.cell.hh"), rnn),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_modules_match_reference(kind: str, name: str) -> None:
    make, (ih, hh), reference = RECURRENT[kind]
    model = made(lambda: Recurs(make()))
    rule = attach(model, name, sample_input=X, **RULES[name])
    layers = layers_of(model, rule, name)
    y = model(X)
    delta = errors(y)
    (y * delta).sum().backward()
    with torch.no_grad():
        states = model.core(model.first(X))[0]  # without gradients, the plain module runs  # type: ignore[operator]
    for n in range(X.shape[1]):
        x = [[*map(float, row)] for row in X[:, n]]
        h = [layers["first"].forward(row) for row in x]
        g = [
            layers["last"].backward([*map(float, state)], [*map(float, row)])
            for state, row in zip(states[:, n], delta[:, n], strict=True)
        ]
        for row, error in zip(x, reference(layers[ih], layers[hh], h, g), strict=True):
            layers["first"].backward(row, error)
    require_gradients(model, rule, name, layers)


@pytest.mark.parametrize("name", RULES)
def test_bilinear_module_matches_reference(name: str) -> None:
    model = made(Multiplies)
    rule = attach(model, name, sample_input=X, **RULES[name])
    layers = layers_of(model, rule, name)
    y = model(X)
    delta = errors(y)
    (y * delta).sum().backward()
    for row, error in zip(X.flatten(0, 1), delta.flatten(0, 1), strict=True):
        x = [*map(float, row)]
        x1, x2 = layers["first"].forward(x), layers["second"].forward(x)
        g1, g2 = bilinear(layers["core.product"], x1, x2, [*map(float, error)])
        layers["first"].backward(x, g1)
        layers["second"].backward(x, g2)
    require_gradients(model, rule, name, layers)


class Steps(nn.Module):
    """A recurrent cell in a user-defined loop over time steps."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        state, outputs = None, []
        for step in x:
            state = self.cell(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs), None


MODELS: dict[str, Callable[[], nn.Module]] = {
    "self attention": lambda: Attends(False),
    "attention with dropout": lambda: Attends(False, dropout=0.3, add_bias_kv=True),
    "cross attention": lambda: Attends(True, add_zero_attn=True),
    "keys of another size": lambda: Attends(True, kdim=5, vdim=7),
    "LSTM": lambda: Recurs(nn.LSTM(5, 3, 2, dropout=0.3)),
    "projected LSTM": lambda: Recurs(nn.LSTM(5, 4, bidirectional=True, proj_size=2), 4),
    "GRU": lambda: Recurs(nn.GRU(5, 3)),
    "RNN": lambda: Recurs(nn.RNN(5, 3, nonlinearity="relu")),
    "LSTM cell": lambda: Recurs(Steps(nn.LSTMCell(5, 3))),
    "GRU cell": lambda: Recurs(Steps(nn.GRUCell(5, 3))),
    "bilinear": Multiplies,
    "encoder layer": lambda: nn.Sequential(nn.Linear(4, 6), nn.TransformerEncoderLayer(6, 2, 7), nn.Linear(6, 2)),
    "transformer": lambda: Translates(),
}


class Translates(nn.Module):
    """A transformer with masks in the encoder and the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.core = nn.Linear(4, 6), nn.Transformer(6, 2, 1, 1, 7, dropout=0.2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        mask = nn.Transformer.generate_square_subsequent_mask(len(x), dtype=x.dtype)
        return self.core(h, h[:2], tgt_mask=mask[:2, :2], src_mask=mask, tgt_is_causal=True)


def gradients(model: nn.Module, autocast: bool = False) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(X.to(next(model.parameters()).dtype))
    (y * errors(y)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and "feedback" not in name}


def with_weights_as_feedback(name: str, kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    model = made(MODELS[kind]).to(dtype)
    rule = attach(model, name, sample_input=X.to(dtype))
    with torch.no_grad():
        for path, tensors in rule.feedback.items():
            tensors["B"].copy_(model.get_submodule(path).weight)  # type: ignore[arg-type]
    return model, rule


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ["fa", "kp"])
def test_weights_as_feedback_match_backprop(name: str, kind: str) -> None:
    model, rule = with_weights_as_feedback(name, kind)
    found = gradients(model)
    with rule.exact():
        exact = gradients(model)
    plain = gradients(rule.detach())
    assert found.keys() == exact.keys() == plain.keys() == {name for name, _ in model.named_parameters()}
    for key, gradient in found.items():
        # The result is bitwise identical to that of an exact pass, but fused kernels in the plain module sum in another order.
        assert torch.equal(gradient, exact[key])
        assert (gradient - plain[key]).abs().max() <= 1e-5 * plain[key].abs().max() + 1e-7


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ["fa", "kp"])
def test_weights_as_feedback_match_backprop_under_autocast(name: str, kind: str) -> None:
    model, rule = with_weights_as_feedback(name, kind)
    found = gradients(model, autocast=True)
    with rule.exact():
        exact = gradients(model, autocast=True)
    for key, gradient in found.items():
        # If a layer runs several times, PyTorch accumulates its gradients in bfloat16, which rounds with an error of up to 1/256.
        assert (gradient - exact[key]).abs().max() <= 0.02 * exact[key].abs().max()


@pytest.mark.parametrize("kind", MODELS)
def test_train_eval_load_and_detach(kind: str) -> None:
    model = made(MODELS[kind]).float()
    names = list(model.state_dict())
    rule = attach(model, "kp", sample_input=X.float())
    assert not rule.coverage.uncovered and len(rule.coverage.covered) == len(rule.feedback)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        gradients(model)
        optimizer.step()
        rule.step()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.any():
            assert not torch.equal(before[name], parameter), name
    with torch.no_grad():
        model.eval()(X.float())
    restored = made(MODELS[kind]).float()
    attach(restored, "kp", sample_input=X.float(), seed=3)
    restored.load_state_dict(model.state_dict())
    plain = rule.detach()
    assert list(plain.state_dict()) == names


def test_coverage_lists_module_type_and_weight_shape() -> None:
    model = made(lambda: Recurs(nn.LSTM(5, 3)))
    text = str(attach(model, "fa", sample_input=X).coverage)
    assert "core.ih_l0" in text and "LSTM" in text and "12x5" in text and "every weight" in text


@pytest.mark.parametrize("name", ["asap", "asfp", "forward_alignment"])
def test_single_run_rules_reject_recurrent_modules(name: str) -> None:
    with pytest.raises(CoverageError, match=r"hh_l0.* runs 3 times"):
        attach(made(lambda: Recurs(nn.LSTM(5, 3))), name, sample_input=X)


@pytest.mark.parametrize("name", ["fa", "wm", "forward_alignment", "brsf"])
def test_rules_with_extra_passes_train_attention_with_finite_gradients(name: str) -> None:
    options: dict[str, Any] = {"initial_steps": 1} if name == "wm" else {}
    model = made(lambda: Attends(False, dropout=0.5))
    rule = attach(model, name, sample_input=X, **options)
    for _ in range(2):
        y = model(X)
        rule.backward((y * errors(y)).sum())
        rule.step()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@needs_compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_model_gradients_match_eager() -> None:
    model = made(lambda: nn.Sequential(Attends(False), nn.Linear(3, 4), Recurs(nn.LSTM(5, 3)))).float()
    attach(model, "fa", sample_input=X.float())
    found = gradients(model)
    compiled: Any = torch.compile(model, backend="aot_eager")
    for key, gradient in gradients(compiled).items():
        assert torch.allclose(gradient, found[key.removeprefix("_orig_mod.")], rtol=1e-5, atol=1e-6)


def test_dfa_cuts_inside_attention_module() -> None:
    model = made(lambda: Attends(False))
    rule: Any = attach(model, "dfa", sample_input=X, cuts=["first", "core.in_proj", "core.out_proj"], seed=3)
    y = model(X)
    delta = errors(y)
    rule.backward((y * delta).sum(), y)
    with torch.no_grad():
        h: Any = model.first(X)  # type: ignore[operator]
        g = delta @ rule.feedback["core.in_proj"]["B"]
        wanted = g.flatten(0, 1).t() @ h.flatten(0, 1)
    assert torch.allclose(model.core.in_proj_weight.grad, wanted, rtol=1e-9)  # type: ignore[union-attr, arg-type]


def test_rejects_recurrent_weight_used_outside_its_layer() -> None:
    class Tied(Recurs):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) @ self.core.weight_hh_l0[:2]  # type: ignore[index]

    with pytest.raises(CoverageError, match=r"core.weight_hh_l0 \(used outside its layer"):
        attach(made(lambda: Tied(nn.LSTM(5, 3))), "fa", sample_input=X)
