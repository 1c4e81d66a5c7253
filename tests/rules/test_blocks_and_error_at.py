"""Tests of cut rules that take their error at a named module (error_at) or train blocks by backpropagation (within=block)."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fa_bench
from fa_bench.errors import CoverageError, OptionError
from fa_bench.metrics.meter import AlignmentMeter
from fa_bench.registry.kinds import POSITIONS

from .helpers import REL, array, assert_bitwise, assert_matches, collect, distance

VOCABULARY, WIDTH, T = 7, 4, 5


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(1, 2) / math.sqrt(WIDTH)
        return self.out(scores.softmax(-1) @ self.v(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.norm1 = Attention(), nn.LayerNorm(WIDTH)
        self.wide, self.act, self.narrow, self.norm2 = nn.Linear(WIDTH, 6), nn.ReLU(), nn.Linear(6, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.narrow(self.act(self.wide(x))))


class Transformer(nn.Module):
    """A transformer with two blocks and normalisation after the additions, as in the code of Launay et al. 2020."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(0.1 * torch.randn(T, WIDTH))
        self.drop, self.layers, self.head = nn.Dropout(0.0), nn.ModuleList([Block(), Block()]), nn.Linear(WIDTH, VOCABULARY)
        self.blocks = ["layers.0", "layers.1"]
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.embed(x) + self.place)
        for layer in self.layers:
            h = layer(h)
        return self.head(h)


