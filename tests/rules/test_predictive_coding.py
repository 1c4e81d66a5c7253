"""Tests of epc and pc: equivalence to backpropagation, equilibria, and properties of their passes."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fa_bench
from fa_bench.errors import OptionError
from fa_bench.mechanisms.cut.energy import SHORT
from fa_bench.objectives.mse import MSE
from fa_bench.objectives.token_cross_entropy import TokenCrossEntropy

from .test_pass_rules import X, Y, cosine, exact, learn, mlp

RULES = ["epc", "pc"]
LAYERS = ["0.weight", "2.weight", "4.weight", "6.weight"]


def deep(activation: Any = nn.Tanh, **options: Any) -> nn.Sequential:
    """A 6-8-7-5-3 network in which each hidden layer and its activation form a block."""
    model = mlp(8, 7, 5, activation=activation, **options)
    model.blocks = model.cut_points  # type: ignore[assignment]
    return model


def attach(name: str, model: nn.Module | None = None, objective: Any = None, **options: Any) -> Any:
    return fa_bench.attach(deep() if model is None else model, name, objective=objective, **options)


def ratios(got: dict[str, Tensor], want: dict[str, Tensor]) -> list[float]:
    return [(got[name].norm() / want[name].norm()).item() for name in LAYERS]


def cosines(got: dict[str, Tensor], want: dict[str, Tensor]) -> list[float]:
    # torch's cosine similarity is wrong for vectors with tiny norms.
    return [cosine(got[name] / got[name].norm(), want[name]) for name in LAYERS]


# ------------------------------------------------------------------------------------------------ backpropagation
def test_epc_few_small_steps_match_scaled_backprop() -> None:
    """After T small steps, the errors are e = -T η ∂L/∂s + O(η²), so the hidden gradients are T η times those of backpropagation.
    The output layer's gradient equals that of backpropagation."""
    got, want = learn(attach("epc", steps=5, rate=1e-3)), exact(deep())
    assert min(cosines(got, want)) > 0.9999
    assert ratios(got, want) == pytest.approx([0.005, 0.005, 0.005, 1], rel=0.02)
    tiny = ratios(learn(attach("epc", steps=5, rate=1e-6)), want)
    assert tiny == pytest.approx([5e-6, 5e-6, 5e-6, 1], rel=2e-5)  # the remainder is of first order in η


def test_pc_few_small_steps_match_scaled_backprop() -> None:
    """An error travels one block per step. In the block that ends d blocks before the last cut, the gradient is (T choose d + 1)
    η^(d + 1) times that of backpropagation."""
    got, want = learn(attach("pc", steps=5, rate=1e-3)), exact(deep())
    assert min(cosines(got, want)) > 0.9999
    factors = [math.comb(5, blocks) * 1e-3**blocks for blocks in (3, 2, 1)]
    assert ratios(got, want) == pytest.approx([*factors, 1], rel=2e-2)  # the remainder is of first order in η


def test_pc_with_fewer_steps_than_blocks_skips_first_blocks() -> None:
    got = learn(attach("pc", steps=2, rate=0.5))
    assert not got["0.weight"].any() and got["2.weight"].any()


def test_epc_single_unit_step_matches_backprop_only_in_first_layer() -> None:
    got, want = learn(attach("epc", steps=1, rate=1.0)), exact(deep())
    torch.testing.assert_close(got["0.weight"], want["0.weight"])
    torch.testing.assert_close(got["0.bias"], want["0.bias"])
    assert cosine(got["6.weight"], want["6.weight"]) < 0.98


def test_epc_settled_gradients_differ_from_backprop() -> None:
    got, want = learn(attach("epc", steps=300)), exact(deep())
    assert cosines(got, want)[-1] < 0.98


