"""Reference implementations of the rules with a loss at every cut.

Auxiliary nets are chains of stages, like the network itself.
"""

from __future__ import annotations

import math
from itertools import product

import numpy as np

from ..reference import (
    Arrays,
    Stage,
    conv_forward,
    conv_input_error,
    conv_weight_gradient,
    gradients,
    linear_forward,
    linear_input_error,
    linear_weight_gradient,
)
from .direct import outputs

EPS = 1e-5  # torch's default for BatchNorm


def flattening(shape: tuple[int, ...], limit: int) -> list[Stage]:
    """Stages that average a map until it has at most `limit` features or a single pixel, and then flatten it.

    The numbers of rows and columns are halved in turn and rounded up.
    """
    stages = []
    if len(shape) == 3:
        rows = columns = 1
        size = shape[1:]
        while shape[0] * size[0] * size[1] > limit and size != (1, 1):
            rows, columns = (2 * rows, columns) if rows == columns else (rows, 2 * columns)
            size = (math.ceil(shape[1] / rows), math.ceil(shape[2] / columns))
        if size != shape[1:]:
            stages.append(Stage("pool", "pool", size=size))
    return [*stages, Stage("flatten", "flatten")]


def below(chain, params, x, y, cuts, local, output=1.0) -> Arrays:
    """All gradients, where local(cut, activation) returns the error at a cut and the gradients of the cut's own parameters."""
    values, given, learned = outputs(chain, params, x), {}, {}
    for cut in cuts:
        given[cut], grads = local(cut, values[cut])
        learned |= {f"{cut}.{name}": grad for name, grad in grads.items()}
    return gradients(chain, params, x, y, given=given, output=output) | learned


# --- local errors ---


def local_error(chain, params, feedback, x, y, features=4096, separate=False, **_) -> Arrays:
    """The error at a cut is e = (softmax(a Mᵀ) - onehot) M / N, where M does not learn.

    With `separate`, |K| sign(M) replaces the second M in this formula.
    """

    def local(cut, a):
        errors: Arrays = {}
        classifier = [*flattening(a.shape[1:], features), Stage("M", "linear")]
        carry = {"M": np.abs(feedback[cut]["K"]) * np.sign(feedback[cut]["M"])} if separate else {}
        gradients(classifier, {"M.weight": feedback[cut]["M"]}, a, y, carry=carry, errors=errors)
        return errors[""], {}

    return below(chain, params, x, y, feedback, local)


# --- prediction and similarity ---


