"""Tests of rules that run extra forward passes: the properties that their papers state, the state that they restore, and how they
are called."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fa_bench
from fa_bench.errors import CoverageError
from fa_bench.mechanisms import second_pass
from fa_bench.mechanisms.second_pass import Draws
from fa_bench.objectives.cross_entropy import CrossEntropy
from fa_bench.objectives.mse import MSE

RULES = ["node_perturbation", "weight_perturbation", "np_feedback", "pepita", "forward_forward"]
NOISY = ["node_perturbation", "weight_perturbation", "np_feedback", "forward_forward"]


def mlp(*widths: int, activation: Any = nn.ReLU, bias: bool = True) -> nn.Sequential:
    """A double-precision network with 6 inputs, hidden layers of the given widths, 3 outputs and cut points at its
    activations."""
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for inputs, outputs in zip((6, *widths), (*widths, 3), strict=True):
            layers += [nn.Linear(inputs, outputs, bias=bias), activation()]
    model = nn.Sequential(*layers[:-1]).double()
    model.cut_points = [str(number) for number in range(1, len(model), 2)]  # type: ignore[assignment]
    return model


def batch(size: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 6, generator=generator, dtype=torch.float64), torch.randint(3, (size,), generator=generator)


X, Y = batch()


def learn(rule: Any, x: Tensor = X, y: Tensor = Y) -> dict[str, Tensor]:
    """Run one training pass and return all existing gradients by parameter name."""
    model = rule.model
    model.zero_grad()
    logits = model(x)
    rule.backward(rule.objective.loss(logits, y), logits, y)
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def exact(model: nn.Module, x: Tensor = X, y: Tensor = Y, objective: Any = None) -> dict[str, Tensor]:
    plain = copy.deepcopy(model)
    plain.zero_grad()
    (objective.loss if objective else F.cross_entropy)(plain(x), y).backward()
    return {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.grad is not None}


def noise_at(place: str, unit: int, length: float = 1.0) -> Any:
    """A replacement for `Draws.normal` that perturbs only the given unit at the given place, by `length` in every sample."""

    def normal(draws: Draws, name: str, like: Tensor, is_shared: bool = False) -> Tensor:
        noise = torch.zeros_like(like)
        if name == place:
            noise[:, unit] = length
        return noise

    return normal


def cosine(one: Tensor, two: Tensor) -> float:
    return F.cosine_similarity(one.flatten(), two.flatten(), dim=0).item()


# ------------------------------------------------------------------------------------------------ all pass rules
@pytest.mark.parametrize("name", RULES)
def test_extra_passes_do_not_change_running_statistics_or_rng(name: str) -> None:
    """If every pass sampled new dropout masks, the differences between masks would hide the effect of the noise. After an update,
    the global generator must be in the same state as after a single forward pass."""
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    rule = (
        fa_bench.attach(model, name, cuts=["2"])
        if name not in ("weight_perturbation", "np_feedback")
        else fa_bench.attach(model, name)
    )
    twin = copy.deepcopy(model)
    fa_bench.attached_rule(twin).detach()  # type: ignore[union-attr]
    torch.manual_seed(4)
    learn(rule)
    state = torch.get_rng_state()
    torch.manual_seed(4)
    if name == "forward_forward":  # in this rule's first pass, the input contains a neutral label
        twin[0].register_forward_pre_hook(lambda module, args: (rule._marked(X, X.new_full((1, 3), 1 / 3)),))
    twin(X)
    assert torch.equal(torch.get_rng_state(), state)
    assert model[1].num_batches_tracked == 1
    for key in ("running_mean", "running_var"):
        assert torch.equal(getattr(model[1], key), getattr(twin[1], key))


@pytest.mark.parametrize("name", ["node_perturbation", "weight_perturbation", "np_feedback"])
def test_all_passes_use_same_dropout_masks(name: str) -> None:
    """The central difference is a directional derivative only if all passes use the same dropout masks."""

    def trained(seed: int) -> dict[str, Tensor]:
        model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Dropout(0.5), nn.Linear(40, 3)).double()
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) / 3)
        rule = fa_bench.attach(model, name, **({"cuts": ["1"]} if name == "node_perturbation" else {}))
        torch.manual_seed(seed)
        return learn(rule)

    one, same, other = trained(1), trained(1), trained(2)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)
    assert max(tensor.abs().max().item() for tensor in one.values()) < 100  # different masks would give much larger gradients


@pytest.mark.parametrize("name", NOISY)
def test_noise_changes_every_update_and_is_restored_from_state(name: str) -> None:
    rule = fa_bench.attach(mlp(8, 7), name)
    first, state = learn(rule), copy.deepcopy(rule.state_dict())
    before = copy.deepcopy(rule.model.state_dict())
    second = learn(rule)
    assert any(not torch.equal(first[key], second[key]) for key in first)
    fresh = fa_bench.attach(mlp(8, 7), name, seed=9)
    fresh.model.load_state_dict(before)
    fresh.load_state_dict(state)
    again = learn(fresh)
    assert all(torch.equal(again[key], second[key]) for key in second)


@pytest.mark.parametrize("name", NOISY)
def test_measuring_does_not_change_noise_state(name: str) -> None:
    rule = fa_bench.attach(mlp(8, 7), name)
    learn(rule)
    state, tensors = copy.deepcopy(rule.state_dict()), copy.deepcopy(rule.model.state_dict())
    rule.mode.freeze_random = True
    learn(rule)
    assert rule.state_dict() == state
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in rule.model.state_dict().items())


@pytest.mark.parametrize("name", RULES)
def test_labels_are_needed(name: str) -> None:
    rule = fa_bench.attach(mlp(8, 7), name)
    logits = rule.model(X)
    with pytest.raises(ValueError, match=r"call rule\.backward\(loss, logits, target\)"):
        rule.backward(F.cross_entropy(logits, Y))
    assert all(parameter.grad is None for parameter in rule.model.parameters())


def test_forward_forward_classifier_does_not_affect_hidden_gradients() -> None:
    """The classifier's M is a parameter of the nonlinearity at a middle cut and must not affect the gradients of the hidden
    weights."""
    hidden = []
    for all_layers in (True, False):
        rule = fa_bench.attach(mlp(8, 7, 9), "forward_forward", all_layers=all_layers)
        found = learn(rule)
        assert ("3.feedback_M" in found) == all_layers
        hidden.append({name: found[name] for name in ("0.weight", "2.weight", "4.weight")})
    assert all(torch.equal(gradient, hidden[1][name]) for name, gradient in hidden[0].items())


OF_OBJECTIVE = ["node_perturbation", "weight_perturbation", "np_feedback", "pepita"]


@pytest.mark.parametrize("name", OF_OBJECTIVE)
def test_rejects_loss_not_multiple_of_objective(name: str) -> None:
    """Perturbation rules and PEPITA evaluate the objective on the model's output themselves, so they must refuse a loss that is
    not a multiple of the objective."""
    for loss in (
        lambda z: F.cross_entropy(z / 5, Y),
        lambda z: F.cross_entropy(z.flip(1), Y),
        lambda z: F.mse_loss(z, F.one_hot(Y, 3).double()),
    ):
        rule = fa_bench.attach(mlp(8, 7), name)
        logits = rule.model(X)
        with pytest.raises(ValueError, match="is not a multiple of that of the mean cross-entropy"):
            rule.backward(loss(logits), logits, Y)


@pytest.mark.parametrize("name", [*OF_OBJECTIVE, "ddtp_linear", "fdfa", "dfc"])
def test_loss_scale_of_torch_mse_loss_is_inferred(name: str) -> None:
    """The objective is half the sum of squared errors over the three outputs, whereas torch's loss is their mean. Torch's loss is
    therefore 2/3 of the objective, and the rule must detect this factor."""
    target = F.one_hot(Y, 3).double()
    found = []
    for loss in (F.mse_loss, lambda z, t: (z - t).square().mean()):
        rule = fa_bench.attach(mlp(8, 7), name, objective=MSE(), **({"b_init": "pytorch"} if name == "fdfa" else {}))
        logits = rule.model(X)
        rule.backward(loss(logits, target), logits, target)
        found.append({key: p.grad for key, p in rule.model.named_parameters() if p.grad is not None})
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key])


@pytest.mark.parametrize("name", ["node_perturbation", "weight_perturbation"])
def test_bfloat16_autocast_perturbs_in_float32(name: str) -> None:
    """bfloat16 has eight bits of precision, so a difference of 1e-3 between logits would be lost to rounding."""
    found = []
    for enabled in (False, True):
        model = mlp(8, 7).float()
        rule = fa_bench.attach(model, name)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = model(X.float())
            rule.backward(F.cross_entropy(logits, Y), logits, Y)
        found.append(model[0].weight.grad)
    assert cosine(*found) > 0.99 and found[1].norm() > 0.9 * found[0].norm()


@pytest.mark.parametrize("name", ["node_perturbation", "weight_perturbation", "np_feedback", "epc", "pc"])
def test_bfloat16_model_computes_losses_in_float32(name: str) -> None:
    """bfloat16 has eight bits of precision, so two losses that differ only by the effect of noise would round to the same
    number."""
    seen: set[torch.dtype] = set()

    class Watched(CrossEntropy):
        def loss(self, outputs: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
            seen.add(outputs.dtype)
            return super().loss(outputs, target, reduction)

    model = mlp(8, 7).bfloat16()
    model.blocks = model.cut_points  # type: ignore[assignment]
    rule = fa_bench.attach(model, name, objective=Watched())
    logits = model(X.bfloat16())
    rule.backward(F.cross_entropy(logits, Y), logits, Y)
    assert seen == {torch.float32}


@pytest.mark.parametrize("name", [*RULES, "ddtp_linear", "ldrl", "fdfa", "grape", "dfc"])
def test_empty_batch_gives_finite_gradients(name: str) -> None:
    rule = fa_bench.attach(mlp(8, 7), name, **({"cuts": ["1", "3"]} if name == "ldrl" else {}))
    logits = rule.model(X[:0])
    rule.backward(F.cross_entropy(logits, Y[:0], reduction="sum"), logits, Y[:0], loss_scale=1.0)
    assert all(torch.isfinite(p.grad).all() for p in rule.model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["pepita", "forward_forward", "dfc"])
def test_only_trainable_layers_get_gradients(name: str) -> None:
    for frozen, learning in ((["4"], {"0", "2"}), (["0", "2"], {"4"}), (["2"], {"0", "4"})):
        model = mlp(8, 7)
        for path in frozen:
            model.get_submodule(path).requires_grad_(False)
        assert {key.partition(".")[0] for key in learn(fa_bench.attach(model, name)) if "feedback" not in key} == learning


@pytest.mark.parametrize("name", ["pepita", "forward_forward"])
def test_rejects_input_passed_as_keyword(name: str) -> None:
    rule = fa_bench.attach(mlp(8, 7), name)
    with pytest.raises(CoverageError, match="pass it as the first positional argument"):
        logits = rule.model(input=X)
        rule.backward(F.cross_entropy(logits, Y), logits, Y)


@pytest.mark.parametrize("name", ["fdfa", "grape", "forward_gradient"])
def test_tangents_are_finite_under_bfloat16_autocast(name: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))
    rule = fa_bench.attach(model, name, cuts=["1", "4"])
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(X.float())
    rule.backward(F.cross_entropy(logits.float(), Y), logits, Y)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_deep_supervision_learns_around_frozen_layers() -> None:
    for frozen in (["0"], ["2"], ["4"], ["2", "4"]):
        model = mlp(8, 7, 5)
        for path in frozen:
            model.get_submodule(path).requires_grad_(False)
        gradients = learn(fa_bench.attach(model, "bp_deepsup"))
        assert {key.partition(".")[0] for key in gradients if "feedback" not in key} == {"0", "2", "4", "6"} - set(frozen)


def test_ldrl_rejects_frozen_block_between_trainable_blocks() -> None:
    def frozen(model: nn.Module, *paths: str) -> nn.Module:
        for path in paths:
            model.get_submodule(path).requires_grad_(False)
        return model

    refused = r"through the block that ends at '5', whose weights are frozen"
    with pytest.raises(CoverageError, match=refused):
        fa_bench.attach(frozen(mlp(8, 7, 5), "4"), "ldrl", cuts=["1", "3", "5"])
    fa_bench.attach(frozen(mlp(8, 7, 5), "4"), "ldrl", cuts=["1", "3"])

    rule = fa_bench.attach(mlp(8, 7, 5), "ldrl", cuts=["1", "3", "5"])
    learn(rule)
    frozen(rule.model, "4")
    with pytest.raises(CoverageError, match=refused):
        learn(rule)
    rule.model.requires_grad_(True)
    learn(rule)
    # If no block before the frozen ones learns, no error has to pass through them, even if the input requires a gradient.
    frozen(rule.model, "0", "2")
    learn(rule, X.clone().requires_grad_(True))


@pytest.mark.parametrize("name", OF_OBJECTIVE)
def test_one_hot_float_targets_match_labels(name: str) -> None:
    """With squared errors, class labels and the corresponding one-hot targets give the same gradients."""
    found = [learn(fa_bench.attach(mlp(8, 7), name, objective=MSE()), X, target) for target in (Y, F.one_hot(Y, 3).double())]
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value)


@pytest.mark.parametrize("name", RULES)
def test_copied_and_pickled_models_train_identically(name: str) -> None:
    rule = fa_bench.attach(mlp(8, 7), name)
    learn(rule)
    copies: list[nn.Module] = [copy.deepcopy(rule.model)]
    if name != "forward_forward":
        copies.append(pickle.loads(pickle.dumps(rule.model)))
    want = learn(rule)
    for model in copies:
        got = learn(fa_bench.attached_rule(model))
        assert all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize("name", RULES)
def test_evaluation_runs_model_once(name: str) -> None:
    rule = fa_bench.attach(mlp(8, 7), name)
    calls: list[int] = []
    rule.model[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        assert torch.equal(rule.predict(X), rule.model(X))
    assert len(calls) == 2 and rule.first_pass is None


@pytest.mark.parametrize(
    ("name", "passes"),
    [("node_perturbation", 3), ("weight_perturbation", 3), ("np_feedback", 3), ("pepita", 2), ("forward_forward", 3)],
)
def test_number_of_passes_per_update(name: str, passes: int) -> None:
    rule = fa_bench.attach(mlp(8, 7), name)
    calls: list[int] = []
    rule.model[0].register_forward_hook(lambda *_: calls.append(1))
    learn(rule)
    assert len(calls) == passes


@pytest.mark.parametrize("name", ["weight_perturbation", "pepita", "forward_forward"])
def test_no_alignment_metrics_are_defined(name: str) -> None:
    rule = fa_bench.attach(mlp(8, 7), name)
    assert rule.readouts() == {} == rule.weight_pairs() and rule.error_points(rule._trace) == {}


@pytest.mark.parametrize("name", ["node_perturbation", "weight_perturbation", "pepita", "forward_forward"])
def test_rejects_outputs_with_changed_dimensions(name: str) -> None:
    model = mlp(8, 7)
    model.register_forward_hook(lambda module, args, output: output.unsqueeze(1) if module.extended else output)
    model.extended = False  # type: ignore[assignment]
    rule = fa_bench.attach(model, name, sample_input=X)
    model.extended = True  # type: ignore[assignment]
    logits = model(X)
    with pytest.raises(CoverageError, match=r"with outputs of 2 dimensions; now they have the shape \(5, 1, 3\)"):
        rule.backward(F.cross_entropy(logits[:, 0], Y), logits, Y)


# ------------------------------------------------------------------------------------------------ perturbations
def test_node_perturbation_is_exact_for_quadratic_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """With identity activations and squared errors, the estimates for all noise vectors of a basis add up to the gradients of
    backpropagation, even if sigma is large."""
    sizes = {"1": 8, "3": 7, "": 3}
    total: dict[str, Tensor] = {}
    for place, features in sizes.items():
        for unit in range(features):
            monkeypatch.setattr(Draws, "normal", noise_at(place, unit))
            rule = fa_bench.attach(mlp(8, 7, activation=nn.Identity), "node_perturbation", sigma=3.0, objective=MSE())
            for key, value in learn(rule).items():
                total[key] = total.get(key, torch.zeros(())) + value
    for key, value in exact(mlp(8, 7, activation=nn.Identity), objective=MSE()).items():
        torch.testing.assert_close(total[key], value)


@pytest.mark.parametrize("name", ["node_perturbation", "weight_perturbation"])
def test_perturbations_are_unbiased(name: str) -> None:
    """With P perturbed values, the cosine between the mean of n estimates and the gradient is about 1/√(1 + P/n). The cosine is
    about 0.98 over all values together, and lower for a single matrix with small gradients."""
    model = mlp(4, activation=nn.Tanh)
    rule, want = fa_bench.attach(copy.deepcopy(model), name), exact(model)
    total = {key: torch.zeros_like(value) for key, value in want.items()}
    for _ in range(1500):
        for key, value in learn(rule).items():
            total[key] += value / 1500
    for key, value in want.items():
        assert cosine(total[key], value) > 0.9, key
        assert total[key].norm() / value.norm() == pytest.approx(1, abs=0.2)


def test_weight_perturbation_matches_directional_derivative() -> None:
    """The central difference is exact because the loss is quadratic in the weights."""
    model = nn.Sequential(nn.Linear(6, 3)).double()
    rule = fa_bench.attach(copy.deepcopy(model), "weight_perturbation", epsilon=5.0, objective=MSE())
    want = exact(model, objective=MSE())
    got = learn(rule)
    draws = Draws(0)
    draws.number = 1
    noise = {key: draws.normal(str(number), value, is_shared=True) for number, (key, value) in enumerate(want.items())}
    slope = sum((noise[key] * value).sum() for key, value in want.items())
    for key in want:
        torch.testing.assert_close(got[key], noise[key] * slope)


def test_weight_perturbation_restores_weights_even_after_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = fa_bench.attach(mlp(8, 7), "weight_perturbation", epsilon=0.3)
    before = {key: tensor.clone() for key, tensor in rule.model.state_dict().items()}
    versions = [parameter._version for parameter in rule.model.parameters()]
    learn(rule)
    assert all(torch.equal(tensor, before[key]) for key, tensor in rule.model.state_dict().items())
    assert [parameter._version for parameter in rule.model.parameters()] == versions
    logits = rule.model(X)
    rule.model[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rule.backward(F.cross_entropy(logits, Y), logits, Y)
    assert all(torch.equal(tensor, before[key]) for key, tensor in rule.model.state_dict().items())


def test_exceptions_in_extra_passes_propagate_unchanged() -> None:
    rule = fa_bench.attach(mlp(8, 7), "weight_perturbation")
    logits = rule.model(X)

    def fails(*_: Any) -> None:
        raise RuntimeError("the second pass failed")

    rule.model[2].register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="the second pass failed"):
        rule.backward(F.cross_entropy(logits, Y), logits, Y)


# ------------------------------------------------------------------------------------------------ feedback from noise
def test_np_feedback_gradient_vanishes_at_weights_of_linear_net(monkeypatch: pytest.MonkeyPatch) -> None:
    """Averaged over a basis of the noise ξ, the product of ξ and the loss difference d is the true error at the layer's input.
    The gradient of B must therefore vanish if B equals W."""
    model = mlp(8, 7, activation=nn.Identity)
    rule = fa_bench.attach(model, "np_feedback", sigma=2.0, objective=MSE())
    with torch.no_grad():
        for path, tensors in rule.feedback.items():
            tensors["B"].copy_(model.get_submodule(path).weight)  # type: ignore[arg-type]
    total, size = torch.zeros(()), torch.zeros(())
    for unit in range(8):
        # Each noise vector has length √8, so that the mean over the eight basis vectors is the full error.
        monkeypatch.setattr(Draws, "normal", noise_at("2 0", unit, 8**0.5))
        gradient = learn(rule)["2.feedback_B"]
        total, size = total + gradient / 8, torch.maximum(size, gradient.abs().max())
    assert total.abs().max() < 1e-12 < size


def test_np_feedback_weight_gradients_match_fa() -> None:
    found = {}
    for name in ("np_feedback", "fa"):
        rule = fa_bench.attach(mlp(8, 7), name, seed=3)
        found[name] = {key: value for key, value in learn(rule).items() if "feedback" not in key}
    assert all(torch.equal(value, found["fa"][key]) for key, value in found["np_feedback"].items())


def test_np_feedback_rejects_logits_not_from_model() -> None:
    rule = fa_bench.attach(mlp(8, 7), "np_feedback")
    logits = rule.model(X)
    other = torch.zeros(5, 3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="the loss was not computed by a training forward pass of the attached model"):
        rule.backward(F.cross_entropy(other, Y), other, Y)
    copied = logits.clone()
    del logits
    rule.backward(F.cross_entropy(copied, Y), copied, Y)
    assert rule.model[0].feedback_B.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "make",
    [lambda: nn.LSTM(6, 5, batch_first=True), lambda: nn.MultiheadAttention(6, 2, batch_first=True)],
    ids=["lstm", "attention"],
)
def test_np_feedback_perturbs_all_layers_of_compound_module(make: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = make()
            self.out = nn.Linear(5 if isinstance(self.core, nn.LSTM) else 6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.core(x)[0] if isinstance(self.core, nn.LSTM) else self.core(x, x, x)[0]
            return self.out(h.mean(1))

    x = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rule = fa_bench.attach(Net().double(), "np_feedback", sample_input=x)
    gradients = learn(rule, x)
    assert all(value.abs().sum() > 0 for key, value in gradients.items() if "feedback" in key)
    assert len([key for key in gradients if "feedback" in key]) == 3


# ------------------------------------------------------------------------------------------------ PEPITA
def test_pepita_linear_layer_matches_direct_feedback() -> None:
    """In a linear layer, the activations of the two passes differ by h - h' = -W₁ F e, which is a direct feedback signal.
    PEPITA's update multiplies this difference by the input of the second pass instead of that of the first."""
    model = mlp(8, 7, activation=nn.Identity)
    rule = fa_bench.attach(model, "pepita", f_scale=0.5)
    feedback = rule.feedback["1"]["F"]
    error = torch.softmax(model(X), 1) - F.one_hot(Y, 3)
    first: Any = model[0]
    modulated = X + error.detach() @ feedback
    direct = -(error.detach() @ feedback) @ first.weight.t() / len(X)
    torch.testing.assert_close(learn(rule)["0.weight"], (direct.t() @ modulated).detach())


