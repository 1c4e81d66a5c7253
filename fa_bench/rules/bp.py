"""Backpropagation, the reference of every metric."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fa_bench.coverage import Coverage, Covered
from fa_bench.registries import ALGORITHMS
from fa_bench.rules.base import Rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn


@ALGORITHMS.register("bp")
@dataclasses.dataclass(eq=False)
class BP(Rule):
    """Backpropagation.

    e_in = g W; gradient of W = gᵀ x; gradient of b = Σ g (Rumelhart, Hinton and Williams 1986; eqs 1-2 of Akrout et al. 2019).

    The model is left as it is. Subclasses freeze a part of it.
    """

    def frozen_parameters(self, sample_input: Tensor | None) -> dict[int, str]:
        """{id of a parameter that does not learn: why}."""
        return {}

    def put_in(self, sample_input: Tensor | None) -> Coverage:
        from fa_bench.layers import weighted_layers

        self._froze: list[nn.Parameter] = []
        self._layers = weighted_layers(self.model)
        why = self.frozen_parameters(sample_input)
        for parameter in self.model.parameters():
            if id(parameter) in why and parameter.requires_grad:
                parameter.requires_grad_(False)
                self._froze.append(parameter)
        return Coverage(self.name, tuple(
            Covered(path, type(layer).__name__, tuple(layer.weight.shape), why.get(id(layer.weight), "its consumers' weights"))
            for path, layer in self._layers.items()
        ), {})

    def take_out(self) -> None:
        for parameter in self._froze:
            parameter.requires_grad_(True)

    @contextmanager
    def exact(self) -> Iterator[None]:
        """True backpropagation: what the rule froze takes part."""
        before = [parameter.requires_grad for parameter in self._froze]
        with super().exact():
            try:
                for parameter in self._froze:
                    parameter.requires_grad_(True)
                yield
            finally:
                for parameter, required in zip(self._froze, before, strict=True):
                    parameter.requires_grad_(required)

    def effective_feedback(self, layer: str) -> Tensor:
        return self._layers[layer].weight.detach()

    def weight_pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        weights = {path: layer.weight for path, layer in self._layers.items()}
        return {path: (weight.detach(), weight.detach()) for path, weight in weights.items() if weight.requires_grad}