def transformer(**options: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Transformer(**options).double()


def words() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return (torch.randint(VOCABULARY, (3, T), generator=generator), torch.randint(VOCABULARY, (3, T), generator=generator))


def loss_of(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def train(model: Any, rule: Any) -> dict[str, Tensor | None]:
    x, y = words()
    logits = model(x)
    rule.backward(loss_of(logits, y), logits, y)
    return collect(model)


def projected(errors: Tensor, b: Tensor) -> Tensor:
    """The signal δ B at every position, computed with plain loops."""
    signal = torch.zeros(*errors.shape[:2], b.shape[1], dtype=b.dtype)
    for n in range(errors.shape[0]):
        for t in range(errors.shape[1]):
            for c in range(b.shape[0]):
                signal[n, t] += errors[n, t, c] * b[c]
    return signal


MACRO = {"cuts": None, "error_at": "layers.1"}
MICRO = {"cuts": ["*norm1", "*act", "*norm2"], "error_at": "layers.1.norm2"}


@pytest.mark.parametrize("options", [MACRO, MICRO, {**MACRO, "error_at": None}], ids=["macro", "micro", "macro, logits"])
@pytest.mark.parametrize("name", ["dfa", "dkp"])
def test_launay_settings_match_reference(name: str, options: dict[str, Any]):
    """The gradients equal those of a forward pass detached at each cut, followed by a backward pass from δ B at each cut."""
    model, plain, (x, y) = transformer(), transformer(), words()
    form = {"form": "shared"} if name == "dfa" else {}
    rule = fa_bench.attach(model, name, seed=0, sample_input=x, within="block", **options, **form)
    feedback = {cut: tensors["B"].detach().clone() for cut, tensors in rule.feedback.items()}
    rows = WIDTH if options["error_at"] else VOCABULARY
    assert all(b.shape[0] == rows for b in feedback.values()) and len(feedback) == (6 if options is MICRO else 2)
    if form and options["error_at"]:  # each B consists of the leading columns of one matrix
        widest = max(feedback.values(), key=lambda b: b.shape[1])
        assert all(torch.equal(b, widest[:, : b.shape[1]]) for b in feedback.values())
    got = train(model, rule)

    outputs: dict[str, Tensor] = {}

    def detached(cut: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            outputs[cut] = output
            return output.detach().requires_grad_(True)

        return hook

    for cut in feedback:
        plain.get_submodule(cut).register_forward_hook(detached(cut))
    ends: list[Tensor] = []
    plain.head.register_forward_pre_hook(lambda module, args: ends.append(args[0]))
    logits = plain(x)
    errors = torch.autograd.grad(loss_of(logits, y), [ends[0], logits], retain_graph=True)
    delta = errors[0] if options["error_at"] else errors[1]
    loss_of(logits, y).backward()  # for the layers after the last cut
    gain = 1 / math.sqrt(max(b.shape[1] for b in feedback.values())) if form else 1.0
    for cut, output in outputs.items():
        output.backward(projected(delta, feedback[cut]) * gain)
    assert_matches(got, {key: array(grad) for key, grad in collect(plain).items() if grad is not None})
    if name == "dkp":
        for cut, output in outputs.items():
            want = sum(torch.outer(delta[n, t], output[n, t]) for n in range(3) for t in range(T))
            assert distance(rule.feedback[cut]["B"].grad, array(want)) < REL


def test_error_at_module_without_cut_has_exact_error():
    """The second block learns by backpropagation, and the first one learns from δ B."""
    model, (x, y) = transformer(), words()
    rule = fa_bench.attach(model, "dfa", seed=0, sample_input=x, within="block", cuts=["layers.0"], error_at="layers.1")
    got = train(model, rule)
    exact = transformer()
    loss_of(exact(x), y).backward()
    wanted = collect(exact)
    for key in ("head.weight", "layers.1.norm2.weight", "layers.1.attn.q.weight"):
        assert distance(got[key], array(wanted[key])) < REL
    assert distance(got["layers.0.attn.q.weight"], array(wanted["layers.0.attn.q.weight"])) > 1e-2
    said = {entry.layer: entry.feedback for entry in rule.coverage.covered}
    assert said["layers.1.narrow"] == "is the true one at layers.1"


def test_coverage_reports_weight_transport():
    (x, _), model = words(), transformer()
    rule = fa_bench.attach(model, "dfa", sample_input=x, within="block", error_at="layers.1")
    said = {entry.layer: entry.feedback for entry in rule.coverage.covered}
    assert said["layers.0.wide"] == said["layers.1.attn.q"] == "comes by backpropagation within its block (weight transport)"
    assert said["layers.0.narrow"] == "comes from the cut at layers.0" and said["head"] == "is the true one (output layer)"
    assert said["layers.0.attn.out"].startswith("comes from the cut at layers.0, in part by backpropagation within its block")
    assert rule.coverage.transport == ("within blocks", "after 'layers.1'") and not rule.coverage.uncovered
    assert "Weight transport within blocks." in str(rule.coverage) and "Weight transport after 'layers.1'." in str(rule.coverage)
    layerwise = fa_bench.attach(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), "dfa", cuts=["1"], within="block")
    assert layerwise.coverage.transport == (), "weight transport is reported, although every block has only one layer"


def test_embedding_requires_its_cut_with_within_layer():
    cuts = ["*.q", "*.k", "*.v", "*.attn", "*.act", "*.narrow"]
    (x, _), why = words(), r"embed\.weight \(no cut point between it and the next layer\)"
    with pytest.raises(CoverageError, match=why):
        fa_bench.attach(transformer(), "dfa", sample_input=x, cuts=cuts)
    with pytest.raises(CoverageError, match=why) as refused:
        fa_bench.attach(transformer(tied=True), "dfa", sample_input=x, cuts=cuts)
    assert "head.weight (" not in str(refused.value)
    for tied in (False, True):
        model = transformer(tied=tied)
        rule = fa_bench.attach(model, "dfa", sample_input=x, cuts=["drop", *cuts])
        assert not rule.coverage.uncovered and train(model, rule)["place"] is not None
    frozen = transformer()
    frozen.embed.weight.requires_grad_(False)
    frozen.place.requires_grad_(False)
    assert not fa_bench.attach(frozen, "dfa", sample_input=x, cuts=cuts).coverage.uncovered


class Factorised(nn.Embedding):
    """A narrow embedding, followed by a linear layer that widens its output."""

    def __init__(self, words: int, narrow: int, width: int) -> None:
        super().__init__(words, narrow)
        self.widen = nn.Linear(narrow, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.widen(super().forward(x))


@pytest.mark.parametrize("cut", ["0", "1"])
def test_layer_inside_embedding_gets_error_from_next_cut(cut: str):
    model = nn.Sequential(Factorised(VOCABULARY, 3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * T, 3))
    rule = fa_bench.attach(model, "dfa", sample_input=words()[0], cuts=[cut])
    assert {entry.layer: entry.feedback for entry in rule.coverage.covered}["0.widen"] == f"comes from the cut at {cut}"


def test_position_table_without_cut_is_uncovered():
    cuts = ["embed", "*.q", "*.k", "*.v", "*.attn", "*.act", "*.narrow"]
    with pytest.raises(CoverageError, match=r"uncovered: place \(no cut point between it and the next layer\)\."):
        fa_bench.attach(transformer(), "dfa", sample_input=words()[0], cuts=cuts)


@pytest.mark.parametrize("name", ["dfa", "dkp", "drtp", "local_error"])
def test_suggested_cuts_cover_transformer(name: str):
    model, (x, _) = transformer(), words()
    with pytest.raises(CoverageError, match="needs cut points") as refused:
        fa_bench.attach(model, name, sample_input=x)
    assert "within" not in refused.value.settings, "the option within is suggested, although a cut at every layer suffices"
    rule = fa_bench.attach(model, name, sample_input=x, **refused.value.settings)
    assert not rule.coverage.uncovered and all(grad is not None for grad in train(model, rule).values())


class Functional(Transformer):
    """A transformer that also multiplies activations by a parameter outside of all layers and by the weight of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.eye(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.embed(x) + self.place) @ self.mix @ self.layers[0].wide.weight.t()
        return self.head(self.layers[0](self.layers[0].narrow(h)))


def test_functional_weight_uses_inside_block_are_covered():
    (x, y) = words()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, plain = Functional().double(), Functional().double()
    plain.load_state_dict(model.state_dict())
    rule = fa_bench.attach(model, "dfa", sample_input=x, within="block", cuts=["layers.0"])
    assert not rule.coverage.uncovered and rule.coverage.transport == ("within blocks",)
    assert "Learning by backpropagation within a block: mix." in str(rule.coverage)
    train(model, rule)
    body = plain.layers[0](
        plain.layers[0].narrow(plain.drop(plain.embed(x) + plain.place) @ plain.mix @ plain.layers[0].wide.weight.t())
    )
    z = plain.head(body)
    delta = torch.autograd.grad(loss_of(z, y), z, retain_graph=True)[0]
    body.backward(projected(delta, rule.feedback["layers.0"]["B"]))
    assert distance(model.mix.grad, array(plain.mix.grad)) < REL


def chain(*widths: int) -> Any:
    torch.manual_seed(0)
    layers = [part for pair in itertools.pairwise(widths) for part in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).double()


def test_layers_after_error_at_module_learn_by_backprop():
    model, plain, x, y = chain(4, 4, 4, 4, 4), chain(4, 4, 4, 4, 4), torch.eye(4).double(), torch.tensor([0, 1, 2, 3])
    rule = fa_bench.attach(model, "dfa", sample_input=x, cuts=["1"], error_at="3")
    said = {entry.layer: entry.feedback for entry in rule.coverage.covered}
    assert said["4"] == "comes by backpropagation after 3" and said["2"] == "is the true one at 3"
    assert not rule.coverage.uncovered and rule.coverage.transport == ("after '3'",)
    assert rule.weight_pairs() == {} == rule.readouts(), "expected no pairs, because B (4, 4) projects the error at 3"
    for net, backward in ((model, lambda loss, z: rule.backward(loss, z, y)), (plain, lambda loss, z: loss.backward())):
        logits = net(x)
        backward(F.cross_entropy(logits, y), logits)
    for key in ("2.weight", "4.weight", "6.weight"):
        assert torch.equal(collect(model)[key], collect(plain)[key])
    with pytest.raises(CoverageError, match=r"4\.weight \(no cut point"):
        fa_bench.attach(chain(4, 4, 4, 4, 4), "dfa", sample_input=x, cuts=["1", "3"])


@pytest.mark.parametrize("name", ["dfa", "dkp"])
def test_error_at_module_may_contain_cut_with_same_output(name: str):
    """If a module and a cut inside it have the same output, error_at may name either of them, with the same result."""
    found = []
    for origin in ("2", "2.1"):
        plain = chain(4, 4, 4, 4)
        model = nn.Sequential(*plain[:2], nn.Sequential(*plain[2:4]), plain[4])
        x, y = torch.eye(4).double(), torch.tensor([0, 1, 2, 3])
        rule = fa_bench.attach(model, name, sample_input=x, cuts=["1", "2.1"], error_at=origin)
        rule.backward(F.cross_entropy(model(x), y))
        found.append(collect(model))
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    assert found[0]["0.weight"].any()


class Tied(nn.Module):
    """A model whose output is computed with the embedding's weight or, if `layer`, by a layer and a function with its weight."""

    def __init__(self, layer: bool) -> None:
        super().__init__()
        self.embed, self.drop = nn.Embedding(VOCABULARY, WIDTH), nn.Identity()
        self.fc, self.act = nn.Linear(WIDTH, WIDTH), nn.ReLU()
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY) if layer else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.act(self.fc(self.drop(self.embed(x)))))
        return F.linear(h, self.embed.weight) if self.head is None else self.head(h) + F.linear(h, self.head.weight)


@pytest.mark.parametrize("layer", [False, True])
def test_functional_weight_uses_after_error_at_module_are_covered(layer: bool):
    model, (x, y) = Tied(layer), words()
    cuts = ["drop", "act"]
    with pytest.raises(CoverageError, match=r"'act' is after the output layer"):  # functions do not count as layers
        fa_bench.attach(model, "dfa", sample_input=x, cuts=cuts)
    rule = fa_bench.attach(model, "dfa", sample_input=x, cuts=cuts, error_at="norm")
    assert not rule.coverage.uncovered
    logits = model(x)
    rule.backward(loss_of(logits, y), logits, y)


def test_weight_used_on_both_sides_of_error_at_is_uncovered():
    """A weight used only after the error_at module is covered, because it learns by backpropagation like the layers there."""

    class Net(nn.Module):
        def __init__(self, below: bool) -> None:
            super().__init__()
            self.below, self.mix = below, nn.Parameter(torch.eye(WIDTH) + 0.1)
            self.fc, self.act, self.mid = nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)
            self.head = nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.fc(x)
            h = self.mid(self.act(h @ self.mix if self.below else h))
            return self.head(h @ self.mix)

    options = {"sample_input": torch.randn(3, WIDTH), "cuts": ["act"], "error_at": "mid"}
    assert not fa_bench.attach(Net(False), "dfa", **options).coverage.uncovered
    with pytest.raises(CoverageError, match=r"leaves weights uncovered: mix \(in a Net\)"):
        fa_bench.attach(Net(True), "dfa", **options)


