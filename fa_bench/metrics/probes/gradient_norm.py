"""Whether the gradient that is left at each weight is more than noise."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from fa_bench.metrics.probes.base import Probe, Quantities, Subject
from fa_bench.registry.registries import PROBES
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

#: Parts of the batch whose gradients are compared, at most.
GROUPS = 16


@PROBES.register("gradient_norm")
@dataclasses.dataclass(eq=False)
class GradientNorm(Probe):
    """Norms of the true gradient of each weight, of the rule's own, and what noise alone would make of the first.

    All on the fixed batch of N samples with the objective's mean loss L, batch normalisation on the batch's statistics and
    dropout off; Frobenius norms.

    - ``gradient_norm``: ‖g‖, g = ∂L/∂W by exact backpropagation.
    - ``gradient_norm_update``: the norm of what the rule gives the optimizer in the place of g, before momentum, decay and rate;
      0 for a weight that does not learn.
    - ``gradient_norm_floor``: the standard error s of g over samples. If the true gradient were zero in expectation, ‖g‖ would be
      s in the root mean square: a norm near s cannot be told from zero, one several times as large can.

    For s the samples are dealt, in an order drawn with a fixed seed, to K = min(16, N) groups of nₖ; with gₖ the gradient of the
    group's mean loss in the same forward pass and wₖ = nₖ/N, so that g = Σ wₖ gₖ,

        s² = Σ wₖ² ‖gₖ - g‖² / (1 - Σ wₖ²),

    which for equal groups is Σ ‖gₖ - g‖² / (K (K - 1)), and for independent samples has the expectation E‖g - E g‖², for unequal
    groups too. Batch normalisation couples the samples, which s neglects. NaN for a batch of one.
    """

    def measure(self, subject: Subject) -> Quantities:
        from fa_bench.mechanisms.trace import all_require_grad, tensors_in
        from fa_bench.mechanisms.weighted_layers import weighted_layers
        from fa_bench.metrics.meter import untouched

        rule, x, y = subject.rule, subject.meter.x, subject.meter.y
        layers = weighted_layers(subject.model)
        weights = {path: layers[path].weight for path in subject.meter.trace.order}
        with untouched(rule), torch.enable_grad():
            logits = next(tensors_in(subject.model(x)))
            rule.deliver(subject.rule.objective.loss(logits, y), logits, y)
            updates = {path: 0.0 if weight.grad is None else weight.grad.double().norm().item()
                       for path, weight in weights.items()}
            with rule.exact(), all_require_grad(subject.model):
                losses = subject.rule.objective.loss(next(tensors_in(subject.model(x))), y, reduction="none")
                norms, floors = norms_and_errors(losses, list(weights.values()))
        return {self.name: dict(zip(weights, norms, strict=True)), f"{self.name}_update": updates,
                f"{self.name}_floor": dict(zip(weights, floors, strict=True))}


def norms_and_errors(losses: Tensor, weights: list[Tensor]) -> tuple[list[float], list[float]]:
    """For each weight ‖g‖ and s as `GradientNorm` has them; `losses` are those of the samples, (N,), with their graph."""
    samples = len(losses)
    count = min(GROUPS, samples)
    # Dealt as they come, samples whose classes take turns would make groups less alike than chance does.
    losses = losses[torch.randperm(samples, generator=torch.Generator().manual_seed(0)).to(losses.device)]
    shares = [len(range(number, samples, count)) / samples for number in range(count)]
    means = [torch.zeros_like(weight, dtype=torch.float64) for weight in weights]  # Σ wₖ gₖ = g
    leaning = [torch.zeros_like(mean) for mean in means]  # Σ wₖ² gₖ
    squares = [0.0] * len(weights)  # Σ wₖ² ‖gₖ‖²
    for number, share in enumerate(shares):
        # Summed up at once, so that one group's gradients are held at a time and not those of all.
        found = torch.autograd.grad(losses[number::count].mean(), weights, retain_graph=number + 1 < count, allow_unused=True)
        for index, gradient in enumerate(found):
            if gradient is not None:
                gradient = gradient.double()
                means[index] += share * gradient
                leaning[index] += share**2 * gradient
                squares[index] += share**2 * gradient.square().sum().item()
    norms = [mean.norm().item() for mean in means]
    if count == 1:
        return norms, [math.nan] * len(weights)
    total = sum(share**2 for share in shares)
    variances = [(square - 2 * (mean * lean).sum().item() + total * norm**2) / (1 - total)
                 for square, mean, lean, norm in zip(squares, means, leaning, norms, strict=True)]
    return norms, [math.sqrt(max(variance, 0.0)) if math.isfinite(variance) else math.nan for variance in variances]
