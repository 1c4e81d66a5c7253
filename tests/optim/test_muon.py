"""Muon agrees with its formulas: the iteration, whole steps, the tensors it updates, and learned feedback."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fa_bench
from fa_bench.errors import OptionError
from fa_bench.mechanisms.rule import Rule
from fa_bench.optim.muon import Muon
from fa_bench.optim.optimizers import Optimizers
from fa_bench.optim.sgd import SGD
from fa_bench.schedules.decay import Cosine
from fa_bench.utils import muon
from fa_bench.utils.muon import orthogonalized
from tests.optim.test_optimizers import adam_by_hand, attached, give_gradients
from tests.rules import nets


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def iterated_by_hand(matrix: list[list[float]], steps: int) -> list[list[float]]:
    """Iterate X <- a X + b (X Xᵀ) X + c (X Xᵀ)² X with loops, beginning with the normalised matrix."""

    def product(one: list[list[float]], other: list[list[float]]) -> list[list[float]]:
        return [[sum(one[i][k] * other[k][j] for k in range(len(other))) for j in range(len(other[0]))] for i in range(len(one))]

    norm = math.sqrt(sum(value**2 for row in matrix for value in row))
    x = [[value / norm for value in row] for row in matrix]
    for _ in range(steps):
        gram = product(x, [list(column) for column in zip(*x, strict=True)])
        first, second = product(gram, x), product(gram, product(gram, x))
        x = [[3.4445 * x[i][j] - 4.7750 * first[i][j] + 2.0315 * second[i][j] for j in range(len(x[0]))] for i in range(len(x))]
    return x


# ------------------------------------------------------------------------------------------------ the iteration
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (1, 4), (4, 1)])
@pytest.mark.parametrize("steps", [1, 5])
def test_iteration_matches_loop_reference(shape: tuple[int, int], steps: int) -> None:
    matrix = random(*shape)
    want = torch.tensor(iterated_by_hand(matrix.tolist(), steps), dtype=torch.float64)
    torch.testing.assert_close(orthogonalized(matrix, steps), want, rtol=1e-10, atol=1e-12)


def test_five_steps_bring_singular_values_near_one_at_any_scale() -> None:
    """The limits are the range of five iterations of the quintic polynomial for singular values above 1/100 of the norm, with a
    margin of 0.01."""
    matrix = random(20, 30)
    for scale in (1.0, 1e-30, 1e30):
        values = torch.linalg.svdvals(orthogonalized(scale * matrix, 5))
        assert values.min() > 0.67 and values.max() < 1.14
        torch.testing.assert_close(orthogonalized(scale * matrix, 5), orthogonalized(matrix, 5), rtol=1e-9, atol=1e-12)
    assert not orthogonalized(torch.zeros(3, 4), 5).any()
    single = matrix.float()  # at these scales, the squares of the entries underflow or overflow
    for scale in (1e-25, 1e-36, 1e25, 1e37):
        torch.testing.assert_close(orthogonalized(scale * single, 5), orthogonalized(single, 5), rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_matches_torch_muon_up_to_rounding(adjust_lr: str, nesterov: bool) -> None:
    """torch's Muon rounds to bfloat16 (8 bits), which causes relative errors of a few hundredths after five iterations. torch's
    Muon averages the gradients instead of summing them, but the iteration removes this difference in scale."""
    for shape in ((8, 5), (5, 8)):
        ours, theirs = (nn.Parameter(random(*shape).float()) for _ in range(2))
        mine = muon.Muon([ours], 0.1, 0.9, nesterov, 5, adjust_lr, 0.2)
        other = torch.optim.Muon([theirs], lr=0.1, momentum=0.9, nesterov=nesterov, adjust_lr_fn=adjust_lr, weight_decay=0.2)
        for step in range(3):
            before = ours.detach().clone()
            theirs.data.copy_(ours.data)
            for tensor, optimizer in ((ours, mine), (theirs, other)):
                tensor.grad = random(*shape, seed=step + 1).float()
                optimizer.step()
            difference = (ours - theirs).norm() / (ours - before).norm()
            assert difference < 0.05


# ------------------------------------------------------------------------------------------------ whole steps
OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.0},
    {"momentum": 0.5, "nesterov": False},
    {"ns_steps": 2},
    {"adjust_lr": "match_rms_adamw"},
    {"weight_decay": 0.3},
    {"adam_lr": 0.05, "beta1": 0.5, "beta2": 0.7, "eps": 0.1},
    {"lr": 0.3},
]


def by_hand(w: Tensor, gradients: list[Tensor], made: Muon) -> Tensor:
    velocity = torch.zeros_like(w)
    for gradient in gradients:
        velocity = made.momentum * velocity + gradient
        direction = gradient + made.momentum * velocity if made.nesterov else velocity
        rows, columns = direction.shape[0], direction[0].numel()
        update = orthogonalized(direction.reshape(rows, columns), made.ns_steps).reshape(w.shape)
        factor = max(1, rows / columns) ** 0.5 if made.adjust_lr == "original" else 0.2 * max(rows, columns) ** 0.5
        w = w - made.lr * made.weight_decay * w - made.lr * factor * update
    return w


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_steps_match_formula_for_every_option(options: dict[str, Any]) -> None:
    """In three steps, Muon updates weights and kernels, and AdamW updates vectors."""
    rule, made = attached("kp", "conv_bn"), Muon(**options)
    optimizers = Optimizers(made, rule, 1)
    tensors = [*optimizers.trained()]
    before = [tensor.detach().clone() for tensor in tensors]
    series = [[random(*tensor.shape, seed=100 * step + i) for i, tensor in enumerate(tensors)] for step in range(3)]
    for gradients in series:
        for tensor, gradient in zip(tensors, gradients, strict=True):
            tensor.grad = gradient.clone()
        optimizers.step()
    assert {tensor.dim() for tensor in tensors} == {1, 2, 4}
    for tensor, start, *gradients in zip(tensors, before, *series, strict=True):
        if tensor.dim() > 1:
            want = by_hand(start, gradients, made)
        elif made.weight_decay:
            continue  # tested below
        else:
            # Without decay, steps are linear in the learning rate, which is 0.1 in `adam_by_hand`.
            moved = adam_by_hand(start, gradients, made.beta1, made.beta2, made.eps, 0.0, True) - start
            want = start + made.adam_lr / 0.1 * moved
        torch.testing.assert_close(tensor.detach(), want, rtol=1e-9, atol=1e-11)


def test_weight_decay_of_vectors_is_decoupled() -> None:
    rule = attached("bp")
    optimizers = Optimizers(Muon(weight_decay=0.3, adam_lr=0.01, lr=0.1), rule, 1)
    before = [tensor.detach().clone() for tensor in optimizers.trained()]
    give_gradients(optimizers, torch.zeros_like)
    optimizers.step()
    for tensor, start in zip(optimizers.trained(), before, strict=True):
        torch.testing.assert_close(tensor.detach(), start * (1 - 0.3 * (0.1 if tensor.dim() > 1 else 0.01)), rtol=1e-12, atol=0)


def test_half_precision_iterates_in_single_precision() -> None:
    """The only error comes from rounding the update once to bfloat16; it is at most 2^-8 of each entry."""
    weight = nn.Parameter(torch.zeros(6, 9, dtype=torch.bfloat16))
    weight.grad = random(6, 9).bfloat16()
    muon.Muon([weight], 1.0, 0.0, False, 5, "original", 0.0).step()
    assert weight.dtype == torch.bfloat16
    torch.testing.assert_close(-weight.detach().float(), orthogonalized(weight.grad.float(), 5), rtol=2**-8, atol=1e-6)


def test_update_does_not_depend_on_memory_format() -> None:
    formats = (torch.contiguous_format, torch.channels_last)
    kernels = [nn.Parameter(random(4, 3, 2, 2).contiguous(memory_format=each)) for each in formats]
    for kernel in kernels:
        kernel.grad = random(4, 3, 2, 2, seed=1).contiguous(memory_format=torch.channels_last)
        muon.Muon([kernel], 0.1, 0.9, True, 5, "original", 0.1).step()
    torch.testing.assert_close(kernels[0].detach(), kernels[1].detach(), rtol=1e-12, atol=0)


def test_step_skips_tensors_without_gradient_and_calls_closure() -> None:
    weight, other = (nn.Parameter(random(2, 3)) for _ in range(2))
    optimizer, before = muon.Muon([weight, other], 0.1, 0.9, True, 5, "original", 0.5), other.detach().clone()

    def closure() -> Tensor:
        loss = weight.square().sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.item() > weight.square().sum().item() and torch.equal(other.detach(), before)


# ------------------------------------------------------------------------------------------------ which tensors
def names_of(rule: Rule, made: Muon, feedback: Any = None) -> list[set[str]]:
    """The names of each optimizer's tensors."""
    known = {id(tensor): name for name, tensor in rule.model.named_parameters()}
    return [
        {known[id(tensor)] for group in optimizer.param_groups for tensor in group["params"]}
        for optimizer in Optimizers(made, rule, 1, feedback).optimizers
    ]


