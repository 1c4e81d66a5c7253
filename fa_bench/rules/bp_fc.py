"""The floor for convolutional networks, with random convolutions."""

from __future__ import annotations

import dataclasses
from typing import Any

from fa_bench.errors import CoverageError
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.rules.bp import BP
from fa_bench.utils.lazy import nn


@ALGORITHMS.register("bp_fc")
@dataclasses.dataclass(eq=False)
class BPFullyConnected(BP):
    """Floor for convolutional networks: fully connected layers learn by backpropagation, and convolutions stay random.

    The rule is "BP (FC only)" in section 3.2 of the paper that introduces `dkp`.

    The paper does not specify the following choices. The gains and biases of normalisation layers that follow a convolution are
    frozen as well, but these layers stay in training mode. Frozen tensors do not decay. All fully connected layers learn,
    including hidden ones.
    """

    equations = (
        r"e_{\text{in}} &= g W",
        r"\nabla_W &= g^\top x \quad \text{in fully connected layers}",
        r"\Delta W &= 0 \quad \text{in convolutions}",
    )

    def frozen_parameters(self, sample_input: Any) -> dict[int, str]:
        from fa_bench.mechanisms.weighted_layers import CONVOLUTIONS

        convolutions = {path for path, layer in self._layers.items() if isinstance(layer, CONVOLUTIONS)}
        if not convolutions:
            return {}
        if len(convolutions) == len(self._layers):
            raise CoverageError(f"rule '{self.name}' trains fully connected layers, and this model has none")
        norms = {path: module for path, module in self.model.named_modules() if isinstance(module, _norms())}
        frozen = [self._layers[path] for path in convolutions]
        feeds = self.trace(sample_input, watch=tuple(norms)).feeds if norms else {}
        frozen += [norms[path] for path, fed in feeds.items() if fed and convolutions.issuperset(fed)]
        return {id(p): "trains nothing" for module in frozen for p in module.parameters(recurse=False)}


def _norms() -> tuple[type[nn.Module], ...]:
    return (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