def test_functional_weight_use_inside_block_counts_as_transport():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.fc, self.act, self.head = nn.Linear(4, 4), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            return self.head(self.act(self.fc(h) + F.linear(h, self.fc.weight)))

    rule = fa_bench.attach(Twice(), "dfa", sample_input=torch.ones(2, 4), cuts=["stem", "act"], within="block")
    assert rule.coverage.transport == ("within blocks",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"error_at": "layers.1.norm3"}, r"error_at=layers\.1\.norm3: the model has no module of that name; did you mean"),
        ({"error_at": "layers.0"}, r"error_at=layers\.0: the cut layers\.1 runs after this module"),
        ({"error_at": "layers.1.norm2"}, r"cut layers\.1 has the same output; use error_at='layers\.1'"),
        ({"error_at": "twice"}, r"error_at=twice: this module runs 2 times"),
        ({"error_at": "pair", "cuts": ["layers.0"]}, r"error_at=pair: this module returns a tuple"),
    ],
    ids=str,
)
def test_rejects_invalid_error_at_modules(options: dict[str, Any], message: str):
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x, x

    class Odd(Transformer):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.pair = nn.Identity(), Pair()

        def forward(self, x: Tensor) -> Tensor:
            h = self.twice(self.twice(self.embed(x)))
            return self.head(self.pair(self.layers[1](self.layers[0](h)))[0])

    with pytest.raises(CoverageError, match=message):
        fa_bench.attach(Odd(), "dfa", sample_input=words()[0], within="block", **options)


