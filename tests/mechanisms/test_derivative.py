"""Tests of the finite difference that replaces the derivative of a nonlinearity: limits, scale, covered modules, and refusals."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fa_bench
from fa_bench.errors import CoverageError, OptionError
from fa_bench.mechanisms.derivative import NONLINEAR, DualModule
from fa_bench.rules.dual_propagation import DualPropagation
from tests.mechanisms.loops.chain import EDGE_RULES, LOCAL_LOSSES
from tests.versions import needs_compiler

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 0, 1, 2])
#: Edge rules that always use exact derivatives, or, like dual propagation, finite differences by default.
BACKPROPAGATES = ("bp", "bp_fc", "frozen", "frozen_blocks", "dual_propagation")


def mlp(*activations: nn.Module) -> nn.Sequential:
    torch.manual_seed(1)
    first, second = activations if len(activations) == 2 else (activations[0], copy.deepcopy(activations[0]))
    return nn.Sequential(nn.Linear(8, 7), first, nn.Linear(7, 5), second, nn.Linear(5, 3)).double()


def gradients(model: nn.Module, rule, x: Tensor = X, y: Tensor = Y, factor: float = 1.0, **call) -> list[Tensor]:
    model.zero_grad()
    logits = model(x)
    rule.backward(factor * F.cross_entropy(logits, y), logits, y, **call)
    return [p.grad.clone() for p in model.parameters()]


def exact(model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    F.cross_entropy(model(X), Y).backward()
    return [p.grad.clone() for p in model.parameters()]


def apart(one: list[Tensor], two: list[Tensor]) -> float:
    """The largest difference between two lists of tensors, relative to each tensor's largest entry."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(one, two, strict=True))


def make(kind: type[nn.Module]) -> nn.Module:
    options = {nn.Threshold: (0.1, 0.2), nn.Softshrink: (0.05,), nn.Hardshrink: (0.05,)}
    return kind(*options.get(kind, ()))


@pytest.mark.parametrize("kind", NONLINEAR)
def test_only_small_beta_matches_backprop(kind: type[nn.Module]) -> None:
    """With a β of 1e-6 and errors of size 1, third-order terms vanish, and rounding errors are about 1e-16 / 1e-6. The inputs do
    not hit a kink."""
    model = mlp(make(kind))
    want = exact(model)
    rule = fa_bench.attach(model, "dual_propagation", beta=1e-6)
    assert apart(gradients(model, rule), want) < 1e-7
    rule.detach()
    rule = fa_bench.attach(model, "dual_propagation", beta=30.0)
    assert apart(gradients(model, rule)[:1], want[:1]) > 1e-2


def test_linear_activations_match_backprop_for_every_beta() -> None:
    """A leaky ReLU with a slope of 1 is linear, so the difference of its values is exact except for rounding errors of 1e-16."""
    for activation in (nn.LeakyReLU(1.0), nn.Identity()):
        model = mlp(activation)
        want = exact(model)
        for beta in (0.01, 100.0):
            rule = fa_bench.attach(model, "dual_propagation", beta=beta)
            assert apart(gradients(model, rule), want) < 1e-12
            rule.detach()


