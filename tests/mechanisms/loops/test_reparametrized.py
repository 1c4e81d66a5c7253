"""Pruning, parametrizing or quantising an attached model gives correct results or an error that names the layer, and the
suggested remedies work."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fa_bench
from fa_bench.errors import CoverageError
from fa_bench.mechanisms.graph import tensors_in
from fa_bench.registry.registries import ALGORITHMS
from tests.mechanisms.loops.chain import CUT_RULES, EDGE_RULES, RULES, Chain, assert_same, attach, batch, gradients, state, train

X, Y = batch()
# Rules that leave the layers unchanged.
PLAIN = ("bp", "bp_fc", "frozen", "frozen_blocks", "weight_perturbation")
# Rules that put feedback into the layers.
FEEDBACK = [name for name in [*EDGE_RULES, "asfp_lc", "np_feedback"] if name not in PLAIN]


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def old_weight_norm(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the function is deprecated, but scripts still use it
        nn.utils.weight_norm(layer)


def void(value: Any) -> None:
    """Return nothing, because a hook's result would replace the output."""


def unparametrize(layer: nn.Module) -> None:
    parametrize.remove_parametrizations(layer, "weight")


#: Maps a name to a function that replaces the weight with a computed one, and to a function that makes it a parameter again.
HOW: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "prune": (lambda layer: prune.l1_unstructured(layer, "weight", 0.3), lambda layer: prune.remove(layer, "weight")),
    "weight_norm": (parametrizations.weight_norm, unparametrize),
    "old weight_norm": (old_weight_norm, nn.utils.remove_weight_norm),
    "spectral_norm": (parametrizations.spectral_norm, unparametrize),
    "orthogonal": (parametrizations.orthogonal, unparametrize),
    "own": (lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()), unparametrize),
}


def reparametrized(name: str, how: str) -> tuple[Chain, Any]:
    model = Chain().eval()  # spectral_norm iterates only in training
    rule = attach(model, name)
    HOW[how][0](model.b.fc)
    return model.train(), rule


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {key: parameter.detach().clone() for key, parameter in model.named_parameters()}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", FEEDBACK)
def test_feedback_rules_reject_training_and_error_names_layer(name: str, how: str) -> None:
    """Training is refused because feedback belongs to a weight, and this weight is now computed from other tensors."""
    model, rule = reparametrized(name, how)
    before = parameters(model)
    with pytest.raises(CoverageError, match=r"layer 'b\.fc' was pruned or parametrized after attach.*rule\.detach\(\)"):
        train(model, rule, X, Y)
    assert_same(parameters(model), before)
    assert not gradients(model)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", [name for name in CUT_RULES if name not in FEEDBACK and not ALGORITHMS[name].repeats])
def test_cut_rule_error_propagates_through_reparametrization(name: str, how: str) -> None:
    """Cut rules leave every layer unchanged, so the error at a cut also reaches the tensors from which the weight is computed."""
    model, rule = reparametrized(name, how)
    model.eval()
    state = rule.state_dict()
    logits = model(X)
    rule.backward(F.cross_entropy(logits, Y), logits, Y, indices=torch.arange(len(Y)))
    found = {key: gradient for key, gradient in gradients(model).items() if key.startswith("b.fc") and "feedback" not in key}
    # The gradients must equal those that the layer without a rule computes from the same error at its output.
    errors: list[Tensor] = []
    handle = model.b.fc.register_forward_hook(
        lambda module, args, output: void(output.requires_grad and output.register_hook(errors.append))
    )  # additional passes compute no gradients
    model.zero_grad()
    rule.load_state_dict(state)  # so that the noise is the same again
    logits = model(X)
    rule.backward(F.cross_entropy(logits, Y), logits, Y, indices=torch.arange(len(Y)))
    handle.remove()
    rule.detach()
    model.zero_grad()
    model.b.fc(model.a(X)).backward(errors[0])
    assert_same(found, {key: gradient for key, gradient in gradients(model).items() if key.startswith("b.fc")}, rel=1e-5)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", RULES)
