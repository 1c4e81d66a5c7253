"""Building blocks of the reference implementations of the learning rules: forward and backward passes in plain float64 loops.

A network is a chain of stages read from a plain ``nn.Sequential``. Gradients have the usual sign, so parameters change by -lr
grad. The loss is the mean cross-entropy. Tensors that replace a weight in the backward pass have its layout. Nothing here uses
torch's autograd or fa_bench.

In the equations, n indexes samples, o output channels, i input channels, (p, q) output pixels, (a, b) kernel taps, and c classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import numpy as np
from torch import nn

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Stage:
    """One module of the chain, with a convolution's geometry, the eps of BatchNorm, or the output size of average pooling."""

    name: str
    kind: str
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    groups: int = 1
    eps: float = 0.0
    size: tuple[int, int] = (1, 1)


def describe(model: nn.Sequential) -> list[Stage]:
    """The chain of stages of a plain sequential model. Call this before attaching a rule."""
    chain = []
    for name, module in model.named_children():
        if isinstance(module, nn.Linear):
            chain.append(Stage(name, "linear"))
        elif isinstance(module, nn.Conv2d):
            assert module.dilation == (1, 1) and module.padding_mode == "zeros"
            chain.append(Stage(name, "conv", module.stride, module.padding, module.groups))
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            chain.append(Stage(name, "bn2d" if isinstance(module, nn.BatchNorm2d) else "bn1d", eps=module.eps))
        else:
            kinds = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.Flatten: "flatten"}
            chain.append(Stage(name, kinds[type(module)]))
    return chain


def weighted(chain: list[Stage]) -> list[str]:
    """The names of the linear and convolutional layers, from input to output."""
    return [stage.name for stage in chain if stage.kind in ("linear", "conv")]


# --- convolution ---


