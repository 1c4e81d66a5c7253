"""Tests of deep feedback control: its limits, its dynamics, the fixed point of its feedback, and its additional passes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fa_bench
from fa_bench.errors import CoverageError, OptionError
from fa_bench.mechanisms.second_pass import Draws
from fa_bench.objectives.mse import MSE
from fa_bench.rules.dfc import OF_OUTPUT
from fa_bench.utils.sampling import seed_for

from . import nets
from .helpers import assert_matches, bp_grads, rule_grads

CUTS = ["act1", "act2"]


def attached(net: str = "mlp_tanh", **options: Any) -> tuple[nn.Module, Any]:
    model = nets.NETS[net]()
    x, _ = nets.batch(net)
    return model, fa_bench.attach(model, "dfc", seed=0, sample_input=x, cuts=nets.activation_cuts(model), **options)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def learn(model: nn.Module, rule: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The gradients of one pass, including those of learned feedback."""
    model.zero_grad()
    rule_grads(model, rule, x, y)
    return gradients(model)


def layers_of(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def output_after(model: nn.Module, voltages: list[Tensor], x: Tensor) -> Tensor:
    """The output of a chain of linear layers and tanh, with `voltages` added to the voltages of the layers."""
    *hidden, last = layers_of(model)
    for layer, added in zip(hidden, voltages, strict=False):
        x = torch.tanh(layer(x) + added)
    return last(x) + voltages[-1]


def jacobian_of(model: nn.Module, x: Tensor) -> Tensor:
    """The Jacobian J of the output with respect to all voltages, of shape (C, sum of all F), for one sample of shape (1, I)."""
    zeros = [torch.zeros(1, layer.out_features, dtype=x.dtype) for layer in layers_of(model)]
    rows = torch.autograd.functional.jacobian(lambda *v: output_after(model, list(v), x)[0], tuple(zeros))
    return torch.cat([row[:, 0] for row in rows], 1).detach()


def bias_gradients(found: dict[str, Tensor]) -> Tensor:
    """The gradients of all biases. For a single sample and the voltage difference, the bias gradients of all layers form -Q u."""
    return torch.cat([found[f"fc{number}.bias"] for number in (1, 2, 3)])


# ------------------------------------------------------------------------------------------------ limits
@pytest.mark.parametrize(
    ("net", "difference"), [("mlp_tanh", "voltage"), ("conv", "voltage"), ("mlp_relu", "nonlinear"), ("conv", "nonlinear")]
)
def test_transposed_jacobian_with_large_leak_matches_backprop(net: str, difference: str) -> None:
    """The control Q u equals -stepsize / alpha Jᵀ dL/dz (1 + O(1 / alpha)).

    The nonlinear difference squares the derivatives, which leaves those of ReLU unchanged.
    """
    options = {"feedback_weights": "jacobian", "alpha": 1e7, "target_stepsize": 0.5}
    model, rule = attached(net, learning_rule=f"{difference}_difference", **options)
    x, y = nets.batch(net)
    found = {key: value * (1e7 / 0.5) for key, value in rule_grads(model, rule, x, y).items()}
    assert_matches(found, bp_grads(nets.NETS[net](), x, y), rel=1e-5)


def test_nonlinear_difference_squares_activation_derivative() -> None:
    """With the nonlinear difference, the gradients of hidden layers contain the square of the derivative of tanh."""
    x, y = nets.batch("mlp_tanh", size=1)
    found = {}
    for difference in ("voltage", "nonlinear"):
        model, rule = attached(feedback_weights="jacobian", alpha=1e7, learning_rule=f"{difference}_difference")
        found[difference] = learn(model, rule, x, y)
    slope = 1 - torch.tanh(nets.NETS["mlp_tanh"]().fc1(x))[0].square()
    assert torch.allclose(found["nonlinear"]["fc1.bias"], found["voltage"]["fc1.bias"] * slope, rtol=1e-5, atol=0)
    assert torch.allclose(found["nonlinear"]["fc3.bias"], found["voltage"]["fc3.bias"], rtol=1e-9, atol=0)


def test_transposed_jacobian_without_leak_is_gauss_newton_step() -> None:
    model, rule = attached(feedback_weights="jacobian", alpha=0.0, learning_rule="voltage_difference", target_stepsize=0.3)
    x, y = nets.batch("mlp_tanh", size=1)
    error = nets.NETS["mlp_tanh"]()(x).softmax(1).detach()[0] - F.one_hot(y, 3)[0]
    want = torch.linalg.pinv(jacobian_of(nets.NETS["mlp_tanh"](), x)) @ (-0.3 * error)
    found = -bias_gradients(learn(model, rule, x, y))
    assert torch.allclose(found, want, rtol=1e-9)
    # Unlike a step of backpropagation, this change brings the linearised output exactly to its target.
    assert torch.allclose(jacobian_of(nets.NETS["mlp_tanh"](), x) @ found, -0.3 * error, rtol=1e-9)


@pytest.mark.parametrize("kind", ["fixed", "jacobian"])
def test_closed_form_matches_steady_state_of_dynamics(kind: str) -> None:
    """The closed form is compared with Euler steps of the controller and of all voltages.

    Unlike the closed form, the steps are not linearised, which causes a relative difference of O(stepsize).
    """
    x, y = nets.batch("mlp_tanh", size=1)
    plain, distances = nets.NETS["mlp_tanh"](), []
    for stepsize in (1e-2, 1e-3):
        model, rule = attached(feedback_weights=kind, alpha=0.1, learning_rule="voltage_difference", target_stepsize=stepsize)
        found = -bias_gradients(learn(model, rule, x, y))
        if kind == "jacobian":
            q = jacobian_of(plain, x).t()
        else:
            q = torch.cat([rule.feedback[cut]["B"].t() for cut in CUTS] + [torch.eye(3, dtype=torch.float64)])
        with torch.no_grad():
            layers, start = layers_of(plain), plain(x)
            goal = start - stepsize * (start.softmax(1) - F.one_hot(y, 3))
            v, u = [layers[0](x), plain[:3](x), start], torch.zeros(1, 3, dtype=torch.float64)
            for _ in range(6000):
                fed, r = (u @ q.t()).split([5, 6, 3], 1), [x, v[0].tanh(), v[1].tanh()]
                rest = [layer(below) + added for layer, below, added in zip(layers, r, fed, strict=True)]
                u = u + 0.02 * (goal - v[2] - 0.1 * u)
                v = [now + 0.1 * (end - now) for now, end in zip(v, rest, strict=True)]
            assert all(torch.allclose(now, end, atol=1e-12) for now, end in zip(v, rest, strict=True)), (
                "the dynamics have not come to rest"
            )
            distances.append(((u @ q.t())[0] - found).norm().item() / found.norm().item())
    assert distances[1] < 1e-2 and distances[1] < 0.2 * distances[0]


def test_weight_gradient_uses_controlled_input_activity() -> None:
    """For one sample, the gradient of the second layer is its error times the controlled activity of the first layer."""
    model, rule = attached(feedback_weights="fixed", learning_rule="voltage_difference", target_stepsize=2.0)
    x, y = nets.batch("mlp_tanh", size=1)
    found = learn(model, rule, x, y)
    controlled = torch.tanh(model.fc1(x)[0] - found["fc1.bias"]).detach()
    assert torch.allclose(found["fc2.weight"], found["fc2.bias"].outer(controlled), rtol=1e-9)
    assert not torch.allclose(controlled, torch.tanh(model.fc1(x)[0]), rtol=1e-2)


# ------------------------------------------------------------------------------------------------ learned feedback
def solved(leak: float, decay: float, s: float) -> float:
    """The solution m of leak / (leak + m s)² = decay m, found by bisection.

    The left side decreases with m, and the right side increases.
    """
    low, high = 0.0, 100.0
    for _ in range(60):
        m = (low + high) / 2
        low, high = (m, high) if leak / (leak + m * s) ** 2 > decay * m else (low, m)
    return low


def test_feedback_converges_to_row_space_of_jacobian() -> None:
    """The feedback of a linear net converges to Q = Jᵀ M, where M has the eigenvectors of J Jᵀ.

    For the eigenvalue s of J Jᵀ, M has the eigenvalue m that solves decay m = leak / (leak + m s)². Averaged over noise, the
    gradient of the feedback is -(I - Q (J Q + leak)⁻¹ J) Jᵀ (J Q + leak)⁻ᵀ. Along the eigenvector for s, the gradient equals
    -leak / (leak + m s)² Jᵀ.

    The feedback is averaged over 200 steps of 256 noisy samples, so its relative error is about 1 / (200 * 256)^(1/2) = 0.4 %.
    """
    leak, decay = 0.3, 0.2
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 6), nn.Identity(), nn.Linear(6, 4), nn.Identity(), nn.Linear(4, 3)).double()
    x = torch.zeros(256, 7).double()
    rule = fa_bench.attach(model, "dfc", sample_input=x, cuts=["1", "3"], sigma=0.7, alpha_fb=leak)
    with torch.no_grad():
        jacobian = torch.cat([model[4].weight @ model[2].weight, model[4].weight, torch.eye(3)], 1)
    optimizer = torch.optim.SGD(rule.feedback_parameters(), lr=0.1, weight_decay=decay)
    mean, steps = torch.zeros(13, 3).double(), 500
    for step in range(steps):
        optimizer.zero_grad()
        rule.backward(F.cross_entropy(model(x), torch.zeros(256, dtype=torch.long)))
        optimizer.step()
        if step >= steps - 200:
            tensors = [rule.feedback["1"]["B"], rule.feedback["3"]["B"], rule.feedback["3"]["B_output"]]
            mean += torch.cat([tensor.detach().t() for tensor in tensors]) / 200
    values, vectors = torch.linalg.eigh(jacobian @ jacobian.t())
    sizes = torch.tensor([solved(leak, decay, s) for s in values.tolist()]).double()
    want = jacobian.t() @ vectors @ sizes.diag() @ vectors.t()
    assert ((mean - want).norm() / want.norm()).item() < 0.03


