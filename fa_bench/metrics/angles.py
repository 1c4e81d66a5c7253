"""Angles and norm ratios. All norms are Frobenius norms of flattened tensors, and all angles are in degrees."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

#: A tensor whose norm is below this value is treated as zero, so its angle to any other tensor is undefined.
NORM_FLOOR = 1e-12


def angles(u: Tensor, v: Tensor) -> Tensor:
    """The angles (N,) between corresponding rows of two (N, F) tensors, in double precision. An angle is NaN if either norm is
    below `NORM_FLOOR`.

    For unit vectors û and v̂, the formula 2 atan2(‖û - v̂‖, ‖û + v̂‖) is precise near 0 and 180 degrees, where the arc cosine
    loses half of its digits.
    """
    u, v = u.double(), v.double()
    norm_u, norm_v = u.norm(dim=1, keepdim=True), v.norm(dim=1, keepdim=True)
    void = ((norm_u < NORM_FLOOR) | (norm_v < NORM_FLOOR)).squeeze(1)
    u, v = u / norm_u.clamp_min(NORM_FLOOR), v / norm_v.clamp_min(NORM_FLOOR)
    degrees = torch.rad2deg(2 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1)))
    return degrees.masked_fill(void, math.nan)


def weight_angle(feedback: Tensor, weight: Tensor) -> float:
    """Angle between the effective feedback and the weight, both in the layout of the weight (metric 1 of Li and Benna 2024, Fig.
    2)."""
    return angles(feedback.reshape(1, -1), weight.reshape(1, -1)).item()


def norm_ratio(feedback: Tensor, weight: Tensor) -> float:
    """The ratio ‖effective feedback‖ / ‖weight‖; NaN for a zero weight."""
    norm = weight.double().norm().item()
    return feedback.double().norm().item() / norm if norm > NORM_FLOOR else math.nan


def mean_sample_angle(errors: Tensor, true_errors: Tensor) -> float:
    """The angle between the two flattened errors (N, ...) of each sample, averaged over the samples for which it is defined."""
    return angles(errors.flatten(1), true_errors.flatten(1)).nanmean().item()
