"""Decoder-only transformers for language modelling."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from fa_bench.errors import OptionError
from fa_bench.models.transformer import TransformerArchitecture
from fa_bench.registry.kinds import POSITIONS, TOKENS
from fa_bench.registry.options import option
from fa_bench.registry.registries import ARCHITECTURES
from fa_bench.utils.lazy import nn

if TYPE_CHECKING:
    from torch import nn as torch_nn


@ARCHITECTURES.register("decoder")
@dataclasses.dataclass(eq=False)
class Decoder(TransformerArchitecture):
    """Decoder-only transformer that predicts the next token at every position.

    The layers are embed - causal blocks - (final_norm) - head, which map tokens (N, T) to logits (N, T, V).

    The network of Launay et al. 2020 (arXiv 2006.12878) is
    ``depth=6 width=512 heads=8 norm=post positions=sinusoidal activation=relu`` on sequences of 128 tokens. The initial weights
    differ from those of Launay et al.: in their code, the embedding and the head are initialised uniformly, and all blocks start
    with the same weights.

    Learned positions and the token embeddings that they are added to are initialised from N(0, 0.02²). With sinusoidal positions
    (Vaswani et al. 2017, section 3.5), token embeddings are initialised from N(0, 1). `init` and `linear_init` apply to all
    linear layers, including q, k, v and out in the attention. The embedding and the head do not share weights.

    The modules of a block are attn (with q, k, v, out), norm1, fc1, act, fc2, norm2. The cuts of Launay et al. 2020, for
    ``norm=post``, are ``[*.norm1,*.act,*.norm2]`` ("micro") and ``[*.norm2]`` ("macro"). The model declares the outputs of embed,
    q, k, v and act as cut points. With ``norm=post``, the outputs of norm1 and norm2 are cut points as well. With ``norm=pre``,
    the additional cut points are the outputs of attn, of every block except the last, and of the final LayerNorm.
    """

    tasks = ((TOKENS, POSITIONS),)

    depth: int = option(4, "transformer blocks", minimum=1, maximum=1000)
    context: int | None = option(
        None, "length of the longest sequence in tokens; null: the length of the data's sequences", minimum=1
    )
    norm: str = option("pre", "LayerNorm before attention, MLP and head (pre), or after each sum (post)", choices=["pre", "post"])
    positions: str = option("learned", "kind of position embeddings", choices=["learned", "sinusoidal"])
    dropout: float = option(
        0.1,
        "dropout rate of embeddings, attention weights, hidden activations, and outputs of attention and MLP",
        minimum=0,
        below=1,
    )

    def check(self) -> None:
        super().check()
        if self.positions == "sinusoidal" and self.width % 2:
            raise OptionError("width", f"={self.width} is odd: positions=sinusoidal requires an even width")

    def make(self, input_shape: tuple[int, ...], classes: int) -> torch_nn.Module:
        from fa_bench.models.nets.transformer import Block, TokenEmbedding

        [length] = input_shape
        context = length if self.context is None else self.context
        if context < length:
            raise OptionError("context", f"={context} is shorter than the data's sequences of {length} tokens")
        blocks = (
            Block(
                self.width,
                self.heads,
                self.hidden,
                self.activation,
                dropout=self.dropout,
                causal=True,
                post_norm=self.norm == "post",
            )
            for _ in range(self.depth)
        )
        parts: OrderedDict[str, torch_nn.Module] = OrderedDict(
            embed=TokenEmbedding(classes, context, self.width, self.positions == "learned", self.dropout),
            layers=nn.Sequential(*blocks),
        )
        if self.norm == "pre":
            parts["final_norm"] = nn.LayerNorm(self.width)
        parts["head"] = nn.Linear(self.width, classes)
        model: Any = nn.Sequential(parts)
        model.blocks = [f"layers.{number}" for number in range(self.depth)]
        ends = (
            ["layers.*.norm1", "layers.*.norm2"] if self.norm == "post" else ["layers.*.attn", *model.blocks[:-1], "final_norm"]
        )
        model.cut_points = ["embed", "layers.*.attn.q", "layers.*.attn.k", "layers.*.attn.v", "layers.*.act", *ends]
        return model
