"""Models can return more than logits. Cut rules take their error from the named output, and edge rules take it from every
loss."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fa_bench
from fa_bench.errors import CoverageError, OptionError
from fa_bench.objectives.cross_entropy import CrossEntropy
from tests.mechanisms.loops.chain import (
    COVERS_ALL,
    CUT_RULES,
    EDGE_RULES,
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

X, Y = batch()


@pytest.fixture(autouse=True)
def noise(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_the_same_for_every_sample(monkeypatch)


Pair = namedtuple("Pair", ["one", "two"])


@dataclasses.dataclass
class Record:
    one: Tensor
    two: Tensor


@dataclasses.dataclass(frozen=True)
class FrozenRecord:
    one: Tensor
    two: Tensor


class ModelOutput(OrderedDict):
    """Behaves like the class in transformers: entries are also attributes, integers index the values, and None entries are
    omitted."""

    def __init__(self, **entries: Any) -> None:
        super().__init__()
        for key, value in entries.items():
            if value is not None:
                self[key] = value

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        object.__setattr__(self, key, value)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("you cannot use ``update`` on a ModelOutput instance")


#: Maps a name to functions that pack and unpack the outputs, and to the names of both outputs.
PACKS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Tensor]], str, str]] = {
    "dictionary": (lambda one, two: {"one": one, "two": two}, lambda out: (out["one"], out["two"]), "one", "two"),
    "tuple": (lambda one, two: (one, two), lambda out: out, "0", "1"),
    "list": (lambda one, two: [one, two], lambda out: out, "0", "1"),
    "namedtuple": (Pair, lambda out: (out.one, out.two), "0", "1"),
    "nested": (
        lambda one, two: {"heads": [one, (two, None)], "note": "x"},
        lambda out: (out["heads"][0], out["heads"][1][0]),
        "heads.0",
        "heads.1.0",
    ),
    "ModelOutput": (lambda one, two: ModelOutput(one=one, two=two), lambda out: (out.one, out["two"]), "one", "two"),
    "dataclass": (Record, lambda out: (out.one, out.two), "one", "two"),
    "frozen dataclass": (FrozenRecord, lambda out: (out.one, out.two), "one", "two"),
}


class Net(nn.Module):
    """A net of widths 8-16-16 with a head for 3 classes and one for 2; `pack` combines both outputs into the return value."""

    def __init__(self, pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.pack = pack
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.a, self.b, self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3), nn.Linear(16, 2)
        self.act, self.act2 = nn.ReLU(), nn.ReLU()
        self.cut_points = self.blocks = ["act", "act2"]

    def forward(self, x: Tensor) -> Any:
        h = self.act2(self.b(self.act(self.a(x))))
        return self.pack(self.one(h), self.two(h))


def single(number: int) -> Net:
    """A net that returns only one of the outputs."""
    model = Net(lambda one, two: (one, two)[number])
    delattr(model, ("two", "one")[number])
    setattr(model, ("two", "one")[number], nn.Identity())
    return model


def only(model: Net, rule: Any, number: int = 0) -> dict[str, Tensor]:
    """The gradients of the loss on one output, for a model that returns only this output."""
    logits, target = model(X), Y % (3 - number)
    rule.backward(F.cross_entropy(logits, target), logits, target, indices=torch.arange(len(target)))
    return gradients(model)


def both(model: Net, rule: Any, kind: str, parts: tuple[int, ...] = (0, 1), main: int = 0) -> dict[str, Tensor]:
    """The gradients of the sum of the losses on the outputs in `parts`; the labels belong to the output `main`."""
    outputs = PACKS[kind][1](model(X))
    loss = sum(F.cross_entropy(outputs[number], Y % (3 - number)) for number in parts)
    rule.backward(loss, outputs[main], Y % (3 - main), indices=torch.arange(len(Y)))
    return gradients(model)


@pytest.mark.parametrize("name", ["weight_perturbation", "pepita", "epc"])
def test_rules_computing_all_gradients_ignore_loss_on_other_output(name: str) -> None:
    """If a rule computes all gradients itself, a loss on another output is ignored, because it would otherwise be backpropagated
    through the whole model."""
    found = []
    for weight in (0.0, 1.0):
        model = Net(lambda one, two: (one, two))
        rule = fa_bench.attach(model, name, output=0, sample_input=X)
        logits, other = model(X)
        rule.backward(F.cross_entropy(logits, Y) + weight * other.square().mean(), logits, Y, loss_scale=1.0)
        found.append(gradients(model))
    assert found[0] and found[0].keys() == found[1].keys()
    assert all(torch.equal(gradient, found[1][key]) for key, gradient in found[0].items())


@pytest.mark.parametrize("kind", PACKS)
@pytest.mark.parametrize("name", CUT_RULES)
def test_cut_rules_require_output_and_suggest_one(name: str, kind: str) -> None:
    pack, _, first, second = PACKS[kind]
    with pytest.raises(CoverageError, match=rf"returns {first} \(2, 3\), {second} \(2, 2\).*for example output='{first}'"):
        attach(Net(pack), name)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("kind", PACKS)
@pytest.mark.parametrize("name", CUT_RULES)
def test_cut_rule_gradients_match_single_output_model(name: str, kind: str, number: int) -> None:
    """The gradients equal those of a model that returns only the named output. With most rules, a loss on the other output trains
    only that output's head."""
    reference = single(number)
    want = only(reference, attach(reference, name), number)
    model = Net(PACKS[kind][0])
    rule = attach(model, name, output=PACKS[kind][2 + number])
    state = rule.state_dict()
    assert_same(both(model, rule, kind, (number,), number), want)
    model.zero_grad()
    if name in ("pepita", "weight_perturbation", "dfc", *SETTLING):
        return  # these rules compute all gradients in their own passes, so the other loss has no effect
    rule.load_state_dict(state)  # so that the noise is the same again
    found = both(model, rule, kind, (0, 1), number)
    other = ("two", "one")[number]
    assert {f"{other}.weight", f"{other}.bias"} <= set(found)
    # In dgl and asfp_lc, the second layer and both heads form one module and learn from both losses. In bp_deepsup, all layers
    # learn from both losses.
    if name not in ("dgl", "asfp_lc", "bp_deepsup"):
        drawn = "feedback" if name in ("ddtp_linear", "ldrl") else "none"  # their feedback learns from noise
        assert_same({key: found[key] for key in want if drawn not in key}, {key: want[key] for key in want if drawn not in key})


