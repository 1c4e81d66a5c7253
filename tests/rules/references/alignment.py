"""Reference implementations of the rules whose feedback learns by local losses, as loops over scalars."""

from __future__ import annotations

from itertools import product

import numpy as np

from ..reference import Arrays, conv_forward, conv_input_error, conv_weight_gradient, inputs, weighted
from .classic import fa


def outputs(stage, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The outputs z of all samples, in the shape (N, O, P) with P output positions."""
    if stage.kind == "linear":
        return np.array([[[sum(w[i] * row[i] for i in range(len(row)))] for w in weight] for row in x])
    return conv_forward(stage, x, weight, None).reshape(len(x), len(weight), -1)


def correlation(stage, x: np.ndarray, z: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The mean of z xᵀ over samples and positions, in the shape of the weight."""
    count = z.shape[0] * z.shape[2]
    if stage.kind == "conv":
        return conv_weight_gradient(stage, x, z.reshape(conv_forward(stage, x, weight, None).shape), weight.shape) / count
    found = np.zeros(weight.shape)
    for n, o, i in product(range(len(x)), range(len(weight)), range(weight.shape[1])):
        found[o, i] += z[n, o, 0] * x[n, i] / count
    return found


def back(stage, x: np.ndarray, z: np.ndarray, feedback: np.ndarray) -> np.ndarray:
    """The product z B, in the shape of the input."""
    if stage.kind == "conv":
        return conv_input_error(stage, z.reshape(conv_forward(stage, x, feedback, None).shape), feedback, x.shape)
    found = np.zeros(x.shape)
    for n, o, i in product(range(len(x)), range(len(feedback)), range(x.shape[1])):
        found[n, i] += z[n, o, 0] * feedback[o, i]
    return found


def local_gradients(stage, weight, feedback, x, decay=0.0, amp=0.0, null=0.0, tie=0.0, sparse=0.0):
    """The gradients of the local losses with respect to B and W."""
    of_b, of_w = 2 * decay * feedback - tie * weight, 2 * decay * weight - tie * feedback
    z_w, z_b = outputs(stage, x, weight), outputs(stage, x, feedback)
    of_b = of_b - amp * correlation(stage, x, z_w, weight) + 2 * sparse * correlation(stage, x, z_b, weight)
    of_w = of_w - amp * correlation(stage, x, z_b, weight) + 2 * sparse * correlation(stage, x, z_w, weight)
    u = back(stage, x, z_w, feedback)
    of_b = of_b + 2 * null * correlation(stage, u, z_w, weight)
    of_w = of_w + 2 * null * correlation(stage, x, outputs(stage, u, feedback), weight)
    return of_b, of_w


def with_losses(chain, params, feedback, x, y, losses: dict[str, float], update_forward: bool) -> Arrays:
    """The gradients of FA plus those of the local losses.

    The local losses of a layer are computed from the layer's noise, if there is any, or else from its true input.
    """
    grads, true_inputs = fa(chain, params, feedback, x, y), inputs(chain, params, x)
    for stage in chain:
        if stage.name in weighted(chain):
            tensors = feedback[stage.name]
            of_b, of_w = local_gradients(
                stage, params[f"{stage.name}.weight"], tensors["B"], tensors.get("noise", true_inputs[stage.name]), **losses
            )
            grads[f"{stage.name}.B"] = of_b
            if update_forward:
                grads[f"{stage.name}.weight"] = grads[f"{stage.name}.weight"] + of_w
    return grads


def symmetric_alignment(chain, params, feedback, x, y, alpha=1e-3, beta=2e-3, update_forward=False, **_) -> Arrays:
    return with_losses(chain, params, feedback, x, y, {"decay": alpha, "tie": beta}, update_forward)


def activation_alignment(chain, params, feedback, x, y, alpha=1e-3, beta=2e-3, update_forward=False, **_) -> Arrays:
    return with_losses(chain, params, feedback, x, y, {"sparse": alpha, "amp": beta}, update_forward)


def regularized_mirror(chain, params, feedback, x, y, alpha=1e-3, beta=1e-3, update_forward=False, **_) -> Arrays:
    return with_losses(chain, params, feedback, x, y, {"decay": alpha, "amp": beta}, update_forward)


def information_alignment(chain, params, feedback, x, y, alpha=2e-3, beta=1e-3, gamma=1e-3, update_forward=False, **_) -> Arrays:
    return with_losses(chain, params, feedback, x, y, {"amp": alpha, "null": beta, "decay": gamma}, update_forward)


REFERENCES = {
    function.__name__: function
    for function in (symmetric_alignment, activation_alignment, regularized_mirror, information_alignment)
}
CASES = {name: (name, {}) for name in REFERENCES}
CASES |= {f"{name}-forward": (name, {"update_forward": True, "alpha": 0.3, "beta": 0.5}) for name in REFERENCES}
CASES |= {
    "information_alignment-gamma": ("information_alignment", {"alpha": 0.2, "beta": 0.3, "gamma": 0.4}),
    "information_alignment-noise": ("information_alignment", {"signal": "noise", "noise_batch": 3}),
}
TRAITS = {"redrawn": {"information_alignment"}}
