"""Tests of activation checkpointing: the gradients of weights and of learned feedback are bitwise identical with and without it.

Most rules refuse reentrant checkpoints of parts of a model.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from fa_bench.errors import CoverageError
from fa_bench.registry.registries import ALGORITHMS
from tests.mechanisms.loops import chain
from tests.mechanisms.loops.chain import LOCAL_LOSSES, RULES, Chain, assert_same, batch, gradients, part, state, train
from tests.versions import CHECKPOINTS_LACK_TANGENTS

X, Y = batch()
#: Rules whose additional passes use forward-mode differentiation.
BY_TANGENTS = [name for name, rule in ALGORITHMS.items() if "tangents" in {field.name for field in dataclasses.fields(rule)}]


def attach(model: nn.Module, name: str, **options: Any) -> Any:
    """Attach the rule, with central differences if checkpoints do not support tangents."""
    if CHECKPOINTS_LACK_TANGENTS and name in BY_TANGENTS:
        options["tangents"] = "difference"
    return chain.attach(model, name, **options)


def checkpointed(module: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(module, x, use_reentrant=False)


def reentrant(module: nn.Module, x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns if no input requires a gradient
        return checkpoint(module, x, use_reentrant=True)


def result(model: nn.Module, rule: Any, **loop: Any) -> dict[str, Tensor]:
    """The gradients of the last update, and the model's state after it."""
    last = train(model, rule, X, Y, **loop)
    return {f"gradient of {name}": tensor for name, tensor in last.items()} | state(model)


@pytest.mark.parametrize("name", RULES)
def test_checkpointed_parts_match_plain_model(name: str) -> None:
    plain, model = Chain(), Chain(checkpointed)
    assert_same(result(model, attach(model, name)), result(plain, attach(plain, name)))


@pytest.mark.parametrize("late", [False, True], ids=["before attach", "after attach"])
@pytest.mark.parametrize("name", BY_TANGENTS)
def test_central_differences_work_with_checkpoints(name: str, late: bool) -> None:
    """If the version of torch is too old, an error recommends central differences, which give correct results with every
    version."""

    def of_parts(**options: Any) -> dict[str, Tensor]:
        model = Chain(None if late else checkpointed)
        rule = chain.attach(model, name, **options)
        model.runs = checkpointed
        return result(model, rule)

    if CHECKPOINTS_LACK_TANGENTS:
        with pytest.raises(CoverageError, match=rf"'{name}': .* no forward-mode derivative .*tangents='difference'"):
            of_parts()
    plain = Chain()
    assert_same(of_parts(tangents="difference"), result(plain, chain.attach(plain, name, tangents="difference")))


@pytest.mark.parametrize("name", RULES)
def test_checkpointed_whole_model_matches_plain_model(name: str) -> None:
    plain, model = Chain(), Chain()
    assert_same(result(model, attach(model, name), runs=checkpointed), result(plain, attach(plain, name)))


@pytest.mark.parametrize("whole", [False, True], ids=["parts", "whole"])
@pytest.mark.parametrize("name", RULES)
def test_exact_passes_match_backprop(name: str, whole: bool) -> None:
    """Exact passes give the gradients of backpropagation, no matter which parts are recomputed."""
    plain, model = Chain(), Chain() if whole else Chain(checkpointed)
    rule = attach(model, name)
    F.cross_entropy(plain(X), Y).backward()
    with rule.exact():
        F.cross_entropy(checkpointed(model, X) if whole else model(X), Y).backward()
        assert_same({key: tensor for key, tensor in gradients(model).items() if "feedback_" not in key}, gradients(plain))


def wrapped(model: Chain, **how: Any) -> Chain:
    for path in ("a", "b", "c"):
        setattr(model, path, checkpoint_wrapper(getattr(model, path), **how))
    return model


@pytest.mark.parametrize("name", RULES)
def test_wrappers_applied_after_attach(name: str) -> None:
    plain, model = Chain(), Chain()
    rule = attach(model, name)
    assert isinstance(wrapped(model).a, CheckpointWrapper)
    assert_same(result(model, rule), result(plain, attach(plain, name)))