@pytest.mark.parametrize("kind", PACKS)
@pytest.mark.parametrize("name", CUT_RULES)
def test_unknown_output_error_suggests_nearest_name(name: str, kind: str) -> None:
    pack, _, first, second = PACKS[kind]
    for wrong in ("", f"{second}x", "zzz"):
        with pytest.raises(CoverageError, match=rf"^output='{wrong}': the model has no such output") as refused:
            attach(Net(pack), name, output=wrong)
        assert f"(outputs: {first}, {second})" in str(refused.value)
        if wrong == f"{second}x":
            assert f"did you mean '{second}'?" in str(refused.value)
    attach(single(0), name, output=first)  # accepted, because the model may return several outputs only in training


@pytest.mark.parametrize("kind", PACKS)
@pytest.mark.parametrize("name", [name for name in EDGE_RULES if name != "dual_propagation"])
def test_edge_rules_add_the_gradients_of_both_losses(name: str, kind: str) -> None:
    """Edge rules other than dual_propagation are linear in the errors, so the gradients of both losses add up.

    There are two exceptions. The B of ldfa learns the subspace of the errors, and the subspace of a sum is not the sum of the
    subspaces. The gradients of local losses are added only once.
    """
    nonlinear = name in ("ldfa", *LOCAL_LOSSES)

    def found(parts: tuple[int, ...]) -> dict[str, Tensor]:
        model = Net(PACKS[kind][0]).double()
        rule = attach(model, name, sample_input=X[:2].double())
        outputs = PACKS[kind][1](model(X.double()))
        rule.backward(
            sum(F.cross_entropy(outputs[number], Y % (3 - number)) for number in parts),
            loss_scale=1.0,
            indices=torch.arange(len(Y)),
        )
        return {key: gradient for key, gradient in gradients(model).items() if not nonlinear or "feedback_B" not in key}

    first, second, sum_ = found((0,)), found((1,)), found((0, 1))
    want = {key: first.get(key, torch.zeros(())) + second.get(key, torch.zeros(())) for key in sum_}
    if name == "frozen":  # only the heads learn
        assert set(sum_) == {"one.weight", "one.bias", "two.weight", "two.bias"}
    assert_same(sum_, want, rel=1e-12)


@pytest.mark.parametrize("name", EDGE_RULES)
def test_head_without_loss_does_not_affect_edge_rules(name: str) -> None:
    reference, model = single(0), Net(PACKS["tuple"][0])
    want = only(reference, attach(reference, name, sample_input=X[:2]))
    assert_same(both(model, attach(model, name, sample_input=X[:2]), "tuple", (0,)), want)


