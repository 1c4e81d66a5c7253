"""Optimizers agree with their formulas for weights and learned feedback: steps, first-epoch decay, schedules and saved state."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fa_bench
from fa_bench.errors import OptionError
from fa_bench.mechanisms.rule import Rule
from fa_bench.optim.adam import Adam, AdamW
from fa_bench.optim.base import OptimizerOptions
from fa_bench.optim.optimizers import Optimizers
from fa_bench.optim.sgd import SGD
from fa_bench.schedules.base import Schedule
from fa_bench.schedules.decay import Cosine
from fa_bench.schedules.one_cycle import OneCycle
from fa_bench.schedules.step import MultiStep, Step
from tests.rules import nets
from tests.rules.helpers import cut_options

LR = 0.1


def attached(name: str = "kp", net: str = "mlp_tanh", **options: Any) -> Rule:
    x, _ = nets.batch(net)
    model = nets.NETS[net]()
    return fa_bench.attach(model, name, seed=0, sample_input=x, **cut_options(name, model, options))


def weights(rule: Rule) -> list[Tensor]:
    """The trained parameters that are not feedback."""
    learned = {id(tensor) for tensor in rule.feedback_parameters()}
    return [parameter for parameter in rule.model.parameters() if parameter.requires_grad and id(parameter) not in learned]


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def give_gradients(optimizers: Optimizers, make: Callable[[Tensor], Tensor]) -> None:
    for tensor in optimizers.trained():
        tensor.grad = make(tensor.detach())


# --- single tensor ------------------------------------------------------------------------------------------------------------


def sgd_by_hand(w: Tensor, gradients: list[Tensor], momentum: float, nesterov: bool, decay: float) -> Tensor:
    velocity = torch.zeros_like(w)
    for gradient in gradients:
        gradient = gradient + decay * w
        velocity = momentum * velocity + gradient
        w = w - LR * (gradient + momentum * velocity if nesterov else velocity)
    return w


def adam_by_hand(
    w: Tensor, gradients: list[Tensor], beta1: float, beta2: float, eps: float, decay: float, decoupled: bool
) -> Tensor:
    first, second = torch.zeros_like(w), torch.zeros_like(w)
    for step, gradient in enumerate(gradients, start=1):
        gradient = gradient + (0 if decoupled else decay) * w
        w = w * (1 - LR * decay) if decoupled else w
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        w = w - LR * (first / (1 - beta1**step)) / ((second / (1 - beta2**step)).sqrt() + eps)
    return w


SGDS = [
    {"momentum": m, "nesterov": n, "weight_decay": d}
    for m, n, d in [
        (0.0, False, 0.0),
        (0.9, False, 0.0),
        (0.5, False, 0.0),
        (0.9, True, 0.0),
        (0.9, False, 0.3),
        (0.6, True, 0.2),
    ]
]
ADAMS = [
    {"beta1": b1, "beta2": b2, "eps": e, "weight_decay": d}
    for b1, b2, e, d in [
        (0.9, 0.999, 1e-8, 0.0),
        (0.5, 0.999, 1e-8, 0.0),
        (0.9, 0.7, 1e-8, 0.0),
        (0.9, 0.999, 0.3, 0.0),
        (0.8, 0.9, 0.1, 0.4),
    ]
]


@pytest.mark.parametrize("of", ["weights", "feedback"])
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        *((SGD, options) for options in SGDS),
        *((cls, options) for cls in (Adam, AdamW) for options in ADAMS),
    ],
    ids=str,
)
def test_steps_match_formula_for_every_option(cls: type[OptimizerOptions], options: dict[str, Any], of: str) -> None:
    """Three steps of the weights' optimizer or of the feedback optimizer equal the formulas, whatever the options."""
    rule, made = attached("pfa"), cls(lr=LR, **options)
    other = SGD(lr=0.7, momentum=0.3)
    optimizers = Optimizers(made, rule, 1, other) if of == "weights" else Optimizers(other, rule, 1, made)
    tensors = weights(rule) if of == "weights" else rule.feedback_parameters()
    before = copies(tensors)
    generator = torch.Generator().manual_seed(0)
    gradients = [[torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in tensors] for _ in range(3)]
    for step in gradients:
        give_gradients(optimizers, torch.ones_like)
        for tensor, gradient in zip(tensors, step, strict=True):
            tensor.grad = gradient.clone()
        optimizers.step()
    for tensor, start, *series in zip(tensors, before, *gradients, strict=True):
        decay = options["weight_decay"]
        if cls is SGD:
            want = sgd_by_hand(start, series, options["momentum"], options["nesterov"], decay)
        else:
            want = adam_by_hand(start, series, options["beta1"], options["beta2"], options["eps"], decay, cls is AdamW)
        # The tolerance covers the rounding of a few float64 operations on numbers of order 1.
        torch.testing.assert_close(tensor.detach(), want, rtol=1e-10, atol=1e-12)


