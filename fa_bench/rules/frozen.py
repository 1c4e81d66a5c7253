"""The floor in which only the output layer learns."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from fa_bench.registry.registries import ALGORITHMS
from fa_bench.rules.bp import BP

if TYPE_CHECKING:
    from torch import Tensor


@ALGORITHMS.register("frozen")
@dataclasses.dataclass(eq=False)
class Frozen(BP):
    """Floor: only the output layer learns, from its true gradient; all other parameters keep their initial values.

    A rule that does not beat this floor trains nothing useful below the output layer. Batch normalisation stays in training mode;
    its gains and biases are frozen, but its running statistics are updated. Frozen tensors do not decay.
    """

    equations = (
        r"\Delta W &= 0 \quad \text{in hidden layers}",
        r"\nabla_W &= \delta^\top x \quad \text{in the output layer}",
    )

    is_floor: ClassVar[bool] = True

    def frozen_parameters(self, sample_input: Any) -> dict[int, str]:
        outputs = self.trace(sample_input).outputs if sample_input is not None else list(self._layers)[-1:]
        learns = {id(p) for path in outputs for p in self._layers[path].parameters(recurse=False)}
        return {id(p): "trains nothing" for p in self.model.parameters() if id(p) not in learns}

    def weight_pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns no pairs, because no error passes through a layer."""
        return {}
