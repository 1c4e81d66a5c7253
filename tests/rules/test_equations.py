"""Tests of every rule against its loop-based reference, in single passes on every network and in several training steps."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fa_bench
from fa_bench.mechanisms.second_pass import Draws

from . import nets
from .helpers import (
    array,
    arrays,
    assert_bitwise,
    assert_matches,
    backward,
    bp_grads,
    collect,
    cut_options,
    distance,
    feedback_arrays,
    feedback_tensors,
    restore,
    rule_grads,
    state_of,
)
from .reference import describe, sgd_step, weighted
from .references import AFTER_UPDATE, CASES, REFERENCES, TRAITS


def start(case: str, net: str):
    """The rule object, attached model, plain twin, chain, reference and options of a case."""
    name, options = CASES[case]
    plain, (x, _) = nets.NETS[net](), nets.batch(net)
    chain = describe(plain)
    options = cut_options(name, plain, options)
    model = nets.NETS[net]()
    rule = fa_bench.attach(model, name, seed=0, sample_input=x, **options)
    return rule, model, plain, chain, REFERENCES[name], options


def learned_names(rule) -> dict[str, torch.Tensor]:
    """The learned feedback whose gradients a reference computes, as {"layer.B": tensor}.

    These tensors are also among the model's parameters, so an optimizer of the model updates them.
    """
    if rule.name in TRAITS["learned_from_noise"]:
        return {}
    ids = {id(tensor) for tensor in rule.feedback_parameters()}
    return {f"{layer}.{name}": tensor for (layer, name), tensor in feedback_tensors(rule).items() if id(tensor) in ids}


def reference_options(options: dict) -> dict:
    """The options without `density`, because references get tensors that are already masked."""
    return {key: value for key, value in options.items() if key != "density"}


def noise_options(case: str, rule) -> dict:
    """The random numbers that a noisy rule will sample for its next update, as an option for its reference."""
    if CASES[case][0] not in TRAITS["noisy"]:
        return {}
    draws = Draws(0)
    draws.load_state(rule.state_dict()["draws"])
    draws.number += 1
    return {"draws": draws}


@pytest.mark.parametrize("net", nets.NETS)
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_reference_and_not_bp(case, net):
    rule, model, plain, chain, reference, options = start(case, net)
    x, y = nets.batch(net)
    noise, before = noise_options(case, rule), feedback_arrays(rule)
    got = rule_grads(model, rule, x, y)
    params = arrays(plain)
    assert_matches(arrays(model), params, rel=0)
    feedback = before if noise else feedback_arrays(rule)  # brsf samples in the forward pass
    want = reference(chain, params, feedback, array(x), y.numpy(), **reference_options(options), **noise)
    assert_matches(got | {name: tensor.grad for name, tensor in learned_names(rule).items()}, want)

    exact, layers, name = bp_grads(plain, x, y), weighted(chain), CASES[case][0]
    last = layers[-1]
    if name in TRAITS["exact"]:
        assert_bitwise({n: g for n, g in got.items() if n in want}, {n: g for n, g in exact.items() if n in want})
    else:
        if name not in TRAITS["untrue_output"] and not options.get("update_forward"):
            assert distance(got[f"{last}.weight"], exact[f"{last}.weight"]) < 1e-12, (
                "the output layer does not have its true gradient"
            )
        hidden = layers[: -2 if "plain_last" in options or name in TRAITS["last_module"] else -1]
        away = [distance(got[f"{at}.weight"], exact[f"{at}.weight"]) > 1e-2 for at in hidden if got[f"{at}.weight"] is not None]
        assert all(away) or name in TRAITS["partly_exact"], "a hidden layer has the gradient of BP"


def test_plain_last_uses_true_weights_only_in_output_layer():
    rule, model, plain, _, _, _ = start("usf-plain-last", "mlp_tanh")
    x, y = nets.batch("mlp_tanh")
    got, exact = rule_grads(model, rule, x, y), bp_grads(plain, x, y)
    assert distance(got["fc2.weight"], exact["fc2.weight"]) < 1e-12
    assert distance(got["fc1.weight"], exact["fc1.weight"]) > 1e-2


# Nesterov momentum is tested only with one rule for fixed and one for learned feedback, because the optimizer is torch's.
SCHEDULES = [(case, False) for case in CASES] + [("fa", True), ("kp", True)]


@pytest.mark.filterwarnings("ignore:.*should have 0.01 times")  # dkp's learning rate is not part of its equations
@pytest.mark.parametrize("net", ["mlp_bn", "conv"])
@pytest.mark.parametrize(("case", "nesterov"), SCHEDULES)
def test_training_steps_equal_reference(case, net, nesterov):
    """Weights, biases and learned feedback equal those of the reference after each of four steps.

    Each step uses SGD with momentum and coupled weight decay on a new batch.
    """
    rule, model, _, chain, reference, options = start(case, net)
    settings = {"lr": 0.1, "momentum": 0.9, "nesterov": nesterov}
    optimizer = torch.optim.SGD(model.parameters(), weight_decay=0.01, **settings)
    kept = {"kept": {}} if CASES[case][0] in TRAITS["delayed"] else {}
    initial, velocity, redrawn = feedback_arrays(rule), {}, CASES[case][0] in TRAITS["redrawn"]
    learned = {name: array(tensor) for name, tensor in learned_names(rule).items()}
    params = arrays(model) | learned
    for step in range(4):
        x, y = nets.batch(net, seed=step)
        optimizer.zero_grad()
        logits = model(x)
        # Learned feedback comes from the reference, redrawn feedback from this forward pass, and fixed feedback from the initial
        # state.
        present = feedback_arrays(rule) if redrawn else initial
        feedback = {at: {t: params.get(f"{at}.{t}", value) for t, value in tensors.items()} for at, tensors in present.items()}
        given = reference_options(options) | noise_options(case, rule) | kept
        weights_now = {name: value for name, value in params.items() if name not in learned}
        grads = reference(chain, weights_now if "draws" in given else params, feedback, array(x), y.numpy(), **given)
        backward(rule, F.cross_entropy(logits, y), logits, y)
        optimizer.step()
        rule.step()
        sgd_step(params, velocity, grads, decay=0.01, **settings)
        for name in learned:  # masks are applied again after every update
            layer, tensor = name.rsplit(".", 1)
            if options.get("density", 1) < 1:
                params[name] = params[name] * (initial[layer][tensor] != 0)
        if CASES[case][0] in AFTER_UPDATE:
            AFTER_UPDATE[CASES[case][0]](chain, params)
        now = arrays(model) | {name: array(tensor) for name, tensor in learned_names(rule).items()}
        # Over four steps, BatchNorm and momentum amplify the rounding error of one pass (1e-12) by a factor of less than a
        # thousand.
        assert_matches(now, params)
    for (layer, name), tensor in feedback_tensors(rule).items():
        if not redrawn and f"{layer}.{name}" not in learned and CASES[case][0] != "usf":  # usf's B follows the weights
            assert np.array_equal(array(tensor), initial[layer][name]), f"{layer}: fixed feedback changed"


@pytest.mark.parametrize("case", [case for case, (name, _) in CASES.items() if name not in TRAITS["unscaled"]])
def test_loss_scaling_scales_every_gradient(case):
    """All errors come from the loss, so multiplying it by 1024, a power of two, multiplies the gradients by exactly 1024."""
    rule, model, _, _, _, _ = start(case, "conv")
    x, y = nets.batch("conv")
    model.eval()  # so that brsf does not sample between the two passes
    state = state_of(rule)
    once = rule_grads(model, rule, x, y)
    restore(rule, state)
    model.zero_grad(set_to_none=True)
    logits = model(x)
    backward(rule, 1024 * F.cross_entropy(logits, y), logits, y)
    assert_bitwise(collect(model), {name: None if grad is None else 1024 * grad for name, grad in once.items()})


@pytest.mark.parametrize("case", CASES)
def test_gradients_accumulate_over_passes(case):
    """Without zero_grad, the gradients of two backward passes add up. Under kp, B still has the gradient of W."""
    rule, model, _, _, _, _ = start(case, "mlp_tanh")
    batches = [nets.batch("mlp_tanh", seed=seed) for seed in (0, 1)]
    model.eval()
    state = state_of(rule)
    single = [rule_grads(model, rule, x, y) for x, y in batches]
    restore(rule, state)
    model.zero_grad(set_to_none=True)
    for tensor in rule.feedback_parameters():
        tensor.grad = None
    for x, y in batches:
        logits = model(x)
        backward(rule, F.cross_entropy(logits, y), logits, y)
    both = collect(model)
    assert_matches(both, {name: grad + single[1][name] for name, grad in single[0].items() if grad is not None}, rel=1e-12)
    if case == "kp":
        for layer, tensors in rule.feedback.items():
            assert torch.equal(tensors["B"].grad, both[f"{layer}.weight"])