# --- groups, epochs --------------------------------------------------------------------------------------------------------


def plain(lr: float, later: float, first: float | None, **schedule: Any) -> SGD:
    return SGD(lr=lr, momentum=0.0, weight_decay=later, first_epoch_weight_decay=first, schedule=Schedule.from_mapping(schedule))


@pytest.mark.parametrize(
    ("scale", "own", "of_weights", "of_feedback"),
    [
        (1.0, None, [1 - 0.1 * 0.5, 1 - 0.1 * 0.2], [1 - 0.1 * 0.5, 1 - 0.1 * 0.2]),
        (0.5, None, [1 - 0.1 * 0.5, 1 - 0.1 * 0.2], [1 - 0.05 * 0.5, 1 - 0.05 * 0.2]),
        (1.0, plain(0.4, 0.3, 0.9), [1 - 0.1 * 0.5, 1 - 0.1 * 0.2], [1 - 0.4 * 0.9, 1 - 0.4 * 0.3]),
        (1.0, plain(0.4, 0.3, None), [1 - 0.1 * 0.5, 1 - 0.1 * 0.2], [1 - 0.4 * 0.3, 1 - 0.4 * 0.3]),
        (1.0, plain(0.4, 0.3, 0.0), [1 - 0.1 * 0.5, 1 - 0.1 * 0.2], [1.0, 1 - 0.4 * 0.3]),
    ],
    ids=["one group", "two groups", "own decay", "own decay in every epoch", "no decay at first"],
)
def test_first_epoch_weight_decay_per_group(
    scale: float, own: SGD | None, of_weights: list[float], of_feedback: list[float]
) -> None:
    """If all gradients are zero, a step multiplies a tensor by 1 - lr λ."""
    rule = attached(b_lr_scale=scale)
    optimizers = Optimizers(plain(0.1, 0.2, 0.5), rule, 3, own)
    for epoch in range(3):
        optimizers.begin_epoch(epoch)
        for tensors, factors in ((weights(rule), of_weights), (rule.feedback_parameters(), of_feedback)):
            before = copies(tensors)
            give_gradients(optimizers, torch.zeros_like)
            saved = copies([*optimizers.trained()])
            optimizers.step()
            for tensor, start in zip(tensors, before, strict=True):
                torch.testing.assert_close(tensor.detach(), factors[min(epoch, 1)] * start, rtol=1e-12, atol=0)
            for tensor, start in zip(optimizers.trained(), saved, strict=True):
                tensor.data.copy_(start)


SCHEDULES = [
    ({"name": "constant"}, [1, 1, 1, 1]),
    ({"name": "step", "step_size": 2, "gamma": 0.5}, [1, 1, 0.5, 0.5]),
    ({"name": "multistep", "milestones": [1, 3], "gamma": 0.2}, [1, 0.2, 0.2, 0.04]),
    ({"name": "cosine"}, [(1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)]),
]


@pytest.mark.parametrize("second", SCHEDULES, ids=lambda case: case[0]["name"])
@pytest.mark.parametrize("first", SCHEDULES, ids=lambda case: case[0]["name"])
def test_each_optimizer_follows_its_own_schedule(first: Any, second: Any) -> None:
    """Without decay and momentum, a gradient of ones moves a tensor by the learning rate."""
    rule = attached()
    optimizers = Optimizers(plain(0.1, 0.0, None, **first[0]), rule, 4, plain(0.3, 0.0, None, **second[0]))
    seen = rates(optimizers, rule, 4)
    assert seen[0] == pytest.approx([0.1 * factor for factor in first[1]])
    assert seen[1] == pytest.approx([0.3 * factor for factor in second[1]])