def net() -> nn.Module:
    model = nn.Sequential()
    model.add_module("embed", nn.Embedding(5, 4))
    for number in (1, 2, 3):
        model.add_module(f"fc{number}", nn.Linear(4, 4))
        model.add_module(f"norm{number}", nn.LayerNorm(4))
    return model


@pytest.mark.parametrize(
    ("options", "muons"),
    [
        ({}, ["fc1", "fc2", "fc3"]),
        ({"layers": "hidden"}, ["fc2"]),
        ({"exclude": ["fc[12]"]}, ["fc3"]),
        ({"layers": "hidden", "exclude": ["fc1"]}, ["fc2"]),
        ({"exclude": ["fc3"]}, ["fc1", "fc2"]),
    ],
    ids=str,
)
def test_layers_and_their_feedback_are_chosen_together(options: dict[str, Any], muons: list[str]) -> None:
    rule = fa_bench.attach(net(), "kp", sample_input=torch.zeros(2, 1, dtype=torch.long))
    of_muon, of_adam = names_of(rule, Muon(**options))
    assert of_muon == {f"{path}.{kind}" for path in muons for kind in ("weight", "feedback_B")}
    assert of_adam == {name for name, _ in rule.model.named_parameters()} - of_muon
    of_weights = names_of(rule, Muon(**options), SGD())
    assert of_weights == [
        {f"{path}.weight" for path in muons},
        {name for name in of_adam if "feedback" not in name},
        {name for name, _ in rule.model.named_parameters() if "feedback" in name},
    ]
    of_feedback = Optimizers(SGD(), rule, 1, Muon(**options)).optimizers
    assert {id(tensor) for group in of_feedback[1].param_groups for tensor in group["params"]} == {
        id(rule.model.get_submodule(path).feedback_B) for path in muons
    }


