"""Tests of modules whose weights most rules do not cover: refusals, the advice in errors, and weights that propagate no error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fa_bench
from fa_bench.errors import CoverageError
from fa_bench.mechanisms.coverage import is_weight
from tests.mechanisms.loops.chain import CHANGES_INPUT, COVERS_ALL, COVERS_BLOCKS, CUT_RULES, RULES, attach, gradients

TOKENS = torch.arange(60).reshape(12, 5) % 11
Y = torch.arange(12) % 3
FREE = ("bp", "bp_deepsup", "bp_fc", "frozen", "frozen_blocks")
COVERING = [name for name in RULES if name not in (*FREE, *COVERS_BLOCKS, *CHANGES_INPUT, *COVERS_ALL)]


def own(cls: type[nn.Module]) -> Any:
    """A user's subclass of a module; most rules do not cover its weights, because its forward pass is unknown."""
    return type(f"Own{cls.__name__}", (cls,), {})


class Cells(nn.Module):
    """Applies a recurrent cell step by step and returns its last state."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, h: Tensor) -> Tensor:
        state = None
        for step in h.unbind(1):
            state = self.cell(step, state)
        last = state[0] if isinstance(state, tuple) else state
        assert last is not None
        return last.unsqueeze(1)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = own(nn.MultiheadAttention)(8, 2, batch_first=True)

    def forward(self, h: Tensor) -> Tensor:
        return self.attention(h, h, h, need_weights=False)[0]


class Multiplies(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both = own(nn.Bilinear)(8, 8, 8)

    def forward(self, h: Tensor) -> Tensor:
        return self.both(h, h)


LAYERED, STEPPED = ["core.weight_ih_l0", "core.weight_hh_l0"], ["core.cell.weight_ih", "core.cell.weight_hh"]
#: Maps a name to a function that creates the module, and to the names of its weights in a `Reader`.
MODULES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    **{cls.__name__: (lambda cls=cls: own(cls)(8, 8, batch_first=True), LAYERED) for cls in (nn.LSTM, nn.GRU, nn.RNN)},
    **{cls.__name__: (lambda cls=cls: Cells(own(cls)(8, 8)), STEPPED) for cls in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)},
    "MultiheadAttention": (Attends, ["core.attention.in_proj_weight", "core.attention.out_proj.weight"]),
    "Bilinear": (Multiplies, ["core.both.weight"]),
}


class Reader(nn.Module):
    """Embeds tokens and adds their positions, applies `core`, then maps the mean to three classes with layers of widths
    8-16-16-3."""

    def __init__(self, core: nn.Module | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.emb, self.pos = nn.Embedding(11, 8), nn.Parameter(0.1 * torch.randn(5, 8))
            self.fc, self.fc2, self.out = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.embedded, self.core = nn.Identity(), core or nn.Identity()
        self.act, self.act2 = nn.ReLU(), nn.ReLU()
        self.cut_points, self.blocks = ["embedded", "act", "act2"], ["act", "act2"]

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.embedded(self.emb(tokens) + self.pos)
        h = self.core(h if mask is None else h * mask.unsqueeze(-1))
        h = h[0] if isinstance(h, tuple) else h
        return self.out(self.act2(self.fc2(self.act(self.fc(h.mean(1))))))


def learn(model: nn.Module, rule: Any) -> dict[str, Tensor]:
    logits = model(TOKENS)
    rule.backward(F.cross_entropy(logits, Y), logits, Y, indices=torch.arange(len(Y)))
    return gradients(model)


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("name", COVERING)
def test_uncovered_error_lists_weights_and_suggests_working_fix(name: str, kind: str) -> None:
    make, weights = MODULES[kind]
    if name == "dual_propagation" and kind.startswith(("LSTM", "GRU", "RNN")):
        with pytest.raises(CoverageError, match=r"computes ((sigmoid, )?tanh|lstm) outside of supported modules"):
            attach(Reader(make()), name, sample_input=TOKENS[:2])
        return
    with pytest.raises(CoverageError, match="leaves weights uncovered") as refused:
        attach(Reader(make()), name, sample_input=TOKENS[:2])
    for weight in weights:
        assert f"{weight} (in a" in str(refused.value)
    assert str(refused.value).endswith(f"pass allow_uncovered={weights!r}")
    for allowed in (True, weights, ["core.*"]):
        model = Reader(make())
        # A fused LSTM has no forward-mode derivative. An LSTM that a rule covers is not fused.
        options = {"tangents": "difference"} if kind == "LSTM" and name in ("fdfa", "grape", "forward_gradient") else {}
        rule = attach(model, name, sample_input=TOKENS[:2], allow_uncovered=allowed, **options)
        assert set(rule.coverage.uncovered) == set(weights) and "weight transport" in str(rule.coverage)
        if name not in CUT_RULES:
            assert set(weights) <= set(learn(model, rule))
    with pytest.raises(CoverageError, match="leaves weights uncovered"):
        attach(Reader(make()), name, sample_input=TOKENS[:2], allow_uncovered=["fc.*"])


@pytest.mark.parametrize("kind", MODULES)
def test_error_explains_model_without_covered_layers(kind: str) -> None:
    make, _ = MODULES[kind]
    with pytest.raises(CoverageError, match=r"covers no layer of this model.*is a user-defined subclass"):
        attach(nn.Sequential(make()), "fa")


@pytest.mark.parametrize("name", COVERING)
def test_embeddings_and_position_tables_are_local(name: str) -> None:
    model = Reader()
    rule = attach(model, name, sample_input=TOKENS[:2])
    assert rule.coverage.uncovered == {} and set(rule.coverage.local) == {"emb.weight", "pos"}
    assert "looked up" in rule.coverage.local["emb.weight"] and "only added" in rule.coverage.local["pos"]
    assert "propagates no error" in str(rule.coverage) and "every weight" in str(rule.coverage)
    found = learn(model, rule)
    assert found["emb.weight"].abs().sum() > 0 and found["pos"].abs().sum() > 0


@pytest.mark.parametrize(
    ("table", "local"),
    [
        (lambda net, h: h + 0.5 * net.pos, True),
        (lambda net, h: torch.cat([net.pos.expand_as(h), h], 1), True),
        (lambda net, h: torch.where(h > 0, h, net.pos), True),
        (lambda net, h: torch.stack([h, net.pos.expand_as(h)]).sum(0), True),
        (lambda net, h: h - net.pos.flip(0), True),
        (lambda net, h: h * net.pos, False),
        (lambda net, h: h @ net.pos.t() @ net.pos, False),
        (lambda net, h: h @ (net.pos.tanh() - net.pos).t() @ net.pos.detach(), False),
    ],
    ids=[
        "scaled and added",
        "concatenated",
        "chosen",
        "stacked",
        "subtracted",
        "multiplied",
        "matrix product",
        "a weight made of it",
    ],
)
@pytest.mark.parametrize("name", ["fa", "kp", "dfa", "asap"])
def test_position_table_is_local_unless_multiplied(name: str, table: Callable[[Reader, Tensor], Tensor], local: bool) -> None:
    class Tabled(Reader):
        def forward(self, tokens: Tensor, mask: Any = None) -> Tensor:
            return self.out(self.act2(self.fc2(self.act(self.fc(self.embedded(table(self, self.emb(tokens))).mean(1))))))

    if local:
        assert "pos" in attach(Tabled(), name, sample_input=TOKENS[:2]).coverage.local
    else:
        with pytest.raises(CoverageError, match=r"pos \(in a Tabled\)"):
            attach(Tabled(), name, sample_input=TOKENS[:2])


class Speaker(nn.Module):
    """Shares the head's weight with the embedding, which is a module or a function."""

    def __init__(self, by_function: bool) -> None:
        super().__init__()
        self.by_function = by_function
        self.emb, self.fc, self.fc2 = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.embedded, self.act, self.act2 = nn.Identity(), nn.ReLU(), nn.ReLU()
        self.head.weight = self.emb.weight
        self.cut_points, self.blocks = [*([] if by_function else ["embedded"]), "act", "act2"], ["act", "act2"]

    def forward(self, tokens: Tensor) -> Tensor:
        h = F.embedding(tokens, self.head.weight) if self.by_function else self.emb(tokens)
        return self.head(self.act2(self.fc2(self.act(self.fc(self.embedded(h).mean(1))))))


