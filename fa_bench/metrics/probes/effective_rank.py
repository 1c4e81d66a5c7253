"""Measures the number of directions spanned by the errors that a rule delivers."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from fa_bench.metrics.probes.base import Probe, Quantities, Subject
from fa_bench.registry.registries import PROBES
from fa_bench.utils.lazy import nn, torch

if TYPE_CHECKING:
    from torch import Tensor
    from torch import nn as torch_nn

    from fa_bench.mechanisms.trace import Trace


@PROBES.register("effective_rank")
@dataclasses.dataclass(eq=False)
class EffectiveRank(Probe):
    """Effective rank of the matrix of errors at a layer's activation, with one row for each sample or position.

    - ``effective_rank``: exp(-Σ p log p) with p = σ / Σ σ, where σ are the singular values of the rule's errors (Roy and Vetterli
      2007). The value lies between 1 and the number of rows or of features, whichever is smaller.

    - ``effective_rank_bp``: the effective rank of backpropagation's errors at the same place, with the same weights.

    - ``effective_rank_stable``: the stable rank of the rule's errors, Σ σ² / max σ², which small singular values hardly affect.

    Errors are taken at the same points as for `delta_angle`, on the fixed batch of N samples; at the output layer, the error is
    that of the logits. An error (N, F) is used unchanged, tokens (N, T, F) give N T rows, and maps (N, C, H, W) give N H W rows
    of C features. Values are NaN if all errors are zero or any error is not finite.
    """

    def measure(self, subject: Subject) -> Quantities:
        from fa_bench.mechanisms.cut.positions import class_axis
        from fa_bench.metrics.meter import LOGITS, Passes, measurement_mode

        meter = subject.meter
        with measurement_mode(subject.rule):
            passes = Passes(meter)
            delivered, exact = passes.delivered.errors, passes.exact.errors
        points = dict.fromkeys(meter.trace.outputs, LOGITS) | meter.points
        found: Quantities = {self.name: {}, f"{self.name}_bp": {}, f"{self.name}_stable": {}}
        for layer in meter.trace.order:
            point = points.get(layer)
            if point is None or point not in delivered:
                continue
            error = delivered[point]
            features_last = (
                class_axis(error.shape) == error.dim() - 1
                if point == LOGITS
                else last_is_features(error, subject.model, meter.trace, layer)
            )
            found[self.name][layer], found[f"{self.name}_stable"][layer] = ranks(rows(error, features_last))
            if point in exact:
                found[f"{self.name}_bp"][layer] = ranks(rows(exact[point], features_last))[0]
        return found


def last_is_features(error: Tensor, model: torch_nn.Module, trace: Trace, layer: str) -> bool:
    """Whether the features of an error at the layer's activation are its last dimension, as for tokens, rather than its second.

    The answer depends on the next layer, which takes the activation as its input. If the error does not have the shape of that
    input, the answer depends on the layer itself.
    """
    consumer = trace.consumer.get(layer, layer)
    takes = error.shape[1:] == trace.input_shapes[consumer][1:]
    return not isinstance(model.get_submodule(consumer if takes else layer), nn.modules.conv._ConvNd)


def rows(error: Tensor, features_last: bool) -> Tensor:
    """The error (N, ...) as a matrix with one row per sample or position and one column per feature."""
    if error.dim() < 3:
        return error.reshape(len(error), -1)
    return error.flatten(0, -2) if features_last else error.movedim(1, -1).flatten(0, -2)


def ranks(matrix: Tensor) -> tuple[float, float]:
    """The (effective rank, stable rank) of a matrix. Both ranks are NaN if the matrix is zero or not finite."""
    values = torch.linalg.svdvals(matrix.double()) if torch.isfinite(matrix).all() else matrix.new_zeros(1)
    largest = values.max().item()
    if largest == 0:
        return math.nan, math.nan
    values = values / largest  # so that squares of tiny errors do not vanish
    shares = values / values.sum()
    return math.exp(torch.special.entr(shares).sum().item()), values.square().sum().item()
