"""References of the rules that make their signals of the output error or the labels, by one matrix a cut: dkp and drtp."""

from __future__ import annotations

from itertools import product

import numpy as np

from ..reference import Arrays, forward, gradients, linear_input_error, output_error


def outputs(chain, params, x) -> Arrays:
    """{stage: its output}."""
    return {stage.name: value for stage, value in zip(chain, forward(chain, params, x)[1:], strict=True)}


def dkp(chain, params, feedback, x, y, **_) -> Arrays:
    """As dfa; gradB[c,f] = sum over n of delta_out[n,c] a[n,f], a the flattened activation at the cut."""
    grads = gradients(chain, params, x, y, inject={cut: tensors["B"] for cut, tensors in feedback.items()})
    values = outputs(chain, params, x)
    delta = output_error(values[chain[-1].name], y)
    for cut, tensors in feedback.items():
        a, grad = values[cut].reshape(len(x), -1), np.zeros_like(tensors["B"])
        for n, c, f in product(range(len(x)), *map(range, grad.shape)):
            grad[c, f] += delta[n, c] * a[n, f]
        grads[f"{cut}.B"] = grad
    return grads


def drtp(chain, params, feedback, x, y, scale=1.0, error_sign=False, **_) -> Arrays:
    """The error at a cut is scale/N times onehot(y) B or, with error_sign, sign(output - target) B."""
    values, given = outputs(chain, params, x), {}
    signals = np.sign(output_error(values[chain[-1].name], y))
    if not error_sign:
        signals = np.zeros_like(signals)
        for n in range(len(x)):
            signals[n, y[n]] = 1.0
    for cut, tensors in feedback.items():
        given[cut] = scale / len(x) * linear_input_error(signals, tensors["B"]).reshape(values[cut].shape)
    return gradients(chain, params, x, y, given=given)


REFERENCES = {"dkp": dkp, "drtp": drtp}
CASES = {
    "dkp": ("dkp", {}),
    "dkp-sparse": ("dkp", {"density": 0.5}),
    "dkp-zeros": ("dkp", {"b_init": "zeros"}),
    "drtp": ("drtp", {}),
    "drtp-scaled": ("drtp", {"scale": 4.0}),
    "drtp-sparse": ("drtp", {"density": 0.5}),
    "drtp-sign": ("drtp", {"error_sign": True, "scale": 0.5}),
}
TRAITS = {"unscaled": {"drtp"}}