@pytest.mark.parametrize("name", RULES)
def test_wrappers_applied_before_attach(name: str) -> None:
    """Feedback depends on the layer's path, which a wrapper changes, so the reference model has wrappers that do nothing."""

    def run_it(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return module(*args, **kwargs)

    model, plain = wrapped(Chain()), wrapped(Chain(), checkpoint_fn=run_it)
    for one in (model, plain):
        one.cut_points = [f"{path}._checkpoint_wrapped_module.act" for path in "abc"]
    assert_same(result(model, attach(model, name)), result(plain, attach(plain, name)))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first first", "last first"])
@pytest.mark.parametrize("whole", [False, True], ids=["parts", "whole"])
@pytest.mark.parametrize("name", RULES)
def test_two_forward_passes_before_two_backward_passes(name: str, whole: bool, order: tuple[int, int]) -> None:
    found = []
    for how in (checkpointed, lambda module, x: module(x)):
        model = Chain(None if whole else how)
        rule, batches = attach(model, name), [batch(seed=5), batch(seed=6)]
        logits = [how(model, x) if whole else model(x) for x, _ in batches]
        for number in order:
            target = batches[number][1]
            rule.backward(F.cross_entropy(logits[number], target), logits[number], target, indices=torch.arange(len(target)))
        found.append(gradients(model))
    assert_same(*found)


@pytest.mark.parametrize("whole", [False, True], ids=["parts", "whole"])
def test_brsf_draws_its_magnitudes_once_a_step(whole: bool) -> None:
    model, plain = Chain(None if whole else checkpointed), Chain()
    rule, reference = attach(model, "brsf"), attach(plain, "brsf")
    train(model, rule, X, Y, steps=4, runs=checkpointed if whole else None)
    train(plain, reference, X, Y, steps=4)
    assert {layer["draws"] for layer in rule.state_dict().values()} == {4}
    assert_same(
        {layer: tensors["M"] for layer, tensors in rule.feedback.items()},
        {layer: tensors["M"] for layer, tensors in reference.feedback.items()},
    )


@pytest.mark.parametrize("name", RULES)
def test_recomputation_repeats_dropout_masks(name: str) -> None:
    """The recomputation drops the same units as the forward pass and does not change the random state."""
    found = []
    for runs in (checkpointed, None):
        model = Chain(runs, dropout=0.3)
        rule = attach(model, name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            found.append(result(model, rule) | {"next random number": torch.rand(1)})
    assert_same(*found)


class ConvChain(Chain):
    """A `Chain` whose first two parts are convolutions with batch normalisation, and whose third part flattens its input."""

    def __init__(self, runs: Any = None) -> None:
        super().__init__(runs)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            self.a = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
            self.b = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
            self.c = nn.Sequential(nn.Flatten(), *part(32))
        self.cut_points = ["a.2", "b.2", "c.2"]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(-1, 1, 2, 4))


@pytest.mark.parametrize("name", RULES)
def test_convolutions_with_batch_normalisation(name: str) -> None:
    """As usual in torch, the recomputation updates the running statistics a second time, but gradients do not depend on them."""
    plain, model = ConvChain(), ConvChain(checkpointed)
    options = {"linear": "share"} if name in ("asap", "asfp", "asfp_lc") else {}
    options |= {"sample_input": X[:2]}
    assert_same(train(model, attach(model, name, **options), X, Y), train(plain, attach(plain, name, **options), X, Y))


# ------------------------------------------------------------------------------------------------ reentrant
@pytest.mark.parametrize("asks", [False, True], ids=["input", "input requires grad"])
@pytest.mark.parametrize("late", [False, True], ids=["before attach", "after attach"])
@pytest.mark.filterwarnings("ignore:.*computes no error for the model's input")
@pytest.mark.parametrize("name", RULES)
def test_reentrant_parts_are_correct_or_rejected(name: str, late: bool, asks: bool) -> None:
    plain, model = Chain(), Chain(None if late else reentrant)
    x = X.clone().requires_grad_(asks)
    want = train(plain, attach(plain, name), X, Y)
    before = state(plain := Chain())
    try:
        rule = attach(model, name)
        model.runs = reentrant
        got = train(model, rule, x, Y)
    except CoverageError as error:
        assert "use_reentrant=False" in str(error)
        after = state(model)
        assert_same({key: after[key] for key in before}, before)
        assert not gradients(model)
    else:
        assert name in ("bp", "bp_fc", "frozen", "frozen_blocks", "weight_perturbation")  # these rules do not change the layers
        if asks or name in ("frozen", "weight_perturbation"):
            assert_same(got, want)
        else:
            assert set(got) == {"head.weight", "head.bias"}  # torch warns that the other parts get no gradient


@pytest.mark.parametrize("name", RULES)
def test_reentrant_whole_model_is_correct_or_rejected(name: str) -> None:
    plain, model = Chain(), Chain()
    rule = attach(model, name)
    before = state(model)
    try:
        got = train(model, rule, X.clone().requires_grad_(True), Y, runs=reentrant)
    except CoverageError as error:
        # Rules that repeat passes, or sample or compute values for one pass, refuse reentrant checkpoints.
        assert name in ("brsf", "forward_alignment") or ALGORITHMS[name].repeats
        assert "use_reentrant=False" in str(error)
        assert_same(state(model), before)
        assert not gradients(model)
    else:
        assert_same(got, train(plain, attach(plain, name), X, Y))


@pytest.mark.parametrize("name", [name for name in RULES if name not in ("asap", "asfp", "asfp_lc")])
def test_frozen_part_may_run_under_no_grad(name: str) -> None:
    def without_gradients(module: nn.Module, x: Tensor) -> Tensor:
        if module[0].weight.requires_grad:
            return module(x)
        with torch.no_grad():
            return module(x)

    found = []
    for runs in (None, without_gradients):
        model = Chain(runs)
        model.a.requires_grad_(False)
        last = train(model, attach(model, name), X, Y)
        # Some feedback learns from its layer's input and output error even if the weight is frozen, but not if the layer runs
        # without gradients.
        own = ("a.fc.feedback_R", "a.fc.feedback_B" if name in ("ldfa", "np_feedback", *LOCAL_LOSSES) else None)
        found.append({key: gradient for key, gradient in last.items() if key not in own})
    assert_same(*found)


def test_rejects_part_run_outside_forward_after_checkpointed_pass() -> None:
    """forward_alignment identifies a pass by the forward call that is running, and a recomputed pass does not stay open
    afterwards."""
    model = Chain()
    rule = attach(model, "forward_alignment")
    train(model, rule, X, Y, runs=checkpointed)
    with pytest.raises(CoverageError, match="ran outside a forward pass of the attached model"):
        model.a(X)
