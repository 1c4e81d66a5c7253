"""Reference implementation of the weight mirror: feedback alignment with the current B, and one mirror step in plain loops."""

from __future__ import annotations

import math
from itertools import product

import numpy as np

from ..reference import Arrays, Stage, conv_forward, linear_forward
from .classic import fa

PHI = {
    "linear": (lambda v: v, 1.0),
    "relu": (lambda v: max(v, 0.0), 0.5),
    "tanh": (math.tanh, 1.0),
    "sigmoid": (lambda v: 1 / (1 + math.exp(-v)), 0.25),
}


def wm(chain, params, feedback, x, y, **_) -> Arrays:
    """The input error is e_in = g B, and B has no gradient."""
    return fa(chain, params, feedback, x, y)


def mirror_step(
    stage: Stage,
    weight: np.ndarray,
    bias: np.ndarray | None,
    feedback: np.ndarray,
    noise: np.ndarray,
    *,
    rate=0.01,
    decay=None,
    sigma=1.0,
    activation="linear",
    block_bias=True,
    per_tap=True,
) -> np.ndarray:
    """B after one step: (1 - λ) B + η (1 / (N σ² φ' n_pos)) Σ yᵀ x, with y = φ(W x + b).

    The inputs x are the given noise, and λ defaults to η. For each kernel tap, n_pos is the number of output positions at which
    the tap reads the input instead of padding. Without `per_tap`, all taps have the largest of these numbers.
    """
    decay = rate if decay is None else decay
    phi, slope = PHI[activation]
    bias = None if block_bias else bias
    y = linear_forward(noise, weight, bias) if stage.kind == "linear" else conv_forward(stage, noise, weight, bias)
    for index in np.ndindex(y.shape):
        y[index] = phi(y[index])
    estimate = np.zeros_like(weight)
    if stage.kind == "linear":
        for n, o, i in product(range(len(noise)), *map(range, weight.shape)):
            estimate[o, i] += y[n, o] * noise[n, i]
        return (1 - decay) * feedback + rate * estimate / (len(noise) * sigma**2 * slope)

    outputs = weight.shape[0] // stage.groups
    counts = np.zeros(weight.shape[2:])
    for a, b, p, q in product(*map(range, (*weight.shape[2:], *y.shape[2:]))):
        row, column = p * stage.stride[0] - stage.padding[0] + a, q * stage.stride[1] - stage.padding[1] + b
        if not (0 <= row < noise.shape[2] and 0 <= column < noise.shape[3]):
            continue
        counts[a, b] += 1
        for n, o, i in product(range(len(noise)), range(weight.shape[0]), range(weight.shape[1])):
            estimate[o, i, a, b] += y[n, o, p, q] * noise[n, (o // outputs) * weight.shape[1] + i, row, column]
    if not per_tap:
        counts[:] = counts.max()
    return (1 - decay) * feedback + rate * estimate / (len(noise) * sigma**2 * slope * counts)


def undecayed_step(weight: np.ndarray, bias: np.ndarray, feedback: np.ndarray, noise: np.ndarray, rate=0.01) -> np.ndarray:
    """B of a linear layer after a step of Akrout et al.'s numpy code: B + η_B Σ yᵀ x, with y = sigmoid(W x + b)."""
    after = feedback.copy()
    for x, o in product(noise, range(len(weight))):
        y = 1 / (1 + math.exp(-(sum(weight[o, i] * x[i] for i in range(len(x))) + bias[o])))
        for i in range(len(x)):
            after[o, i] += rate * y * x[i]
    return after


REFERENCES = {"wm": wm}
CASES = {
    "wm": ("wm", {"initial_steps": 2, "mirror_batch": 4}),
    "wm-relu": ("wm", {"initial_steps": 0, "mirror_batch": 4, "mirror_steps": 2, "activation": "relu", "block_bias": False}),
}
TRAITS = {"redrawn": {"wm"}}
