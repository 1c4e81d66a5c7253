"""A model with a rule compiles to one graph, without breaks or recompilation, and gives the same results as without compilation.

Rules that run the model again in the backward pass refuse compilation.
"""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import fa_bench
from fa_bench.errors import CoverageError, StateError
from fa_bench.mechanisms.compiled import Handle
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.registry.specs import parse_spec
from fa_bench.runs.execution import _no_compiler
from tests.versions import needs_compiler

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit"),
    pytest.mark.filterwarnings("ignore:The .grad attribute"),
    needs_compiler,
]
#: Maps a rule to the specs to be tested, if the default options do not run all of the rule's code or take too long.
VARIANTS = {
    "wm": ["wm:initial_steps=0,mirror_batch=4"],
    "usf": ["usf", "usf:density=0.5"],
    "frsf": ["frsf:density=0.5"],
    "brsf": ["brsf", "brsf:m_init=xavier_normal,density=0.5"],
    "dfa": ["dfa", "dfa:form=shared"],
    "drtp": ["drtp", "drtp:error_sign=true"],
    "asap": ["asap", "asap:transport=true", "asap:match=random"],
    "pfa": ["pfa:ratio=2"],
    "local_error": ["local_error:separate=true"],
    "predsim": ["predsim", "predsim:loss=pred"],
    "mixed": ["mixed:ratio=2"],
    "ldfa": ["ldfa:rank=2"],
    "f3": [
        f"f3:samples=5,information={one}"
        for one in ("delayed_loss", "delayed_error_softmax", "delayed_loss_softmax", "one_hot_target", "current_error")
    ],
    "information_alignment": ["information_alignment:update_forward=true", "information_alignment:signal=noise,noise_batch=3"],
}
SPECS = [spec for name in ALGORITHMS for spec in VARIANTS.get(name, [name]) if not ALGORITHMS[name].repeats]


class Net(nn.Module):
    """A net with a convolution, a normalised convolution with a shortcut, a transposed convolution, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act0 = nn.Conv2d(2, 4, 3, padding=1), nn.ReLU()
        self.conv, self.norm, self.act1 = nn.Conv2d(4, 4, 3, padding="same"), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.up, self.act2 = nn.ConvTranspose2d(4, 4, 2, stride=2, bias=False), nn.Tanh()
        self.fc, self.act3, self.out = nn.Linear(64, 8), nn.Sigmoid(), nn.Linear(8, 3)
        self.cut_points = self.blocks = ["act0", "act1", "act2", "act3"]

    def forward(self, x: Tensor) -> Tensor:
        h = self.act0(self.stem(x))
        h = self.act2(self.up(self.act1(self.norm(self.conv(h)) + h)[:, :, ::2, ::2]))
        return self.out(self.act3(self.fc(h.flatten(1))))


class Small(nn.Module):
    """A convolution followed by two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.fc, self.out = nn.Conv2d(2, 3, 3, stride=2), nn.ReLU(), nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.fc(self.act(self.conv(x)).flatten(1))))