@pytest.mark.parametrize("name", RULES)
def test_momentum_matches_torch_sgd(name: str) -> None:
    """The expected gradients come from a separate loop that minimises the energy with three steps of torch's SGD.

    The first velocity of torch's SGD is the gradient.
    """
    model, want = deep(), {}
    blocks = [model[0:2], model[2:4], model[4:6], model[6:]]
    with torch.no_grad():
        states = [blocks[0](X)]
        for block in blocks[1:3]:
            states.append(block(states[-1]))
    moved = [(torch.zeros_like(state) if name == "epc" else state.clone()).requires_grad_() for state in states]
    optimizer = torch.optim.SGD(moved, lr=0.3, momentum=0.6)

    def energy(fixed: bool = False) -> Tensor:
        total, start = torch.zeros((), dtype=torch.float64), X
        for block, variable in zip(blocks, moved, strict=False):
            predicted = block(start)
            state = predicted + variable if name == "epc" else variable
            if fixed:
                state = state.detach()
            total, start = total + (state - predicted).square().sum() / 2, state
        return total + F.cross_entropy(blocks[-1](start), Y, reduction="sum")

    for _ in range(3):
        optimizer.zero_grad()
        energy().backward()
        optimizer.step()
    model.zero_grad()
    energy(fixed=True).backward()
    want = {key: parameter.grad / 5 for key, parameter in model.named_parameters()}
    got = learn(attach(name, steps=3, rate=0.3, momentum=0.6))
    for key, value in want.items():
        torch.testing.assert_close(got[key], value)


# ------------------------------------------------------------------------------------------------ equilibrium
@pytest.mark.parametrize("name", RULES)
def test_linear_net_equilibrium_matches_closed_form(name: str) -> None:
    """With squared errors, the remaining error at the output is r = S⁻¹ (W x - t) with S = 1 + Σ_l P_l P_lᵀ. Here W is the
    product of all weights, and P_l is the product of the weights after s_l. The errors at the cuts are e_l = -P_lᵀ r, and all
    gradients follow from r and e_l."""
    model = deep(nn.Identity, bias=False)
    got = learn(attach(name, copy.deepcopy(model), MSE(), steps=1000, rate=0.3))
    weights = [model.get_submodule(path).weight.detach() for path in ("0", "2", "4", "6")]
    products = [weights[3] @ weights[2] @ weights[1], weights[3] @ weights[2], weights[3]]
    spread = torch.eye(3, dtype=torch.float64) + sum(p @ p.t() for p in products)
    target = F.one_hot(Y, 3).double()
    left = (X @ weights[0].t() @ products[0].t() - target) @ torch.linalg.inv(spread)
    state = X
    for layer, weight, product in zip(LAYERS, weights, products, strict=False):
        error = -left @ product
        torch.testing.assert_close(got[layer], -error.t() @ state / 5, rtol=1e-6, atol=1e-12)
        state = state @ weight.t() + error
    torch.testing.assert_close(state @ weights[3].t() - target, left)
    torch.testing.assert_close(got[LAYERS[3]], left.t() @ state / 5, rtol=1e-6, atol=1e-12)


def test_epc_and_pc_reach_same_equilibrium() -> None:
    """The rules epc and pc must reach the same states, because the energy has only one minimum near the states of the forward
    pass."""
    errors, states = (learn(attach(name, steps=500, rate=0.3)) for name in RULES)
    for key, value in errors.items():
        torch.testing.assert_close(states[key], value, rtol=1e-5, atol=1e-12)


def test_epc_and_pc_have_same_energy() -> None:
    errors_rule, states_rule = attach("epc"), attach("pc")
    generator = torch.Generator().manual_seed(3)
    errors: dict[str, Tensor] = {
        cut: torch.randn(5, width, generator=generator, dtype=torch.float64)
        for cut, width in zip(("1", "3", "5"), (8, 7, 5), strict=True)
    }
    states, start = {}, X
    for cut, error in errors.items():
        with torch.no_grad():
            start = errors_rule.model[int(cut) - 1 : int(cut) + 1](start) + error
        states[cut] = start
    energies = [energy_of(errors_rule, errors), energy_of(states_rule, states)]
    assert energies[0] == pytest.approx(energies[1], rel=1e-12)
    want = sum(error.square().sum().item() / 2 for error in errors.values())
    assert energies[0] == pytest.approx(want + F.cross_entropy(errors_rule.model[6](start), Y, reduction="sum").item())


