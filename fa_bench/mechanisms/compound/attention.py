"""Attention modules as compositions of linear layers.

Shapes: N batch, L queries, S keys, E features of queries, H heads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fa_bench.mechanisms.compound.base import Compound, compound
from fa_bench.mechanisms.compound.projection import Projection


@compound(nn.MultiheadAttention)
class AttentionLayers(Compound):
    """Attention with the layers ``in_proj`` and ``out_proj``. If keys or values do not have the same number of features as
    queries, the layers ``q_proj``, ``k_proj`` and ``v_proj`` replace ``in_proj``.

    With ``in_proj``, self-attention projects its input once, with the whole weight; cross-attention projects each argument with
    its own rows of the weight.
    """

    batch_axis = 1
    embed_dim: int
    in_proj: Any
    out_proj: Any

    def projections(self) -> dict[str, Projection]:
        if self._qkv_same_embed_dim:
            return {"in_proj": Projection(self, "in_proj_weight", "in_proj_bias")}
        return {
            f"{name}_proj": Projection(self, f"{name}_proj_weight", "in_proj_bias", rows)
            for name, rows in zip("qkv", self._rows(), strict=True)
        }

    def _rows(self) -> list[slice]:
        """The rows of the packed weight and bias that belong to queries, keys and values."""
        return [slice(number * self.embed_dim, (number + 1) * self.embed_dim) for number in range(3)]

    def _projected(self, inputs: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
        """The projected queries (L, N, E), keys (S, N, E) and values (S, N, E)."""
        module: Any = self
        query, key, value = inputs
        if not self._qkv_same_embed_dim:
            return [module.q_proj(query), module.k_proj(key), module.v_proj(value)]
        if query is key and key is value:
            return list(self.in_proj(query).chunk(3, dim=-1))
        return [self.in_proj(x, rows=rows) for x, rows in zip(inputs, self._rows(), strict=True)]

    def layerwise_forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        module: Any = self
        functional: Any = F
        functional._mha_shape_check(query, key, value, key_padding_mask, attn_mask, module.num_heads)
        is_batched, first = query.dim() == 3, module.batch_first and query.dim() == 3
        # Arguments that are the same tensor must remain the same tensor, so that it is projected only once.
        shaped = {id(x): x.transpose(0, 1) if first else x if is_batched else x.unsqueeze(1) for x in (query, key, value)}
        dtype = query.dtype
        length, batch, _ = shaped[id(query)].shape
        q, k, v = self._projected((shaped[id(query)], shaped[id(key)], shaped[id(value)]))
        mask, is_causal = self._mask(attn_mask, key_padding_mask, is_causal, need_weights, (length, batch, len(k)), dtype)
        if module.bias_k is not None:
            k, v = (torch.cat([x, bias.expand(1, batch, -1)]) for x, bias in ((k, module.bias_k), (v, module.bias_v)))
        width = q.shape[2] // module.num_heads  # -1 is ambiguous for an empty batch
        q, k, v = (x.reshape(len(x), batch * module.num_heads, width).transpose(0, 1) for x in (q, k, v))  # (N H, L, E / H)
        if module.add_zero_attn:
            k, v = (torch.cat([x, x.new_zeros(len(x), 1, x.shape[2])], 1) for x in (k, v))
        dropout = module.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores, keys = q * math.sqrt(1 / q.shape[2]), k.transpose(1, 2)
            scores = scores @ keys if mask is None else torch.baddbmm(mask, scores, keys)
            weights = F.dropout(scores.softmax(-1), dropout)
            attended = weights @ v  # (N H, L, E / H)
            weights = weights.view(batch, module.num_heads, *weights.shape[1:])
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            q, k, v = (x.view(batch, module.num_heads, *x.shape[1:]) for x in (q, k, v))
            if mask is not None:
                mask = mask.unsqueeze(0) if len(mask) == 1 else mask.view(batch, module.num_heads, *mask.shape[1:])
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal).flatten(0, 1)
        output = self.out_proj(attended.transpose(0, 1).reshape(length, batch, self.embed_dim))
        if not is_batched:
            return output.squeeze(1), None if weights is None else weights.squeeze(0)
        return output.transpose(0, 1) if first else output, weights

    def _mask(
        self,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool,
        need_weights: bool,
        sizes: tuple[int, int, int],
        dtype: torch.dtype,
    ) -> tuple[Tensor | None, bool]:
        """The mask to add to the scores, (1 or N H, L, S) or None, and whether the attention function itself has to apply the
        causal mask.

        Args:
            sizes: (L, N, S).
        """
        module: Any = self
        length, batch, keys = sizes
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal=True is a hint about attn_mask, which is missing; pass attn_mask as well")
        is_causal = is_causal and key_padding_mask is None and not need_weights
        mask = None
        if attn_mask is not None and not is_causal:
            allowed = (length, keys), (batch * module.num_heads, length, keys)
            if attn_mask.shape not in allowed:
                raise RuntimeError(f"attn_mask has shape {tuple(attn_mask.shape)}, but should have {allowed[0]} or {allowed[1]}")
            mask = _additive(attn_mask, dtype)
            mask = mask if mask.dim() == 3 else mask.unsqueeze(0)
        extra = (module.bias_k is not None) + bool(module.add_zero_attn)
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, dtype).view(batch, 1, 1, keys).expand(-1, module.num_heads, -1, -1)
            padding = padding.reshape(batch * module.num_heads, 1, keys)
            mask = padding.expand(-1, length, -1) if mask is None else mask + padding
        return mask if mask is None or not extra else F.pad(mask, (0, extra)), is_causal


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as numbers that are added to the scores. In a boolean mask, True marks positions that are not attended to."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf) if mask.dtype == torch.bool else mask