@pytest.mark.parametrize("by_function", [False, True], ids=["module", "function"])
@pytest.mark.parametrize("name", COVERING)
def test_head_tied_to_embedding_is_covered(name: str, by_function: bool) -> None:
    model = Speaker(by_function)
    rule = attach(model, name, sample_input=TOKENS[:2])
    assert rule.coverage.uncovered == {}
    logits = model(TOKENS)
    rule.backward(F.cross_entropy(logits, Y), logits, Y, indices=torch.arange(len(Y)))
    assert model.head.weight is model.emb.weight and model.head.weight.grad is not None


@pytest.mark.parametrize("name", CHANGES_INPUT)
def test_input_changing_rules_reject_tokens(name: str) -> None:
    with pytest.raises(CoverageError, match=r"the model's first argument, which must be a floating-point tensor"):
        attach(Reader(), name, sample_input=TOKENS[:2])


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("name", COVERS_ALL)
def test_rules_without_errors_cover_all_modules(name: str, kind: str) -> None:
    model = Reader(MODULES[kind][0]())
    rule = attach(model, name, sample_input=TOKENS[:2])
    assert rule.coverage.uncovered == {}
    assert set(learn(model, rule)) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("name", RULES)
def test_lazy_layers_are_rejected_until_initialised(name: str) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.LazyLinear(16), nn.ReLU(), nn.Linear(16, 3))
    model.cut_points = model.blocks = ["1", "3"]
    x = torch.linspace(-1, 1, 96).reshape(12, 8)
    for sample in (None, x):
        with pytest.raises(
            CoverageError, match=r"'2' \(LazyLinear\) has no weight or buffers yet; run one forward pass, then attach"
        ):
            attach(model, name, sample_input=sample)
        assert type(model[2]) is nn.LazyLinear
    model(x)
    assert attach(model, name).coverage.uncovered == {}