@pytest.mark.parametrize("name", RULES)
def test_energy_without_errors_equals_loss(name: str) -> None:
    rule = attach(name)
    assert energy_of(rule, {}) == pytest.approx(F.cross_entropy(rule.model(X), Y, reduction="sum").item(), rel=1e-12)


def energy_of(rule: Any, variables: dict[str, Tensor]) -> float:
    """Compute the energy E of a batch at the given errors or states, summed over the samples."""
    from fa_bench.mechanisms.second_pass import FirstPass

    rule.first_pass = FirstPass(rule.name, rule.model, (X,), {})
    with rule._energy_pass(dict(variables), Y, rule.moves_states) as found:
        total = found.loss * 5 + sum(error.square().sum() / 2 for error in found.errors.values())
    rule.first_pass = None
    return total.item()


# ------------------------------------------------------------------------------------------------ passes
@pytest.mark.parametrize("name", RULES)
def test_settling_is_independent_of_batch_size(name: str) -> None:
    """The gradient of a batch is the mean of its samples' gradients, regardless of the batch size."""
    whole = learn(attach(name))
    single = [learn(attach(name), X[n : n + 1], Y[n : n + 1]) for n in range(5)]
    for key, value in whole.items():
        torch.testing.assert_close(sum(one[key] for one in single) / 5, value)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("steps", [1, 4])
def test_number_of_passes_per_update(name: str, steps: int) -> None:
    rule, calls = attach(name, steps=steps), []
    rule.model[0].register_forward_hook(lambda *_: calls.append(1))
    learn(rule)
    assert len(calls) == steps + 2


def normalised() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(8, 7),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(7, 3),
    ).double()
    model.blocks = ["3", "6"]  # type: ignore[assignment]
    return model


def test_all_passes_use_same_dropout_masks() -> None:
    """With the first pass's masks, one step of length one gives the gradients of backpropagation in the first block."""
    got, want = [], []
    rule, plain = attach("epc", normalised(), steps=1, rate=1.0), normalised()
    for seed in (1, 2):
        torch.manual_seed(seed)
        got.append(learn(rule)["0.weight"])
        torch.manual_seed(seed)
        want.append(exact(plain)["0.weight"])
        torch.testing.assert_close(got[-1], want[-1])
    assert not torch.allclose(*want)


@pytest.mark.parametrize("name", RULES)
def test_extra_passes_do_not_change_running_statistics_or_rng(name: str) -> None:
    rule, twin = attach(name, normalised()), normalised()
    torch.manual_seed(4)
    twin(X)
    state = torch.get_rng_state()
    torch.manual_seed(4)
    learn(rule)
    assert torch.equal(torch.get_rng_state(), state) and rule.model[1].num_batches_tracked == 1
    assert torch.equal(rule.model[1].running_var, twin[1].running_var)


@pytest.mark.parametrize("name", RULES)
def test_copies_train_identically_and_labels_are_required(name: str) -> None:
    rule = attach(name)
    want = learn(rule)
    for model in (copy.deepcopy(rule.model), pickle.loads(pickle.dumps(rule.model))):
        got = learn(fa_bench.attached_rule(model))
        assert all(torch.equal(value, got[key]) for key, value in want.items())
    logits = rule.model(X)
    with pytest.raises(ValueError, match=r"call rule\.backward\(loss, logits, target\)"):
        rule.backward(F.cross_entropy(logits, Y))


@pytest.mark.parametrize("name", RULES)
def test_frozen_layer_does_not_affect_other_gradients(name: str) -> None:
    """The state after a layer must settle in the same way whether the layer is frozen or learns."""
    want, model = learn(attach(name)), deep()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    got = learn(attach(name, model))
    assert got.keys() == {key for key in want if not key.startswith("0.")}
    assert all(torch.equal(value, want[key]) for key, value in got.items())


