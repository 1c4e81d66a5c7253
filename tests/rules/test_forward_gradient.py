"""Tests of forward_gradient: both forms are unbiased, and the noise of the form `weight` has the theoretical size."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fa_bench
from fa_bench.mechanisms.second_pass import Draws
from fa_bench.metrics.meter import AlignmentMeter

from . import nets
from .helpers import array, assert_bitwise, bp_grads, distance, restore, rule_grads, state_of
from .test_forward_direct_feedback import Tokens


def attached(net: str = "mlp_tanh", size: int = 4, **options: Any) -> tuple[nn.Module, Any, Tensor, Tensor]:
    model, (x, y) = nets.NETS[net](), nets.batch(net, size=size)
    cuts = {} if options.get("form") == "weight" else {"cuts": ["act1", "act2"]}
    return model, fa_bench.attach(model, "forward_gradient", seed=0, sample_input=x, **cuts, **options), x, y


@pytest.mark.parametrize(
    ("options", "draws", "least", "net"),
    [
        ({}, 1000, 0.95, "mlp_tanh"),
        ({}, 1000, 0.95, "conv"),
        ({"tangents": "difference"}, 1000, 0.95, "mlp_tanh"),
        ({"form": "weight"}, 2500, 0.93, "mlp_tanh"),
    ],
    ids=str,
)
def test_mean_over_draws_matches_gradient(options: dict, draws: int, least: float, net: str) -> None:
    """The relative noise of one draw is about the square root of the number of perturbed values, which is at most 120 here."""
    model, rule, x, y = attached(net, **options)
    exact, total = bp_grads(nets.NETS[net](), x, y), {}
    for _ in range(draws):
        for name, gradient in rule_grads(model, rule, x, y).items():
            assert gradient is not None
            total[name] = total.get(name, 0) + gradient / draws
    got = torch.cat([total[name].flatten() for name in exact])
    want = torch.cat([gradient.flatten() for gradient in exact.values() if gradient is not None])
    assert F.cosine_similarity(got, want, dim=0) > least and 0.9 < got.norm() / want.norm() < 1.15


def test_output_layer_is_exact_only_in_activation_form() -> None:
    exact = bp_grads(nets.mlp(), *nets.batch("mlp"))
    for form in ("activation", "weight"):
        model, rule, x, y = attached(form=form)
        got = rule_grads(model, rule, x, y)
        assert torch.equal(got["fc3.weight"], exact["fc3.weight"]) == (form == "activation")
        assert distance(got["fc1.weight"], array(exact["fc1.weight"])) > 0.1


def test_single_draw_cosine_matches_theory() -> None:
    """Up to its sign, the cosine between d v and the gradient equals the cosine between v and the gradient.

    For P parameters, the absolute cosine is √(2 / (π P)) on average.
    """
    model, rule, x, y = attached(form="weight")
    names = [name for name, _ in model.named_parameters()]
    exact = bp_grads(nets.mlp(), x, y)
    want = torch.cat([exact[name].flatten() for name in names])
    cosines = []
    for _ in range(400):
        got = rule_grads(model, rule, x, y)
        cosines.append(F.cosine_similarity(torch.cat([got[name].flatten() for name in names]), want, dim=0))
    mean = torch.stack(cosines).mean().item()
    assert min(cosines) > -1e-9 and mean == pytest.approx(math.sqrt(2 / (math.pi * len(want))), rel=0.15)


def test_each_sample_has_separate_derivative() -> None:
    """Each sample's error is a multiple of its own noise, and the factor differs between samples."""
    model, rule, x, y = attached()
    seen: dict[str, Tensor] = {}
    errors: list[Tensor] = []
    normal = Draws.normal
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Draws, "normal", lambda draws, name, like: seen.setdefault(name, normal(draws, name, like)))
        model.get_submodule("act1").register_forward_hook(
            lambda _, __, out: (out.requires_grad and errors.append(out)) or None, prepend=True
        )
        logits = model(x)
        errors[0].retain_grad()
        rule.backward(F.cross_entropy(logits, y), logits, y)
    factors = errors[0].grad / seen["act1"]
    assert torch.allclose(factors, factors[:, :1].expand_as(factors)) and len(set(factors[:, 0].tolist())) == 4


def test_basis_vectors_reproduce_error_before_output_layer() -> None:
    """With p set to each basis vector in turn, the sum of d p is the exact error at the cut."""
    model, (x, y) = nets.one_hidden(), nets.batch("one")
    rule = fa_bench.attach(model, "forward_gradient", seed=0, cuts=["act1"])
    total = 0
    for index in range(5):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                Draws, "normal", lambda draws, name, like, index=index: F.one_hot(torch.full((len(like),), index), 5).to(like)
            )
            total = total + rule_grads(model, rule, x, y)["fc1.weight"]
    assert distance(total, array(bp_grads(nets.one_hidden(), x, y)["fc1.weight"])) < 1e-13


@pytest.mark.parametrize("form", ["activation", "weight"])
def test_noise_changes_every_pass_and_is_restored_from_state(form: str) -> None:
    model, rule, x, y = attached(form=form)
    state = state_of(rule)
    first, second = (rule_grads(model, rule, x, y) for _ in range(2))
    assert not torch.equal(first["fc1.weight"], second["fc1.weight"])
    restore(rule, state)
    assert_bitwise(rule_grads(model, rule, x, y), first)
    values = AlignmentMeter(rule, x, y).measure()
    assert rule.state_dict() == {"draws": {"seed": 0, "number": 1}}
    assert set(values.get("delta_angle", {})) == ({"fc1", "fc2", "fc3"} if form == "activation" else {"fc3"})


def test_frozen_parameters_are_not_perturbed() -> None:
    model, rule, x, y = attached(form="weight")
    model.get_submodule("fc1").requires_grad_(False)
    names: list[str] = []
    normal = Draws.normal
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Draws,
            "normal",
            lambda draws, name, like, is_shared: names.append((name, is_shared)) or normal(draws, name, like, is_shared),
        )
        got = rule_grads(model, rule, x, y)
    assert names == [(name, True) for name in ("fc2.weight", "fc2.bias", "fc3.weight", "fc3.bias")]
    assert got["fc1.weight"] is None and got["fc2.weight"].any()


def test_weight_form_needs_no_cuts_and_covers_all_layers() -> None:
    rule = fa_bench.attach(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), "forward_gradient", form="weight")
    assert [entry.layer for entry in rule.coverage.covered] == ["0", "2"] and rule.coverage.notes == ()
    assert "its gradient is noise times a derivative" in str(rule.coverage) and not rule.feedback
    with pytest.raises(fa_bench.errors.CoverageError, match="needs cut points"):
        fa_bench.attach(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), "forward_gradient")


def test_gradient_is_unbiased_for_tokens() -> None:
    """The mean over 1500 noise samples has nearly the direction of the exact gradient."""
    model = Tokens().double()  # seeds the global generator
    x, y = torch.randn(4, 3, 3, dtype=torch.float64), torch.arange(12).view(4, 3) % 3
    rule = fa_bench.attach(model, "forward_gradient", seed=0, sample_input=x)
    total = torch.zeros_like(model.fc1.weight)

    def gradient() -> Tensor:
        model.zero_grad()
        logits = model(x)
        rule.backward(F.cross_entropy(logits.transpose(1, 2), y), logits, y)
        assert model.fc1.weight.grad is not None
        return model.fc1.weight.grad

    for _ in range(1500):
        total += gradient() / 1500
    with rule.exact():
        want = gradient()
    assert F.cosine_similarity(total.flatten(), want.flatten(), dim=0) > 0.9
