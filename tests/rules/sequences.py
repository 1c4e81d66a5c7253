"""Naive reference implementations of attention, recurrent and bilinear modules, as loops over float64 scalars.

Each call processes one sample.

Nothing here uses torch's autograd or fa_bench. In `Layer` and `attention`, o indexes outputs, i inputs, t queries, and s keys.
"""

from __future__ import annotations

import math

import numpy as np

Vector = list[float]


class Layer:
    """A layer y = W x + b whose backward pass uses E instead of W and accumulates gradients over calls.

    Args:
        weight: W (O, I).
        bias: b (O,).
        feedback: E (O, I).
    """

    def __init__(self, weight: np.ndarray, bias: np.ndarray, feedback: np.ndarray) -> None:
        self.weight, self.bias, self.feedback = weight, bias, feedback
        self.grad_weight, self.grad_bias = np.zeros_like(weight), np.zeros_like(bias)

    def forward(self, x: Vector, rows: range | None = None) -> Vector:
        rows = rows or range(len(self.weight))
        return [self.bias[o] + sum(self.weight[o, i] * x[i] for i in range(len(x))) for o in rows]

    def backward(self, x: Vector, g: Vector, rows: range | None = None) -> Vector:
        """The error at x, computed from the error g at the outputs `rows`."""
        rows = rows or range(len(self.weight))
        for o, error in zip(rows, g, strict=True):
            self.grad_bias[o] += error
            for i in range(len(x)):
                self.grad_weight[o, i] += error * x[i]
        return [sum(error * self.feedback[o, i] for o, error in zip(rows, g, strict=True)) for i in range(len(x))]


def added(*vectors: Vector) -> Vector:
    return [sum(entries) for entries in zip(*vectors, strict=True)]


#: A layer and the rows of its weight that are used.
Rows = tuple[Layer, range]


def packed(layer: Layer) -> list[Rows]:
    """The projections of queries, keys and values, which share one weight of shape (3F, F) for F features."""
    size = len(layer.weight) // 3
    return [(layer, range(number * size, (number + 1) * size)) for number in range(3)]


def attention(
    projections: list[Rows],
    output: Layer,
    queries: list[Vector],
    keys: list[Vector],
    values: list[Vector],
    heads: int,
    errors: list[Vector],
) -> tuple[list[Vector], list[Vector], list[Vector]]:
    """The errors at queries, keys and values, computed from the errors at the outputs of attention without masks.

    Args:
        projections: those of queries, keys and values, with F rows each.
        output: the output projection, W (F, F).
    """
    features = len(output.weight)
    size = features // heads
    q, k, v = (
        [layer.forward(x, rows) for x in sequence]
        for (layer, rows), sequence in zip(projections, (queries, keys, values), strict=True)
    )
    g_q, g_k, g_v = ([[0.0] * features for _ in sequence] for sequence in (q, k, v))
    for t, error in enumerate(errors):
        context, attended = [0.0] * features, []
        for head in range(heads):
            part = range(head * size, (head + 1) * size)
            scores = [sum(q[t][f] * k[s][f] for f in part) / math.sqrt(size) for s in range(len(k))]
            total = sum(math.exp(score) for score in scores)
            weights = [math.exp(score) / total for score in scores]
            attended.append(weights)
            for f in part:
                context[f] = sum(weights[s] * v[s][f] for s in range(len(v)))
        g_context = output.backward(context, error)
        for head, weights in enumerate(attended):
            part = range(head * size, (head + 1) * size)
            g_weights = [sum(g_context[f] * v[s][f] for f in part) for s in range(len(v))]
            mean = sum(weight * g for weight, g in zip(weights, g_weights, strict=True))
            for s, weight in enumerate(weights):
                g_score = weight * (g_weights[s] - mean) / math.sqrt(size)
                for f in part:
                    g_v[s][f] += weight * g_context[f]
                    g_q[t][f] += g_score * k[s][f]
                    g_k[s][f] += g_score * q[t][f]
    at_q, at_k, at_v = (
        [layer.backward(x, g, rows) for x, g in zip(sequence, g_sequence, strict=True)]
        for (layer, rows), sequence, g_sequence in zip(projections, (queries, keys, values), (g_q, g_k, g_v), strict=True)
    )
    return at_q, at_k, at_v


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def lstm(ih: Layer, hh: Layer, inputs: list[Vector], errors: list[Vector]) -> list[Vector]:
    """The errors at the inputs of all time steps, computed from the errors at all outputs h. The states start at zero."""
    size = len(hh.weight) // 4
    h, c = [0.0] * size, [0.0] * size
    steps = []
    for x in inputs:
        z = added(ih.forward(x), hh.forward(h))
        i, f, g, o = (
            [squash(z[part * size + j]) for j in range(size)]
            for part, squash in enumerate((sigmoid, sigmoid, math.tanh, sigmoid))
        )
        new_c = [f[j] * c[j] + i[j] * g[j] for j in range(size)]
        steps.append((x, h, c, i, f, g, o, new_c))
        h, c = [o[j] * math.tanh(new_c[j]) for j in range(size)], new_c
    g_h, g_c, at_inputs = [0.0] * size, [0.0] * size, []
    for (x, h, c, i, f, g, o, new_c), error in zip(reversed(steps), reversed(errors), strict=True):
        g_h = added(g_h, error)
        g_z = [0.0] * (4 * size)
        for j in range(size):
            tanh = math.tanh(new_c[j])
            g_c[j] += g_h[j] * o[j] * (1 - tanh**2)
            g_z[j] = g_c[j] * g[j] * i[j] * (1 - i[j])
            g_z[size + j] = g_c[j] * c[j] * f[j] * (1 - f[j])
            g_z[2 * size + j] = g_c[j] * i[j] * (1 - g[j] ** 2)
            g_z[3 * size + j] = g_h[j] * tanh * o[j] * (1 - o[j])
            g_c[j] *= f[j]
        g_h = hh.backward(h, g_z)
        at_inputs.insert(0, ih.backward(x, g_z))
    return at_inputs