def test_pepita_without_feedback_trains_only_output_layer() -> None:
    rule = fa_bench.attach(mlp(8, 7), "pepita", f_scale=0.0)
    got, want = learn(rule), exact(mlp(8, 7))
    assert not any(value.any() for key, value in got.items() if not key.startswith("4"))
    torch.testing.assert_close(got["4.weight"], want["4.weight"])


def test_pepita_zero_error_gives_zero_gradients() -> None:
    rule = fa_bench.attach(mlp(8, 7), "pepita", f_scale=0.5, objective=MSE())
    with torch.no_grad():
        target = rule.model(X)
    assert not any(value.any() for value in learn(rule, X, target).values())


def test_pepita_is_linear_in_small_feedback() -> None:
    small, large = (
        learn(fa_bench.attach(mlp(8, 7, activation=nn.Tanh), "pepita", f_scale=scale))["0.weight"] for scale in (1e-6, 2e-6)
    )
    torch.testing.assert_close(2 * small, large, rtol=1e-4, atol=0)


def test_cut_at_pooling_moves_to_preceding_nonlinearity() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3))
    x = torch.zeros(2, 1, 8, 8)
    for name in ("pepita", "forward_forward"):
        rule = fa_bench.attach(model, name, sample_input=x, cuts=["3"])
        assert list(rule._cut_modules) == ["2"]
        rule.detach()
    assert list(fa_bench.attach(model, "forward_forward", sample_input=x, cuts=["3"], full_gradient=False)._cut_modules) == ["3"]