@pytest.mark.parametrize(
    ("a", "slope"), [(3.0, 1.0), (2.0, 1.0), (0.5, 0.625), (0.0, 0.5), (-0.5, 0.375), (-2.0, 0.0), (-3.0, 0.0)]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_relu_slope_is_linear_between_thresholds(a: float, slope: float, sign: int) -> None:
    """Here, β |g| is 2, so the slope is 1 for a above 2, 0 for a below -2, and (a + 2) / 4 in between."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False)).double()
    rule = fa_bench.attach(model, "dual_propagation", beta=2.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    rule.backward(sign * model(torch.tensor([[a]]).double()).sum(), loss_scale=1.0)
    found = model.get_submodule("0").weight.grad.item()
    assert math.isclose(found, sign * slope * a, rel_tol=1e-12, abs_tol=1e-12)


def test_relu_has_no_cancellation_in_single_precision() -> None:
    """In single precision, a plain difference φ(a + d) - φ(a - d) with d = 1e-8 a would be zero or a rounding error."""
    model = mlp(nn.ReLU()).float()
    x = X.float()
    model.zero_grad()
    F.cross_entropy(model(x), Y).backward()
    want = [p.grad.clone() for p in model.parameters()]
    rule = fa_bench.attach(model, "dual_propagation", beta=1e-7)
    assert apart(gradients(model, rule, x), want) < 1e-5


@pytest.mark.parametrize("name", [name for name in EDGE_RULES if name not in (*BACKPROPAGATES, *LOCAL_LOSSES)])
def test_edge_rules_support_dual_derivatives(name: str) -> None:
    """With a small β, the gradients are those with exact derivatives; with a large one, they are not."""
    options = {"initial_steps": 1, "mirror_batch": 2} if name == "wm" else {}

    def found(**derivative: object) -> list[Tensor]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double()
        rule = fa_bench.attach(model, name, seed=0, sample_input=X, **options, **derivative)
        logits = model(X)
        rule.backward(F.cross_entropy(logits, Y), logits, Y, loss_scale=1.0)
        return [p.grad.clone() for p in model.parameters() if p.grad is not None and p.grad.any()]

    want = found(derivative="exact")
    assert apart(found(derivative="dual", beta=1e-6), want) < 1e-6
    assert apart(found(derivative="dual", beta=5.0), want) > 1e-3


@pytest.mark.parametrize("name", LOCAL_LOSSES)
def test_rules_with_another_beta_refuse_dual_derivatives(name: str) -> None:
    with pytest.raises(OptionError, match=r"derivative=dual is not available, because beta is a coefficient of the local losses"):
        fa_bench.attach(mlp(nn.Tanh()), name, derivative="dual")


@pytest.mark.parametrize("name", ["dual_propagation", "kp", "asfp_lc"])
def test_gradients_scale_with_loss_and_batch_size(name: str) -> None:
    """The gradients of c times the loss are c times those of the loss, and the mean over the batch is the mean of its halves."""
    options = {"derivative": "dual", "beta": 5.0}
    if name == "asfp_lc":
        options |= {"cuts": ["1", "3"], "freeze_stem": False, "linear": "share", "k": 2}
    model = mlp(nn.Tanh())
    if name == "asfp_lc":
        model = nn.Sequential(
            nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
        ).double()
        options["cuts"] = ["1", "3", "5"]
    rule = fa_bench.attach(model, name, seed=0, sample_input=X, **options)
    want = gradients(model, rule)
    for factor, call in ((1024.0, {}), (0.3, {}), (0.3, {"loss_scale": 0.3}), (-2.0, {"loss_scale": -2.0})):
        assert apart(gradients(model, rule, factor=factor, **call), [factor * one for one in want]) < 1e-9
    for call in ({}, {"loss_scale": 0.0}):
        assert not any(one.any() for one in gradients(model, rule, factor=0.0, **call)), (
            "a loss of zero must give gradients of zero, not NaN"
        )
    wrong = gradients(model, rule, loss_scale=0.1)
    assert apart(wrong[:1], want[:1]) > 1e-3, "a wrong scale does not change the errors"
    if name != "asfp_lc":  # the classifiers of asfp_lc normalise over the batch
        halves = [gradients(model, rule, X[part], Y[part], 0.5) for part in (slice(3), slice(3, 6))]
        assert apart([a + b for a, b in zip(*halves, strict=True)], want) < 1e-9


def test_zero_loss_has_zero_gradient() -> None:
    model = mlp(nn.ReLU())
    rule = fa_bench.attach(model, "dual_propagation")
    assert all((one == 0).all() for one in gradients(model, rule, factor=0.0))


def test_in_place_modules_give_the_same_outputs_and_gradients() -> None:
    class Shortcut(nn.Module):
        """A block whose nonlinearity, if it works in place, also changes the input of the shortcut."""

        def __init__(self, inplace: bool) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.fc1, self.act, self.fc2 = nn.Linear(8, 3), nn.ELU(inplace=inplace), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.fc1(x)
            y = self.act(h)
            return (h if self.act.inplace else y) + self.fc2(y)

    found, outputs = [], []
    for inplace in (False, True):
        model = Shortcut(inplace).double()
        plain = model(X)
        rule = fa_bench.attach(model, "dual_propagation", beta=5.0, sample_input=X)
        outputs += [plain, model(X)]
        found.append(gradients(model, rule))
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    assert apart(*found) == 0


def test_exact_and_detached_modules_match_plain() -> None:
    model = mlp(nn.GELU())
    want, plain = exact(model), [type(module) for module in model]
    rule = fa_bench.attach(model, "fa", derivative="dual", beta=5.0, sample_input=X)
    assert [type(module).__name__ for module in model][1] == "DualGELU" and isinstance(model[1], nn.GELU)
    assert "The derivative of 1, 3 is a finite difference over each sample's error (beta=5)." in str(rule.coverage)
    with torch.no_grad():
        model[1](X)  # a module may be called outside the model
    with rule.exact():
        assert apart(exact(model), want) == 0
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert copied[1].dual is copied[3].dual is not model[1].dual
    rule.detach()
    assert [type(module) for module in model] == plain and not any("dual" in vars(module) for module in model)
    assert apart(exact(model), want) == 0


def test_rejects_activation_replaced_after_attach() -> None:
    model = mlp(nn.ReLU())
    fa_bench.attach(model, "dual_propagation")
    model[1] = nn.ReLU()
    with pytest.raises(CoverageError, match=r"changed after attach \(1 replaced\)"):
        model(X)


class Calls(nn.Module):
    """A net that computes one nonlinearity with `nn.ReLU` and the other with the given function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.fc1, self.act, self.function = nn.Linear(8, 8), nn.ReLU(), function
        self.fc2, self.fc3 = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.function(self.fc2(self.act(self.fc1(x)))))


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (F.relu, "relu"),
        (torch.tanh, "tanh"),
        (F.gelu, "gelu"),
        (F.hardswish, "hardswish"),
        (nn.PReLU(), "prelu"),
        (nn.RReLU(), "rrelu"),
        (F.relu6, "hardtanh"),
    ],
)
@pytest.mark.parametrize("sample", [True, False])
def test_rejects_functional_activations(function, name: str, sample: bool) -> None:
    """With a sample, attach refuses the function; without one, the first training pass refuses it. With exact derivatives, the
    function is accepted."""
    says = rf"rule 'fa': derivative='dual' replaces .* nn.ReLU, but this model computes {name} outside of supported"
    model = Calls(copy.deepcopy(function))  # a module with parameters must belong to only one model
    given = {"sample_input": X.float()} if sample else {}
    with pytest.raises(CoverageError, match=says):
        rule = fa_bench.attach(model, "fa", derivative="dual", **given)
        assert not sample, "attach accepted the function although there was a sample"
        with torch.no_grad():
            model(X.float())
        model(X.float())
    if not sample:
        rule.detach()
    assert type(model.act) is nn.ReLU, "the refused rule left its class in the model"
    rule = fa_bench.attach(model, "fa", **given)
    rule.backward(F.cross_entropy(model(X.float()), Y))


