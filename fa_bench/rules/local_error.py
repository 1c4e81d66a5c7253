"""Local errors from fixed random classifiers."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fa_bench.config.options import option
from fa_bench.config.registries import ALGORITHMS
from fa_bench.draws import INITIALISERS, draw, seed_for
from fa_bench.lazy import nn
from fa_bench.mechanisms.local import LocalRule, cross_entropy, flattening

if TYPE_CHECKING:
    from torch import Tensor
    from torch import nn as torch_nn


@ALGORITHMS.register("local_error")
@dataclasses.dataclass(eq=False)
class LocalError(LocalRule):
    """Local errors: a fixed random classifier at every hidden activation.

    Mostafa, Ramesh and Cauwenberghs 2018.

    Every hidden activation a goes to a linear classifier M (C, features), fixed and random, and learns by its cross-entropy:

        s = a Mᵀ,    error at a = (softmax(s) - y) M / N,    y the one-hot labels.

    From there the error goes through the layer's own nonlinearity and normalisation to its weights, and no further. The output
    layer has its true gradient. M never learns and does not decay. ``separate=true`` carries the local error by |K| ∘ sign(M) in
    place of M, K of M's shape and fixed and random too.

    Choices, where the paper gives no details: one classifier at every cut point; a map of more than `features` features is
    averaged to at most so many first, its sizes halved in turn; M is Kaiming-uniform with the features for its fan
    (``m_init``); no bias.
    """

    m_init: str = option("kaiming_uniform", "initialiser of the classifiers M", choices=list(INITIALISERS))
    features: int = option(4096, "features of a map that a classifier takes at most; larger maps are averaged", minimum=1)
    separate: bool = option(False, "carry the local error by magnitudes of its own with the signs of M")

    def auxiliary(self, cut: str, shape: tuple[int, ...], classes: int) -> torch_nn.Module:
        from fa_bench.mechanisms.layers import put_tensor

        layers, count = flattening(cut, shape, self.features)
        self.put(cut, "M", (classes, count), self.m_init)
        if self.separate:
            matrix = self.tensor(cut, "M")
            magnitudes = draw((classes, count), self.m_init, seed_for(self.seed, cut, "K")).abs_()
            put_tensor(self._at[cut], "K", magnitudes.to(matrix).mul_(matrix.sign()))
        return nn.Sequential(layers)

    def local_loss(self, cut: str, auxiliary: torch_nn.Module, activation: Tensor, target: Tensor) -> Tensor:
        features = auxiliary(activation)
        scores = features.mm(self.tensor(cut, "M").t())
        if self.separate:
            # The value of one, the derivative of the other.
            carrying = features.mm(self.tensor(cut, "K").t())
            scores = carrying + (scores - carrying).detach()
        return cross_entropy(scores, target)