@pytest.mark.parametrize("name", RULES)
def test_shortcut_around_cut_uses_state(name: str) -> None:
    """The state replaces the activation for all later layers, so the closed-form energy includes both the shortcut and the path
    through `second`."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.out = (nn.Linear(*widths, bias=False) for widths in ((6, 4), (4, 4), (4, 3)))
            self.blocks = ["first"]

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.out(h + self.second(h))

    model = Net().double()
    first, second, out = (one.weight.detach().clone() for one in (model.first, model.second, model.out))
    got = learn(attach(name, model, MSE(), steps=1500))
    after = out @ (torch.eye(4, dtype=torch.float64) + second)
    left = (X @ first.t() @ after.t() - F.one_hot(Y, 3)) @ torch.linalg.inv(torch.eye(3, dtype=torch.float64) + after @ after.t())
    torch.testing.assert_close(got["first.weight"], (left @ after).t() @ X / 5)
    state = X @ first.t() - left @ after
    torch.testing.assert_close(got["second.weight"], (left @ out).t() @ state / 5)


@pytest.mark.parametrize("name", RULES)
def test_inplace_module_does_not_change_states(name: str) -> None:
    """Each block ends at a linear layer, and the nonlinearity that follows overwrites the output of that layer."""

    def trained(inplace: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace), nn.Linear(8, 7), nn.ReLU(inplace), nn.Linear(7, 3)).double()
        return learn(attach(name, model, cuts=["0", "2"]))

    plain, in_place = trained(False), trained(True)
    assert all(torch.equal(value, in_place[key]) for key, value in plain.items())


@pytest.mark.parametrize("name", RULES)
def test_half_precision_settles_in_single_precision(name: str) -> None:
    """The states must accumulate steps that are far below bfloat16's spacing of 2⁻⁸. The gradients are returned in bfloat16, so
    they are accurate to about 2⁻⁸."""

    def trained(dtype: torch.dtype) -> dict[str, Tensor]:
        rule = attach(name, deep().to(dtype), steps=40, rate=2e-3)
        return learn(rule, X.to(dtype), Y)

    low, high = trained(torch.bfloat16), trained(torch.float32)
    last = ["4.weight", "6.weight"]  # the errors of pc are small in earlier layers
    assert all(low[key].dtype == torch.bfloat16 for key in low)
    for key in low if name == "epc" else last:
        assert cosine(low[key].float(), high[key]) > 0.98
        assert low[key].float().norm() / high[key].norm() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("name", RULES)
def test_loss_is_computed_in_at_least_float32(name: str) -> None:
    """The loss of bfloat16 logits must not be rounded to bfloat16, because rounding would change it by up to 0.2 %."""
    rule = attach(name, deep().to(torch.bfloat16), steps=1, rate=1e-9)
    with rule.observed() as found:
        learn(rule, X.to(torch.bfloat16), Y)
    with torch.no_grad():
        logits = rule.model(X.to(torch.bfloat16))
    assert F.cross_entropy(logits, Y).item() != pytest.approx(F.cross_entropy(logits.float(), Y).item(), rel=1e-5)
    assert found[0].loss == pytest.approx(F.cross_entropy(logits.float(), Y).item(), rel=1e-5)


@pytest.mark.parametrize("name", RULES)
def test_ignored_positions_do_not_count(name: str) -> None:
    """The gradients equal those of a flat batch that contains only the labelled tokens."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    tokens, labels = torch.stack([X, X.flip(0)]), torch.stack([Y, Y.flip(0)])
    labels[0, 0] = labels[1, 3] = -100
    kept = labels.flatten() != -100
    many = attach(name, copy.deepcopy(model), TokenCrossEntropy(), sample_input=tokens, cuts=["1"])
    one = attach(name, copy.deepcopy(model), cuts=["1"])
    got, want = learn(many, tokens, labels), learn(one, tokens.flatten(0, 1)[kept], labels.flatten()[kept])
    for key, value in want.items():
        torch.testing.assert_close(got[key], value)