@pytest.mark.parametrize("of_feedback", [False, True])
def test_schedule_of_one_optimizer_can_count_steps(of_feedback: bool) -> None:
    parts = [plain(0.1, 0.0, None), plain(0.1, 0.0, None, name="step", step_size=2, gamma=0.5, per="step")]
    first, second = parts if of_feedback else reversed(parts)
    optimizers = Optimizers(first, attached(), 1, second, steps_per_epoch=4)
    optimizers.begin_epoch(0)
    seen: tuple[list[float], list[float]] = ([], [])
    for step in range(4):
        optimizers.begin_step(step)
        for rates_of, optimizer in zip(seen, optimizers.optimizers, strict=True):
            rates_of.append(optimizer.param_groups[0]["lr"])
    assert seen[of_feedback] == pytest.approx([0.1, 0.1, 0.05, 0.05]) and seen[not of_feedback] == pytest.approx([0.1] * 4)


@pytest.mark.parametrize(("schedule", "factors"), SCHEDULES, ids=lambda case: str(case)[:20])
def test_scaled_feedback_lr_follows_schedule(schedule: dict[str, Any], factors: list[float]) -> None:
    rule = attached(b_lr_scale=0.25)
    seen = rates(Optimizers(plain(0.1, 0.0, None, **schedule), rule, 4), rule, 4)
    assert seen[0] == pytest.approx([0.1 * factor for factor in factors])
    assert seen[1] == pytest.approx([0.025 * factor for factor in factors])


def rates(optimizers: Optimizers, rule: Rule, epochs: int) -> tuple[list[float], list[float]]:
    """The learning rates of weights and feedback in every epoch, measured by their steps."""
    seen: tuple[list[float], list[float]] = ([], [])
    for epoch in range(epochs):
        optimizers.begin_epoch(epoch)
        assert optimizers.lr == pytest.approx(optimizers.optimizers[0].param_groups[0]["lr"])
        before = [copies(tensors) for tensors in (weights(rule), rule.feedback_parameters())]
        give_gradients(optimizers, torch.ones_like)
        optimizers.step()
        for tensors, starts, found in zip((weights(rule), rule.feedback_parameters()), before, seen, strict=True):
            moved = torch.cat([(start - t.detach()).flatten() for start, t in zip(starts, tensors, strict=True)])
            assert moved.max() - moved.min() < 1e-12  # all entries have the same learning rate, up to rounding
            found.append(moved.mean().item())
    return seen


# --- gradients ----------------------------------------------------------------------------------------------------------------

SHARING = {"match": "random", "linear": "share", "freeze_stem": False}
LEARNING = {
    "kp": {},
    "pfa": {},
    "pfa_o": {},
    "ldfa": {"rank": 2},
    "mixed": {},
    "asap": SHARING,
    "asfp": SHARING,
    "asfp_lc": SHARING | {"cuts": ["act1"]},
    "dkp": {"b_lr_scale": 1.0},
    "predsim": {},
    "bp_deepsup": {},
    "fdfa": {},
    "grape": {},
    "dgl": {"cuts": ["act1"]},
}


