"""Measures whether a rule's gradient depends on the batch."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from fa_bench.metrics.alarm import Alarm
from fa_bench.metrics.probes.base import Probe, Quantities, Subject
from fa_bench.registry.registries import PROBES
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

#: Number of batches whose gradients are compared, and the norm below which a gradient has no direction.
BATCHES, MIN_NORM = 8, 1e-12


@PROBES.register("stability")
@dataclasses.dataclass(eq=False)
class Stability(Probe):
    """Mean cosine between the gradients that the rule computes for a weight on two different batches.

    The gradients are those for the objective's mean loss on up to 8 batches, without augmentation. A batch has the run's batch
    size, but at most an eighth of the training samples that probes may learn from, and at least two samples. The mean is taken
    over all pairs of batches:

        c = (‖Σ uₖ‖² - K) / (K (K - 1)).

    Here, uₖ is the gradient on batch k divided by its norm, and K is the number of batches whose gradient has a norm of at least
    1e-12. The value is NaN for a weight with fewer than two such batches, such as a weight that does not learn. Batch
    normalisation uses the batch's statistics, and dropout is off.

    If the value is near 0, the gradients are mostly noise, as is common late in training. If the value is near 1, the weight
    drifts, that is, it moves in the same direction regardless of the data. If a rule samples noise in every step, as
    `weight_perturbation` does, all batches get the same noise. The gradients then have the same direction up to their sign, and
    the value says little.
    """

    alarms = {
        "stability": Alarm(
            0.95,
            True,
            "The gradient hardly depends on the batch, so the weight drifts (the faeval protocol found 0.992 in a net that "
            "drifted; threshold chosen by this project).",
        )
    }

    def measure(self, subject: Subject) -> Quantities:
        from fa_bench.mechanisms.weighted_layers import weight_gradient, weighted_layers
        from fa_bench.metrics.meter import measured_output, measurement_mode

        rule, data = subject.rule, subject.training
        layers = weighted_layers(subject.model)
        directions: dict[str, Directions] = {path: Directions() for path in subject.meter.trace.order}
        # The data are shuffled here, because they may be sorted by class; `batches` would also augment them if it were given a
        # seed.
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
        data, indices = data.subset(order), subject.training_indices[order]
        size = max(2, min(subject.batch_size, len(data) // BATCHES))
        batches = zip(data.batches(size, drop_last=True), data.batch_indices(size, drop_last=True), strict=False)
        for ((x, y), chosen), _ in zip(batches, range(BATCHES), strict=False):
            with measurement_mode(rule), torch.enable_grad(), rule.of_samples(indices[chosen]):
                logits = measured_output(rule, subject.model(x))
                rule.deliver(rule.objective.loss(logits, y), logits, y)
                for path, seen in directions.items():
                    if (gradient := weight_gradient(layers[path])) is not None:
                        seen.add(gradient)
        return {self.name: {path: seen.mean_cosine for path, seen in directions.items()}}


class Directions:
    """The sum of unit vectors, from which their mean pairwise cosine is computed."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def add(self, vector: Tensor) -> None:
        """Add the direction of a vector of any shape, unless its norm is below `MIN_NORM` or not finite."""
        vector = vector.detach().double()
        norm = vector.norm().item()
        if MIN_NORM <= norm < math.inf:
            unit = vector / norm
            self.total, self.count = unit if self.total is None else self.total + unit, self.count + 1

    @property
    def mean_cosine(self) -> float:
        """The mean cosine over all pairs of vectors, or NaN for fewer than two vectors."""
        if self.total is None or self.count < 2:
            return math.nan
        return (self.total.square().sum().item() - self.count) / (self.count * (self.count - 1))