def test_rejects_error_at_module_not_run_in_training():
    class Skips(Transformer):
        def forward(self, x: Tensor) -> Tensor:
            h = self.layers[0](self.drop(self.embed(x)))
            return self.head(h if self.training else self.layers[1](h))

    model = Skips()
    fa_bench.attach(model, "dfa", sample_input=words()[0], within="block", cuts=["layers.0"], error_at="layers.1")
    with pytest.raises(CoverageError, match=r"error_at=layers\.1: this module did not run in a training pass"):
        model(words()[0])


def test_rejects_cut_after_error_at_module_only_in_training():
    class Swaps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act, self.mid, self.head = nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.fc(x)
            return self.head(self.act(self.mid(h)) if self.training else self.mid(self.act(h)))

    model, x = Swaps(), torch.ones(2, 4)
    fa_bench.attach(model, "dfa", sample_input=x, cuts=["act"], error_at="mid")
    with (
        pytest.warns(UserWarning, match="cut 'act' did not run"),
        pytest.raises(CoverageError, match="cut 'act' ran after 'mid' in a training pass, but before it when"),
    ):
        model(x)


@pytest.mark.parametrize("option", ["within=block", "error_at=1", "positions=shared"])
def test_kernel_form_rejects_block_options(option: str):
    name, value = option.split("=")
    with pytest.raises(OptionError, match=rf"{name}={value}: form=kernel"):
        fa_bench.attach(nn.Sequential(nn.Linear(2, 2)), "dfa", form="kernel", **{name: value})