def test_noise_depends_on_cut_and_pass_number() -> None:
    """In a linear net whose leak is so large that J Q is negligible, u = -J sigma eps / leak."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 6), nn.Identity(), nn.Linear(6, 3)).double()
    x, y = nets.batch("mlp_tanh")
    rule = fa_bench.attach(model, "dfc", seed=3, sample_input=x, cuts=["1"], sigma=0.7, alpha_fb=1e9)
    for number in (1, 2):
        model.zero_grad()
        found = learn(model, rule, x, y)

        def eps(name: str, features: int, number: int = number) -> Tensor:
            generator = torch.Generator().manual_seed(seed_for(3, number, name, 0))
            return torch.empty(4, features, dtype=torch.float64).normal_(generator=generator)

        hidden, output = eps("1", 6), eps("", 3)
        u = -(hidden @ model[2].weight.detach().t() + output) / 1e9
        assert torch.allclose(found["1.feedback_B"], u.t() @ hidden / 4, rtol=1e-6, atol=0)
        assert torch.allclose(found["1.feedback_B_output"], u.t() @ output / 4, rtol=1e-6)
    assert rule.state_dict() == {"draws": {"seed": 3, "number": 2}}


def test_number_of_forward_passes_per_feedback_kind() -> None:
    x, y = nets.batch("mlp_tanh")
    for kind, passes in (("learned", 4), ("fixed", 3), ("jacobian", 3)):
        model, rule = attached(feedback_weights=kind)
        calls: list[int] = []
        model.fc3.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        learn(model, rule, x, y)
        assert len(calls) == passes
        for tensor in rule.feedback_parameters():
            tensor.requires_grad_(False)
        learn(model, rule, x, y)
        assert len(calls) == passes + 3, "expected no pass with noise for frozen feedback"
        assert bool(rule.feedback_parameters()) == (kind == "learned")
        assert {name for tensors in rule.feedback.values() for name in tensors} == {
            "learned": {"B", "B_output"},
            "fixed": {"B"},
            "jacobian": set(),
        }[kind]


def test_frozen_feedback_does_not_affect_other_gradients() -> None:
    x, y = nets.batch("mlp_tanh")
    model, rule = attached()
    want = learn(model, rule, x, y)
    model, rule = attached()
    rule.feedback["act1"]["B"].requires_grad_(False)
    found = learn(model, rule, x, y)
    assert set(want) - set(found) == {"act1.feedback_B"}
    assert all(torch.equal(found[key], want[key]) for key in found)


def test_measuring_draws_no_noise_and_no_feedback_gradient() -> None:
    x, y = nets.batch("mlp_tanh")
    model, rule = attached()
    learn(model, rule, x, y)
    rule.mode.freeze_random = True
    assert not [key for key in learn(model, rule, x, y) if "feedback" in key]
    assert rule.state_dict()["draws"]["number"] == 1


def test_noise_changes_every_update_and_is_restored_from_state() -> None:
    x, y = nets.batch("mlp_tanh")
    model, rule = attached()
    first, state = learn(model, rule, x, y), copy.deepcopy(rule.state_dict())
    second = learn(model, rule, x, y)
    drawn = [key for key in first if "feedback" in key]
    assert len(drawn) == 3 and not any(torch.equal(first[key], second[key]) for key in drawn)
    fresh = nets.NETS["mlp_tanh"]()
    other = fa_bench.attach(fresh, "dfc", seed=9, sample_input=x, cuts=CUTS)
    fresh.load_state_dict(model.state_dict())
    other.load_state_dict(state)
    again = learn(fresh, other, x, y)
    assert all(torch.equal(again[key], second[key]) for key in second)


# ------------------------------------------------------------------------------------------------ further passes
def test_extra_passes_do_not_change_running_statistics_or_rng() -> None:
    """All passes use the dropout masks of the first pass.

    With new masks, the differences between masks would dominate the change of the output.
    """

    def build() -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(7, 40), nn.BatchNorm1d(40), nn.Tanh(), nn.Dropout(0.5), nn.Linear(40, 3)).double()

    plain, model = build(), build()
    x, y = nets.batch("mlp_tanh")
    rule = fa_bench.attach(model, "dfc", sample_input=x, cuts=["2"], sigma=1e-6, alpha_fb=1e9)
    torch.manual_seed(5)
    plain(x)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    learn(model, rule, x, y)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model[1].running_mean, plain[1].running_mean) and model[1].num_batches_tracked == 1
    torch.manual_seed(5)
    mask = model[3](torch.ones(4, 40, dtype=torch.float64))
    generators = [torch.Generator().manual_seed(seed_for(0, 1, name, 0)) for name in ("2", "")]
    hidden, output = (
        torch.empty(4, features, dtype=torch.float64).normal_(generator=one)
        for features, one in zip((40, 3), generators, strict=True)
    )
    voltage = F.batch_norm(model[0](x), None, None, model[1].weight, model[1].bias, True)
    u = -(((1 - voltage.tanh().square()) * hidden * mask) @ model[4].weight.t() + output) / 1e9
    assert torch.allclose(rule.feedback["2"]["B"].grad, (u.t() @ hidden / 4).detach(), rtol=1e-4)


@pytest.mark.parametrize("kind", ["learned", "jacobian"])
@pytest.mark.parametrize("where", ["nonlinearity", "block"])
def test_inplace_nonlinearity_matches_out_of_place(where: str, kind: str) -> None:
    def trained(inplace: bool) -> dict[str, Tensor]:
        torch.manual_seed(1)
        # Applying LeakyReLU to its own result changes it, so a second in-place application would be detected.
        layers = [nn.Linear(7, 6), nn.LeakyReLU(0.3, inplace), nn.Linear(6, 5), nn.LeakyReLU(0.3, inplace)]
        if where == "block":
            model = nn.Sequential(nn.Sequential(*layers[:2]), nn.Sequential(*layers[2:]), nn.Linear(5, 3)).double()
        else:
            model = nn.Sequential(*layers, nn.Linear(5, 3)).double()
        x, y = nets.batch("mlp_tanh")
        cuts = ["0", "1"] if where == "block" else ["1", "3"]
        return learn(model, fa_bench.attach(model, "dfc", sample_input=x, cuts=cuts, feedback_weights=kind), x, y)

    assert_matches(trained(True), trained(False), rel=0)


def test_cut_at_block_matches_identity_after_block() -> None:
    """A cut at a block is equivalent to a cut at an identity after the same layers, so derivatives within the block are exact."""
    torch.manual_seed(1)
    block = nn.Sequential(nn.Linear(7, 6), nn.Tanh()).double()
    head = nn.Linear(6, 3).double()
    x, y = nets.batch("mlp_tanh")
    whole, apart = nn.Sequential(block, head), nn.Sequential(*copy.deepcopy(block), nn.Identity(), copy.deepcopy(head))
    found, want = (
        learn(model, fa_bench.attach(model, "dfc", sample_input=x, cuts=[cut], feedback_weights="jacobian"), x, y)
        for model, cut in ((whole, "0"), (apart, "2"))
    )
    assert torch.equal(found["0.0.weight"], want["0.weight"]) and torch.equal(found["1.weight"], want["3.weight"])


def test_dropout_in_nonlinearity_is_sampled_once() -> None:
    """Two evaluations would sample different masks, which would dominate the difference between the activations."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(7, 6), nn.Sequential(nn.Tanh(), nn.Dropout(0.5)), nn.Linear(6, 3)).double()
    x, y = nets.batch("mlp_tanh")
    rule = fa_bench.attach(model, "dfc", sample_input=x, cuts=["1"], target_stepsize=1e-6)
    torch.manual_seed(2)
    assert learn(model, rule, x, y)["0.weight"].norm() < 1e-4


