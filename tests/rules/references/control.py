"""Reference implementation of deep feedback control."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import torch

from ..reference import Arrays, Stage, forward, gradients, output_error

#: The name under which the output is listed among the cuts.
OUTPUT = ""


def dfc(
    chain,
    params,
    feedback,
    x,
    y,
    alpha=0.001,
    target_stepsize=0.1,
    learning_rule="nonlinear_difference",
    feedback_weights="learned",
    sigma=0.1,
    alpha_fb=0.5,
    draws=None,
    **_,
) -> Arrays:
    """The gradient at v, the input of a cut, is -(phi(v + Q u) - phi(v)) / N, or -Q u / N with the voltage difference.

    The control is u_n = (J_n Q_n + alpha I)^-1 (-stepsize dL_n/dz_n). Weight gradients are computed with the controlled
    activities.
    """
    jacobian, logits = jacobians(chain, params, x, feedback), forward(chain, params, x)[-1]
    q = feedback_of(feedback, jacobian, feedback_weights)
    u = control(jacobian, q, -target_stepsize * len(x) * output_error(logits, y), alpha)
    total, part, start, h = {}, [], x, x
    for stage in chain:
        if stage.name in feedback:
            change = pushed(q[stage.name], u).reshape(h.shape)
            moved = forward([stage], params, h + change)[-1]
            difference = moved - forward([stage], params, h)[-1] if learning_rule == "nonlinear_difference" else change
            total |= of_part(part, params, start, -difference / len(x))
            part, start, h = [], moved, moved
        else:
            part.append(stage)
            h = forward([stage], params, h)[-1]
    total |= of_part(part, params, start, -pushed(q[OUTPUT], u) / len(x))
    if feedback_weights == "learned":
        total |= of_feedback(chain, params, x, feedback, jacobian, q, logits, sigma, alpha_fb, draws)
    return total


def jacobians(chain, params, x, cuts) -> Arrays:
    """The Jacobians {cut: dz_n/dv_n (N, C, F)}, where v is the input of the cut, and the identity for the output."""
    names, classes = [stage.name for stage in chain], forward(chain, params, x)[-1].shape[1]
    found: Arrays = {OUTPUT: np.zeros((len(x), classes, classes))}
    for c in range(classes):
        unit, at = np.zeros((len(x), classes)), {}
        unit[:, c] = 1.0
        flat = Stage("flat", "flatten")  # `gradients` needs 2-D logits for its loss, whose error `given` replaces
        gradients([*chain, flat], params, x, np.zeros(len(x), dtype=int), given={names[-1]: unit}, errors=at)
        found[OUTPUT][:, c, c] = 1.0
        for cut in cuts:
            row = at[names[names.index(cut) - 1]].reshape(len(x), -1)
            found.setdefault(cut, np.zeros((len(x), classes, row.shape[1])))[:, c] = row
    return found


def feedback_of(feedback, jacobian, kind) -> Arrays:
    """The matrices Q (N, F, C) of all samples, at every cut and at the output."""
    samples, classes = jacobian[OUTPUT].shape[:2]
    if kind == "jacobian":
        return {place: value.transpose(0, 2, 1) for place, value in jacobian.items()}
    last = list(feedback)[-1]
    of_output = feedback[last].get("B_output", np.eye(classes))
    matrices = {cut: tensors["B"] for cut, tensors in feedback.items()} | {OUTPUT: of_output}
    return {place: np.array([matrix.T for _ in range(samples)]) for place, matrix in matrices.items()}


def control(jacobian, q, error, leak) -> np.ndarray:
    """The control u, which solves (J_n Q_n + leak I) u_n = error_n."""
    u = np.zeros_like(error)
    for n in range(len(error)):
        loop = leak * np.eye(error.shape[1])
        for place, c, k in product(q, *map(range, loop.shape)):
            loop[c, k] += sum(jacobian[place][n, c, f] * q[place][n, f, k] for f in range(q[place].shape[1]))
        u[n] = np.linalg.solve(loop, error[n])
    return u


def pushed(q, u) -> np.ndarray:
    """The products (Q u)_nf."""
    change = np.zeros(q.shape[:2])
    for n, f in np.ndindex(change.shape):
        change[n, f] = sum(q[n, f, c] * u[n, c] for c in range(u.shape[1]))
    return change


def of_part(part, params, x, error) -> Arrays:
    flat = Stage("flat", "flatten")  # `gradients` needs 2-D logits for its loss, whose error `given` replaces
    return gradients([*part, flat], params, x, np.zeros(len(x), dtype=int), given={part[-1].name: error})


def of_feedback(chain, params, x, feedback, jacobian, q, logits, sigma, alpha_fb, draws) -> Arrays:
    """gradB[c,f] = 1/(N sigma^2) sum over n of u[n,c] (sum over k of Q[f,k] u[n,k] + sigma eps[n,f])."""
    eps, h = {}, x
    for stage in chain:
        if stage.name in feedback:
            eps[stage.name] = draws.normal(stage.name, torch.empty(h.shape, dtype=torch.float64)).numpy()
            h = h + sigma * eps[stage.name]
        h = forward([stage], params, h)[-1]
    eps[OUTPUT] = draws.normal(OUTPUT, torch.empty(h.shape, dtype=torch.float64)).numpy()
    u = control(jacobian, q, logits - (h + sigma * eps[OUTPUT]), alpha_fb)
    total, last = {}, list(feedback)[-1]
    for place, value in eps.items():
        apical = pushed(q[place], u) + sigma * value.reshape(len(x), -1)
        grad = np.zeros((u.shape[1], apical.shape[1]))
        for n, c, f in product(range(len(x)), *map(range, grad.shape)):
            grad[c, f] += u[n, c] * apical[n, f] / (len(x) * math.pow(sigma, 2))
        total[f"{place}.B" if place else f"{last}.B_output"] = grad
    return total


REFERENCES = {"dfc": dfc}
CASES = {
    "dfc": ("dfc", {"target_stepsize": 0.5}),
    "dfc-voltage": (
        "dfc",
        {"learning_rule": "voltage_difference", "alpha": 0.3, "sigma": 0.4, "alpha_fb": 0.2, "b_init": "normal_fan_out"},
    ),
    "dfc-fixed": ("dfc", {"feedback_weights": "fixed", "alpha": 0.1}),
    "dfc-jacobian": ("dfc", {"feedback_weights": "jacobian", "alpha": 0.1, "target_stepsize": 1.0}),
}
TRAITS = {"untrue_output": {"dfc"}, "noisy": {"dfc"}}
