"""Small plain networks and batches for the rule tests. Adjacent layers of a chain have different widths."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

CLASSES = 3


def _seeded(build, seed: int, dtype: torch.dtype) -> nn.Module:
    """The model from `build` with random BatchNorm parameters, seeded without affecting the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.to(dtype)


def mlp(activation=nn.Tanh, *, batch_norm: bool = False, seed: int = 1, dtype=torch.float64) -> nn.Sequential:
    """A fully connected net with layer widths 7-5-6-3."""

    def build():
        stages = [("fc1", nn.Linear(7, 5)), ("bn1", nn.BatchNorm1d(5)), ("act1", activation())]
        stages += [("fc2", nn.Linear(5, 6)), ("bn2", nn.BatchNorm1d(6)), ("act2", activation()), ("fc3", nn.Linear(6, CLASSES))]
        return nn.Sequential(OrderedDict(stage for stage in stages if batch_norm or not stage[0].startswith("bn")))

    return _seeded(build, seed, dtype)


def one_hidden(*, seed: int = 2, dtype=torch.float64) -> nn.Sequential:
    """A net with one hidden layer and layer widths 7-5-3."""
    return _seeded(
        lambda: nn.Sequential(OrderedDict(fc1=nn.Linear(7, 5), act1=nn.Tanh(), fc2=nn.Linear(5, CLASSES))), seed, dtype
    )


def convnet(activation=nn.ReLU, *, batch_norm: bool = False, seed: int = 3, dtype=torch.float64) -> nn.Sequential:
    """A net with a strided, padded convolution, a grouped convolution, and one or two linear layers.

    The shapes are 2x6x7 -> 4x3x4 -> 6x3x4 -> 72 -> 3. With `batch_norm`, a hidden layer of 5 features precedes the output layer.
    """

    def build():
        stages = [("conv1", nn.Conv2d(2, 4, 3, stride=2, padding=1)), ("bn1", nn.BatchNorm2d(4)), ("act1", activation())]
        stages += [("conv2", nn.Conv2d(4, 6, 3, padding=1, groups=2)), ("bn2", nn.BatchNorm2d(6)), ("act2", activation())]
        stages += [("flat", nn.Flatten())]
        if batch_norm:
            stages += [("fc1", nn.Linear(72, 5)), ("bn3", nn.BatchNorm1d(5)), ("act3", activation())]
            stages += [("fc2", nn.Linear(5, CLASSES))]
        else:
            stages += [("fc1", nn.Linear(72, CLASSES))]
        return nn.Sequential(OrderedDict(stage for stage in stages if batch_norm or not stage[0].startswith("bn")))

    return _seeded(build, seed, dtype)


class Residual(nn.Module):
    """A residual net with an identity shortcut, a strided projection shortcut, BatchNorm, and in-place ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, CLASSES)  # registered first, executed last
        self.stem, self.stem_bn = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.a1, self.a_bn, self.a2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.b1, self.b_bn = nn.Conv2d(4, 5, 3, stride=2, padding=1), nn.BatchNorm2d(5)
        self.down = nn.Conv2d(4, 5, 1, stride=2, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem_bn(self.stem(x)))
        x = self.relu(self.a2(self.relu(self.a_bn(self.a1(x)))) + x)
        x = self.relu(self.b_bn(self.b1(x)) + self.down(x))
        return self.head(x.mean((2, 3)))


def inplace_relu() -> nn.ReLU:
    return nn.ReLU(inplace=True)


def activation_cuts(model: nn.Sequential) -> list[str]:
    """The names of the net's activation modules, for use as cuts."""
    return [name for name, _ in model.named_children() if name.startswith("act")]


def residual(*, seed: int = 4, dtype=torch.float64) -> Residual:
    return _seeded(Residual, seed, dtype)


NETS = {
    "mlp_tanh": mlp,
    "mlp_relu": lambda **kw: mlp(nn.ReLU, **kw),
    "mlp_bn": lambda **kw: mlp(batch_norm=True, **kw),
    "conv": convnet,
    "conv_bn": lambda **kw: convnet(batch_norm=True, **kw),
}


def batch(net: str, *, seed: int = 0, size: int = 4, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    """Random inputs and labels for the given net: a key of NETS, "one" or "residual"."""
    generator = torch.Generator().manual_seed(100 + seed)
    shape = (7,) if net.startswith(("mlp", "one")) else (2, 6, 7)
    x = torch.randn(size, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(CLASSES, (size,), generator=generator)