class Recurrent(nn.Module):
    """Attention and a recurrent layer over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.lstm, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.LSTM(8, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.movedim(1, -1).flatten(2)
        h = self.attention(h, h, h, need_weights=False)[0]
        return self.out(self.lstm(h.transpose(0, 1))[0][-1])


def attached(spec: str, net: type[nn.Module] = Net) -> tuple[nn.Module, Any, Tensor, Tensor]:
    torch.manual_seed(1)
    model = net()
    x, y = torch.randn(3, 5, 2, 4, 4), torch.randint(3, (3, 5))
    name, options = parse_spec(spec)
    return model, fa_bench.attach(model, name, seed=2, sample_input=x[0], **options), x, y


def trained(model: nn.Module, rule: Any, x: Tensor, y: Tensor, call: Any) -> dict[str, Tensor]:
    """Train for three steps and return all tensors of the model, including the feedback."""
    optimizer = torch.optim.SGD(rule.parameter_groups(lr=0.1), momentum=0.9, weight_decay=0.01)
    for images, labels in zip(x, y, strict=True):
        optimizer.zero_grad()
        logits = call(images)
        rule.backward(F.cross_entropy(logits, labels), logits, labels, loss_scale=1.0, indices=torch.arange(len(labels)))
        optimizer.step()
        rule.step()
    feedback = {f"{path}.{name}": tensor for path, tensors in rule.feedback.items() for name, tensor in tensors.items()}
    return {name: tensor.clone() for name, tensor in {**model.state_dict(), **feedback}.items()}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if ALGORITHMS[name].repeats])
def test_rules_with_repeated_passes_reject_compilation(name: str) -> None:
    model, _, x, _ = attached(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CoverageError, match=f"rule '{name}' runs the model again in the backward pass.*do not compile the model"):
        torch.compile(model, backend="aot_eager")(x[0])
    torch._dynamo.reset()
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match=r"runs the model again in the backward pass.*do not compile the model"
    ):
        torch.compile(model, backend="aot_eager", fullgraph=True)(x[0])
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_rejects_compiled_part_with_fullgraph() -> None:
    model, rule, x, y = attached("forward_alignment")
    model.get_submodule("fc").compile(backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile the model, not only a part of it"):
        trained(model, rule, x, y, model)


@pytest.mark.parametrize(
    ("spec", "net"),
    [*((spec, Net) for spec in SPECS), ("dfa:form=kernel", Small), ("fa", Recurrent), ("kp", Recurrent), ("brsf", Recurrent)],
)
def test_compiled_steps_match_eager_bitwise(spec: str, net: type[nn.Module]) -> None:
    """The backend runs PyTorch's own operations in the order of the graph, so the results must be bitwise identical."""
    wanted = trained(*(parts := attached(spec, net)), call=parts[0])
    model, rule, x, y = attached(spec, net)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x[0])
    rule.load_state_dict(attached(spec, net)[1].state_dict())  # the random state from before the first call
    model.load_state_dict(attached(spec, net)[0].state_dict())
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = trained(model, rule, x, y, compiled)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name]), name
    assert repr(rule.state_dict()) == repr(parts[1].state_dict())


@pytest.mark.parametrize("spec", ["dfa", "forward_alignment"])
def test_compiled_and_eager_calls_can_alternate(spec: str) -> None:
    wanted = trained(*(parts := attached(spec)), call=parts[0])
    model, rule, x, y = attached(spec)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    calls = iter([compiled, model, compiled])
    found = trained(model, rule, x, y, lambda images: next(calls)(images))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("spec", ["kp", "forward_alignment"])
def test_compiled_model_keeps_output_structure(spec: str) -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc1, self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = self.fc1(x).tanh()
            return {"one": self.one(h), "two": self.two(h)}

    x, y = torch.randn(7, 4, generator=torch.Generator().manual_seed(1)), torch.arange(7)
    found = []
    for compiles in (False, True):
        model = TwoHeads()
        rule = fa_bench.attach(model, spec, seed=0, sample_input=x)
        out = (torch.compile(model, fullgraph=True, backend="aot_eager") if compiles else model)(x)
        assert type(out) is dict and list(out) == ["one", "two"]
        rule.backward(F.cross_entropy(out["one"], y % 3) + F.cross_entropy(out["two"], y % 2))
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert found[0]["fc1.weight"].any() and all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items())


@pytest.mark.parametrize("spec", ["kp", "forward_alignment"])
def test_compiled_model_accepts_keyword_arguments(spec: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc1, self.fc2, self.fc3 = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor, *, shift: Tensor, factor: Tensor) -> Tensor:
            return self.fc3((self.fc2((self.fc1(x) + shift).tanh()) * factor).tanh())

    generator = torch.Generator().manual_seed(1)
    given = {"x": (7, 4), "shift": (7, 5), "factor": (7, 6)}
    sample = {name: torch.randn(*shape, generator=generator) for name, shape in given.items()}
    found = []
    for compiles in (False, True):
        model, y = Named(), torch.arange(7) % 3
        rule = fa_bench.attach(model, spec, seed=0, sample_input=sample)
        call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiles else model
        logits = call(sample["x"], shift=sample["shift"], factor=sample["factor"])
        rule.backward(F.cross_entropy(logits, y), logits, y)
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert found[0]["fc2.weight"].any() and all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items())


@pytest.mark.parametrize("spec", ["kp", "brsf"])
def test_default_compiler_matches_eager(spec: str) -> None:
    """Fused kernels compute in a different order. In each step, rounding changes weights of about 0.1 by a relative error of
    1e-7, which BatchNorm amplifies."""
    if _no_compiler():
        pytest.skip("no C++ compiler")
    wanted = trained(*(parts := attached(spec)), call=parts[0])
    model, rule, x, y = attached(spec)
    found = trained(model, rule, x, y, torch.compile(model, fullgraph=True))
    for name, tensor in found.items():
        assert torch.allclose(tensor, wanted[name], rtol=1e-4, atol=1e-5), name