def gru(ih: Layer, hh: Layer, inputs: list[Vector], errors: list[Vector]) -> list[Vector]:
    """The errors at the inputs, as in `lstm`, for h' = (1 - z) n + z h with n = tanh(n_x + r n_h)."""
    size = len(hh.weight) // 3
    h = [0.0] * size
    steps = []
    for x in inputs:
        a, b = ih.forward(x), hh.forward(h)
        r = [sigmoid(a[j] + b[j]) for j in range(size)]
        z = [sigmoid(a[size + j] + b[size + j]) for j in range(size)]
        n = [math.tanh(a[2 * size + j] + r[j] * b[2 * size + j]) for j in range(size)]
        steps.append((x, h, b, r, z, n))
        h = [(1 - z[j]) * n[j] + z[j] * h[j] for j in range(size)]
    g_h, at_inputs = [0.0] * size, []
    for (x, h, b, r, z, n), error in zip(reversed(steps), reversed(errors), strict=True):
        g_h = added(g_h, error)
        g_a, g_b, direct = [0.0] * (3 * size), [0.0] * (3 * size), [0.0] * size
        for j in range(size):
            g_n = g_h[j] * (1 - z[j]) * (1 - n[j] ** 2)
            g_r = g_n * b[2 * size + j] * r[j] * (1 - r[j])
            g_z = g_h[j] * (h[j] - n[j]) * z[j] * (1 - z[j])
            g_a[j] = g_b[j] = g_r
            g_a[size + j] = g_b[size + j] = g_z
            g_a[2 * size + j], g_b[2 * size + j] = g_n, g_n * r[j]
            direct[j] = g_h[j] * z[j]
        g_h = added(hh.backward(h, g_b), direct)
        at_inputs.insert(0, ih.backward(x, g_a))
    return at_inputs


def rnn(ih: Layer, hh: Layer, inputs: list[Vector], errors: list[Vector]) -> list[Vector]:
    """The errors at the inputs, as in `lstm`, for h' = tanh(ih(x) + hh(h))."""
    h = [0.0] * len(hh.weight)
    steps = []
    for x in inputs:
        new_h = [math.tanh(z) for z in added(ih.forward(x), hh.forward(h))]
        steps.append((x, h, new_h))
        h = new_h
    g_h, at_inputs = [0.0] * len(h), []
    for (x, h, new_h), error in zip(reversed(steps), reversed(errors), strict=True):
        g_z = [g * (1 - value**2) for g, value in zip(added(g_h, error), new_h, strict=True)]
        g_h = hh.backward(h, g_z)
        at_inputs.insert(0, ih.backward(x, g_z))
    return at_inputs


def bilinear(product: Layer, x1: Vector, x2: Vector, error: Vector) -> tuple[Vector, Vector]:
    """The errors at x1 and x2 for y_o = Σ_ij x1_i A_oij x2_j + b_o. The weight of `product` is A in the shape (O, I1 I2)."""
    outer = product.backward([a * b for a in x1 for b in x2], error)
    return (
        [sum(outer[i * len(x2) + j] * x2[j] for j in range(len(x2))) for i in range(len(x1))],
        [sum(outer[i * len(x2) + j] * x1[i] for i in range(len(x1))) for j in range(len(x2))],
    )
