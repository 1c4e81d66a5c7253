"""Reference implementations of dkp, drtp and f3, which project output errors or labels with one matrix per cut."""

from __future__ import annotations

from itertools import product

import numpy as np

from ..reference import Arrays, forward, gradients, linear_input_error, output_error


def outputs(chain, params, x) -> Arrays:
    """The output of every stage, as {stage: output}."""
    return {stage.name: value for stage, value in zip(chain, forward(chain, params, x)[1:], strict=True)}


def dkp(chain, params, feedback, x, y, **_) -> Arrays:
    """The gradients of dfa, plus gradB[c,f] = sum over n of delta_out[n,c] a[n,f].

    Here a is the flattened activation at the cut.
    """
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
    """The error at a cut is scale/N times onehot(y) B or, with error_sign, scale/N times sign(output - target) B."""
    values, given = outputs(chain, params, x), {}
    signals = np.sign(output_error(values[chain[-1].name], y))
    if not error_sign:
        signals = np.zeros_like(signals)
        for n in range(len(x)):
            signals[n, y[n]] = 1.0
    for cut, tensors in feedback.items():
        given[cut] = scale / len(x) * linear_input_error(signals, tensors["B"]).reshape(values[cut].shape)
    return gradients(chain, params, x, y, given=given)


def f3_errors(information, logits, y) -> np.ndarray:
    """The error of every sample in this pass, as defined by `information`, for the cross-entropy loss l."""
    current, softmax = logits.shape[0] * output_error(logits, y), np.zeros_like(logits)
    for n, c in product(range(logits.shape[0]), range(logits.shape[1])):
        target = 1.0 if c == y[n] else 0.0
        softmax[n, c] = current[n, c] + target
    errors = np.zeros_like(logits)
    for n, c in product(range(logits.shape[0]), range(logits.shape[1])):
        target, times = 1.0 if c == y[n] else 0.0, 1.0
        if information.endswith("_one_hot"):
            times = target
        kind = information.removesuffix("_one_hot")
        if kind in ("delayed_loss", "current_error"):
            errors[n, c] = times * current[n, c]
        elif kind == "delayed_error":
            errors[n, c] = times * (logits[n, c] - target)
        elif kind == "delayed_error_softmax":
            errors[n, c] = softmax[n, c] - target
        elif kind == "delayed_loss_softmax":  # cross-entropy of p = softmax(z) taken as logits: dl/dz_c = sum_k dl/dp_k dp_k/dz_c
            of_p = logits.shape[0] * output_error(softmax, y)
            for k in range(logits.shape[1]):
                errors[n, c] += of_p[n, k] * softmax[n, k] * ((1.0 if k == c else 0.0) - softmax[n, c])
        else:
            assert kind == "one_hot_target"
            errors[n, c] = -target
    return errors


def f3(chain, params, feedback, x, y, information="delayed_loss", first_epoch="target", **options) -> Arrays:
    """The error at a cut is e B / N, where e comes from this pass or, with delayed `information`, from the sample's previous one.

    The dictionary `kept` maps each sample to the error of its previous pass and is updated in place. If `kept` and `indices` are
    absent, every sample is treated as being in its first epoch.
    """
    kept, indices = options.get("kept", {}), options.get("indices", range(len(x)))
    values, given = outputs(chain, params, x), {}
    now = f3_errors(information, values[chain[-1].name], y)
    used = np.zeros_like(now)
    for n, index in enumerate(indices):
        if not information.startswith("delayed"):
            used[n] = now[n]
        elif index in kept:
            used[n] = kept[index]
        elif first_epoch == "current":
            used[n] = now[n]
        elif first_epoch == "target":
            used[n, y[n]] = -1.0
    kept.update({index: now[n].copy() for n, index in enumerate(indices)})
    for cut, tensors in feedback.items():
        given[cut] = linear_input_error(used / len(x), tensors["B"]).reshape(values[cut].shape)
    return gradients(chain, params, x, y, given=given)


REFERENCES = {"dkp": dkp, "drtp": drtp, "f3": f3}
CASES = {
    "dkp": ("dkp", {}),
    "dkp-sparse": ("dkp", {"density": 0.5}),
    "dkp-zeros": ("dkp", {"b_init": "zeros"}),
    "drtp": ("drtp", {}),
    "drtp-scaled": ("drtp", {"scale": 4.0}),
    "drtp-sparse": ("drtp", {"density": 0.5}),
    "drtp-sign": ("drtp", {"error_sign": True, "scale": 0.5}),
    "f3": ("f3", {"samples": 99}),
    "f3-current-first": ("f3", {"samples": 99, "first_epoch": "current", "density": 0.5}),
    "f3-trinomial": ("f3", {"samples": 99, "b_init": "trinomial"}),
    "f3-current": ("f3", {"information": "current_error"}),
    "f3-target": ("f3", {"information": "one_hot_target"}),
}
TRAITS = {"unscaled": {"drtp", "f3"}, "delayed": {"f3"}}