def test_detach_restores_layers_and_keeps_reparametrization(name: str, how: str) -> None:
    model, rule = reparametrized(name, how)
    model.eval()
    with torch.no_grad():
        before = model(X) if name in PLAIN else None
    with rule.exact():
        exact = model(X).detach()
    rule.detach()
    assert torch.equal(model(X), exact) and (before is None or torch.equal(before, exact))
    assert not [key for key in model.state_dict() if "feedback" in key]
    for layer in (model.a.fc, model.b.fc, model.c.fc, model.head):
        assert isinstance(layer, nn.Linear) and "fa_bench" not in type(layer).__module__ and "Feedback" not in repr(layer)
        assert not any("fa_bench" in base.__module__ for base in type(layer).__mro__)
    if parametrize.is_parametrized(model.b.fc):
        assert type(model.b.fc).__name__ == "ParametrizedLinear" and "weight" in model.b.fc.parametrizations
    assert all(parameter.requires_grad for parameter in model.parameters())
    # The gradient passes through the reparametrization, and the outputs are the same after its removal.
    F.cross_entropy(model(X), Y).backward()
    assert "weight" not in dict(model.b.fc.named_parameters())
    assert any(key.startswith("b.fc") and "weight" in key for key in gradients(model))
    HOW[how][1](model.b.fc)
    assert type(model.b.fc) is nn.Linear
    torch.testing.assert_close(model(X), exact)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", [name for name in RULES if name not in PLAIN])
def test_reattach_error_suggests_working_fix(name: str, how: str) -> None:
    model, rule = reparametrized(name, how)
    rule.detach()
    with pytest.raises(CoverageError, match=r"b\.fc is computed by pruning or a parametrization.*prune\.remove") as refused:
        attach(model, name)
    assert "remove_parametrizations" in str(refused.value) and "remove_weight_norm" in str(refused.value)
    HOW[how][1](model.b.fc)
    plain = Chain()
    plain.load_state_dict(model.state_dict())
    assert_same(train(model, attach(model, name), X, Y), train(plain, attach(plain, name), X, Y))


@pytest.mark.parametrize("name", RULES)
def test_spectral_norm_before_attach_trains_or_is_rejected(name: str) -> None:
    model = Chain()
    parametrizations.spectral_norm(model.b.fc)
    if name in PLAIN:
        train(model, attach(model, name), X, Y)
    else:
        with pytest.raises(CoverageError, match=r"b\.fc is computed"):
            attach(model, name)