def test_cuts_move_only_across_pooling_layers() -> None:
    """A cut at a second nonlinearity, or at a block that changes the shape, stays in place. A cut at a pooling layer moves
    to the preceding nonlinearity, even across another pooling layer or into a container."""

    def part(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU())

    act = nn.Sequential(nn.ReLU(), nn.Dropout(0.1))
    for layers, cut, found in (
        ([nn.Linear(6, 8), nn.Tanh(), nn.ReLU(), nn.Linear(8, 3)], "2", "2"),
        ([part(6, 8), nn.Linear(8, 3)], "0", "0"),
        ([nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), act, nn.MaxPool1d(2), nn.Flatten(), nn.Linear(8, 3)], "3", "2.0"),
        (
            [
                nn.Unflatten(1, (1, 6)),
                nn.Conv1d(1, 4, 3),
                nn.ReLU(),
                nn.MaxPool1d(2),
                nn.AvgPool1d(2),
                nn.Flatten(),
                nn.Linear(4, 3),
            ],
            "4",
            "2",
        ),
    ):
        rule = fa_bench.attach(nn.Sequential(*layers).double(), "pepita", sample_input=X, cuts=[cut])
        assert list(rule._cut_modules) == [found]


def test_weight_perturbation_rejects_ambiguous_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.other = nn.Linear(6, 3), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.fc(x), "other": self.other(x)}

    with pytest.raises(CoverageError, match="takes its error from one output, but this model returns"):
        fa_bench.attach(Two(), "weight_perturbation", sample_input=X.float())


