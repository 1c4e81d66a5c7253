"""Batch normalisation over the batches of all processes, on the CPU, where torch.nn.SyncBatchNorm does not work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _AllReduce(torch.autograd.Function):
    """Sums a tensor over all processes in the forward pass, and its gradient over all processes in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        total = g.contiguous().clone()
        torch.distributed.all_reduce(total)
        return total


class SynchronisedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation that uses the statistics of the samples in all processes during training."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, not {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training or self.running_mean is None):
            return super().forward(input)
        self._check_input_dim(input)
        axes, shape = [0, *range(2, input.dim())], [1, -1, *[1] * (input.dim() - 2)]
        # The statistics are computed in double precision, because subtracting the squared mean from the mean square loses digits.
        wide = input.double()
        count = wide.new_tensor([wide.numel() // wide.shape[1]])
        sums, squares, (total,) = _AllReduce.apply(torch.cat([wide.sum(axes), wide.square().sum(axes), count])).split(  # type: ignore[union-attr]
            [self.num_features, self.num_features, 1]
        )
        mean = sums / total
        variance = (squares / total - mean.square()).clamp_min(0)
        if self.training and self.track_running_stats and self.running_mean is not None:
            self._update(mean.detach(), variance.detach() * (total / (total - 1).clamp_min(1)))
        normalised = (wide - mean.view(shape)) / (variance.view(shape) + self.eps).sqrt()
        normalised = normalised.to(input.dtype)
        return normalised if self.weight is None else normalised * self.weight.view(shape) + self.bias.view(shape)

    @torch.no_grad()
    def _update(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), factor)
        self.running_var.lerp_(variance.to(self.running_var), factor)


def synchronise(model: nn.Module) -> nn.Module:
    """Make every batch normalisation in the model use the samples of all processes, and return the model."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            # Only the class is changed, so attributes of the module and references to it remain valid.
            module.__class__ = SynchronisedBatchNorm  # pyright: ignore[reportAttributeAccessIssue]
    return model