def test_attach_under_no_grad_rejects_functional_activations() -> None:
    with torch.no_grad(), pytest.raises(CoverageError, match="computes tanh outside of supported modules"):
        fa_bench.attach(Calls(torch.tanh), "fa", derivative="dual", sample_input=X.float())


def test_module_with_custom_forward_is_unchanged() -> None:
    model = mlp(nn.Tanh(), nn.ReLU())
    model[1].forward = torch.sin
    fa_bench.attach(model, "dual_propagation")
    assert [isinstance(module, DualModule) for module in model] == [False, False, False, True, False]


def test_rejects_functional_activations_of_frozen_layers() -> None:
    model = Calls(torch.tanh).requires_grad_(False)
    model.fc3.requires_grad_(True)
    with pytest.raises(CoverageError, match="computes tanh outside of supported modules"):
        fa_bench.attach(model, "fa", derivative="dual", sample_input=X.float())


def test_rejects_subclass_with_functional_activation() -> None:
    """Tanhshrink, which is x - tanh(x), is accepted as a module; a subclass of Tanh with its own forward method is not, because
    it calls a function."""

    class Steep(nn.Tanh):
        def forward(self, input: Tensor) -> Tensor:
            return torch.tanh(3 * input)

    fa_bench.attach(mlp(nn.Tanhshrink()), "fa", derivative="dual", sample_input=X)
    with pytest.raises(CoverageError, match="computes tanh outside of supported modules"):
        fa_bench.attach(mlp(Steep()), "fa", derivative="dual", sample_input=X)