# ------------------------------------------------------------------------------------------------ transformers outputs
class Classifier(Net):
    """Returns logits, hidden states if requested, and its own loss if it is given labels."""

    def __init__(self, hidden_states: bool = False) -> None:
        super().__init__(Pair)
        self.hidden_states = hidden_states

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        h1 = self.act(self.a(x))
        h2 = self.act2(self.b(h1))
        logits = self.one(h2)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ModelOutput(loss=loss, logits=logits, hidden_states=(h1, h2) if self.hidden_states else None)


@pytest.mark.parametrize("hidden", [False, True], ids=["logits", "hidden states"])
@pytest.mark.parametrize("name", RULES)
def test_loss_from_model_output_logits_matches_plain_model(name: str, hidden: bool) -> None:
    reference, model = single(0), Classifier(hidden)
    want = only(reference, attach(reference, name, sample_input=X[:2]))
    del model.two
    options = {"output": "logits"} if name in (*CUT_RULES, *COVERS_ALL) and hidden else {}
    rule = attach(model, name, sample_input=X[:2], **options)
    out = model(X)
    assert out.logits is out["logits"] is out[0]
    rule.backward(F.cross_entropy(out.logits, Y), out.logits, Y, indices=torch.arange(len(Y)))
    assert_same(gradients(model), want)


@pytest.mark.parametrize("name", CUT_RULES)
def test_cut_rules_require_output_if_hidden_states_are_returned(name: str) -> None:
    with pytest.raises(CoverageError, match=r"returns logits \(2, 3\), hidden_states\.0 \(2, 16\).*output='logits'"):
        attach(Classifier(True), name)


@pytest.mark.parametrize("name", RULES)
def test_loss_computed_by_model_is_correct_or_rejected(name: str) -> None:
    model, reference = Classifier(), single(0)
    del model.two
    want = only(reference, attach(reference, name, sample_input=X[:2]))
    rule = attach(model, name, sample_input=X[:2])
    if name in (*CUT_RULES, *COVERS_ALL, "np_feedback"):
        with pytest.raises(CoverageError, match=r"returns a loss \('loss'\).*call the model without labels.*from its logits"):
            model(X, labels=Y)
        assert not gradients(model)
        out = model(X)  # this is the remedy in the error message
        loss = F.cross_entropy(out.logits, Y)
    else:
        out = model(X, labels=Y)
        loss = out.loss
    rule.backward(loss, out.logits, Y, indices=torch.arange(len(Y)))
    assert_same(gradients(model), want)


