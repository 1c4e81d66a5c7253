"""The modules of transformers: attention, blocks, and embeddings of patches and tokens.

In shapes, N is the batch size, T the number of positions, and D the width.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fa_bench.models.base import ACTIVATIONS


class Attention(nn.Module):
    """Multi-head self-attention with the linear layers q, k, v and out; maps (N, T, D) to (N, T, D).

    Args:
        width: D.
        heads: the number of attention heads, a divisor of D.
        dropout: rate for the attention weights and for the output.
        causal: whether a position attends to itself and earlier positions only.
    """

    def __init__(self, width: int, heads: int, dropout: float, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        # The mode of the dropout module determines whether dropout is applied, because code that disables dropout does so module
        # by module.
        dropout = self.drop.p if self.drop.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=self.causal)
        return self.drop(self.out(y.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """A transformer block, which maps (N, T, D) to (N, T, D).

    With `post_norm`, the block computes x = norm1(x + attn(x)) and returns norm2(x + mlp(x)) (Vaswani et al. 2017). Otherwise, it
    computes x = x + attn(norm1(x)) and returns x + mlp(norm2(x)). The layers of mlp are fc1 - act - fc2 - drop; with dropout, act
    is the activation followed by dropout.

    Args:
        width: D.
        heads: the number of attention heads, a divisor of D.
        hidden: neurons between fc1 and fc2.
        activation: one of ACTIVATIONS.
        dropout: rate for the attention weights, the hidden activations and the outputs of attn and fc2.
        causal: whether a position attends to itself and earlier positions only.
        post_norm: see above.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        activation: str,
        *,
        dropout: float = 0.0,
        causal: bool = False,
        post_norm: bool = False,
    ) -> None:
        super().__init__()
        self.post_norm = post_norm
        # The modules are defined in the order of execution, because their order determines the order of the cuts.
        if not post_norm:
            self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, dropout, causal)
        if post_norm:
            self.norm1 = nn.LayerNorm(width)
        else:
            self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        act = ACTIVATIONS[activation]()
        self.act = nn.Sequential(OrderedDict(activation=act, drop=nn.Dropout(dropout))) if dropout else act
        self.fc2 = nn.Linear(hidden, width)
        self.drop = nn.Dropout(dropout)
        if post_norm:
            self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        if self.post_norm:
            x = self.norm1(x + self.attn(x))
            return self.norm2(x + self._mlp(x))
        x = x + self.attn(self.norm1(x))
        return x + self._mlp(self.norm2(x))

    def _mlp(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.act(self.fc1(x))))


class PatchEmbedding(nn.Module):
    """Maps images (N, C, H, W) to tokens (N, 1 + H W / patch², D): a class token and the projected patches, plus learned
    positions.

    Args:
        colours: C.
        patches: H W / patch².
        patch: height and width of a patch.
        width: D.
    """

    def __init__(self, colours: int, patches: int, patch: int, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(colours, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.empty(patches + 1, width).normal_(0.0, 0.02))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions


class FirstToken(nn.Module):
    """Maps tokens (N, T, D) to the first token of each sequence, (N, D)."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


class TokenEmbedding(nn.Module):
    """Maps token ids (N, T) to embeddings (N, T, D), adds the positions and applies dropout; T must not exceed `context`.

    Args:
        vocabulary: number of tokens.
        context: the length of the longest sequence.
        width: D, even for sinusoidal positions.
        learned: whether positions are learned instead of sinusoidal.
        dropout: the dropout rate.
    """

    def __init__(self, vocabulary: int, context: int, width: int, learned: bool, dropout: float) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        if learned:
            nn.init.normal_(self.tokens.weight, 0.0, 0.02)
            self.positions = nn.Parameter(torch.empty(context, width).normal_(0.0, 0.02))
        else:
            self.register_buffer("positions", sinusoids(context, width), persistent=False)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        length, context = x.shape[1], len(self.positions)
        if length > context:
            raise ValueError(f"a sequence of {length} tokens is longer than the context of the model, {context}")
        return self.drop(self.tokens(x) + self.positions[:length])


def sinusoids(context: int, width: int) -> Tensor:
    """Sinusoidal positions (context, width): sin and cos of position / 10000^(2i / width) in columns 2i and 2i + 1."""
    frequencies = torch.exp(torch.arange(0, width, 2) * (-math.log(10000) / width))
    angles = torch.arange(context)[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)