@pytest.mark.parametrize("last", [0.25, None])
def test_zero_logit_error_reuses_last_loss_scale(last: float | None) -> None:
    """A net that predicts with certainty has no error at the logits, but the loss may contain a penalty on activations. The scale
    of the last pass is then used.

    Without an earlier pass, the scale is 1.
    """
    found, scale = [], last or 1.0
    for call in ({}, {"loss_scale": scale}):
        model = mlp(nn.Tanh())
        rule = fa_bench.attach(model, "dual_propagation", beta=5.0)
        if last is not None:
            gradients(model, rule, factor=last)
        with torch.no_grad():
            model[4].bias.copy_(torch.tensor([1e4, 0.0, 0.0]))
        activations: list[Tensor] = []
        model[3].register_forward_hook(lambda module, args, output, seen=activations: seen.append(output))
        model.zero_grad()
        logits = model(X)
        loss = F.cross_entropy(logits, torch.zeros_like(Y)) + activations[0].square().mean()
        rule.backward(loss * scale, logits, torch.zeros_like(Y), **call)
        found.append([p.grad for p in model.parameters()][:4])
    assert all(torch.equal(one, two) and one.any() for one, two in zip(*found, strict=True))


def test_batch_size_is_read_from_first_nonscalar_argument() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(nn.Tanh())

        def forward(self, temperature: Tensor, x: Tensor) -> Tensor:
            return self.net(x) / temperature

    model, plain, one = Scaled(), mlp(nn.Tanh()), torch.tensor(1.0)
    rule = fa_bench.attach(model, "dual_propagation", beta=5.0, sample_input=(one, X))
    rule.backward(F.cross_entropy(model(one, X), Y))
    want = gradients(plain, fa_bench.attach(plain, "dual_propagation", beta=5.0))
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(model.parameters(), want, strict=True))


def test_coverage_reports_model_without_nonlinearities() -> None:
    rule = fa_bench.attach(nn.Sequential(nn.Linear(8, 7), nn.Linear(7, 3)), "fa", derivative="dual")
    assert "This model has no nonlinear modules whose derivative could be replaced." in str(rule.coverage)


def test_requires_known_loss_scale() -> None:
    model = mlp(nn.ReLU())
    rule = fa_bench.attach(model, "fa", derivative="dual")
    logits = model(X)
    with pytest.raises(ValueError, match=r"needs the scale of the loss; call rule.backward\(loss, logits, target\), or "):
        rule.backward(2 * F.cross_entropy(logits, Y))
    rule.backward(F.cross_entropy(model(X), Y))  # an unscaled loss is recognised
    with pytest.raises(ValueError, match=r"call rule.backward\(loss, logits, target\)"):
        F.cross_entropy(model(X), Y).backward()
    with pytest.raises(ValueError, match="cannot infer it"):
        logits = model(X)
        rule.backward(2 * F.cross_entropy(logits, Y, label_smoothing=0.1), logits, Y)
    with pytest.raises(CoverageError, match="ReLU ran outside a forward pass of the attached model"):
        model[1](model[0](X))