def test_cut_feedback_is_trained_by_muon_at_scaled_lr() -> None:
    rule = attached("dkp")
    optimizers = Optimizers(Muon(lr=0.2, adam_lr=0.03), rule, 1)
    assert [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers.optimizers] == [
        pytest.approx([0.2, 0.2 * rule.feedback_lr_scale]),
        pytest.approx([0.03]),
    ]
    assert optimizers.lr == 0.2


def test_feedback_trained_by_adamw_has_scaled_lr() -> None:
    rule = fa_bench.attach(net(), "kp", sample_input=torch.zeros(2, 1, dtype=torch.long), b_lr_scale=0.5)
    of_adam = Optimizers(Muon(lr=0.2, adam_lr=0.03, exclude=["fc3"]), rule, 1).optimizers[1]
    rates = {id(tensor): group["lr"] for group in of_adam.param_groups for tensor in group["params"]}
    assert rates[id(rule.model.fc3.weight)] == pytest.approx(0.03)
    assert rates[id(rule.model.fc3.feedback_B)] == pytest.approx(0.015)


def test_weight_shared_with_excluded_layer_is_excluded() -> None:
    model = net()
    model.fc3.weight = model.fc2.weight
    rule = fa_bench.attach(model, "bp", sample_input=torch.zeros(2, 1, dtype=torch.long))
    for excluded in ("fc2", "fc3"):
        assert names_of(rule, Muon(exclude=[excluded]))[0] == {"fc1.weight"}