@pytest.mark.parametrize("own", [None, plain(LR, 0.0, None)], ids=["one optimizer", "two optimizers"])
@pytest.mark.parametrize("net", ["mlp_tanh", "conv_bn"])
@pytest.mark.parametrize("name", LEARNING)
def test_every_tensor_is_updated_by_its_own_gradient(name: str, net: str, own: SGD | None) -> None:
    """The fused update of every tensor uses the gradient that the rule computed for it."""
    rule = attached(name, net, **LEARNING[name])
    optimizers = Optimizers(plain(LR, 0.0, None), rule, 1, own)
    assert rule.feedback_parameters() and all(o.defaults["fused"] for o in optimizers.optimizers)
    x, y = nets.batch(net)
    for _ in range(2):
        optimizers.zero_grad()
        tensors = [*optimizers.trained()]
        assert all(tensor.grad is None for tensor in tensors)
        logits = rule.model(x)
        rule.backward(F.cross_entropy(logits, y), logits, y)
        assert all(tensor.grad is not None for tensor in tensors)
        want = [tensor.detach() - LR * tensor.grad for tensor in tensors]
        optimizers.step()
        for tensor, expected in zip(tensors, want, strict=True):
            torch.testing.assert_close(tensor.detach(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("own", [None, plain(LR, 0.0, None)], ids=["one optimizer", "two optimizers"])
def test_clipping_uses_common_norm_of_weights_and_feedback(own: SGD | None) -> None:
    """A gradient of n ones has the norm √n, to which torch adds 1e-6 before it divides."""
    rule = attached("kp")
    optimizers = Optimizers(plain(LR, 0.0, None), rule, 1, own)
    tensors = [*weights(rule), *rule.feedback_parameters()]
    norm = math.sqrt(sum(tensor.numel() for tensor in tensors))
    for largest, clipped in ((2.0, 2.0 / norm), (2 * norm, 1.0)):
        give_gradients(optimizers, torch.ones_like)
        optimizers.clip(largest)
        for tensor in tensors:
            torch.testing.assert_close(tensor.grad, torch.full_like(tensor, clipped), rtol=1e-6, atol=0)


@pytest.mark.parametrize("largest", [None, 0.05])
def test_shared_gradients_match_separate_feedback_gradients(largest: float | None) -> None:
    """Sharing has the same result even if the first step requests separate gradients, or if gradients are clipped by a norm that
    includes the feedback."""
    found = []
    for shares in (False, True):
        rule, (x, y) = attached("kp"), nets.batch("mlp_tanh")
        optimizers = Optimizers(plain(LR, 0.0, None), rule, 1)
        if shares:
            optimizers.share_gradients()
        for step in range(3):
            optimizers.begin_step(step)
            logits = rule.model(x)
            rule.backward(F.cross_entropy(logits, y), logits, y)
            assert all((tensor.grad is None) == shares for tensor in rule.feedback_parameters())
            if step == 0:
                optimizers.fill_gradients()
            if largest is not None:
                optimizers.clip(largest)
            optimizers.step()
        found.append([*copies(weights(rule)), *copies(rule.feedback_parameters())])
    # Both computations perform the same operations in float64.
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["asfp", "asfp_lc"])
def test_feedback_of_sharing_layer_uses_shared_activation_gradient(name: str) -> None:
    """The gradient of the feedback is gᵀ h̃ with the shared activation h̃, not gᵀ x, and its step uses this gradient."""
    rule = attached(name, **LEARNING[name])
    x, y = nets.batch("mlp_tanh")
    layers = {path: rule.model.get_submodule(path) for path in ("fc2", "fc3")}
    optimizers = Optimizers(plain(LR, 0.0, None), rule, 1)
    before = {path: (layer.weight.detach().clone(), rule.feedback[path]["B"].detach().clone()) for path, layer in layers.items()}
    logits = rule.model(x)
    rule.backward(F.cross_entropy(logits, y), logits, y)
    optimizers.step()
    moved = {
        path: ((layer.weight - before[path][0]).detach(), (rule.feedback[path]["B"] - before[path][1]).detach())
        for path, layer in layers.items()
    }
    # fc2's own input is the shared activation. fc3 uses this activation instead of its own input.
    torch.testing.assert_close(moved["fc2"][0], moved["fc2"][1], rtol=1e-9, atol=1e-14)
    assert (moved["fc3"][0] - moved["fc3"][1]).norm() > 0.1 * moved["fc3"][0].norm()


# --- saved state --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "own"),
    [
        (SGD(lr=0.1, momentum=0.9, schedule=Cosine()), None),
        (Adam(lr=0.1, schedule=Step(step_size=1)), None),
        (SGD(lr=0.1), Adam(lr=0.1, schedule=MultiStep(milestones=[2]))),
        (AdamW(lr=0.1), SGD(lr=0.1, momentum=0.9, nesterov=True, schedule=Cosine())),
        (SGD(lr=0.1, schedule=Step(step_size=1)), SGD(lr=0.05, schedule=Step(step_size=2, gamma=0.3))),
    ],
    ids=["sgd", "adam", "adam on feedback", "sgd on feedback", "two schedules"],
)
def test_resume_from_state_dict_is_bitwise_identical(options: OptimizerOptions, own: OptimizerOptions | None) -> None:
    """The saved state includes moments, velocities and the schedules' epoch."""

    def train(rule: Rule, optimizers: Optimizers, epochs: range) -> None:
        for epoch in epochs:
            optimizers.begin_epoch(epoch)
            give_gradients(optimizers, lambda tensor: torch.sin(7 * tensor))
            optimizers.step()

    whole = attached()
    optimizers = Optimizers(options, whole, 4, own)
    train(whole, optimizers, range(2))
    other = attached()
    other.model.load_state_dict(copy.deepcopy(whole.model.state_dict()))
    fresh = Optimizers(options, other, 4, own)
    fresh.load_state_dict(copy.deepcopy(optimizers.state_dict()))
    for rule, each in ((whole, optimizers), (other, fresh)):
        train(rule, each, range(2, 4))
    assert fresh.lr == optimizers.lr
    for mine, theirs in zip(fresh.trained(), optimizers.trained(), strict=True):
        assert torch.equal(mine, theirs)