def _taps(stage: Stage, x_shape, w_shape, y_shape):
    """Yield the indices of every product in a convolution, except for products with the padding.

    The indices are (n, o, i in its group, i in x, p, q, a, b, row, column).
    """
    n_out_group = w_shape[0] // stage.groups
    sizes = (x_shape[0], w_shape[0], w_shape[1], y_shape[2], y_shape[3], w_shape[2], w_shape[3])
    for n, o, i, p, q, a, b in product(*map(range, sizes)):
        row = p * stage.stride[0] - stage.padding[0] + a
        column = q * stage.stride[1] - stage.padding[1] + b
        if 0 <= row < x_shape[2] and 0 <= column < x_shape[3]:
            yield n, o, i, (o // n_out_group) * w_shape[1] + i, p, q, a, b, row, column


def conv_forward(stage: Stage, x: np.ndarray, w: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """y[n,o,p,q] = bias[o] + sum over i, a, b of w[o,i,a,b] x[n,i,row,column]."""
    size = [(x.shape[2 + d] + 2 * stage.padding[d] - w.shape[2 + d]) // stage.stride[d] + 1 for d in (0, 1)]
    y = np.zeros((x.shape[0], w.shape[0], *size))
    for n, o, i, channel, p, q, a, b, row, column in _taps(stage, x.shape, w.shape, y.shape):
        y[n, o, p, q] += w[o, i, a, b] * x[n, channel, row, column]
    if bias is not None:
        for o in range(w.shape[0]):
            y[:, o] += bias[o]
    return y


def conv_weight_gradient(stage: Stage, x: np.ndarray, g: np.ndarray, w_shape) -> np.ndarray:
    """gradW[o,i,a,b] = sum over n, p, q of g[n,o,p,q] x[n,i,row,column]."""
    grad = np.zeros(w_shape)
    for n, o, i, channel, p, q, a, b, row, column in _taps(stage, x.shape, w_shape, g.shape):
        grad[o, i, a, b] += g[n, o, p, q] * x[n, channel, row, column]
    return grad


def conv_input_error(stage: Stage, g: np.ndarray, feedback: np.ndarray, x_shape) -> np.ndarray:
    """e[n,i,row,column] = sum over o, p, q, a, b of g[n,o,p,q] B[o,i,a,b]. The feedback B has the layout of the weight."""
    error = np.zeros(x_shape)
    for n, o, i, channel, p, q, a, b, row, column in _taps(stage, x_shape, feedback.shape, g.shape):
        error[n, channel, row, column] += g[n, o, p, q] * feedback[o, i, a, b]
    return error


# --- fully connected ---


def linear_forward(x: np.ndarray, w: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """y[n,o] = bias[o] + sum over i of w[o,i] x[n,i]."""
    y = np.zeros((x.shape[0], w.shape[0]))
    for n, o in product(range(x.shape[0]), range(w.shape[0])):
        y[n, o] = sum(w[o, i] * x[n, i] for i in range(w.shape[1])) + (0.0 if bias is None else bias[o])
    return y


def linear_weight_gradient(x: np.ndarray, g: np.ndarray) -> np.ndarray:
    """gradW[o,i] = sum over n of g[n,o] x[n,i]."""
    grad = np.zeros((g.shape[1], x.shape[1]))
    for n, o, i in product(range(x.shape[0]), range(g.shape[1]), range(x.shape[1])):
        grad[o, i] += g[n, o] * x[n, i]
    return grad


def linear_input_error(g: np.ndarray, feedback: np.ndarray) -> np.ndarray:
    """e[n,i] = sum over o of g[n,o] B[o,i]."""
    error = np.zeros((g.shape[0], feedback.shape[1]))
    for n, o, i in product(range(g.shape[0]), range(feedback.shape[0]), range(feedback.shape[1])):
        error[n, i] += g[n, o] * feedback[o, i]
    return error


# --- average pooling to a given size, with overlapping windows if that size does not divide the input's ---


def _windows(shape, size):
    """Yield every output pixel (p, q) with the rows and columns that it averages."""
    for p, q in product(range(size[0]), range(size[1])):
        spans = [(i * length // n, -(-(i + 1) * length // n)) for i, length, n in zip((p, q), shape[2:], size, strict=True)]
        yield p, q, slice(*spans[0]), slice(*spans[1])


def pool_forward(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """y[n,i,p,q] is the mean of x[n,i] over rows from floor(pH/h) to ceil((p+1)H/h) - 1 and over the corresponding columns."""
    y = np.zeros((*x.shape[:2], *size))
    for p, q, rows, columns in _windows(x.shape, size):
        y[:, :, p, q] = x[:, :, rows, columns].mean((2, 3))
    return y


def pool_backward(x: np.ndarray, g: np.ndarray) -> np.ndarray:
    """The error at the input, where every pixel of a window gets an equal share of the window's error."""
    error = np.zeros_like(x)
    for p, q, rows, columns in _windows(x.shape, g.shape[2:]):
        window = error[:, :, rows, columns]
        window += g[:, :, p, q][:, :, None, None] / (window.shape[2] * window.shape[3])
    return error


# --- batch normalisation, in training mode ---


def _normalised(stage: Stage, values: np.ndarray) -> tuple[np.ndarray, float]:
    """The values of one feature, normalised over the batch (and the pixels), and the divisor of the normalisation."""
    mean = values.mean()
    deviation = math.sqrt(((values - mean) ** 2).mean() + stage.eps)
    return (values - mean) / deviation, deviation


def bn_forward(stage: Stage, x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> np.ndarray:
    y = np.zeros_like(x)
    for f in range(x.shape[1]):
        y[:, f] = gamma[f] * _normalised(stage, x[:, f])[0] + beta[f]
    return y


def bn_backward(stage: Stage, x: np.ndarray, g: np.ndarray, gamma: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The error at the input and the gradients of gamma and beta, with exact derivatives of the batch statistics."""
    error, grad_gamma, grad_beta = np.zeros_like(x), np.zeros_like(gamma), np.zeros_like(gamma)
    for f in range(x.shape[1]):
        unit, deviation = _normalised(stage, x[:, f])
        grad_gamma[f], grad_beta[f] = (g[:, f] * unit).sum(), g[:, f].sum()
        error[:, f] = gamma[f] / deviation * (g[:, f] - g[:, f].mean() - unit * (g[:, f] * unit).mean())
    return error, grad_gamma, grad_beta


# --- one pass ---


def forward(chain: list[Stage], params: Arrays, x: np.ndarray) -> list[np.ndarray]:
    """The values [input, output of stage 1, output of stage 2, ..., logits]."""
    values = [x]
    for stage in chain:
        x, weight, bias = values[-1], params.get(f"{stage.name}.weight"), params.get(f"{stage.name}.bias")
        if stage.kind == "linear":
            values.append(linear_forward(x, weight, bias))
        elif stage.kind == "conv":
            values.append(conv_forward(stage, x, weight, bias))
        elif stage.kind in ("bn1d", "bn2d"):
            values.append(bn_forward(stage, x, weight, bias))
        elif stage.kind == "flatten":
            values.append(x.reshape(x.shape[0], -1))
        elif stage.kind == "pool":
            values.append(pool_forward(x, stage.size))
        else:
            values.append(np.maximum(x, 0.0) if stage.kind == "relu" else np.tanh(x))
    return values


def inputs(chain: list[Stage], params: Arrays, x: np.ndarray) -> Arrays:
    """The input of every stage, as {stage: input}."""
    return {stage.name: value for stage, value in zip(chain, forward(chain, params, x)[:-1], strict=True)}


def output_error(logits: np.ndarray, y: np.ndarray) -> np.ndarray:
    """delta_out[n,c] = (softmax(z)[n,c] - onehot[n,c]) / N."""
    delta = np.zeros_like(logits)
    for n, c in product(range(logits.shape[0]), range(logits.shape[1])):
        total = sum(math.exp(z - logits[n].max()) for z in logits[n])
        delta[n, c] = (math.exp(logits[n, c] - logits[n].max()) / total - (1.0 if c == y[n] else 0.0)) / logits.shape[0]
    return delta


def gradients(
    chain: list[Stage],
    params: Arrays,
    x,
    y,
    *,
    carry=None,
    inject=None,
    deliver=None,
    given=None,
    added=None,
    activations=None,
    errors=None,
    output=1.0,
    dual=None,
) -> Arrays:
    """The gradients of all parameters, by backpropagation with the changes that the options specify.

    carry: layer -> the tensor that replaces its weight in the backward pass. Layers without an entry use their weight, as in BP.
    inject: stage -> a matrix (classes, features), whose product with delta_out replaces the error at the stage's output.
    deliver: layer -> a tensor (classes, C_in, kh, kw) or (classes, in) that maps delta_out to the error at the layer's input. For
    a convolution, delta_out is repeated at every output pixel, and groups are ignored.
    given: stage -> an error with the shape of the stage's output, which replaces the error from later stages.
    added: stage -> an error that is added, at the stage's output, to the error from later stages.
    activations: layer -> the activation that replaces the layer's true input in its weight gradient.
    errors: a dictionary that receives the error at the output of every stage and, under "", the error at the chain's input.
    output: the factor by which the error at the logits is multiplied.
    dual: the beta of the finite difference that replaces the derivative of every nonlinearity.
    """
    carry, inject, deliver, given, added, activations = (
        tensors or {} for tensors in (carry, inject, deliver, given, added, activations)
    )
    errors = {} if errors is None else errors
    values = forward(chain, params, x)
    delta = output * output_error(values[-1], y)
    error, grads = delta, {}
    for stage, x_in, x_out in reversed(list(zip(chain, values[:-1], values[1:], strict=True))):
        weight, bias = f"{stage.name}.weight", f"{stage.name}.bias"
        if stage.name in inject:
            error = linear_input_error(delta, inject[stage.name]).reshape(x_out.shape)
        if stage.name in given:
            error = given[stage.name]
        if stage.name in added:
            error = error + added[stage.name]
        errors[stage.name] = error
        if stage.kind in ("linear", "conv") and bias in params:
            grads[bias] = np.array([error[:, o].sum() for o in range(error.shape[1])])
        if stage.kind == "linear":
            grads[weight] = linear_weight_gradient(activations.get(stage.name, x_in), error)
            if stage.name in deliver:
                error = linear_input_error(delta, deliver[stage.name])
            else:
                error = linear_input_error(error, carry.get(stage.name, params[weight]))
        elif stage.kind == "conv":
            grads[weight] = conv_weight_gradient(stage, activations.get(stage.name, x_in), error, params[weight].shape)
            if stage.name in deliver:
                everywhere = np.zeros((*delta.shape, *x_out.shape[2:])) + delta[:, :, None, None]
                ungrouped = Stage(stage.name, "conv", stage.stride, stage.padding, 1)
                error = conv_input_error(ungrouped, everywhere, deliver[stage.name], x_in.shape)
            else:
                error = conv_input_error(stage, error, carry.get(stage.name, params[weight]), x_in.shape)
        elif stage.kind in ("bn1d", "bn2d"):
            error, grads[weight], grads[bias] = bn_backward(stage, x_in, error, params[weight])
        elif stage.kind in ("relu", "tanh") and dual is not None:
            error = dual_error(stage.kind, x_in, error, dual)
        elif stage.kind == "relu":
            error = error * (x_in > 0)
        elif stage.kind == "tanh":
            error = error * (1.0 - x_out**2)
        elif stage.kind == "pool":
            error = pool_backward(x_in, error)
        else:
            error = error.reshape(x_in.shape)
    errors[""] = error
    return grads


def dual_error(kind: str, a: np.ndarray, g: np.ndarray, beta: float) -> np.ndarray:
    """g_in = (phi(a + beta N g) - phi(a - beta N g)) / (2 beta N).

    The factor N is needed because the loss is a mean, so g is 1/N of a sample's own error.
    """
    error, step = np.zeros_like(g), beta * a.shape[0]
    for at in np.ndindex(a.shape):
        high, low = a[at] + step * g[at], a[at] - step * g[at]
        if kind == "relu":
            error[at] = (max(high, 0.0) - max(low, 0.0)) / (2 * step)
        else:
            error[at] = (math.tanh(high) - math.tanh(low)) / (2 * step)
    return error


def sgd_step(params: Arrays, velocity: Arrays, grads: Arrays, *, lr: float, momentum: float, decay: float, nesterov=False):
    """Apply SGD to all parameters that have a gradient: d = g + decay p; v = momentum v + d; p -= lr v.

    With Nesterov momentum, the last step is p -= lr (d + momentum v).
    """
    for name, grad in grads.items():
        direction = grad + decay * params[name]
        velocity[name] = momentum * velocity.get(name, np.zeros_like(grad)) + direction
        params[name] = params[name] - lr * (direction + momentum * velocity[name] if nesterov else velocity[name])
