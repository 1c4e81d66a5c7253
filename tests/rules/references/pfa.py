"""Reference implementations of product feedback alignment and of ldfa, which compute the product B R in plain loops."""

from __future__ import annotations

from itertools import product

import numpy as np

from ..reference import Arrays, Stage, conv_weight_gradient, gradients, inputs, linear_weight_gradient


def path(stage: Stage, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(B R)[o,i,...] = sum over m in the group of o of B[o,m] R[m,i,...]."""
    outputs, between = first.shape
    effective = np.zeros((outputs, *second.shape[1:]))
    for o, m in product(range(outputs), range(between)):
        effective[o] += first[o, m] * second[(o // (outputs // stage.groups)) * between + m]
    return effective


def first_hop(stage: Stage, g: np.ndarray, first: np.ndarray) -> np.ndarray:
    """ē[n,m,...] = sum over o in the group of m of g[n,o,...] B[o,m]."""
    outputs, between = first.shape
    error = np.zeros((g.shape[0], stage.groups * between, *g.shape[2:]))
    for o, m in product(range(outputs), range(between)):
        error[:, (o // (outputs // stage.groups)) * between + m] += g[:, o] * first[o, m]
    return error


def pfa(chain, params, feedback, x, y, **_) -> Arrays:
    """The input error is e_in = (g B) R.

    The gradient of R is computed like that of a weight, from x and ē = g B. B has no gradient.
    """
    stages = {stage.name: stage for stage in chain}
    carry = {layer: path(stages[layer], tensors["B"], tensors["R"]) for layer, tensors in feedback.items()}
    errors: Arrays = {}
    grads = gradients(chain, params, x, y, carry=carry, errors=errors)
    true_inputs = inputs(chain, params, x)
    for layer, tensors in feedback.items():
        stage, between = stages[layer], first_hop(stages[layer], errors[layer], tensors["B"])
        if stage.kind == "linear":
            grads[f"{layer}.R"] = linear_weight_gradient(true_inputs[layer], between)
        else:
            grads[f"{layer}.R"] = conv_weight_gradient(stage, true_inputs[layer], between, tensors["R"].shape)
    return grads


def ldfa(chain, params, feedback, x, y, b_rate=1.0, rank=0, **_) -> Arrays:
    """The gradients of PFA, with -b_rate (C B - B Bᵀ C B) as the gradient of B.

    C is the sum of the outer products g gᵀ / ‖g‖. Every group has its own C.
    """
    stages, errors = {stage.name: stage for stage in chain}, {}
    grads = pfa(chain, params, feedback, x, y)
    gradients(
        chain,
        params,
        x,
        y,
        errors=errors,
        carry={layer: path(stages[layer], tensors["B"], tensors["R"]) for layer, tensors in feedback.items()},
    )
    for layer, tensors in feedback.items():
        if b_rate:
            error = errors[layer].reshape(*errors[layer].shape[:2], -1)
            grads[f"{layer}.B"] = np.zeros_like(tensors["B"])
            for rows in np.split(np.arange(len(tensors["B"])), stages[layer].groups):
                grads[f"{layer}.B"][rows] = oja(error[:, rows], tensors["B"][rows], b_rate)
    return grads


def oja(error: np.ndarray, first: np.ndarray, rate: float) -> np.ndarray:
    """The gradient of one group's B, computed from the group's errors g[n,o,p]."""
    outputs, between = first.shape
    c = np.zeros((outputs, outputs))
    for n, p in product(range(error.shape[0]), range(error.shape[2])):
        size = sum(error[n, o, p] ** 2 for o in range(outputs)) ** 0.5
        for i, j in product(range(outputs), range(outputs)):
            c[i, j] += error[n, i, p] * error[n, j, p] / size if size else 0.0
    grad = np.zeros_like(first)
    for o, m in product(range(outputs), range(between)):
        cb = [[sum(c[i, j] * first[j, k] for j in range(outputs)) for k in range(between)] for i in range(outputs)]
        inner = [sum(first[i, k] * cb[i][m] for i in range(outputs)) for k in range(between)]
        grad[o, m] = -rate * (cb[o][m] - sum(first[o, k] * inner[k] for k in range(between)))
    return grad


def orthonormal(first: np.ndarray, groups: int) -> np.ndarray:
    """The matrix with the columns of every group orthonormalised by the Gram-Schmidt process."""
    parts = []
    for part in np.split(first, groups):
        columns: list[np.ndarray] = []
        for column in part.T:
            rest = column - sum(((column @ earlier) * earlier for earlier in columns), start=np.zeros_like(column))
            columns.append(rest / np.sqrt((rest**2).sum()))
        parts.append(np.stack(columns, axis=1))
    return np.concatenate(parts)


def after_ldfa(chain, params: Arrays) -> None:
    for stage in chain:
        if (key := f"{stage.name}.B") in params:
            params[key] = orthonormal(params[key], stage.groups)


REFERENCES = {"pfa": pfa, "pfa_o": pfa, "ldfa": ldfa}
AFTER_UPDATE = {"ldfa": after_ldfa}
CASES = {
    "pfa": ("pfa", {"ratio": 2.0}),
    "pfa-sparse": ("pfa", {"ratio": 3.0, "density": 0.5}),
    "pfa_o": ("pfa_o", {}),
    "pfa_o-wide": ("pfa_o", {"ratio": 2.0}),
    "pfa_o-narrow": ("pfa_o", {"ratio": 0.5}),
    "ldfa": ("ldfa", {"rank": 2}),
    "ldfa-slow": ("ldfa", {"rank": 2, "b_rate": 0.25}),
    "ldfa-random": ("ldfa", {"rank": 2, "b_rate": 0.0}),
}