class Scaled(nn.Module):
    """A parametrization with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0), requires_grad=False)

    def forward(self, weight: Tensor) -> Tensor:
        return self.factor * weight


def test_detach_does_not_unfreeze_parametrization_parameters() -> None:
    model = Chain()
    rule = attach(model, "frozen")
    parametrize.register_parametrization(model.b.fc, "weight", Scaled())
    rule.detach()
    assert {key for key, parameter in model.named_parameters() if not parameter.requires_grad} == {
        "b.fc.parametrizations.weight.0.factor"
    }


def test_detach_unfreezes_weight_norm_of_frozen_weight() -> None:
    """weight_norm replaces the weight with new parameters for its norm and direction, which the user then freezes."""
    model = Chain()
    rule = attach(model, "frozen")
    old_weight_norm(model.b.fc)
    made = [parameter.requires_grad_(False) for parameter in (model.b.fc.weight_g, model.b.fc.weight_v)]
    with rule.exact():
        assert all(parameter.requires_grad for parameter in made)
    assert not any(parameter.requires_grad for parameter in made)
    rule.detach()
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["frozen", "bp"])
def test_rejects_trainable_weight_norm_of_frozen_weight(name: str) -> None:
    """weight_norm replaces the weight with new parameters for its norm and direction, which have not been frozen."""
    model = Chain()
    rule = attach(model, name, freeze_stem=True)
    stem = next(module for module in model.modules() if isinstance(module, nn.Linear))
    assert not stem.weight.requires_grad
    old_weight_norm(stem)
    with pytest.raises(CoverageError, match=r"weight' was frozen by the rule, but has since been replaced"):
        model(batch(2)[0])
    for parameter in (stem.weight_g, stem.weight_v):
        parameter.requires_grad_(False)
    model(batch(2)[0])
    rule.detach()


# ------------------------------------------------------------------------------------------------ quantisation
def quantised(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that this function is deprecated
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


@pytest.mark.parametrize("name", RULES)
def test_dynamic_quantisation_before_and_after_detach(name: str) -> None:
    model = Chain()
    rule = attach(model, name)
    train(model, rule, X, Y)
    attached = None
    if name in FEEDBACK:
        with pytest.raises(CoverageError, match=r"layer '.*' has feedback, which quantisation does not support"):
            quantised(model)
    else:
        attached = quantised(model)
    weights = state(rule.detach())
    plain = quantised(model)
    assert_same(state(model), weights)  # the model itself does not change
    assert type(plain.b.fc).__module__.startswith("torch.ao") and not any("feedback" in key for key in plain.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(plain(X), model(X), atol=0.05, rtol=0.05)  # the weights are rounded to 8 bits
        if attached is not None and name != "forward_forward":  # it normalises its activations while attached
            assert torch.equal(attached(X), plain(X))


@pytest.mark.parametrize("is_attached_first", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda: (nn.Linear(4, 4), "bias"),
        lambda: (nn.Conv1d(3, 3, 1), "bias"),
        lambda: (nn.Bilinear(4, 4, 4), "bias"),
        lambda: (nn.LSTM(4, 4), "bias_hh_l0"),
        lambda: (nn.GRUCell(4, 4), "bias_ih"),
        lambda: (nn.MultiheadAttention(4, 2), "in_proj_bias"),
    ],
    ids=["linear", "conv", "bilinear", "lstm", "cell", "attention"],
)
def test_pruned_bias_is_used_in_forward_pass(make: Callable[[], Any], is_attached_first: bool) -> None:
    """If only the bias is pruned, the weight is still a parameter and has the same feedback."""
    (module, name), x = make(), torch.randn(3, 4, requires_grad=True)
    nn.init.normal_(getattr(module, name))
    inputs = {nn.MultiheadAttention: (x, x, x), nn.Bilinear: (x, x)}.get(type(module), (x,))
    rule = fa_bench.attach(module, "fa", sample_input=inputs) if is_attached_first else None
    prune.l1_unstructured(module, name, 0.5)
    rule = rule or fa_bench.attach(module, "fa", sample_input=inputs)
    output = next(tensors_in(module(*inputs)))
    with rule.exact():
        torch.testing.assert_close(output, next(tensors_in(module(*inputs))))
    output.sum().backward()
    assert getattr(module, f"{name}_orig").grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("make", "name", "count"),
    [
        (lambda: nn.MultiheadAttention(4, 2), "in_proj_bias", 3),
        (lambda: nn.GRUCell(4, 4), "bias_ih", 1),
        (lambda: nn.Bilinear(4, 4, 4), "bias", 2),
    ],
    ids=["attention", "cell", "bilinear"],
)
def test_detach_keeps_bias_parametrization(
    make: Callable[[], nn.Module],
    name: str,
    count: int,
) -> None:
    """The parametrization derives its class from the class that the module has while a rule is attached; detach must undo only
    the rule's class."""
    module, inputs = make(), (torch.randn(3, 4),) * count
    nn.init.normal_(module.get_parameter(name))
    plain_class = type(module)
    rule = fa_bench.attach(module, "fa", sample_input=inputs)
    parametrize.register_parametrization(module, name, Doubled())
    output = next(tensors_in(module(*inputs)))
    rule.detach()
    assert type(module).__name__ == f"Parametrized{plain_class.__name__}" and isinstance(module, plain_class)
    assert not any("fa_bench" in base.__module__ for base in type(module).__mro__)
    torch.testing.assert_close(next(tensors_in(module(*inputs))), output)
    parametrize.remove_parametrizations(module, name)
    assert type(module) is plain_class
