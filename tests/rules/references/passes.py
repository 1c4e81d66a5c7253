"""Reference implementations of the rules that run the network again, with noise or with another input.

The argument ``draws`` provides the random numbers that the rule samples in the same update.
"""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import torch

from ..reference import Arrays, Stage, conv_weight_gradient, forward, gradients, inputs, linear_weight_gradient, weighted


def noise(draws, name: str, shape, is_shared: bool = False) -> np.ndarray:
    return draws.normal(name, torch.empty(shape, dtype=torch.float64), is_shared).numpy()


def losses(logits: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The losses L_n = -log softmax(z_n)[y_n]."""
    values = np.zeros(len(y))
    for n in range(len(y)):
        top = logits[n].max()
        values[n] = top + math.log(sum(math.exp(z - top) for z in logits[n])) - logits[n, y[n]]
    return values


def altered(chain, params, x, *, before=None, after=None) -> Arrays:
    """The outputs of all stages, and the logits under "", with `before` and `after` added to the stages' inputs and outputs."""
    before, after, values = before or {}, after or {}, {}
    for stage in chain:
        x = forward([stage], params, x + before.get(stage.name, 0.0))[-1] + after.get(stage.name, 0.0)
        values[stage.name] = x
    return values | {"": x}


def node_perturbation(chain, params, feedback, x, y, sigma=1e-3, perturb_output=True, draws=None, **_) -> Arrays:
    """The error at a cut is d_n xi_n / N, with d_n = (L_n(+sigma xi) - L_n(-sigma xi)) / 2 sigma.

    The error at the logits is computed in the same way, or equals delta_out if perturb_output is false.
    """
    plain = altered(chain, params, x)
    last = chain[-1].name
    xi = {cut: noise(draws, cut, plain[cut].shape) for cut in feedback}
    if perturb_output:
        xi[last] = noise(draws, "", plain[last].shape)
    sides = [
        losses(altered(chain, params, x, after={at: size * value for at, value in xi.items()})[""], y) for size in (sigma, -sigma)
    ]
    given = {at: np.zeros_like(value) for at, value in xi.items()}
    for n in range(len(x)):
        for at, value in xi.items():
            given[at][n] = (sides[0][n] - sides[1][n]) / (2 * sigma) * value[n] / len(x)
    return gradients(chain, params, x, y, given=given)


def weight_perturbation(chain, params, feedback, x, y, epsilon=1e-3, draws=None, **_) -> Arrays:
    """The gradient is v (L(theta + eps v) - L(theta - eps v)) / 2 eps, with the same v in both passes."""
    v = {name: noise(draws, str(number), value.shape, True) for number, (name, value) in enumerate(params.items())}
    plus, minus = (
        losses(altered(chain, {name: params[name] + size * v[name] for name in params}, x)[""], y).mean()
        for size in (epsilon, -epsilon)
    )
    return {name: v[name] * (plus - minus) / (2 * epsilon) for name in params}


def pepita(chain, params, feedback, x, y, **_) -> Arrays:
    """The second pass has the input x' = x + (p - y) F.

    The error before a hidden nonlinearity is (h - h') / N, and the output error is (p' - y) / N. Weight gradients are computed
    with h'.
    """
    plain, total = altered(chain, params, x), {}
    (matrix,) = [tensors["F"] for tensors in feedback.values() if "F" in tensors]
    error = _softmax_error(plain[""], y)
    added = np.zeros((len(x), matrix.shape[1]))
    for n, c, f in product(range(len(x)), *map(range, matrix.shape)):
        added[n, f] += error[n, c] * matrix[c, f]
    x = x + added.reshape(x.shape)
    modulated = altered(chain, params, x)
    # Each part between two nonlinearities learns from its own backward pass, which ends at the part's input.
    part, start = [], x
    for stage in chain:
        if stage.name in feedback:
            total |= _of_part(part, params, start, (plain[stage.name] - modulated[stage.name]) / len(x))
            part, start = [], modulated[stage.name]
        else:
            part.append(stage)
    return total | _of_part(part, params, start, _softmax_error(modulated[""], y) / len(x))


def _softmax_error(logits: np.ndarray, y: np.ndarray) -> np.ndarray:
    error = np.zeros_like(logits)
    for n, c in product(*map(range, logits.shape)):
        error[n, c] = math.exp(logits[n, c] - logits[n].max()) / sum(math.exp(z - logits[n].max()) for z in logits[n])
        error[n, c] -= 1.0 if c == y[n] else 0.0
    return error


def _of_part(part, params, x, error) -> Arrays:
    flat = Stage("flat", "flatten")  # `gradients` needs 2-D logits for its loss, whose error `given` replaces
    return gradients([*part, flat], params, x, np.zeros(len(x), dtype=int), given={part[-1].name: error})


def np_feedback(chain, params, feedback, x, y, sigma=1e-2, draws=None, **_) -> Arrays:
    """The gradients of fa, plus gradB = 1/N sum_n ghat_n^T (ghat_n B - d_n xi_n) with ghat = N g.

    The noise xi is added to the input of every layer, and d_n is the derivative of the loss along it, as in
    `node_perturbation`.
    """
    carry, errors = {layer: tensors["B"] for layer, tensors in feedback.items()}, {}
    grads = gradients(chain, params, x, y, carry=carry, errors=errors)
    entering, names = inputs(chain, params, x), [stage.name for stage in chain]
    xi = {layer: noise(draws, f"{layer} 0", entering[layer].shape) for layer in weighted(chain)}
    sides = [
        losses(altered(chain, params, x, before={at: size * value for at, value in xi.items()})[""], y)
        for size in (sigma, -sigma)
    ]
    slopes = (sides[0] - sides[1]) / (2 * sigma)
    for stage in chain:
        if stage.name not in xi:
            continue
        index = names.index(stage.name)
        g = errors[stage.name] * len(x)
        e_in = errors[names[index - 1] if index else ""] * len(x)
        rest = np.array([e_in[n] - slopes[n] * xi[stage.name][n] for n in range(len(x))])
        if stage.kind == "linear":
            grads[f"{stage.name}.B"] = linear_weight_gradient(rest, g) / len(x)
        else:
            grads[f"{stage.name}.B"] = conv_weight_gradient(stage, rest, g, params[f"{stage.name}.weight"].shape) / len(x)
    return grads


def forward_forward(
    chain, params, feedback, x, y, draws=None, theta=None, peer_norm=0.03, full_gradient=True, label_scale=1.0, **_
) -> Arrays:
    """The gradients of the local losses 1/2 softplus(-+(G - theta)), and the true gradient of the classifier.

    The upper sign is for the true labels, for which the peer loss is added, and the lower sign is for wrong labels.
    """
    layers, cuts = {stage.name: stage for stage in chain}, [stage.name for stage in chain if stage.name in feedback]
    classes = len(params[f"{weighted(chain)[-1]}.weight"])
    shift = draws.shifts("labels", len(x), classes).numpy()
    total: Arrays = {}
    for labels, sign in ((y, 1), ((y + shift) % classes, -1)):
        rows = [[float(c == label) * label_scale for c in range(classes)] for label in labels]
        parts, _ = _normalised_pass(chain, params, x, rows, cuts)
        for cut, (part, start, h) in parts.items():
            error, rows = np.zeros_like(h), h.reshape(len(h), -1)
            limit, flat = theta or rows.shape[1], error.reshape(len(h), -1)
            mean = 0.9 * feedback[cut].get("activity", 0.0) + 0.1 * np.array([column.mean() for column in rows.T])
            for n, f in product(*map(range, rows.shape)):
                goodness = sum(value**2 for value in rows[n])
                flat[n, f] = -sign / (1 + math.exp(-sign * (limit - goodness))) * rows[n, f] / len(h)
                if sign == 1 and peer_norm:
                    flat[n, f] += peer_norm * 2 / rows.shape[1] * (mean[f] - mean.mean()) * 0.1 / len(h)
            ends = part if full_gradient else [*part, layers[cut]]
            for name, value in _of_part(ends, params, start, error).items():
                total[name] = total.get(name, 0.0) + value
    _, (part, start, values) = _normalised_pass(chain, params, x, [[label_scale / classes] * classes] * len(x), cuts)
    logits = forward(part, params, start)[-1]
    matrices = {cut: tensors["M"] for cut, tensors in feedback.items() if "M" in tensors}
    for cut, matrix in matrices.items():
        logits = logits + values[cut].reshape(len(x), -1) @ matrix.T
    delta = _softmax_error(logits, y) / len(x)
    for cut in matrices:
        total[f"{cut}.M"] = linear_weight_gradient(values[cut].reshape(len(x), -1), delta)
    return total | _of_part(part, params, start, delta)


def _normalised_pass(chain, params, x, labels, cuts):
    """Run a pass with normalised activations and return the results for the hidden layers and for the output.

    The results for the hidden layers are {cut: (stages before it, their input, its activation)}. The results for the output are
    (its stages, their input, {cut: normalised activation}).
    """
    x = x.copy()
    x.reshape(len(x), -1)[:, : len(labels[0])] = labels
    start, part, parts, values = _unit(x), [], {}, {}
    for stage in chain:
        if stage.name in cuts:
            h = forward([*part, stage], params, start)[-1]
            parts[stage.name] = part, start, h
            start, part = _unit(h), []
            values[stage.name] = start
        else:
            part.append(stage)
    return parts, (part, start, values)


def _unit(x: np.ndarray) -> np.ndarray:
    return np.array([sample / (math.sqrt((sample**2).mean()) + 1e-8) for sample in x])


REFERENCES = {
    "node_perturbation": node_perturbation,
    "weight_perturbation": weight_perturbation,
    "pepita": pepita,
    "np_feedback": np_feedback,
    "forward_forward": forward_forward,
}
CASES = {
    "node_perturbation": ("node_perturbation", {"sigma": 0.3}),
    "node_perturbation-hidden": ("node_perturbation", {"sigma": 0.3, "perturb_output": False}),
    "weight_perturbation": ("weight_perturbation", {"epsilon": 0.2}),
    "pepita": ("pepita", {"f_scale": 0.7}),
    "np_feedback": ("np_feedback", {"sigma": 0.3}),
    "forward_forward": ("forward_forward", {}),
    "forward_forward-exact": ("forward_forward", {"full_gradient": False, "theta": 2.0, "peer_norm": 0.0, "label_scale": 3.0}),
}
TRAITS = {
    "untrue_output": {"node_perturbation", "weight_perturbation", "pepita", "forward_forward"},
    "noisy": {"node_perturbation", "weight_perturbation", "np_feedback", "forward_forward"},
    "redrawn": {"forward_forward"},
}