def test_pepita_cut_at_block_trains_layers_inside_block() -> None:
    """If the difference were taken before the block, nothing inside the block would learn."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act = nn.Linear(6, 6), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.act(self.fc(x))

    model = nn.Sequential(nn.Linear(6, 6), Block(), nn.Linear(6, 3)).double()
    got = learn(fa_bench.attach(model, "pepita", cuts=["0", "1"], f_scale=1.0))
    assert got["1.fc.weight"].any() and got["0.weight"].any()
    normalised = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.LayerNorm(6), Block(), nn.Linear(6, 3)).double()
    got = learn(fa_bench.attach(normalised, "pepita", cuts=["1", "3"], f_scale=1.0))
    assert got["2.weight"].any() and got["2.bias"].any(), "the normalisation before the block does not learn"


@pytest.mark.parametrize("name", [*RULES, "dfc", "epc", "pc", "forward_gradient"])
def test_extra_passes_receive_additional_arguments(name: str) -> None:
    """Every pass receives the extra positional and keyword arguments of the first pass. The gradients must therefore equal those
    of a model that has the same values as defaults."""

    class Net(nn.Module):
        def __init__(self, factor: float, shift: float) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.fc1, self.act, self.fc2 = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)
            self.cut_points = self.blocks = ["act"]
            self.factor, self.shift = factor, shift

        def forward(self, x: Tensor, factor: Tensor | None = None, *, shift: Tensor | None = None) -> Tensor:
            h = self.fc1(x) * (self.factor if factor is None else factor) + (self.shift if shift is None else shift)
            return self.fc2(self.act(h))

    def given(value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64)

    found = []
    for defaults, args, kwargs in (((1.0, 0.0), (given(2.0),), {"shift": given(0.5)}), ((2.0, 0.5), (), {})):
        rule = fa_bench.attach(Net(*defaults).double(), name, sample_input=X)
        logits = rule.model(X, *args, **kwargs)
        rule.backward(F.cross_entropy(logits, Y), logits, Y)
        found.append({key: parameter.grad for key, parameter in rule.model.named_parameters()})
    assert found[0].keys() == found[1].keys() and found[0]["fc1.weight"].any()
    for key, gradient in found[0].items():
        assert (gradient is None and found[1][key] is None) or torch.equal(gradient, found[1][key]), key


@pytest.mark.parametrize(
    ("name", "options", "is_shared"),
    [
        ("weight_perturbation", {}, True),
        ("forward_gradient", {"form": "weight"}, True),
        ("forward_gradient", {}, False),
        ("node_perturbation", {}, False),
        ("np_feedback", {}, False),
        ("fdfa", {}, False),
    ],
)
def test_only_weight_noise_is_shared_across_processes(
    name: str, options: dict[str, Any], is_shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise on weights must be the same in all processes. Noise on samples must differ, because each process has its own
    samples."""
    found = []
    for rank in (0, 1):
        monkeypatch.setattr(second_pass, "rank", lambda rank=rank: rank)
        found.append(learn(fa_bench.attach(mlp(8, 7), name, **options)))
    assert all(torch.equal(found[0][key], gradient) for key, gradient in found[1].items()) == is_shared