@pytest.mark.parametrize("options", [{}, {"error_at": "layers.1"}], ids=str)
def test_alignment_metrics_with_within_block(options: dict[str, Any]):
    (x, y), model = words(), transformer()

    class Flat(fa_bench.objectives.cross_entropy.CrossEntropy):
        targets = (POSITIONS,)

        def loss(self, outputs: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
            return loss_of(outputs, target)

    rule = fa_bench.attach(model, "dkp", sample_input=x, within="block", objective=Flat(), **options)
    values = AlignmentMeter(rule, x, y).measure()
    assert 0 < values["delta_angle"]["layers.0.narrow"] < 180 and values["delta_angle"]["head"] == 0
    assert bool(values["output_angle"]) == (not options) and set(values["weight_angle"]) == (set() if options else {"head"})


def test_detach_restores_backprop():
    model, (x, y) = transformer(), words()
    rule = fa_bench.attach(model, "dfa", sample_input=x, within="block", error_at="layers.1")
    with rule.exact():
        loss_of(model(x), y).backward()
    inside = collect(model)
    rule.detach()
    model.zero_grad(set_to_none=True)
    loss_of(model(x), y).backward()
    assert all(torch.equal(grad, inside[key]) for key, grad in collect(model).items() if grad is not None)
    with torch.no_grad():
        assert torch.equal(model(x), transformer()(x))


class Checkpointed(Transformer):
    """A transformer that recomputes each layer, or the whole model, in the backward pass."""

    by_layer = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.by_layer:
            return checkpoint(super().forward, x, use_reentrant=False)
        h = self.drop(self.embed(x) + self.place)
        for layer in self.layers:
            h = checkpoint(layer, h, use_reentrant=False)
        return self.head(h)


@pytest.mark.parametrize("options", [MACRO, MICRO, {**MACRO, "cuts": ["layers.0"]}], ids=["macro", "micro", "no cut there"])
@pytest.mark.parametrize("by_layer", [True, False])
@pytest.mark.parametrize("name", ["dfa", "dkp"])
def test_activation_checkpointing_around_error_at_module(name: str, by_layer: bool, options: dict[str, Any]):
    gradients = []
    for model in (transformer(), Checkpointed().double()):
        model.by_layer = by_layer
        model.load_state_dict(transformer().state_dict())
        rule = fa_bench.attach(model, name, seed=0, sample_input=words()[0], within="block", **options)
        gradients.append(train(model, rule) | {f"B {n}": b.grad for n, b in enumerate(rule.feedback_parameters())})
    assert_bitwise(*gradients)


class Extra(nn.Sequential):
    """A 4-6-6-3 net whose passes in training depend on `how`.

    With "beside", the second layer also runs once without gradients. With "reentrant", it runs in a reentrant checkpoint.
    """

    how = ""

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            super().__init__(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.how:
            return super().forward(x)
        hidden = self[1](self[0](x))

        def second(h: Tensor) -> Tensor:
            return self[3](self[2](h))

        if self.how == "reentrant":
            return self[4](checkpoint(second, hidden.requires_grad_(), use_reentrant=True))
        with torch.no_grad():
            second(hidden)
        return self[4](second(hidden))


@pytest.mark.parametrize("name", ["dfa", "dkp"])
def test_error_at_module_may_also_run_under_no_grad(name: str):
    found = []
    x, y = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 1, 0])
    for how in ("", "beside", "reentrant"):
        model = Extra()
        model.how = how
        rule = fa_bench.attach(model, name, cuts=["1"], error_at="3", sample_input=x)
        if how == "reentrant":
            with pytest.raises(CoverageError, match=r"error_at=3: .*with gradients.*use_reentrant=False"):
                model(x)
            break
        logits = model(x)
        rule.backward(F.cross_entropy(logits, y), logits, y)
        found.append(collect(model))
    assert_bitwise(*found)