def test_cut_at_pooling_moves_to_preceding_nonlinearity() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)).double()
    x, y = nets.batch("conv")
    x = F.pad(x, (0, 0, 0, 1))[:, :, :6, :6]
    rule = fa_bench.attach(model, "dfc", sample_input=x, cuts=["2"])
    assert set(rule.feedback) == {"1"} and rule.feedback["1"]["B"].shape == (3, 64)
    assert all(torch.isfinite(tensor).all() for tensor in learn(model, rule, x, y).values())


@pytest.mark.parametrize(
    "between", [[nn.Dropout(0.5)], [nn.Identity()], [nn.Softsign()] * 2], ids=["dropout", "identity", "twice"]
)
def test_cut_at_pooling_skips_dropout_identity_and_repeated_modules(between: list[nn.Module]) -> None:
    """Dropout and identities are not nonlinearities, and a nonlinearity that runs twice has no unique position."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), *between, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    rule = fa_bench.attach(model, "dfc", sample_input=torch.zeros(4, 2, 6, 6), cuts=[str(2 + len(between))])
    assert set(rule.feedback) == {"1"}


def test_bfloat16_autocast_runs_extra_passes_in_float32() -> None:
    """Voltages of order 1 change by about 1e-3, which bfloat16 cannot resolve with its eight bits of precision."""
    found = []
    for enabled in (False, True):
        model = nets.NETS["mlp_tanh"]().float()
        x, y = nets.batch("mlp_tanh", dtype=torch.float32)
        rule = fa_bench.attach(model, "dfc", sample_input=x, cuts=CUTS, target_stepsize=1e-3)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = model(x)
            loss = F.cross_entropy(logits, y)
        rule.backward(loss, logits, y)
        found.append(gradients(model))
    assert {gradient.dtype for gradient in found[1].values()} == {torch.float32}
    for key, want in found[0].items():
        assert (found[1][key] - want).norm() < 0.05 * want.norm()


def test_bfloat16_model_gradients_match_float32() -> None:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = nets.NETS["mlp_tanh"]().to(dtype)
        x, y = nets.batch("mlp_tanh", dtype=dtype)
        rule = fa_bench.attach(
            model, "dfc", sample_input=x, cuts=CUTS, feedback_weights="jacobian", target_stepsize=0.01, alpha=1.0
        )
        found.append(learn(model, rule, x, y))
    for key, want in found[0].items():
        assert found[1][key].dtype == torch.bfloat16
        assert (found[1][key].float() - want).norm() < 0.1 * want.norm(), key


# ------------------------------------------------------------------------------------------------ calls
def test_labels_are_optional_and_targets_may_be_floats() -> None:
    x, y = nets.batch("mlp_tanh")
    model, rule = attached()
    want = learn(model, rule, x, y)
    model, rule = attached()
    F.cross_entropy(model(x), y).backward()
    assert_matches(gradients(model), want, rel=1e-12)
    found = []
    for target in (y, F.one_hot(y, 3).double()):
        model, rule = attached(objective=MSE())
        logits = model(x)
        rule.backward(rule.objective.loss(logits, target), logits, target)
        found.append(gradients(model))
    assert_matches(found[1], found[0], rel=1e-12)


@pytest.mark.parametrize("rows", [0, 4])
def test_empty_batch_or_zero_loss_gives_zero_gradients(rows: int) -> None:
    model, rule = attached()
    x, y = nets.batch("mlp_tanh")
    logits = model(x[:rows])
    rule.backward(0 * F.cross_entropy(logits, y[:rows], reduction="sum"), logits, y[:rows], loss_scale=0.0)
    found = gradients(model)
    assert found and not any(gradient.any() for gradient in found.values())


def test_missing_steady_state_gives_nonfinite_gradients() -> None:
    """If J Q + alpha I is zero, the gradients are not finite, which a run reports as divergence."""
    model, rule = attached(alpha=0.0)
    with torch.no_grad():
        for tensor in rule.feedback_parameters():
            tensor.zero_()
    found = learn(model, rule, *nets.batch("mlp_tanh"))
    assert not torch.isfinite(found["fc1.weight"]).all()


def test_copied_and_pickled_models_train_identically() -> None:
    x, y = nets.batch("mlp_tanh")
    model, rule = attached()
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    want = learn(model, rule, x, y)
    for other in copies:
        found = learn(other, fa_bench.attached_rule(other), x, y)
        assert all(torch.equal(found[key], want[key]) for key in want)


@pytest.mark.filterwarnings("ignore:.*computes no error for the model's input")
def test_cuts_without_trainable_layers_before_are_not_controlled() -> None:
    """A cut without trainable layers before it adds nothing to J Q, because no layer would learn from its control.

    The result is the same if the input requires a gradient.
    """
    x, y = nets.batch("mlp_tanh")
    found = []
    for asks in (False, True):
        model = nets.NETS["mlp_tanh"]()
        model.fc1.requires_grad_(False)
        rule = fa_bench.attach(model, "dfc", sample_input=x, cuts=CUTS, feedback_weights="fixed")
        found.append(learn(model, rule, x.clone().requires_grad_(asks), y))
    assert_matches(found[1], found[0], rel=0)
    tail = nets.NETS["mlp_tanh"]()[2:]
    rule = fa_bench.attach(tail, "dfc", sample_input=x[:, :5], cuts=["act2"], feedback_weights="fixed")
    want = learn(tail, rule, torch.tanh(nets.NETS["mlp_tanh"]().fc1(x)).detach(), y)
    assert_matches(found[0], want)
    model = nets.NETS["mlp_tanh"]()
    model[:4].requires_grad_(False)
    assert set(learn(model, fa_bench.attach(model, "dfc", sample_input=x, cuts=CUTS), x, y)) == {"fc3.weight", "fc3.bias"}


@pytest.mark.parametrize("options", [{}, {"feedback_weights": "fixed"}, {"feedback_weights": "jacobian"}], ids=str)
def test_coverage_reports_uncontrolled_layers(options: dict[str, Any]) -> None:
    x, y = nets.batch("mlp_tanh")
    model, reference = nets.NETS["mlp_tanh"](), nets.NETS["mlp_tanh"]()
    rule = fa_bench.attach(model, "dfc", sample_input=x, cuts=CUTS, freeze_stem=True, **options)
    plain = fa_bench.attach(reference, "dfc", sample_input=x, cuts=CUTS, **options)
    rows = {entry.layer: entry.feedback for entry in rule.coverage.covered}
    assert rows["fc1"] == "is not computed: the controller acts from the first trainable layer on"
    assert {path: rows[path] for path in ("fc2", "fc3")} == {
        entry.layer: entry.feedback for entry in plain.coverage.covered if entry.layer != "fc1"
    }
    assert "fc1.weight" not in learn(model, rule, x, y)
    assert not any("not computed" in entry.feedback for entry in plain.coverage.covered)


def test_feedback_of_frozen_layer_after_trainable_layer_learns() -> None:
    x, y = nets.batch("mlp_tanh")
    model, reference = nets.NETS["mlp_tanh"](), nets.NETS["mlp_tanh"]()
    model.fc2.requires_grad_(False)
    rule = fa_bench.attach(model, "dfc", sample_input=x, cuts=CUTS)
    want = learn(reference, fa_bench.attach(reference, "dfc", sample_input=x, cuts=CUTS), x, y)
    found = learn(model, rule, x, y)
    assert set(want) - set(found) == {"fc2.weight", "fc2.bias"}
    assert_matches(found, {key: want[key] for key in found})
    assert not any("not computed" in entry.feedback for entry in rule.coverage.covered)


def test_rejects_invalid_options_cuts_and_shapes() -> None:
    x, y = nets.batch("mlp_tanh")
    for options in ({"alpha": -1.0}, {"target_stepsize": 0.0}, {"sigma": 0.0}, {"alpha_fb": -1.0}, {"learning_rule": "hebbian"}):
        with pytest.raises(OptionError, match=next(iter(options))):
            attached(**options)
    with pytest.raises(OptionError, match="feedback_weights"):
        attached(feedback_weights="weight_product")
    with pytest.raises(CoverageError, match="no cut point between this layer and the next"):
        fa_bench.attach(nets.NETS["mlp_tanh"](), "dfc", sample_input=x, cuts=["act2"])
    tokens = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    with pytest.raises(CoverageError, match=r"rule 'dfc' needs outputs of shape \(N, C\), not \(4, 2, 3\)"):
        fa_bench.attach(tokens, "dfc", sample_input=torch.zeros(4, 2, 7).double(), cuts=["1"], objective="token_cross_entropy")
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).double()
    rule = fa_bench.attach(net, "dfc", sample_input=torch.zeros(2, 2, 6, 7).double(), cuts=["1"])
    with pytest.raises(
        CoverageError, match=r"cut '1' has activations of shape \(4, 3, 5\), but its feedback was made for 80 feat"
    ):
        learn(net, rule, torch.zeros(4, 2, 5, 7).double(), y)


def test_coverage_text_and_default_options() -> None:
    _, rule = attached(b_lr_scale=0.5)
    said = str(rule.coverage)
    assert (
        "Each sample has its own random numbers" in said
        and "Weight transport in the Jacobian that gives the steady state." in said
    )
    assert [entry.feedback for entry in rule.coverage.covered][-1] == "comes from the controller"
    assert rule.coverage.covered[0].feedback == "comes from the cut at act1"
    assert [group["lr"] for group in rule.parameter_groups(0.1)] == [0.1, 0.05]
    assert rule.readouts() == {} and rule.weight_pairs() == {} and rule.error_points(rule._trace) == {}
    assert (rule.alpha, rule.target_stepsize, rule.sigma, rule.alpha_fb) == (0.001, 0.1, 0.1, 0.5)
    for kind in ("fixed", "jacobian"):
        assert "noise" not in str(attached(feedback_weights=kind)[1].coverage)


def test_training_lowers_loss_with_every_feedback_kind() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 7, generator=generator, dtype=torch.float64)
    y = x[:, :3].argmax(1)
    for kind in ("learned", "fixed", "jacobian"):
        model, rule = attached(feedback_weights=kind, alpha=0.1)
        optimizer = torch.optim.Adam(rule.parameter_groups(0.01))
        losses = []
        for _ in range(150):
            optimizer.zero_grad()
            logits = model(x)
            losses.append(loss := F.cross_entropy(logits, y))
            rule.backward(loss, logits, y)
            optimizer.step()
            rule.step()
        assert losses[-1] < 0.5 * losses[0], kind


def test_micro_batch_gradients_add_up_with_equal_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of two parts of a batch, each with its share of the loss, add up to those of the whole batch."""
    monkeypatch.setattr(Draws, "normal", lambda self, name, like, is_shared=False: torch.ones_like(like) * (len(name) + 1) / 3)
    x, y = nets.batch("mlp_tanh")
    model, rule = attached()
    want = learn(model, rule, x, y)
    model.zero_grad()
    for part in (slice(0, 1), slice(1, 4)):
        logits = model(x[part])
        rule.backward(F.cross_entropy(logits, y[part]) * len(y[part]) / 4, logits, y[part])
    assert_matches(gradients(model), want)


