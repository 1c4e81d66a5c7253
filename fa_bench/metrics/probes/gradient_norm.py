"""Measures whether the gradient of each weight is larger than noise."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from fa_bench.metrics.probes.base import Probe, Quantities, Subject
from fa_bench.registry.registries import PROBES
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

#: Maximum number of groups of samples whose gradients are compared.
GROUPS = 16


@PROBES.register("gradient_norm")
@dataclasses.dataclass(eq=False)
class GradientNorm(Probe):
    """Norms of the true gradient and of the rule's gradient for each weight, and the norm that is expected from noise alone.

    All norms are measured on the fixed batch of N samples with the objective's mean loss L. Batch normalisation uses the batch's
    statistics, and dropout is off. Norms are Frobenius norms.

    - ``gradient_norm``: ‖g‖, where g = ∂L/∂W is computed by exact backpropagation.

    - ``gradient_norm_update``: the norm of the gradient that the rule passes to the optimizer instead of g, before momentum,
      weight decay and the learning rate are applied. The norm is 0 for a weight that does not learn.

    - ``gradient_norm_floor``: the standard error s of g over samples. If the expectation of g were zero, the root mean square of
      ‖g‖ would be s. A norm near s therefore cannot be distinguished from zero, but a norm several times as large as s can.

    To compute s, the samples are split at random, with a fixed seed, into K = min(16, N) groups of sizes nₖ. Let gₖ be the
    gradient of the mean loss of group k in the same forward pass, and wₖ = nₖ/N, so that g = Σ wₖ gₖ. Then

        s² = Σ wₖ² ‖gₖ - g‖² / (1 - Σ wₖ²).

    For equal groups, s² is Σ ‖gₖ - g‖² / (K (K - 1)). For independent samples, the expectation of s² is E‖g - E g‖², even for
    unequal groups. Batch normalisation couples the samples, but s does not take this into account. For a batch of one sample, s
    is NaN.
    """

    def measure(self, subject: Subject) -> Quantities:
        from fa_bench.mechanisms.contexts import all_require_grad
        from fa_bench.mechanisms.weighted_layers import weighted_layers
        from fa_bench.metrics.meter import measured_output, measurement_mode

        rule, meter, y = subject.rule, subject.meter, subject.meter.y
        layers = weighted_layers(subject.model)
        weights = {path: layers[path].weight for path in subject.meter.trace.order}
        with measurement_mode(rule), torch.enable_grad(), rule.of_samples(subject.meter.indices):
            logits = measured_output(rule, subject.model(meter.inputs()))
            rule.deliver(rule.objective.loss(logits, y), logits, y)
            updates = {
                path: 0.0 if weight.grad is None else weight.grad.double().norm().item() for path, weight in weights.items()
            }
            with rule.exact(), all_require_grad(subject.model):
                losses = rule.objective.loss(measured_output(rule, subject.model(meter.inputs())), y, reduction="none")
                norms, floors = norms_and_errors(losses, list(weights.values()))
        return {
            self.name: dict(zip(weights, norms, strict=True)),
            f"{self.name}_update": updates,
            f"{self.name}_floor": dict(zip(weights, floors, strict=True)),
        }


def norms_and_errors(losses: Tensor, weights: list[Tensor]) -> tuple[list[float], list[float]]:
    """‖g‖ and s of each weight, as defined in `GradientNorm`; `losses` (N,) contains the loss of each sample with its autograd
    graph."""
    samples = len(losses)
    count = min(GROUPS, samples)
    # The samples are shuffled. A group consists of equally spaced samples, so groups could otherwise contain different classes.
    losses = losses[torch.randperm(samples, generator=torch.Generator().manual_seed(0)).to(losses.device)]
    shares = [len(range(number, samples, count)) / samples for number in range(count)]
    means = [torch.zeros_like(weight, dtype=torch.float64) for weight in weights]  # Σ wₖ gₖ = g
    weighted_means = [torch.zeros_like(mean) for mean in means]  # Σ wₖ² gₖ
    squares = [0.0] * len(weights)  # Σ wₖ² ‖gₖ‖²
    for number, share in enumerate(shares):
        # The sums are accumulated immediately, so that only one group's gradients are in memory.
        gradients = torch.autograd.grad(losses[number::count].mean(), weights, retain_graph=number + 1 < count, allow_unused=True)
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                gradient = gradient.double()
                means[index] += share * gradient
                weighted_means[index] += share**2 * gradient
                squares[index] += share**2 * gradient.square().sum().item()
    norms = [mean.norm().item() for mean in means]
    if count == 1:
        return norms, [math.nan] * len(weights)
    total = sum(share**2 for share in shares)
    variances = [
        (square - 2 * (mean * weighted).sum().item() + total * norm**2) / (1 - total)
        for square, mean, weighted, norm in zip(squares, means, weighted_means, norms, strict=True)
    ]
    return norms, [math.sqrt(max(variance, 0.0)) if math.isfinite(variance) else math.nan for variance in variances]