def test_compiled_pass_rejects_layer_without_gradients() -> None:
    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.learns = nn.Linear(4, 5), nn.Linear(5, 3), True

        def forward(self, x: Tensor) -> Tensor:
            with torch.set_grad_enabled(self.learns):
                h = self.a(x).tanh()
            return self.b(h)

    model = Partial()
    fa_bench.attach(model, "fa")
    model.learns = False
    with pytest.raises(CoverageError, match="layer 'a' ran without gradients"):
        torch.compile(model, backend="aot_eager")(torch.zeros(2, 4))


def test_manual_update_without_feedback_raises_after_compilation() -> None:
    """The first step updates nothing and raises no error; the second step updates only the weights."""
    model, rule, x, y = attached("kp", Small)
    compiled = torch.compile(model, backend="aot_eager")
    for images, labels, rate in zip(x, y, (None, 0.1), strict=False):
        model.zero_grad()
        logits = compiled(images)
        rule.backward(F.cross_entropy(logits, labels), logits, labels)
        if rate is None:
            rule.step()
            continue
        with torch.no_grad():
            for weight in rule.weight_parameters():
                weight -= rate * weight.grad
        with pytest.raises(StateError, match="the weights were updated, but the learned feedback"):
            rule.step()


@pytest.mark.parametrize("spec", ["kp", "pfa:ratio=2", "asap", "dkp", "predsim"])
def test_optimizer_without_feedback_raises(spec: str) -> None:
    model, rule, x, y = attached(spec)
    weights = torch.optim.SGD(rule.weight_parameters(), lr=0.1)
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(StateError, match="feedback_"):
        for images, labels in zip(x, y, strict=True):
            weights.zero_grad()
            logits = compiled(images)
            rule.backward(F.cross_entropy(logits, labels), logits, labels, loss_scale=1.0)
            weights.step()
            rule.step()


