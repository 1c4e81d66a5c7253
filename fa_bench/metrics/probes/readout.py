"""Measures how well a linear classifier can predict the classes from each layer's activation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fa_bench.errors import ConfigError
from fa_bench.metrics.probes.base import Probe, Quantities, Subject
from fa_bench.registry.registries import PROBES
from fa_bench.utils.lazy import nn, torch

if TYPE_CHECKING:
    from torch import Tensor

    from fa_bench.data.splits import Split
    from fa_bench.mechanisms.trace import Trace

#: The row for the raw inputs. A layer whose accuracy is not above that of this row makes the classes no easier to classify
#: linearly.
FLOOR = "input"
#: The maximum number of features of an activation that the readout uses, and the strength of the regularisation; see `fit`.
FEATURES, RIDGE = 1024, 0.01
#: Points where activations are read in addition to the inputs of layers: the model's input and output. No layer can have these
#: paths.
MODEL_INPUT, MODEL_OUTPUT = ".", ""


@PROBES.register("readout")
@dataclasses.dataclass(eq=False)
class Readout(Probe):
    """Accuracy (a fraction) of a linear classifier trained on a layer's activation or, in the row ``input``, on the raw
    inputs.

    A layer's activation is the input of the next layer, that is, the output after normalisation, nonlinearity, addition and
    pooling. For the output layer, the logits are used. Layers whose outputs are added share one activation. The model is in
    evaluation mode.

    The classifier (`fit`) is trained on at most 2,000 training samples without augmentation. The classifier is scored on at most
    10,000 validation samples, or test samples if there is no validation split. Activations are reduced to at most 1024 features
    (`bounded`).
    """

    def require(self, subject: Subject) -> None:
        y = subject.meter.y
        if y.dim() != 1 or y.is_floating_point():
            raise ConfigError(
                "the probe needs one class per sample, but this dataset has "
                f"{'numbers' if y.is_floating_point() else 'one class per position'} as targets; omit the probe"
            )

    def measure(self, subject: Subject) -> Quantities:
        points = activation_points(subject.meter.trace)
        batches = list(_activations(subject, subject.training, points))
        labels, classes = np.concatenate([y for _, y in batches]), len(subject.splits.classes)
        fitted = {
            point: fit(np.concatenate([activations[point] for activations, _ in batches]), labels, classes)
            for point in batches[0][0]
        }
        hits, scored = dict.fromkeys(fitted, 0), subject.scored
        for activations, y in _activations(subject, scored, points):
            for point, features in activations.items():
                hits[point] += int((fitted[point].classify(features) == y).sum())
        accuracy = {point: math.nan if fitted[point].void else count / len(scored) for point, count in hits.items()}
        floor = f"({FLOOR})" if FLOOR in points else FLOOR
        return {self.name: {floor: accuracy[MODEL_INPUT]} | {layer: accuracy[point] for layer, point in points.items()}}


def activation_points(trace: Trace) -> dict[str, str]:
    """A mapping from each layer, in the order of execution, to the layer that takes its activation as input. Output layers are
    mapped to MODEL_OUTPUT."""
    return {
        layer: trace.consumer.get(layer, MODEL_OUTPUT)
        for layer in trace.order
        if layer in trace.consumer or layer in trace.outputs
    }


def _activations(subject: Subject, split: Split, points: dict[str, str]) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Yield ({point: features (n, F)}, labels (n,)) for each batch."""
    from fa_bench.mechanisms.compound.projection import Projection
    from fa_bench.mechanisms.contexts import set_temporarily
    from fa_bench.mechanisms.trace import loss_output
    from fa_bench.mechanisms.weighted_layers import sample_axis
    from fa_bench.metrics.evaluation import EVALUATION_BATCH

    model = subject.model
    activations: dict[str, np.ndarray] = {}

    def recorder(point: str) -> Any:
        def hook(module: Any, args: Any) -> None:
            # If a layer runs several times, its first input is used. For a layer of a compound module, the last input is used
            # instead, because the first input of a recurrent layer may be the initial state.
            in_compound = isinstance(module, Projection)
            if point not in activations or in_compound:
                x = args[0].movedim(sample_axis(module, args[0].dim()), 0)
                activations[point] = _array(bounded(x, isinstance(module, nn.Linear) or in_compound))

        return hook

    consumers = dict.fromkeys(point for point in points.values() if point != MODEL_OUTPUT)
    handles = [model.get_submodule(path).register_forward_pre_hook(recorder(path)) for path in consumers]
    model.eval()
    try:
        with (
            torch.no_grad(),
            set_temporarily([subject.rule.mode], "layerwise", True),
            set_temporarily([subject.rule.mode], "always_layerwise", True),
        ):
            for x, y in split.batches(max(subject.batch_size, EVALUATION_BATCH)):
                activations.clear()
                activations[MODEL_INPUT] = _array(bounded(x))
                activations[MODEL_OUTPUT] = _array(bounded(loss_output(model(x), subject.rule.loss_output)))
                yield dict(activations), y.cpu().numpy()
    finally:
        for handle in handles:
            handle.remove()


def _array(features: Tensor) -> np.ndarray:
    """A copy of the features, because the model may change its own input or a layer's input in place."""
    return features.to("cpu", torch.float32, copy=True).numpy()


def bounded(x: Tensor, features_last: bool = False) -> Tensor:
    """An activation (N, ...) reduced to a matrix (N, F), where F is at most `FEATURES`.

    Maps (N, C, ...) are reduced by average pooling to a size that fits. With `features_last`, x has the features in its last
    dimension, and the mean over all positions is taken. If there are still too many features, neighbouring features are averaged.
    """
    from fa_bench.mechanisms.cut.local import pooled_size

    functional: Any = nn.functional
    x = x if x.is_floating_point() else x.float()  # tokens are integers, which cannot be averaged
    dims = x.dim() - 2
    if dims > 0 and features_last:
        x = x.flatten(1, -2).mean(1)
    elif 0 < dims <= 3:
        size = pooled_size(tuple(x.shape[1:]), FEATURES)
        x = x if size == tuple(x.shape[2:]) else getattr(functional, f"adaptive_avg_pool{dims}d")(x, size)
    x = x.flatten(1)
    return x if x.shape[1] <= FEATURES else functional.adaptive_avg_pool1d(x.unsqueeze(1), FEATURES).squeeze(1)


class Linear(NamedTuple):
    """A fitted classifier with the scores x W + b, where W is (F, C) and b is (C,). `void` is set if the features were not
    finite."""

    weight: np.ndarray
    bias: np.ndarray
    void: bool = False

    def classify(self, features: np.ndarray) -> np.ndarray:
        """The classes (n,) with the highest scores for features (n, F)."""
        return (features.astype(np.float64) @ self.weight + self.bias).argmax(1)


def fit(features: np.ndarray, labels: np.ndarray, classes: int) -> Linear:
    """Ridge regression of the one-hot targets Y in double precision. The solver is a Cholesky factorisation, which uses no random
    numbers.

    W and b minimise ‖Y - X W - 1 bᵀ‖² + λ ‖W‖²; b is not regularised. For n samples, λ is 0.01 n v, where v is the mean variance
    of the features, so that the scale of an activation does not matter. Constant features give W = 0 and the most frequent class.

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
