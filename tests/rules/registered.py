"""Tiny registered models with an attached rule, for tests of rules that use the cuts declared by the models."""

from __future__ import annotations

import torch
from torch import Tensor

import fa_bench
from fa_bench.models.conv2 import Conv2
from fa_bench.models.mlp import MLP
from fa_bench.models.resnet import ResNet20

MODELS = {
    "mlp": lambda: MLP(widths=[9, 8, 7]),
    "conv2": lambda: Conv2(channels=4, hidden=6),
    "resnet20": lambda: ResNet20(width=2, blocks=2),
}


def registered(model: str, rule: str, *, seed: int = 0, dtype=torch.float64, **options):
    torch.manual_seed(1)
    net = MODELS[model]().build((1, 8, 8), 3).to(dtype)
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(6, 1, 8, 8, generator=generator, dtype=dtype), torch.randint(3, (6,), generator=generator)
    return net, fa_bench.attach(net, rule, seed=seed, sample_input=x, **options), x, y


def trained_grads(rule) -> dict[str, Tensor | None]:
    """The gradients of all feedback tensors, including auxiliary parameters, or None for tensors that have none."""
    return {f"{cut}.{name}": tensor.grad for cut, tensors in rule.feedback.items() for name, tensor in tensors.items()}


ACTIVATIONS = {"mlp": ["act1", "act2", "act3"], "conv2": ["act1", "act2", "act3"]}
BLOCKS = {
    "mlp": ["act1", "act2"],
    "conv2": ["act1", "pool"],
    "resnet20": ["relu", *(f"stages.layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1))][:-1],
}