@pytest.mark.parametrize("kind", ["mse", "tokens"])
def test_other_objectives_infer_loss_scale(kind: str) -> None:
    """The scale is inferred from the gradient of the rule's own objective at the logits."""
    found = []
    for factor in (1.0, 0.37):
        model = mlp(nn.Tanh())
        objective = "mse" if kind == "mse" else "token_cross_entropy"
        x, y = (X, torch.eye(3).double()[Y]) if kind == "mse" else (X.view(2, 3, 8), Y.view(2, 3))
        rule = fa_bench.attach(model, "dual_propagation", beta=5.0, objective=objective)
        logits = model(x)
        loss = F.mse_loss(logits, y) if kind == "mse" else F.cross_entropy(logits.flatten(0, 1), y.flatten())
        rule.backward(factor * loss, logits, y)
        found.append([p.grad / factor for p in model.parameters()])
    assert apart(*found) < 1e-9


def test_only_in_place_activations_modify_their_input() -> None:
    for activation in (nn.Tanh(), nn.ReLU(), nn.ReLU(inplace=True)):
        model, seen = mlp(activation), []
        fa_bench.attach(model, "dual_propagation")
        model[0].register_forward_hook(lambda module, args, output, seen=seen: seen.append((output, output.detach().clone())))
        model(X)
        after, before = seen[0]
        want = before.clamp_min(0) if getattr(activation, "inplace", False) else before
        assert torch.equal(after, want)


def test_activation_accepts_input_without_grad_outside_model() -> None:
    model = mlp(nn.ReLU())
    fa_bench.attach(model, "dual_propagation")
    assert torch.equal(model[1](X), X.clamp_min(0))


def test_bfloat16_computes_difference_in_single_precision() -> None:
    """bfloat16 has a relative precision of only 2^-8, so a difference of 1e-3 of the values would consist mostly of rounding
    errors if it were computed in bfloat16."""
    model = mlp(nn.Tanh()).float()
    model.zero_grad()
    F.cross_entropy(model(X.float()), Y).backward()
    want = [p.grad.clone() for p in model.parameters()]
    rule = fa_bench.attach(model, "dual_propagation", beta=1e-3)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(X.float())
        loss = F.cross_entropy(logits, Y)
    rule.backward(loss, logits, Y)
    assert apart([p.grad for p in model.parameters()], want) < 0.05


def test_checkpointing_gives_the_same_gradients() -> None:
    model = mlp(nn.Tanh())
    rule = fa_bench.attach(model, "kp", seed=0, derivative="dual", beta=5.0, sample_input=X)
    want = gradients(model, rule)

    class Checkpointed(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return self[4](checkpoint(lambda h: self[3](self[2](self[1](self[0](h)))), input, use_reentrant=False))

    other = Checkpointed(*mlp(nn.Tanh()))
    rule = fa_bench.attach(other, "kp", seed=0, derivative="dual", beta=5.0, sample_input=X)
    assert apart(gradients(other, rule), want) == 0


@needs_compiler
def test_compiled_graph_accepts_any_loss_scale_and_batch_size() -> None:
    """One graph supports losses of every scale. When the batch size first changes, the graph is recompiled, and then supports
    every batch size."""
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        model = mlp(nn.Tanh(), nn.ReLU(inplace=True))
        rule = fa_bench.attach(model, "kp", seed=0, derivative="dual", beta=5.0, sample_input=X)
        call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        found = []
        for size, factor in ((6, 1.0), (6, 0.25), (4, 1.0), (5, 0.3)):
            model.zero_grad()
            logits = call(X[:size])
            rule.backward(factor * F.cross_entropy(logits, Y[:size]), logits, Y[:size])
            found += [p.grad.clone() for p in model.parameters()]
        results.append(found)
    assert apart(*results) == 0
    torch._dynamo.reset()


def test_option_defaults_and_validation() -> None:
    assert DualPropagation().derivative == "dual" and DualPropagation().beta == 0.01
    for bad in ({"beta": 0.0}, {"beta": -1.0}, {"derivative": "true"}):
        with pytest.raises(OptionError):
            DualPropagation(**bad)
    model = mlp(nn.Tanh())
    rule = fa_bench.attach(model, "dual_propagation", derivative="exact")
    assert apart(gradients(model, rule), exact(mlp(nn.Tanh()))) == 0
    assert not any(isinstance(module, DualModule) for module in model)