def test_frozen_weights_are_not_trained() -> None:
    """Neither gradients nor decay change a frozen weight."""
    rule = attached("kp", freeze_stem=True)
    stem = rule.model.fc1
    assert isinstance(stem, nn.Linear)
    ids = {id(tensor) for tensor in Optimizers(SGD(weight_decay=0.1), rule, 1).trained()}
    assert not ids & {id(stem.weight), id(stem.bias)} and ids >= {id(tensor) for tensor in rule.feedback_parameters()}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SGD(nesterov=True, momentum=0.0), r"nesterov=true requires momentum above 0"),
        (lambda: SGD(lr=0.1, schedule=Cosine(min_lr=0.2)), r"schedule\.min_lr=0\.2 is above lr=0\.1"),
        (lambda: Step(), r"step_size: is required for schedule\.name=step"),
        (lambda: MultiStep(), r"milestones: are required for schedule\.name=multistep"),
        (lambda: Schedule.from_mapping({"name": "step", "step_size": 1, "milestones": [1]}), r"milestones: is not an option of"),
        (lambda: Schedule.from_mapping({"name": "cosine", "step_size": 1}), r"step_size: is not an option of"),
    ],
)
def test_rejects_inconsistent_settings(make: Any, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        make()
    SGD(lr=0.1, schedule=Cosine(min_lr=0.1))


def test_defaults_match_torch() -> None:
    for options, made in ((Adam(), torch.optim.Adam), (AdamW(), torch.optim.AdamW)):
        theirs = made([torch.zeros(1, requires_grad=True)]).defaults
        assert (options.lr, (options.beta1, options.beta2), options.eps) == (theirs["lr"], theirs["betas"], theirs["eps"])
    steps = torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1, requires_grad=True)]), 1)
    assert Step(step_size=1).gamma == steps.gamma


def test_feedback_without_gradient_is_unchanged() -> None:
    """Exact backpropagation, for example, computes no gradient for feedback, so feedback must not change."""
    rule = attached()
    optimizers = Optimizers(SGD(lr=0.1, momentum=0.0), rule, 1)
    x, y = torch.randn(6, rule.model[0].in_features, dtype=torch.float64), torch.arange(6) % 2
    before, others = copies(rule.feedback_parameters()), copies(weights(rule))
    with rule.exact():
        F.cross_entropy(rule.model(x), y).backward()
    optimizers.step()
    assert all(torch.equal(one, other) for one, other in zip(before, rule.feedback_parameters(), strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(others, weights(rule), strict=True))


def test_step_schedule_sets_lr_of_current_step() -> None:
    """The learning rate is that of the current step as soon as the optimizers exist, at the start of an epoch, whatever its first
    step, and in each step."""
    schedule = OneCycle()
    optimizers = Optimizers(SGD(lr=0.1, schedule=schedule), attached(), 2, steps_per_epoch=5)
    assert optimizers.lr == schedule.at(0.1, 0, 10)
    optimizers.begin_epoch(1, step=5)
    assert optimizers.lr == schedule.at(0.1, 5, 10)
    optimizers.begin_epoch(0)
    assert optimizers.lr == schedule.at(0.1, 0, 10)
    optimizers.begin_step(7)
    assert optimizers.lr == schedule.at(0.1, 7, 10)
