"""Reference implementations of the rules that learn from directional derivatives of the logits, propagated stage by stage.

The argument ``draws`` provides the random numbers that the rule samples in the same update.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import torch

from ..reference import Arrays, conv_forward, forward, gradients, linear_forward, output_error


def noise(draws, name: str, shape, is_shared: bool = False) -> np.ndarray:
    return draws.normal(name, torch.empty(shape, dtype=torch.float64), is_shared).numpy()


def tangents(chain, params, x, *, added=None, moved=None) -> Arrays:
    """The derivatives of the outputs of all stages along `added` {stage: tangent} and `moved` {parameter: tangent}."""
    added, moved, found = added or {}, moved or {}, {}
    values = forward(chain, params, x)
    t = np.zeros_like(x)
    for stage, x_in, x_out in zip(chain, values[:-1], values[1:], strict=True):
        weight = params.get(f"{stage.name}.weight")
        by_weight, by_bias = moved.get(f"{stage.name}.weight"), moved.get(f"{stage.name}.bias")
        if stage.kind == "linear":
            t = linear_forward(t, weight, None)
            t = t if by_weight is None else t + linear_forward(x_in, by_weight, by_bias)
        elif stage.kind == "conv":
            t = conv_forward(stage, t, weight, None)
            t = t if by_weight is None else t + conv_forward(stage, x_in, by_weight, by_bias)
        elif stage.kind in ("bn1d", "bn2d"):
            t, normal = t.copy(), np.zeros_like(x_in)
            for c in range(x_in.shape[1]):  # y = γ x̂ + β, x̂ = (x - m) / s: dx̂ = (dx - mean dx - x̂ mean(x̂ dx)) / s
                centred = x_in[:, c] - x_in[:, c].mean()
                s = np.sqrt((centred**2).mean() + stage.eps)
                normal[:, c] = centred / s
                t[:, c] = weight[c] / s * (t[:, c] - t[:, c].mean() - normal[:, c] * (normal[:, c] * t[:, c]).mean())
                if by_weight is not None:
                    t[:, c] += by_weight[c] * normal[:, c] + by_bias[c]
        elif stage.kind == "relu":
            t = t * (x_in > 0)
        elif stage.kind == "tanh":
            t = t * (1 - x_out**2)
        else:
            t = t.reshape(x_out.shape)
        t = t + added.get(stage.name, 0.0)
        found[stage.name] = t
    return found


def along_noise(chain, params, x, cuts, draws) -> tuple[Arrays, np.ndarray]:
    """The noise p at every cut, and the derivative d of the logits along it."""
    values = dict(zip([stage.name for stage in chain], forward(chain, params, x)[1:], strict=True))
    p = {cut: noise(draws, cut, values[cut].shape) for cut in cuts}
    return p, tangents(chain, params, x, added=p)[chain[-1].name]


def mean_product(d: np.ndarray, p: np.ndarray) -> np.ndarray:
    """The matrix J[c,f], the mean over n of d[n,c] p[n,f]."""
    flat = p.reshape(len(p), -1)
    mean = np.zeros((d.shape[1], flat.shape[1]))
    for n, c, f in product(range(len(d)), range(d.shape[1]), range(flat.shape[1])):
        mean[c, f] += d[n, c] * flat[n, f] / len(d)
    return mean


def fdfa(chain, params, feedback, x, y, draws=None, **_) -> Arrays:
    """The error at a cut is delta_out B, and the gradient of B is B minus the mean of d p."""
    grads = gradients(chain, params, x, y, inject={cut: tensors["B"] for cut, tensors in feedback.items()})
    p, d = along_noise(chain, params, x, feedback, draws)
    return grads | {f"{cut}.B": tensors["B"] - mean_product(d, p[cut]) for cut, tensors in feedback.items()}


def grape(chain, params, feedback, x, y, draws=None, **_) -> Arrays:
    """The gradients of fdfa, except that gradB = -d cos(B, J) / dB = -(J / |B||J| - cos B / |B|²), where J is the mean of d p."""
    grads = fdfa(chain, params, feedback, x, y, draws)
    for cut, tensors in feedback.items():
        b = tensors["B"]
        estimate = b - grads[f"{cut}.B"]
        size, length = np.sqrt((b**2).sum()), np.sqrt((estimate**2).sum())
        cosine = (b * estimate).sum() / (size * length)
        grads[f"{cut}.B"] = -(estimate / (size * length) - cosine * b / size**2)
    return grads


def forward_gradient(chain, params, feedback, x, y, form="activation", cuts=(), draws=None, **_) -> Arrays:
    """The error at a cut is (delta_n . d_n) p_n or, with form=weight, the gradient is v times the sum of (delta_n . d_n)."""
    delta = output_error(forward(chain, params, x)[-1], y)
    if form == "weight":
        v = {name: noise(draws, name, value.shape, True) for name, value in params.items()}
        d = tangents(chain, params, x, moved=v)[chain[-1].name]
        return {name: (delta * d).sum() * tangent for name, tangent in v.items()}
    p, d = along_noise(chain, params, x, cuts, draws)
    given = {cut: np.zeros_like(value) for cut, value in p.items()}
    for n in range(len(x)):
        for cut, value in p.items():
            given[cut][n] = sum(delta[n] * d[n]) * value[n]
    return gradients(chain, params, x, y, given=given)


REFERENCES = {"fdfa": fdfa, "grape": grape, "forward_gradient": forward_gradient}
CASES = {
    "fdfa": ("fdfa", {"b_init": "kaiming_uniform"}),
    "fdfa-zeros": ("fdfa", {}),
    "grape": ("grape", {"anchor_period": 0}),
    "forward_gradient": ("forward_gradient", {}),
    "forward_gradient-weight": ("forward_gradient", {"form": "weight"}),
}
TRAITS = {"noisy": {*REFERENCES}, "untrue_output": {"forward_gradient"}}
