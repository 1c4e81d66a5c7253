"""References of product feedback alignment: the two hops one after the other, scalar by scalar."""

from __future__ import annotations

from itertools import product

import numpy as np

from ..reference import Arrays, Stage, conv_weight_gradient, gradients, inputs, linear_weight_gradient


def path(stage: Stage, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(B R)[o,i,...] = sum over m of B[o,m] R[m,i,...], m within the group of o."""
    outputs, between = first.shape
    effective = np.zeros((outputs, *second.shape[1:]))
    for o, m in product(range(outputs), range(between)):
        effective[o] += first[o, m] * second[(o // (outputs // stage.groups)) * between + m]
    return effective


def first_hop(stage: Stage, g: np.ndarray, first: np.ndarray) -> np.ndarray:
    """ē[n,m,...] = sum over o of g[n,o,...] B[o,m], o within the group of m."""
    outputs, between = first.shape
    error = np.zeros((g.shape[0], stage.groups * between, *g.shape[2:]))
    for o, m in product(range(outputs), range(between)):
        error[:, (o // (outputs // stage.groups)) * between + m] += g[:, o] * first[o, m]
    return error


def pfa(chain, params, feedback, x, y, **_) -> Arrays:
    """e_in = (g B) R; gradient of R = that of a weight from x and ē = g B; B has none."""
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


REFERENCES = {"pfa": pfa, "pfa_o": pfa}
CASES = {
    "pfa": ("pfa", {"ratio": 2.0}),
    "pfa-sparse": ("pfa", {"ratio": 3.0, "density": 0.5}),
    "pfa_o": ("pfa_o", {}),
    "pfa_o-wide": ("pfa_o", {"ratio": 2.0}),
}
