"""Backpropagation, the reference for all other rules."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from fa_bench.mechanisms.coverage import Coverage, Covered
from fa_bench.mechanisms.rule import Rule
from fa_bench.registry.registries import ALGORITHMS

if TYPE_CHECKING:
    from torch import Tensor, nn


@ALGORITHMS.register("bp")
@dataclasses.dataclass(eq=False)
class BP(Rule):
    """Backpropagation, the reference with which all other rules are compared.

    The rule computes e_in = g W; gradient of W = gᵀ x; gradient of b = Σ g (Rumelhart, Hinton and Williams 1986; eqs 1-2 of
    Akrout et al. 2019).

    The rules `bp_fc`, `frozen` and `frozen_blocks` are variants of this rule that freeze parts of the model.
    """

    equations = (
        r"e_{\text{in}} &= g W",
        r"\nabla_W &= g^\top x",
        r"\nabla_b &= \sum_n g_n",
    )

    def frozen_parameters(self, sample_input: Any) -> dict[int, str]:
        """The parameters to freeze: a mapping from the id of each to the text about its error in the coverage table."""
        return {}

    def wire(self, sample_input: Any) -> Coverage:
        from fa_bench.mechanisms.weighted_layers import kind_of, weight_parameter, weighted_layers

        self._layers = weighted_layers(self.model)
        why = self.frozen_parameters(sample_input)
        self.freeze(parameter for parameter in self.model.parameters() if id(parameter) in why)
        return Coverage(
            self.name,
            tuple(
                Covered(
                    path,
                    kind_of(layer),
                    tuple(layer.weight.shape),
                    why.get(id(weight_parameter(layer)), "passes through the weight"),
                )
                for path, layer in self._layers.items()
            ),
            {},
        )

    def unwire(self) -> None:
        pass

    def watched_modules(self) -> dict[str, nn.Module]:
        return dict(self._layers)

    def effective_feedback(self, layer: str) -> Tensor:
        return self._layers[layer].weight.detach()

    def weight_pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        weights = {path: layer.weight for path, layer in self._layers.items()}
        return {path: (weight.detach(), weight.detach()) for path, weight in weights.items() if weight.requires_grad}
