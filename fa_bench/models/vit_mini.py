"""Small vision transformers."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from fa_bench.errors import OptionError
from fa_bench.models.transformer import TransformerArchitecture
from fa_bench.registry.options import option
from fa_bench.registry.registries import ARCHITECTURES
from fa_bench.utils.lazy import nn

if TYPE_CHECKING:
    from torch import nn as torch_nn


@ARCHITECTURES.register("vit_mini")
@dataclasses.dataclass(eq=False)
class ViTMini(TransformerArchitecture):
    """Small vision transformer with a class token, for images that can be divided into patches.

    The layers are embed - pre-norm blocks - class token - final_norm - head. The default of 4 blocks of width 128 comes from the
    faeval protocol (spring 2026).

    The structure is that of Dosovitskiy et al. 2021, without dropout. We know the protocol's depth and width and that it has a
    class token, but not its code. Our own choices are patches of 4x4 pixels, 4 heads, hidden layers of 4 times the width, and
    GELU.

    Positions are learned and initialised from N(0, 0.02²); the class token is initialised with zeros. `init` applies to the
    convolution that embeds the patches and to all linear layers, including q, k, v and out in the attention; `linear_init`
    applies only to the linear layers.

    The cut points are the outputs of embed, of q, k and v, of the attention, of every activation and of every block; for the last
    block, the output of the final LayerNorm is used instead. No error passes through a weight, except to the LayerNorms within
    blocks, because there is no cut between them and the next layer.
    """

    patch: int = option(4, "height and width of a patch in pixels", minimum=1)
    blocks: int = option(4, "transformer blocks", minimum=1, maximum=1000)

    def make(self, input_shape: tuple[int, ...], classes: int) -> torch_nn.Module:
        from fa_bench.models.nets.transformer import Block, FirstToken, PatchEmbedding

        colours, height, width = input_shape
        if height % self.patch or width % self.patch:
            raise OptionError("patch", f"={self.patch} does not divide {height}x{width} images into whole patches")
        model: Any = nn.Sequential(
            OrderedDict(
                embed=PatchEmbedding(colours, (height // self.patch) * (width // self.patch), self.patch, self.width),
                layers=nn.Sequential(*(Block(self.width, self.heads, self.hidden, self.activation) for _ in range(self.blocks))),
                first=FirstToken(),
                final_norm=nn.LayerNorm(self.width),
                head=nn.Linear(self.width, classes),
            )
        )
        model.blocks = [f"layers.{number}" for number in range(self.blocks)]
        model.cut_points = [
            "embed",
            *(f"layers.*.{name}" for name in ("attn.q", "attn.k", "attn.v", "attn", "act")),
            *model.blocks[:-1],
            "final_norm",
        ]
        return model
