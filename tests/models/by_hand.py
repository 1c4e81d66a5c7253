"""The published nets, written with plain tensor operations on a model's own tensors.

The functions follow the papers' descriptions, and the authors' code where a paper is silent, but not the code in
``fa_bench/models``. No module is called, and batch normalisation is written out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Activation = Callable[[Tensor], Tensor]

#: The activations, written with elementary functions.
ACTIVATIONS: dict[str, Activation] = {
    "relu": lambda x: torch.where(x > 0, x, 0.0),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "tanh": lambda x: 1 - 2 / (torch.exp(2 * x) + 1),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "gelu": lambda x: x / 2 * (1 + torch.erf(x / 2**0.5)),
    "identity": lambda x: x,
}
relu = ACTIVATIONS["relu"]


class ByHand:
    """Holds the tensors of a model by name, and provides functions for the layers that use them.

    Attributes:
        tensors: copies of the model's parameters and buffers. In training mode, `norm` updates the running statistics.
        training: the model's mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self.training = model.training

    def conv(self, name: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        return F.conv2d(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"), stride, padding)

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        """Layer normalisation over the last axis."""
        mean, var = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt() * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        """Batch normalisation over all axes except the channels. In training mode, the running statistics are updated with a
        momentum of 0.1."""
        axes = [axis for axis in range(x.dim()) if axis != 1]
        shape = (1, -1, *[1] * (x.dim() - 2))
        mean, var = self.tensors[f"{name}.running_mean"], self.tensors[f"{name}.running_var"]
        if self.training:
            samples = x.numel() // x.shape[1]
            batch_mean, batch_var = x.mean(axes), x.var(axes, correction=0)
            self.tensors[f"{name}.running_mean"] = 0.9 * mean + 0.1 * batch_mean
            self.tensors[f"{name}.running_var"] = 0.9 * var + 0.1 * batch_var * samples / (samples - 1)
            self.tensors[f"{name}.num_batches_tracked"] += 1
            mean, var = batch_mean, batch_var
        normalised = (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
        return normalised * self.tensors[f"{name}.weight"].view(shape) + self.tensors[f"{name}.bias"].view(shape)

    def dropout(self, x: Tensor, rate: float) -> Tensor:
        """Inverted dropout, which samples the same masks as torch's modules if it is called in the same order."""
        return F.dropout(x, rate) if self.training else x


def mlp(
    net: ByHand, x: Tensor, hidden: int, activation: str = "relu", batch_norm: bool = False, output_norm: bool = False
) -> Tensor:
    """A net with `hidden` hidden layers and an output layer (PFA paper, section 3)."""
    x = x.flatten(1)
    for number in range(1, hidden + 1):
        x = net.linear(f"fc{number}", x)
        if batch_norm:
            x = net.norm(f"bn{number}", x)
        x = ACTIVATIONS[activation](x)
    x = net.linear(f"fc{hidden + 1}", x)
    return net.norm(f"bn{hidden + 1}", x) if output_norm else x


def conv2(net: ByHand, x: Tensor, padding: int) -> Tensor:
    """The net of Table 3 in the DKP paper."""
    x = relu(net.norm("bn1", net.conv("conv1", x, padding=padding)))
    x = relu(net.norm("bn2", net.conv("conv2", x, padding=padding)))
    x = relu(net.norm("bn3", net.linear("fc1", F.max_pool2d(x, 2).flatten(1))))
    return net.linear("fc2", x)


def asap_alexnet(net: ByHand, x: Tensor, output_norm: bool = True) -> Tensor:
    """The net of the ASAP paper, appendix C. As in the authors' code, it has 5x5 kernels, pooling that rounds up, and by default
    normalised logits."""
    for number in (1, 2, 3):
        x = relu(net.norm(f"bn{number}", net.conv(f"conv{number}", x, padding=2)))
        x = F.max_pool2d(x, 2, 2, ceil_mode=True)
    x = x.flatten(1)
    for number in (4, 5):
        x = relu(net.norm(f"bn{number}", net.linear(f"fc{number}", x)))
    x = net.linear("fc6", x)
    return net.norm("bn6", x) if output_norm else x


def dkp_alexnet(net: ByHand, x: Tensor, dropout: float = 0.5, linear_norm: bool = True) -> Tensor:
    """The net of the DKP paper, section 3.2: torchvision's AlexNet with normalisation before every ReLU (in fully connected
    layers, only with `linear_norm`), and dropout as in the authors' code."""
    x = relu(net.norm("bn1", net.conv("conv1", x, stride=4, padding=2)))
    x = F.max_pool2d(x, 3, 2)
    x = relu(net.norm("bn2", net.conv("conv2", x, padding=2)))
    x = F.max_pool2d(x, 3, 2)
    x = relu(net.norm("bn3", net.conv("conv3", x, padding=1)))
    x = relu(net.norm("bn4", net.conv("conv4", x, padding=1)))
    x = relu(net.norm("bn5", net.conv("conv5", x, padding=1)))
    x = F.max_pool2d(x, 3, 2).flatten(1)
    for number in (6, 7):  # dropout acts on the features and the first hidden layer, not on the second
        x = net.linear(f"fc{number}", net.dropout(x, dropout))
        x = relu(net.norm(f"bn{number}", x) if linear_norm else x)
    return net.linear("fc8", x)


def padded_shortcut(x: Tensor, channels: int) -> Tensor:
    """Option A of He et al. 2016: every second pixel, with zeros for the added channels, half of them on either side.

    The split into halves is taken from the code of the PFA paper.
    """
    missing = torch.zeros_like(x[:, :, ::2, ::2]).repeat(1, (channels - x.shape[1]) // x.shape[1], 1, 1)
    first, second = missing.tensor_split(2, dim=1)
    return torch.cat([first, x[:, :, ::2, ::2], second], dim=1)


def resnet20(net: ByHand, x: Tensor, blocks: int = 3, shortcuts: bool = True) -> Tensor:
    """The net of He et al. 2016, section 4.2."""
    x = relu(net.norm("bn1", net.conv("conv1", x, padding=1)))
    for stage in (1, 2, 3):
        for block in range(blocks):
            name, stride = f"stages.layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = relu(net.norm(f"{name}.bn1", net.conv(f"{name}.conv1", x, stride, 1)))
            y = net.norm(f"{name}.bn2", net.conv(f"{name}.conv2", y, 1, 1))
            if shortcuts:
                y = y + (padded_shortcut(x, y.shape[1]) if stride == 2 else x)
            x = relu(y)
    return net.linear("fc", x.mean((2, 3)))


def resnet_cifar(net: ByHand, x: Tensor, blocks: Sequence[int], shortcuts: bool = True, output_norm: bool = True) -> Tensor:
    """The net of the ASAP paper, appendix C. As in the authors' code, it has a padding of 1 and by default normalised logits."""
    x = relu(net.norm("bn1", net.conv("conv1", x, padding=1)))
    for stage, count in enumerate(blocks, start=1):
        for block in range(count):
            name, stride = f"stages.layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = relu(net.norm(f"{name}.bn1", net.conv(f"{name}.conv1", x, stride, 1)))
            y = net.norm(f"{name}.bn2", net.conv(f"{name}.conv2", y, 1, 1))
            if shortcuts:
                y = y + (project(net, name, x, stride) if stride == 2 else x)
            x = relu(y)
    x = net.linear("fc", x.mean((2, 3)))
    return net.norm("bn_out", x) if output_norm else x


def project(net: ByHand, name: str, x: Tensor, stride: int) -> Tensor:
    return net.norm(f"{name}.shortcut.bn", net.conv(f"{name}.shortcut.conv", x, stride))


def resnet_imagenet(net: ByHand, x: Tensor, blocks: Sequence[int], bottleneck: bool, bn: str) -> Tensor:
    """The net of He et al. 2016, with the stride of a bottleneck in its 3x3 convolution, as in torchvision.

    With bn=after, the signals are normalised after the ReLU, as in the WM paper. The paper's appendix on blocks is not available.
    The project assumes the order convolution - ReLU - normalisation, plus the shortcut, with nothing after the sum.
    """

    def activate(name: str, x: Tensor) -> Tensor:
        return net.norm(name, relu(x)) if bn == "after" else relu(net.norm(name, x))

    x = F.max_pool2d(activate("bn1", net.conv("conv1", x, 2, 3)), 3, 2, 1)
    for stage, count in enumerate(blocks, start=1):
        for block in range(count):
            name, stride = f"stages.layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            if bottleneck:
                y = activate(f"{name}.bn1", net.conv(f"{name}.conv1", x))
                y = activate(f"{name}.bn2", net.conv(f"{name}.conv2", y, stride, 1))
                y, last = net.conv(f"{name}.conv3", y), "bn3"
            else:
                y = activate(f"{name}.bn1", net.conv(f"{name}.conv1", x, stride, 1))
                y, last = net.conv(f"{name}.conv2", y, 1, 1), "bn2"
            # The first block of a bottleneck net widens its input; all other blocks keep the shape unless they are strided.
            projected = block == 0 and (stage > 1 or bottleneck)
            skipped = project(net, name, x, stride) if projected else x
            y = net.norm(f"{name}.{last}", relu(y) if bn == "after" else y) + skipped
            x = y if bn == "after" else relu(y)
    return net.linear("fc", x.mean((2, 3)))


def vgg(net: ByHand, x: Tensor, convolutions: str, activation: str, batch_norm: bool = False) -> Tensor:
    """Each character of `convolutions` stands for a convolution: p with max-pooling after it, v without padding, . for any
    other."""
    for number, kind in enumerate(convolutions, start=1):
        x = net.conv(f"conv{number}", x, padding=0 if kind == "v" else 1)
        x = ACTIVATIONS[activation](net.norm(f"bn{number}", x) if batch_norm else x)
        x = F.max_pool2d(x, 2) if kind == "p" else x
    return net.linear(f"fc{len(convolutions) + 1}", x.flatten(1))


def residual_mlp(net: ByHand, x: Tensor, blocks: int, activation: str = "gelu", final_norm: bool = True) -> Tensor:
    """A net of residual blocks x + MLP(LN(x))."""
    x = net.linear("embed", x.flatten(1))
    for block in range(blocks):
        name = f"layers.{block}"
        y = ACTIVATIONS[activation](net.linear(f"{name}.fc1", net.layer_norm(f"{name}.norm", x)))
        x = x + net.linear(f"{name}.fc2", y)
    return net.linear("head", net.layer_norm("final_norm", x) if final_norm else x)


def attention(net: ByHand, name: str, x: Tensor, heads: int, causal: bool, dropout: float) -> Tensor:
    """Multi-head attention with the weights softmax(q kᵀ / √d) (Vaswani et al. 2017, section 3.2); if causal, later positions
    have no weight."""
    size = x.shape[2] // heads
    q, k, v = (net.linear(f"{name}.{part}", x) for part in "qkv")
    parts = [slice(head * size, (head + 1) * size) for head in range(heads)]
    scores = torch.stack([q[..., part] @ k[..., part].mT / size**0.5 for part in parts], 1)
    if causal:
        scores = scores.masked_fill(torch.arange(x.shape[1]) > torch.arange(x.shape[1])[:, None], -torch.inf)
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    weights = net.dropout(weights, dropout)
    results = [weights[:, head] @ v[..., part] for head, part in enumerate(parts)]
    return net.dropout(net.linear(f"{name}.out", torch.cat(results, 2)), dropout)


def transformer_block(
    net: ByHand, name: str, x: Tensor, heads: int, activation: str, causal: bool, post: bool, dropout: float
) -> Tensor:
    def mlp(x: Tensor) -> Tensor:
        hidden = net.dropout(ACTIVATIONS[activation](net.linear(f"{name}.fc1", x)), dropout)
        return net.dropout(net.linear(f"{name}.fc2", hidden), dropout)

    if post:
        x = net.layer_norm(f"{name}.norm1", x + attention(net, f"{name}.attn", x, heads, causal, dropout))
        return net.layer_norm(f"{name}.norm2", x + mlp(x))
    x = x + attention(net, f"{name}.attn", net.layer_norm(f"{name}.norm1", x), heads, causal, dropout)
    return x + mlp(net.layer_norm(f"{name}.norm2", x))


def vit_mini(net: ByHand, x: Tensor, patch: int, blocks: int, heads: int, activation: str = "gelu") -> Tensor:
    """The net of Dosovitskiy et al. 2021: a class token, then patches from left to right and top to bottom."""
    weight, bias = net.tensors["embed.patches.weight"].flatten(1), net.tensors["embed.patches.bias"]
    cut = [
        x[:, :, top : top + patch, left : left + patch].flatten(1) @ weight.T + bias
        for top in range(0, x.shape[2], patch)
        for left in range(0, x.shape[3], patch)
    ]
    x = torch.stack([net.tensors["embed.token"][0, 0].expand(len(x), -1), *cut], 1) + net.tensors["embed.positions"]
    for block in range(blocks):
        x = transformer_block(net, f"layers.{block}", x, heads, activation, causal=False, post=False, dropout=0.0)
    return net.linear("head", net.layer_norm("final_norm", x)[:, 0])


def decoder(
    net: ByHand,
    x: Tensor,
    depth: int,
    heads: int,
    activation: str = "gelu",
    post: bool = False,
    sinusoidal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """A decoder. With `post`, `sinusoidal` and ReLU, it has the architecture of Launay et al. 2020. Sinusoidal positions are
    those of Vaswani et al. 2017, section 3.5, in float32."""
    tokens = net.tensors["embed.tokens.weight"]
    length, width = x.shape[1], tokens.shape[1]
    if sinusoidal:
        positions = torch.tensor(
            [
                [(math.sin, math.cos)[column % 2](place / 10000 ** (2 * (column // 2) / width)) for column in range(width)]
                for place in range(length)
            ]
        )
    else:
        positions = net.tensors["embed.positions"][:length]
    x = net.dropout(tokens[x] + positions, dropout)
    for block in range(depth):
        x = transformer_block(net, f"layers.{block}", x, heads, activation, causal=True, post=post, dropout=dropout)
    return net.linear("head", x if post else net.layer_norm("final_norm", x))


def recurrent(net: ByHand, x: Tensor, cell: str, layers: int = 1, scan: str = "") -> Tensor:
    """The LSTM of Hochreiter and Schmidhuber 1997 with forget gates, the GRU of Cho et al. 2014 as in cuDNN, or the net of Elman
    1990, with the gates in PyTorch's order."""
    if scan == "rows":
        steps = [x[:, :, row].flatten(1) for row in range(x.shape[2])]
    elif scan == "pixels":
        steps = [x[:, :, row, column] for row in range(x.shape[2]) for column in range(x.shape[3])]
    else:
        steps = list(net.tensors["read.weight"][x].unbind(1))
    sigmoid, tanh = torch.sigmoid, torch.tanh
    for layer in range(layers):
        w, u, b, c = (net.tensors[f"rnn.{kind}_l{layer}"] for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        h = memory = torch.zeros(len(x), u.shape[1], dtype=u.dtype)
        states = []
        for step in steps:
            inner, outer = step @ w.T + b, h @ u.T + c
            if cell == "lstm":
                i, f, g, o = (inner + outer).chunk(4, 1)
                memory = sigmoid(f) * memory + sigmoid(i) * tanh(g)
                h = sigmoid(o) * tanh(memory)
            elif cell == "gru":
                (r, z, n), (r_h, z_h, n_h) = inner.chunk(3, 1), outer.chunk(3, 1)
                update = sigmoid(z + z_h)
                h = (1 - update) * tanh(n + sigmoid(r + r_h) * n_h) + update * h
            else:
                h = tanh(inner + outer)
            states.append(h)
        steps = states
    return net.linear("head", steps[-1] if scan else torch.stack(steps, 1))