@pytest.mark.parametrize("name", CUT_RULES)
def test_multiple_outputs_only_in_training_require_output(name: str) -> None:
    """A model may have auxiliary heads only in training, for example. A pass of the sample in evaluation mode does not reveal
    such heads."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.act, self.two, self.act2 = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()
            self.head = nn.Linear(16, 3)
            self.cut_points = self.blocks = ["act", "act2"]

        def forward(self, x: Tensor) -> Any:
            h = self.act2(self.two(self.act(self.one(x))))
            return {"logits": self.head(h), "again": self.head(h)} if self.training else self.head(h)

    model = Two()
    attach(model, name)
    with pytest.raises(CoverageError, match=rf"rule '{name}' takes its error from one output, but this model returns.*output"):
        model(X)


@pytest.mark.parametrize("name", CUT_RULES)
def test_outputs_without_grad_are_ignored(name: str) -> None:
    """If the only other output is one that requires no gradient, such as a mask, the logits need not be named, even if they come
    last."""

    class Beside(Chain):
        def forward(self, x: Tensor) -> Any:
            return x.mean(1), super().forward(x)

    model, plain = Beside(), Chain()
    rule, alone = attach(model, name, sample_input=X), attach(plain, name, sample_input=X)
    logits, its = model(X)[1], plain(X)
    rule.backward(F.cross_entropy(logits, Y), logits, Y, indices=torch.arange(len(Y)))
    alone.backward(F.cross_entropy(its, Y), its, Y, indices=torch.arange(len(Y)))
    assert_same(gradients(model), gradients(plain))


def test_returned_hidden_state_does_not_define_output_layer() -> None:
    """A hidden state that is returned with the logits, before or after them, does not make its layer an output layer."""

    class States(nn.Module):
        def __init__(self, first: bool) -> None:
            super().__init__()
            self.first, self.fc1, self.fc2, self.fc3 = first, nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.fc2(self.fc1(x).relu()).relu()
            return (h, self.fc3(h)) if self.first else (self.fc3(h), h)

    for first in (True, False):
        rule = attach(States(first), "fa", sample_input=X[:2], plain_last=True)
        assert [path for path, pair in rule.weight_pairs().items() if torch.equal(*pair)] == ["fc3"]


@pytest.mark.parametrize("name", CUT_RULES)
def test_output_index_accepts_int_or_string(name: str) -> None:
    first, second = (attach(Net(PACKS["tuple"][0]), name, output=output) for output in (1, "1"))
    assert [getattr(rule, "_local", rule).output for rule in (first, second)] == ["1", "1"]
    assert str(first.coverage) == str(second.coverage)


@pytest.mark.parametrize("name", CUT_RULES)
def test_rejects_scalar_only_if_computed_from_selected_output(name: str) -> None:
    """A scalar next to the named output may be a penalty on a weight. If it was computed from the logits, or if no output has the
    given name, it may be the loss, so the model is refused."""

    class Penalised(Chain):
        scalar, named = "weight", True

        def forward(self, x: Tensor) -> Any:
            if not self.training:
                return {"logits": super().forward(x)}
            logits = super().forward(x)
            weight = next(parameter for parameter in self.parameters() if parameter.requires_grad)
            scalar = (logits if self.scalar == "logits" else weight).square().mean()
            return {"logits" if self.named else "others": logits, "scalar": scalar}

    model, plain = Penalised(), Chain()
    rule, alone = attach(model, name, output="logits"), attach(plain, name)
    logits, its = model(X)["logits"], plain(X)
    rule.backward(F.cross_entropy(logits, Y), logits, Y, indices=torch.arange(len(Y)))
    alone.backward(F.cross_entropy(its, Y), its, Y, indices=torch.arange(len(Y)))
    assert_same(gradients(model), gradients(plain))
    for model.scalar, model.named in (("logits", True), ("weight", False)):
        with pytest.raises(CoverageError, match=r"returns a loss \('scalar'\)"):
            model(X)


def test_np_feedback_rejects_scalar_only_if_computed_from_logits() -> None:
    class Penalised(Chain):
        computed_from = "a weight"

        def forward(self, x: Tensor) -> Any:
            logits = super().forward(x)
            scalar = (logits if self.computed_from == "the logits" else next(self.parameters())).square().mean()
            return {"logits": logits, "scalar": scalar}

    model, plain = Penalised(), Chain()
    rule, alone = attach(model, "np_feedback"), attach(plain, "np_feedback")
    logits, its = model(X)["logits"], plain(X)
    rule.backward(F.cross_entropy(logits, Y), logits, Y)
    alone.backward(F.cross_entropy(its, Y), its, Y)
    assert_same(gradients(model), gradients(plain))
    model.computed_from = "the logits"
    with pytest.raises(CoverageError, match=r"returns a loss \('scalar'\).*from which rule 'np_feedback' cannot learn"):
        model(X)


class InAnObject(Chain):
    """Returns an object of a class that is not a container, so no tensor is found in it."""

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(logits=super().forward(x))


@pytest.mark.parametrize("name", ["fa", "kp"])
def test_edge_rules_accept_opaque_output_object(name: str) -> None:
    model, plain = InAnObject(), Chain()
    rules = [attach(net, name, seed=0) for net in (model, plain)]
    assert rules[0].coverage.covered == rules[1].coverage.covered
    for rule, logits in zip(rules, (model(X).logits, plain(X)), strict=True):
        rule.backward(F.cross_entropy(logits, Y))
    assert_same(gradients(model), gradients(plain))


def test_cut_rules_reject_opaque_output_object() -> None:
    with pytest.raises(CoverageError, match=r"output='logits': the model has no such output \(outputs: no tensor\)"):
        attach(InAnObject(), "dfa", output="logits")
    with pytest.raises(CoverageError, match=r"needs outputs of shape .*; this model returns \(\)"):
        attach(InAnObject(), "dfa")


@pytest.mark.parametrize("name", CUT_RULES)
def test_cut_rules_use_output_of_objective(name: str) -> None:
    """Errors are computed at the objective's output as if the rule named this output. A rule that names a different output is
    refused."""
    objective = CrossEntropy(output="two")
    with pytest.raises(OptionError, match=r"^output=one conflicts with output=two of the objective"):
        attach(Net(PACKS["dictionary"][0]), name, objective=objective, output="one")
    found = []
    for options in ({"output": "two"}, {"objective": objective}, {"objective": objective, "output": "two"}):
        model = Net(PACKS["dictionary"][0])
        rule = attach(model, name, **options)
        assert rule.output == rule.loss_output == "two"
        found.append(both(model, rule, "dictionary", (1,), 1))
    for gradient in found[1:]:
        assert_same(gradient, found[0])