@pytest.mark.parametrize("name", ["pepita", "forward_forward"])
def test_positions_are_refused(name: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(CoverageError, match=r"needs outputs of shape \(N, C\), not \(2, 4, 3\)"):
        fa_bench.attach(model, name, sample_input=torch.zeros(2, 4, 6), cuts=["1"])


# ------------------------------------------------------------------------------------------------ forward-forward
def test_forward_forward_gradient_matches_goodness_derivative() -> None:
    """For one positive sample, the loss ½ log(1 + exp(θ - z²)) has the gradient -σ(θ - z²) z x̂ with respect to the weights."""
    model = nn.Sequential(nn.Linear(6, 1, bias=False), nn.ReLU(), nn.Linear(1, 3)).double()
    with torch.no_grad():
        model[0].weight.fill_(0.5)
    x, y = torch.arange(6.0, dtype=torch.float64)[None] / 5 + 0.2, torch.tensor([1])
    rule = fa_bench.attach(model, "forward_forward", cuts=["1"], theta=2.0, peer_norm=0.0)
    want = torch.zeros(6, dtype=torch.float64)
    draws = Draws(0)
    draws.number = 1
    wrong = (1 + int(draws.shifts("labels", 1, 3))) % 3
    for label, sign in ((1, 1), (wrong, -1)):
        marked = x.clone()
        marked[:, :3] = F.one_hot(torch.tensor([label]), 3).double()
        marked = marked / (marked.square().mean().sqrt() + 1e-8)
        z = (marked * 0.5).sum()
        assert z > 0
        want = want - sign * torch.sigmoid(sign * (2.0 - z**2)) * z * marked[0]
    torch.testing.assert_close(learn(rule, x, y)["0.weight"][0], want)


def test_forward_forward_layers_ignore_activation_norms() -> None:
    """Layers after a cut must not depend on the norm of the cut's activation, and the first layer must not depend on the norm of
    the input."""
    rule = fa_bench.attach(mlp(8, 7, bias=False), "forward_forward")
    with torch.no_grad():
        logits = rule.model(X)
        rule.model[0].weight.mul_(7)
        torch.testing.assert_close(rule.model(X), logits)
        marked = rule._marked(X, torch.eye(3, dtype=torch.float64)[Y])
    torch.testing.assert_close(marked.square().mean(1), torch.ones(5, dtype=torch.float64))


def test_forward_forward_equal_samples_at_threshold_give_zero_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the positive and the negative sample are equal and their goodness is θ, their gradients cancel."""
    monkeypatch.setattr(Draws, "shifts", lambda draws, name, count, high: torch.full((count,), high))  # keeps the true labels
    rule = fa_bench.attach(mlp(8), "forward_forward", peer_norm=0.0)
    x, y = X[:1], Y[:1]
    with torch.no_grad(), rule.exact():
        goodness = rule.model[1](rule.model[0](rule._marked(x, F.one_hot(y, 3).double()))).square().sum().item()
    rule.theta = goodness
    assert learn(rule, x, y)["0.weight"].abs().max() < 1e-12
    rule.theta = goodness + 1
    assert learn(rule, x, y)["0.weight"].abs().max() > 1e-3


def test_forward_forward_classifier_reads_all_layers_except_first() -> None:
    whole = fa_bench.attach(mlp(8, 7, 5), "forward_forward")
    head = list(whole.model.parameters())[-2:]
    assert [tuple(one.shape) for one in whole.feedback_parameters()[-2:]] == [tuple(one.shape) for one in head]
    assert {id(one) for one in whole.feedback_parameters()} >= {id(one) for one in head}
    assert not {id(one) for one in whole.weight_parameters()} & {id(one) for one in whole.feedback_parameters()}
    assert list(whole._learned) == ["3"]
    last = fa_bench.attach(mlp(8, 7, 5), "forward_forward", all_layers=False)
    assert last.learned_feedback() == []
    with torch.no_grad():
        assert torch.equal(whole.model(X), last.model(X))  # M starts at zero
        whole.feedback["3"]["M"].fill_(0.1)
        assert not torch.allclose(whole.model(X), last.model(X))
    logits = last.model(X)
    hidden = last._normalised["5"]
    output: Any = last.model[6]
    torch.testing.assert_close(logits, F.linear(hidden, output.weight, output.bias))


@pytest.mark.parametrize("widths", [(8, 7), (8,)])
def test_forward_forward_goodness_prediction_sums_later_layers(widths: tuple[int, ...]) -> None:
    """The score of a label is the sum of the goodness of all layers except the first. In a network with one hidden layer, the
    score is the goodness of that layer."""
    rule = fa_bench.attach(mlp(*widths), "forward_forward", prediction="goodness")
    with torch.no_grad():
        scores = rule.predict(X)
        for label in range(3):
            h = rule._marked(X, torch.eye(3, dtype=torch.float64)[label])
            for number in range(0, 2 * len(widths), 2):
                h = torch.relu(rule.model[number](h))
                goodness = h.square().sum(1)
                h = h / (h.square().mean(1, keepdim=True).sqrt() + 1e-8)
            torch.testing.assert_close(scores[:, label], goodness)
    assert scores.shape == (5, 3) and rule.first_pass is None


def test_forward_forward_neutral_input_hides_label() -> None:
    rule = fa_bench.attach(mlp(8, 7), "forward_forward")
    changed = X.clone()
    changed[:, :3] = 5.0
    with torch.no_grad():
        assert torch.equal(rule.model(X), rule.model(changed))
        detached = rule.detach()
        assert not torch.equal(detached(X), detached(changed))


def test_forward_forward_peer_norm_raises_low_activity() -> None:
    """The peer loss raises the activity of units whose running mean is below the mean over all units. The size of this effect is
    proportional to peer_norm."""

    def with_weight(peer_norm: float) -> Any:
        return fa_bench.attach(mlp(8), "forward_forward", peer_norm=peer_norm)

    without, light, heavy = (learn(rule)["0.bias"] for rule in map(with_weight, (0.0, 1.0, 2.0)))
    torch.testing.assert_close(heavy - without, 2 * (light - without))
    rule = with_weight(1.0)
    assert torch.equal(rule.feedback["1"]["activity"], torch.full((8,), 0.5, dtype=torch.float64))
    learn(rule)
    with torch.no_grad(), rule.exact():
        activity = torch.relu(rule.model[0](rule._marked(X, F.one_hot(Y, 3).double()))).mean(0)
    running = 0.9 * 0.5 + 0.1 * activity
    torch.testing.assert_close(rule.feedback["1"]["activity"], running)
    assert torch.equal((light - without).sign(), (running - running.mean()).sign())


@pytest.mark.parametrize(
    ("model", "x", "text"),
    [
        (nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3)), torch.zeros(2, 2), "at least 3 values for each sample"),
        (
            nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1)),
            torch.zeros(2, 6),
            "needs wrong labels: this model has 1 class",
        ),
    ],
)
def test_forward_forward_rejects_small_inputs_and_single_class(model: nn.Module, x: Tensor, text: str) -> None:
    with pytest.raises(CoverageError, match=text):
        fa_bench.attach(model, "forward_forward", sample_input=x, cuts=["1"])