def test_frozen_matrices_are_left_out() -> None:
    rule = attached("bp", freeze_stem=True)
    assert names_of(rule, Muon(), None)[0] == {"fc2.weight", "fc3.weight"}
    only_last = attached("frozen")
    assert [sorted(names) for names in names_of(only_last, Muon(layers="hidden"))] == [["fc3.bias", "fc3.weight"]]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"exclude": ["fc4"]}, r"^optimizer\.exclude=fc4 matches no layer; did you mean 'fc[123]'\? \(layers: fc1, fc2, fc3\)$"),
        ({"exclude": ["*"]}, r"^optimizer\.layers=all with exclude=\['\*'\] leaves no layer for muon \(layers: fc1, fc2, fc3\)$"),
        ({"layers": "hidden", "exclude": ["fc2"]}, r"^optimizer\.layers=hidden with exclude=\['fc2'\] leaves no layer for muon"),
    ],
)
def test_rejects_invalid_layer_selection(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        Optimizers(Muon(**options), attached("kp"), 1)
    with pytest.raises(OptionError, match=says.replace("optimizer", "feedback_optimizer")):
        Optimizers(SGD(), attached("kp"), 1, Muon(**options))


def test_rejects_schedule_min_lr_above_either_lr() -> None:
    for options, key in (({"lr": 0.01, "adam_lr": 1.0}, "lr=0.01"), ({"lr": 1.0, "adam_lr": 0.01}, "adam_lr=0.01")):
        with pytest.raises(OptionError, match=rf"schedule\.min_lr=0\.1 is above {key}"):
            Muon(**options, schedule=Cosine(min_lr=0.1))


# ------------------------------------------------------------------------------------------------ with rules
def trained(rule: Rule, optimizers: Optimizers, steps: int, name: str) -> None:
    x, y = nets.batch(name)
    for _ in range(steps):
        optimizers.zero_grad()
        logits = rule.model(x)
        rule.backward(F.cross_entropy(logits, y), logits, y)
        optimizers.step()
        rule.step()


@pytest.mark.parametrize("name", ["mlp_tanh", "conv_bn"])
def test_kp_weight_feedback_difference_changes_only_by_decay(name: str) -> None:
    """Equal gradients give equal updates, so every step multiplies W - B by 1 - lr λ, up to rounding."""
    rule = attached("kp", name)
    before = {path: weight - feedback for path, (feedback, weight) in rule.weight_pairs().items()}
    trained(rule, Optimizers(Muon(lr=0.1, weight_decay=0.5), rule, 1), 6, name)
    for path, (feedback, weight) in rule.weight_pairs().items():
        torch.testing.assert_close(weight - feedback, 0.95**6 * before[path], rtol=1e-6, atol=1e-9)
    rule = attached("kp", name)
    before = {path: weight - feedback for path, (feedback, weight) in rule.weight_pairs().items()}
    trained(rule, Optimizers(Muon(lr=0.1), rule, 1), 6, name)
    for path, (feedback, weight) in rule.weight_pairs().items():
        torch.testing.assert_close(weight - feedback, before[path], rtol=1e-6, atol=1e-9)


def test_only_semi_orthogonal_pfa_feedback_follows_weight_updates() -> None:
    """Bᵀ commutes with the iteration only if B Bᵀ = I. If R has as many rows as W, the update of R is then Bᵀ times that of W."""
    gaps = {}
    for name in ("pfa_o", "pfa"):
        rule = attached(name, ratio=1.0)
        before = {path: weight - feedback for path, (feedback, weight) in rule.weight_pairs().items()}
        trained(rule, Optimizers(Muon(lr=0.1), rule, 1), 3, "mlp_tanh")
        gaps[name] = max(
            ((weight - feedback - before[path]).norm() / before[path].norm()).item()
            for path, (feedback, weight) in rule.weight_pairs().items()
        )
    assert gaps["pfa_o"] < 1e-6 < 0.05 < gaps["pfa"]


def test_kp_with_copied_weights_matches_backprop() -> None:
    models = []
    for name, options in (("bp", {}), ("kp", {"b_init": "copy_w"})):
        rule = attached(name, **options)
        trained(rule, Optimizers(Muon(), rule, 1), 3, "mlp_tanh")
        models.append([weight for weight in rule.weight_parameters()])
    for one, other in zip(*models, strict=True):
        assert torch.equal(one, other)


def test_resume_from_state_dict_is_bitwise_identical() -> None:
    made = Muon(schedule=Cosine(), weight_decay=0.1)
    whole = attached()
    optimizers = Optimizers(made, whole, 4)
    trained(whole, optimizers, 2, "mlp_tanh")
    other = attached()
    other.model.load_state_dict(copy.deepcopy(whole.model.state_dict()))
    fresh = Optimizers(made, other, 4)
    fresh.load_state_dict(copy.deepcopy(optimizers.state_dict()))
    for rule, each in ((whole, optimizers), (other, fresh)):
        each.begin_epoch(2)
        trained(rule, each, 2, "mlp_tanh")
    assert all(torch.equal(one, two) for one, two in zip(fresh.trained(), optimizers.trained(), strict=True))
