"""How much of the classes a linear readout of each layer finds."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fa_bench.metrics.probes.base import Probe, Quantities, Subject
from fa_bench.registry.registries import PROBES
from fa_bench.utils.lazy import nn, torch

if TYPE_CHECKING:
    from torch import Tensor

    from fa_bench.data.base import Split
    from fa_bench.mechanisms.trace import Trace

#: The row of the raw input: a layer that does not beat it has learned nothing.
FLOOR = "input"
#: Features of an activation that the readout takes at most, and its regularisation, see `fit`.
FEATURES, RIDGE = 1024, 0.01


@PROBES.register("readout")
@dataclasses.dataclass(eq=False)
class Readout(Probe):
    """Accuracy (a fraction) of a linear classifier of each layer's activation, beside one of the raw input, ``input``.

    A layer's activation is what the next layer takes: behind the layer's normalisation, nonlinearity, addition and pooling;
    that of the output layer is the logits. Layers that are added up have the same. The model is in evaluation mode.

    The classifier (`fit`) learns from at most 2,000 training images as they are stored, and is scored on at most 10,000 of the
    validation images, of the test set where there are none. At most 1024 features enter (`bounded`).
    """

    def measure(self, subject: Subject) -> Quantities:
        points = activation_points(subject.meter.trace)
        images, labels = _collected(subject, subject.training, points)
        classes = len(subject.splits.classes)
        fitted = {point: fit(features, labels, classes) for point, features in images.items()}
        hits, scored = dict.fromkeys(fitted, 0), subject.scored
        for activations, y in _activations(subject, scored, points):
            for point, features in activations.items():
                hits[point] += int((fitted[point].classify(features) == y).sum())
        found = {point: math.nan if fitted[point].void else hit / len(scored) for point, hit in hits.items()}
        floor = FLOOR if FLOOR not in points else f"({FLOOR})"
        return {self.name: {floor: found[FLOOR]} | {layer: found[point] for layer, point in points.items()}}


def activation_points(trace: Trace) -> dict[str, str]:
    """{layer: the layer that takes its activation}, in the order of execution; the empty path for the model's output."""
    return {layer: trace.consumer.get(layer, "") for layer in trace.order if layer in trace.consumer or layer in trace.outputs}


def _activations(subject: Subject, split: Split, points: dict[str, str]) -> Any:
    """({point: features (n, F)}, labels (n,)) of each batch, as arrays."""
    from fa_bench.mechanisms.trace import tensors_in
    from fa_bench.metrics.evaluation import EVALUATION_BATCH

    model = subject.model
    found: dict[str, np.ndarray] = {}

    def keep(point: str) -> Any:
        def hook(module: Any, args: Any) -> None:
            if point not in found:  # a layer that runs several times takes the activation at its first run
                found[point] = _array(bounded(args[0], isinstance(module, nn.Linear)))
        return hook

    consumers = dict.fromkeys(point for point in points.values() if point)
    handles = [model.get_submodule(path).register_forward_pre_hook(keep(path)) for path in consumers]
    model.eval()
    try:
        with torch.no_grad():
            for x, y in split.batches(max(subject.batch_size, EVALUATION_BATCH)):
                found.clear()
                found[FLOOR] = _array(bounded(x))
                found[""] = _array(bounded(next(tensors_in(model(x)))))
                yield dict(found), y.cpu().numpy()
    finally:
        for handle in handles:
            handle.remove()


def _collected(subject: Subject, split: Split, points: dict[str, str]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    batches = list(_activations(subject, split, points))
    arrays = {point: np.concatenate([activations[point] for activations, _ in batches]) for point in batches[0][0]}
    return arrays, np.concatenate([y for _, y in batches])


def _array(features: Tensor) -> np.ndarray:
    return features.float().cpu().numpy()


def bounded(x: Tensor, features_last: bool = False) -> Tensor:
    """An activation (N, ...) as (N, F) with F at most `FEATURES`.

    Maps (N, C, ...) are averaged over space to the size that leaves few enough numbers. With `features_last`, (N, ..., F), the
    mean over all positions is taken. What is still too much is averaged over neighbouring features.
    """
    from fa_bench.mechanisms.cut.local import pooled_size

    functional: Any = nn.functional
    dims = x.dim() - 2
    if dims > 0 and features_last:
        x = x.flatten(1, -2).mean(1)
    elif 0 < dims <= 3:
        size = pooled_size(tuple(x.shape[1:]), FEATURES)
        x = x if size == tuple(x.shape[2:]) else getattr(functional, f"adaptive_avg_pool{dims}d")(x, size)
    x = x.flatten(1)
    return x if x.shape[1] <= FEATURES else functional.adaptive_avg_pool1d(x.unsqueeze(1), FEATURES).squeeze(1)


class Linear(NamedTuple):
    """A fitted classifier: scores are x W + b, W (F, C) and b (C,); void where the features were not finite."""

    weight: np.ndarray
    bias: np.ndarray
    void: bool = False

    def classify(self, features: np.ndarray) -> np.ndarray:
        """The classes (n,) with the highest scores for features (n, F)."""
        return (features.astype(np.float64) @ self.weight + self.bias).argmax(1)


def fit(features: np.ndarray, labels: np.ndarray, classes: int) -> Linear:
    """Ridge regression of one-hot targets, in double precision by a Cholesky factorisation: no random numbers.

    W minimises ‖Y - X W - 1 bᵀ‖² + λ ‖W‖² with b free and λ = 0.01 n v: n samples, v the mean variance of the features, so that
    the scale of an activation does not matter. Features that do not vary give W = 0 and the most frequent class.

    Args:
        features: X, (n, F).
        labels: (n,), class numbers; classes may be missing.
        classes: C.
    """
    from sklearn.linear_model import Ridge

    x = features.astype(np.float64)
    if not np.isfinite(x).all():
        return Linear(np.zeros((x.shape[1], classes)), np.zeros(classes), void=True)
    strength = RIDGE * len(x) * x.var(axis=0).mean()
    if strength == 0:
        return Linear(np.zeros((x.shape[1], classes)), np.bincount(labels, minlength=classes) / len(x))
    model = Ridge(alpha=strength, solver="cholesky").fit(x, np.eye(classes)[labels])
    return Linear(model.coef_.T, np.asarray(model.intercept_))