def test_output_feedback_is_not_transposed() -> None:
    """For one sample, u is (J Q + alpha I)⁻¹ times the step of the output towards its target.

    The output's part of Q is not symmetric, so its transpose would give a different result.
    """
    model, rule = attached(learning_rule="voltage_difference", alpha=0.1, target_stepsize=0.3)
    of_output = torch.tensor([[1.0, 0.5, 0.0], [-0.3, 1.2, 0.2], [0.4, 0.0, 0.9]], dtype=torch.float64)
    with torch.no_grad():
        rule.feedback[CUTS[-1]][OF_OUTPUT].copy_(of_output)
    x, y = nets.batch("mlp_tanh", size=1)
    plain = nets.NETS["mlp_tanh"]()
    q = torch.cat([*(rule.feedback[cut]["B"].t() for cut in CUTS), of_output.t()]).detach()
    error = (plain(x).softmax(1) - F.one_hot(y, 3))[0].detach()
    control = torch.linalg.solve(jacobian_of(plain, x) @ q + 0.1 * torch.eye(3, dtype=torch.float64), -0.3 * error)
    assert torch.allclose(-bias_gradients(learn(model, rule, x, y)), q @ control, rtol=1e-9, atol=0)


def test_noise_differs_between_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even layers of equal width must get different noise.

    If several layers had the same noise, the feedback of each would learn from the sum of their Jacobians.
    """
    drawn: list[Tensor] = []
    real = Draws.normal

    def recorded(self: Draws, *arguments: Any, **options: Any) -> Tensor:
        drawn.append(real(self, *arguments, **options))
        return drawn[-1]

    monkeypatch.setattr(Draws, "normal", recorded)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    rule = fa_bench.attach(model, "dfc", seed=0, cuts=["1", "3"])
    rule_grads(model, rule, torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1]))
    assert len(drawn) == 3
    assert not any(torch.equal(one, two) for number, one in enumerate(drawn) for two in drawn[:number])


def test_random_nonlinearity_uses_voltage_difference() -> None:
    """RReLU samples new slopes in every evaluation, so both kinds of difference must use the voltages."""
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for difference in ("voltage", "nonlinear"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.RReLU(), nn.Linear(3, 3)).double()
        options = {"cuts": ["1"], "feedback_weights": "fixed", "learning_rule": f"{difference}_difference"}
        rule = fa_bench.attach(model, "dfc", seed=0, **options)
        torch.manual_seed(1)
        found.append(learn(model, rule, x, torch.tensor([0, 1, 2, 0, 1])))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