# ------------------------------------------------------------------------------------------------ samples
@pytest.mark.parametrize(
    "sample",
    [
        TOKENS[:2],
        (TOKENS[:2],),
        [TOKENS[:2], torch.ones(2, 5)],
        {"tokens": TOKENS[:2]},
        {"mask": torch.ones(2, 5), "tokens": TOKENS[:2]},
    ],
    ids=["tensor", "tuple", "list", "dictionary", "dictionary of two"],
)
@pytest.mark.parametrize("name", COVERING)
def test_sample_input_accepts_tensor_sequence_and_dict(name: str, sample: Any) -> None:
    rule = attach(Reader(), name, sample_input=sample)
    assert rule.coverage == attach(Reader(), name, sample_input=TOKENS[:2]).coverage


@pytest.mark.parametrize("name", COVERING)
def test_token_model_requires_sample_input(name: str) -> None:
    """In place of a sample, attach may use zeros, which are not tokens. Rules that must observe a forward pass ask for a sample;
    the others refuse the position table, because they do not observe how it is used."""
    model = Reader()
    with pytest.raises(CoverageError, match=r"needs sample_input, one input batch|uncovered: pos \(in a Reader\)"):
        attach(model, name)
    assert fa_bench.attached_rule(model) is None
    attach(model, name, sample_input=TOKENS[:2])


def test_invalid_sample_input_raises_model_error() -> None:
    with pytest.raises(TypeError, match="words"):
        attach(Reader(), "fa", sample_input={"words": TOKENS[:2]})


@pytest.mark.parametrize(
    ("shape", "weight"),
    [
        ((4,), False),
        ((), False),
        ((4, 1, 1), False),
        ((1, 1, 5), False),
        ((3, 2), True),
        ((1, 1), True),
        ((1, 5, 4), True),
        ((5, 1, 4, 1), True),
        ((2, 3, 4), True),
    ],
    ids=str,
)
def test_is_weight_depends_on_shape(shape: tuple[int, ...], weight: bool) -> None:
    assert is_weight("table", torch.empty(shape)) is weight
    assert not is_weight("feedback_B", torch.empty(shape))


def test_error_names_matmul_use_of_tied_embedding() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.mix, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
            self.head.weight = self.emb.weight

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.mix(self.emb(tokens).mean(1))
            return self.head(x) + x @ self.emb.weight.t()

    with pytest.raises(CoverageError, match=r"head\.weight \(used outside its layer, by (matmul|__matmul__|t)\(\) in the model"):
        attach(Tied(), "fa", sample_input=TOKENS[:2])


def test_unused_embedding_is_local() -> None:
    """An embedding that the sample's forward pass does not use is accepted, because a look-up propagates no error."""

    class Unused(Reader):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Embedding(7, 8)

    coverage = attach(Unused(), "fa", sample_input=TOKENS[:2]).coverage
    assert coverage.local["spare.weight"] == "in an Embedding, looked up" and not coverage.uncovered


def test_error_includes_package_of_torch_namesake() -> None:
    """A subclass with the name of torch's class, such as timm's Linear, is named with its package, because "in a Linear" would
    not explain why it is not covered."""
    other = type("Linear", (nn.Linear,), {"__module__": "vendor.layers"})
    with pytest.raises(CoverageError, match=r"1\.weight \(in a vendor\.layers\.Linear\)"):
        fa_bench.attach(nn.Sequential(nn.Linear(3, 3), other(3, 2)), "fa")


@pytest.mark.parametrize("name", ["fa", "kp"])
@pytest.mark.parametrize("path", ["0", "1"])
def test_rejects_module_with_replaced_forward(name: str, path: str) -> None:
    """A tool that moves weights between devices may replace the forward method. The new method calls the original one, which
    transports the weight."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4), nn.Identity())
    module = model.get_submodule(path)
    plain = module.forward
    module.forward = lambda *args: plain(*args)  # type: ignore[method-assign]
    with pytest.raises(CoverageError, match=rf"{path}\.weight.* \(in an? (Linear|LSTM) whose forward method was replaced\)"):
        fa_bench.attach(model, name)
    assert type(module) in (nn.Linear, nn.LSTM) and not list(module.children())
    del module.forward
    assert not fa_bench.attach(model, name).coverage.uncovered


def test_sum_of_products_with_input_is_local() -> None:
    """Products with the model's input propagate no error, because no layer before them learns, and their sum is an activation,
    not a weight."""

    class TwoTables(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p, self.q, self.head = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(4, 5)), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x @ self.p + x @ self.q).tanh())

    rule = fa_bench.attach(TwoTables(), "fa", sample_input=torch.randn(2, 4))
    assert not rule.coverage.uncovered and set(rule.coverage.local) == {"p", "q"}