def cosines(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """The cosines S[n,m] between centred rows, the centred rows normalised to unit length, and their original lengths.

    A constant row is mapped to zero.
    """
    units, lengths = np.zeros_like(rows), []
    for n in range(len(rows)):
        centred = rows[n] - sum(rows[n]) / rows.shape[1]
        lengths.append(math.sqrt(sum(value**2 for value in centred)))
        if lengths[n] > 1e-8:
            units[n] = centred / lengths[n]
    matrix = np.zeros((len(rows), len(rows)))
    for n, m in product(range(len(rows)), repeat=2):
        matrix[n, m] = sum(units[n] * units[m])
    return matrix, units, lengths


def cosines_backward(units: np.ndarray, lengths: list[float], g: np.ndarray) -> np.ndarray:
    """The gradient with respect to the rows, computed from the gradient with respect to S.

    Each row's gradient is orthogonal to the row's unit vector (because of the normalisation) and to the vector of ones (because
    of the centring).
    """
    error = np.zeros_like(units)
    for n in range(len(units)):
        if lengths[n] > 1e-8:
            at_unit = sum((g[n, m] + g[m, n]) * units[m] for m in range(len(units)))
            across = (at_unit - sum(at_unit * units[n]) * units[n]) / lengths[n]
            error[n] = across - sum(across) / len(across)
    return error


def deviations(maps: np.ndarray) -> np.ndarray:
    """s[n,c] is the sample standard deviation of a map over its pixels."""
    rows = np.zeros(maps.shape[:2])
    for n, c in product(*map(range, maps.shape[:2])):
        values = maps[n, c].ravel()
        rows[n, c] = math.sqrt(sum((values - values.mean()) ** 2) / (len(values) - 1))
    return rows


def deviations_backward(maps: np.ndarray, rows: np.ndarray, g: np.ndarray) -> np.ndarray:
    """The gradient with respect to the maps, with ds/dx = (x - mean) / ((pixels - 1) s), or 0 for a constant map."""
    error = np.zeros_like(maps)
    for n, c in product(*map(range, maps.shape[:2])):
        if rows[n, c] > 0:
            error[n, c] = g[n, c] * (maps[n, c] - maps[n, c].mean()) / ((maps[n, c].size - 1) * rows[n, c])
    return error


def similarity_loss(a: np.ndarray, weight: np.ndarray, y, classes: int) -> tuple[float, np.ndarray, np.ndarray]:
    """The loss mean (S(K a) - S(onehot))² and its gradients with respect to a and K."""
    stage = Stage("K", "conv", padding=(1, 1))
    mapped = linear_forward(a, weight, None) if a.ndim == 2 else conv_forward(stage, a, weight, None)
    by_deviation = a.ndim == 4 and a.shape[1] > 3 and a.shape[2] > 1
    rows = deviations(mapped) if by_deviation else mapped.reshape(len(a), -1)
    onehot = np.zeros((len(a), classes))
    for n in range(len(a)):
        onehot[n, y[n]] = 1.0
    matrix, units, lengths = cosines(rows)
    difference = matrix - cosines(onehot)[0]
    at_rows = cosines_backward(units, lengths, 2 * difference / len(a) ** 2)
    g = deviations_backward(mapped, rows, at_rows) if by_deviation else at_rows.reshape(mapped.shape)
    loss = sum(value**2 for value in difference.ravel()) / len(a) ** 2
    if a.ndim == 2:
        return loss, linear_input_error(g, weight), linear_weight_gradient(a, g)
    return loss, conv_input_error(stage, g, weight, a.shape), conv_weight_gradient(stage, a, g, weight.shape)


def of_decoder(a, held: Arrays, y, size: int, factor: float) -> tuple[np.ndarray, Arrays]:
    """The gradients of `factor` times CE(D(a)) with respect to a and to the parameters of the decoder, whose bias is optional."""
    errors: Arrays = {}
    decoder = [*flattening(a.shape[1:], size), Stage("out", "linear")]
    params = {name: held[f"decoder.{name}"] for name in ("out.weight", "out.bias") if f"decoder.{name}" in held}
    grads = gradients(decoder, params, a, y, errors=errors, output=factor)
    return errors[""], {f"decoder.{name}": grad for name, grad in grads.items()}


def predsim(chain, params, feedback, x, y, loss="predsim", beta=0.99, decoder_size=4096, **_) -> Arrays:
    """The loss at a cut is (1-beta) CE(D(a)) + beta mean (S(K a) - S(onehot))².

    The output layer gets (1-beta) times its true error. With loss=pred or loss=sim, only one of the two terms is used, and all
    factors are 1.
    """
    of_prediction, of_similarity = {"predsim": (1 - beta, beta), "pred": (1.0, None), "sim": (None, 1.0)}[loss]
    classes = params[f"{chain[-1].name}.weight"].shape[0]

    def local(cut, a):
        held, error, grads = feedback[cut], np.zeros_like(a), {}
        if of_prediction is not None:
            error, grads = of_decoder(a, held, y, decoder_size, of_prediction)
        if of_similarity is not None:
            _, at_a, at_weight = similarity_loss(a, held["similarity.weight"], y, classes)
            error = error + of_similarity * at_a
            grads["similarity.weight"] = of_similarity * at_weight
        return error, grads

    return below(chain, params, x, y, feedback, local, output=1 - beta if loss == "predsim" else 1.0)


def bp_deepsup(chain, params, feedback, x, y, weight=1.0, decoder_size=4096, **_) -> Arrays:
    """Backpropagation of the loss CE(z) + weight times the sum of CE(D(a)) over all cuts.

    The error of a decoder is added to the error from the layers after its cut.
    """
    values, added, learned = outputs(chain, params, x), {}, {}
    for cut, held in feedback.items():
        decoder = {f"decoder.{name}": tensor for name, tensor in held.items()}
        added[cut], grads = of_decoder(values[cut], decoder, y, decoder_size, weight)
        learned |= {f"{cut}.{name.removeprefix('decoder.')}": grad for name, grad in grads.items()}
    return gradients(chain, params, x, y, added=added) | learned


# --- decoupled greedy learning ---


def auxiliary_net(shape: tuple[int, ...], kind: str) -> list[Stage]:
    """The stages of an auxiliary net.

    Maps are averaged to a quarter of their side lengths and then to at most 2x2 pixels, with three 1x1 convolutions in
    between if the kind is mlp_sr. Three linear layers follow, except for the kind linear. The last stage is an output layer.
    """
    chain = []
    if len(shape) == 3:
        quarter = (math.ceil(shape[1] / 4), math.ceil(shape[2] / 4))
        chain.append(Stage("pool1", "pool", size=quarter))
        for i in (1, 2, 3) if kind == "mlp_sr" else ():
            chain += [Stage(f"conv{i}", "conv"), Stage(f"conv_bn{i}", "bn2d", eps=EPS), Stage(f"conv_relu{i}", "relu")]
        chain.append(Stage("pool2", "pool", size=(min(quarter[0], 2), min(quarter[1], 2))))
    chain.append(Stage("flatten", "flatten"))
    for i in (1, 2, 3) if kind != "linear" else ():
        chain += [Stage(f"fc{i}", "linear"), Stage(f"fc_bn{i}", "bn1d", eps=EPS), Stage(f"fc_relu{i}", "relu")]
    return [*chain, Stage("out", "linear")]


def dgl(chain, params, feedback, x, y, **options) -> Arrays:
    """The error at the end of a module is the gradient of its auxiliary net's cross-entropy.

    The auxiliary net learns from the same loss.
    """
    kind = options.get("auxiliary_net", "mlp_sr")

    def local(cut, a):
        errors: Arrays = {}
        grads = gradients(auxiliary_net(a.shape[1:], kind), feedback[cut], a, y, errors=errors)
        return errors[""], grads

    return below(chain, params, x, y, feedback, local)


REFERENCES = {"local_error": local_error, "predsim": predsim, "bp_deepsup": bp_deepsup, "dgl": dgl}
CASES = {
    "local_error": ("local_error", {}),
    "local_error-averaged": ("local_error", {"features": 12}),
    "local_error-separate": ("local_error", {"separate": True}),
    "predsim": ("predsim", {}),
    "predsim-averaged": ("predsim", {"beta": 0.5, "decoder_size": 30}),
    "predsim-pred": ("predsim", {"loss": "pred"}),
    "predsim-sim": ("predsim", {"loss": "sim"}),
    "predsim-mono-forward": ("predsim", {"loss": "pred", "decoder_init": "pytorch", "decoder_bias": False}),
    "bp_deepsup": ("bp_deepsup", {"decoder_init": "pytorch"}),
    "bp_deepsup-averaged": ("bp_deepsup", {"weight": 0.3, "decoder_size": 30, "decoder_init": "xavier_uniform"}),
    "dgl": ("dgl", {}),
    "dgl-mlp": ("dgl", {"auxiliary_net": "mlp"}),
    "dgl-linear": ("dgl", {"auxiliary_net": "linear"}),
}
TRAITS = {
    "unscaled": {"local_error", "predsim", "bp_deepsup", "dgl"},
    "untrue_output": {"predsim"},
    "last_module": {"dgl"},
}