@pytest.mark.parametrize("name", RULES)
def test_ignored_samples_do_not_count(name: str) -> None:
    """The gradients equal those of a batch without the ignored samples. If all samples are ignored, all gradients are zero."""
    labels = Y.clone()
    labels[1] = labels[4] = -100
    kept = labels != -100
    got, want = learn(attach(name, objective=TokenCrossEntropy()), X, labels), learn(attach(name), X[kept], labels[kept])
    for key, value in want.items():
        torch.testing.assert_close(got[key], value)
    for x, nothing in ((X, torch.full_like(Y, -100)), (X.expand(2, 5, 6), torch.full((2, 5), -100))):
        rule = attach(name, objective=TokenCrossEntropy(), sample_input=x)
        assert not any(value.any() for value in learn(rule, x, nothing).values())


@pytest.mark.parametrize("name", RULES)
def test_one_hot_float_targets_match_labels(name: str) -> None:
    rule = attach(name, objective=MSE())
    one_hot = learn(attach(name, objective=MSE()), X, F.one_hot(Y, 3).double())
    assert all(torch.equal(value, one_hot[key]) for key, value in learn(rule).items())


def test_float32_loses_small_errors_only_in_pc() -> None:
    """The first block's error is below 1e-7 of the block's state, so pc loses the error in single precision.

    In contrast, epc stores the error itself and therefore keeps it.
    """
    found = {
        name: [
            learn(attach(name, deep().to(dtype), steps=5, rate=1e-4), X.to(dtype), Y)["0.weight"].double()
            for dtype in (torch.float32, torch.float64)
        ]
        for name in RULES
    }
    lost = {name: ((low - high).norm() / high.norm()).item() for name, (low, high) in found.items()}
    assert lost["pc"] > 0.5 and lost["epc"] < 1e-4


# ------------------------------------------------------------------------------------------------ coverage, options
@pytest.mark.parametrize("name", RULES)
def test_coverage_reports_weight_transport(name: str) -> None:
    rule = attach(name)
    across = {"epc": ("from block to block in each step of settling",), "pc": ()}[name]
    assert rule.coverage.transport == ("within blocks", *across)
    assert not rule.coverage.uncovered and len(rule.coverage.covered) == 4
    assert rule.coverage.notes == ()


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({"steps": 5, "rate": 1e-3}, 0.005),
        ({"steps": 3, "rate": 0.01, "momentum": 0.5}, 0.0425),
        ({}, None),
        ({"steps": 10, "rate": 0.01}, None),
        ({"steps": 4, "rate": 0.01, "momentum": 0.9}, 0.0904),
    ],
)
def test_coverage_notes_near_equivalence_to_backprop(options: dict[str, Any], length: float | None) -> None:
    """Three steps with momentum 0.5 have a path length of 0.01 (1 + 1.5 + 1.75) = 0.0425. A path length of exactly SHORT
    adds no note."""
    notes = attach("epc", **options).coverage.notes
    if length is None:
        assert notes == ()
    else:
        assert len(notes) == 1 and f"gradient times a factor, {length:.2g} at the last cut" in notes[0]
        assert f"steps={options['steps']}, rate={options['rate']:g}:" in notes[0] and length < SHORT


def test_path_length_is_gradient_ratio_for_small_steps() -> None:
    """If the errors are tiny, the loss is linear in the states, so the first layer's gradient is that of backpropagation times
    the path length."""
    rule = attach("epc", steps=6, rate=1e-5, momentum=0.7)
    got, want = learn(rule), exact(deep())
    assert ratios(got, want)[0] == pytest.approx(rule.path_length, rel=1e-3)


@pytest.mark.parametrize("options", [{"steps": 0}, {"rate": 0.0}, {"momentum": 1.0}, {"momentum": -0.1}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        attach("epc", **options)