def test_feedback_replaced_after_compilation_raises() -> None:
    model, rule, x, y = attached("kp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled = torch.compile(model, backend="aot_eager")

    def step(number: int) -> None:
        optimizer.zero_grad()
        rule.backward(F.cross_entropy(compiled(x[number]), y[number]))
        optimizer.step()
        rule.step()

    step(0)
    step(1)
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    with pytest.raises(StateError, match=r"feedback_B"):
        for _ in range(3):
            step(2)


def test_compiled_models_of_same_class_use_own_feedback() -> None:
    """A graph contains the key of its rule. Without the key, the second model would get the errors of the first one."""
    gradients = []
    for seed in (0, 1):
        model, _, x, y = attached("dfa")
        model._fa_bench_rule.detach()  # type: ignore[union-attr,operator]
        rule = fa_bench.attach(model, "dfa", seed=seed, sample_input=x[0])
        for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
            model.zero_grad()
            rule.backward(F.cross_entropy(call(x[0]), y[0]))
            gradients.append((rule, model.get_parameter("stem.weight").grad))
    assert torch.equal(gradients[0][1], gradients[1][1]) and torch.equal(gradients[2][1], gradients[3][1])
    assert not torch.equal(gradients[0][1], gradients[2][1])


@pytest.mark.parametrize("spec", ["dfa", "drtp", "bp", "frozen"])
def test_earlier_compiled_plain_model_does_not_affect_rule(spec: str) -> None:
    """By default, torch reuses the graph of a model with the same classes, even if the new model has hooks."""
    plain = Net()
    torch.compile(plain, backend="aot_eager")(torch.randn(5, 2, 4, 4)).sum().backward()
    wanted = trained(*(parts := attached(spec)), call=parts[0])
    model, rule, x, y = attached(spec)
    found = trained(model, rule, x, y, torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    rule.detach()
    again = fa_bench.attach(model, "drtp", seed=3, sample_input=x[0])
    logits = torch.compile(model, fullgraph=True, backend="aot_eager")(x[0])
    again.backward(F.cross_entropy(logits, y[0]), logits, y[0], 1.0)


def test_brsf_compiled_evaluation_pass_matches_eager() -> None:
    found = []
    for compiles in (False, True):
        model, rule, x, y = attached("brsf")
        call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiles else model
        call(x[0])
        model.eval()
        rule.backward(F.cross_entropy(call(x[1]), y[1]))
        found.append(model.get_parameter("stem.weight").grad)
    assert torch.equal(found[0], found[1])


def test_compiled_part_matches_eager_or_is_rejected() -> None:
    for spec in ("kp", "brsf", "dkp", "forward_alignment"):
        wanted = trained(*(parts := attached(spec)), call=parts[0])
        model, rule, x, y = attached(spec)
        model.get_submodule("fc").compile(backend="aot_eager")
        try:
            found = trained(model, rule, x, y, model)
        except Exception as error:
            assert spec == "forward_alignment" and "compile the model, not only its part 'fc'" in str(error)
        else:
            assert all(torch.equal(found[name], wanted[name]) for name in wanted), spec


def test_handles_are_unique_and_are_copied_with_their_owners() -> None:
    owner: dict[str, Any] = {}
    owner["handle"] = Handle(owner)
    twin = copy.deepcopy(owner)
    assert twin["handle"].owner is twin and twin["handle"].key != owner["handle"].key
    restored = pickle.loads(pickle.dumps(Handle("owner")))
    assert restored.owner == "owner"
    key = restored.key
    del restored
    assert Handle("next").key == key  # so that equal runs in sequence have equal graphs


def test_copy_of_compiled_model_uses_own_rule() -> None:
    model, rule, x, y = attached("drtp")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits = compiled(x[0])
    rule.backward(F.cross_entropy(logits, y[0]), logits, y[0], 1.0)
    twin = copy.deepcopy(model)
    other: Any = twin._fa_bench_rule
    for tensors in other.feedback.values():
        tensors["B"].zero_()
    twin.zero_grad()
    logits = torch.compile(twin, fullgraph=True, backend="aot_eager")(x[0])
    other.backward(F.cross_entropy(logits, y[0]), logits, y[0], 1.0)
    assert not twin.get_parameter("stem.weight").grad.any() and model.get_parameter("stem.weight").grad.any()  # type: ignore[union-attr]


def test_python_operators_are_cudagraph_unsafe() -> None:
    for module in ("cut.function", "edge.messages"):
        importlib.import_module(f"fa_bench.mechanisms.{module}")
    operators = [getattr(torch.ops.fa_bench, name).default for name in ("new_sample", "second_pass", "cut_errors")]
    assert [operator for operator in operators if torch.Tag.cudagraph_unsafe not in operator.tags] == []


@pytest.mark.parametrize(
    ("spec", "of", "method", "operator"),
    [
        ("dkp", "_delivery", "errors_in_graph", "cut_errors"),
        ("predsim", "_delivery", "errors_in_graph", "cut_errors"),
        ("forward_alignment", "", "second_pass", "second_pass"),
    ],
)
def test_operator_results_match_fake_tensors(
    spec: str,
    of: str,
    method: str,
    operator: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The results must have the number, shapes, dtypes and memory formats that the graph was compiled for."""
    model, rule, x, y = attached(spec)
    owner = getattr(rule, of) if of else rule
    calls: list[tuple[Any, ...]] = []
    original = getattr(owner, method)

    def recorded(*given: Any) -> Any:
        calls.append((given, original(*given)))
        return calls[-1][1]

    monkeypatch.setattr(owner, method, recorded)
    logits = torch.compile(model, backend="aot_eager")(x[0].contiguous(memory_format=torch.channels_last))
    rule.backward(F.cross_entropy(logits, y[0]), logits, y[0], 1.0)
    ((given, results),) = calls
    with FakeTensorMode() as mode:
        given = tree_map_only(Tensor, mode.from_tensor, given)
        expected = getattr(torch.ops.fa_bench, operator)(*given, owner._handle.key)
    assert [(one.shape, one.dtype, one.stride()) for one in results] == [(one.shape, one.dtype, one.stride()) for one in expected]


def test_new_sample_operator_returns_next_seed() -> None:
    _, rule, *_ = attached("brsf")
    layer = next(iter(rule._layers.values()))
    pathway, draws = layer.pathway, layer.pathway.draws
    seed = torch.ops.fa_bench.new_sample(layer.feedback_M, pathway._handle.key)
    assert pathway.draws == draws + 1 and tuple(seed.tolist()) == pathway.seed_words()
    with FakeTensorMode() as mode:
        expected = torch.ops.fa_bench.new_sample(mode.from_tensor(layer.feedback_M), pathway._handle.key)
    assert (expected.shape, expected.dtype) == (seed.shape, seed.dtype) and pathway.draws == draws + 1
