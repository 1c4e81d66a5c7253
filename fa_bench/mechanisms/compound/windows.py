"""Torchvision's shifted-window attention as a composition of linear layers. This module is imported only if torchvision's own
module has been imported."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torchvision.models.swin_transformer import ShiftedWindowAttention

from fa_bench.mechanisms.compound.base import Compound, Substitute, compound


@compound(ShiftedWindowAttention)
class WindowAttentionLayers(Compound):
    """Torchvision's shifted-window attention, whose plain class passes the weights of its layers ``qkv`` and ``proj`` to a
    function instead of calling these layers."""

    def layerwise_forward(self, x: Tensor) -> Tensor:
        module: Any = self
        layers = {id(layer.weight): layer for layer in (module.qkv, module.proj)}

        def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            layer: Any = layers.get(id(weight))
            return F.linear(x, weight, bias) if layer is None else layer(x)

        with Substitute(linear=linear):
            return self.plain_class.forward(self, x)
