"""Local errors from fixed random classifiers."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fa_bench.mechanisms.cut.local import LocalRule, flattening
from fa_bench.mechanisms.feedback_options import init_option
from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.utils.lazy import nn
from fa_bench.utils.sampling import sample, seed_for

if TYPE_CHECKING:
    from torch import Tensor
    from torch import nn as torch_nn


@ALGORITHMS.register("local_error")
@dataclasses.dataclass(eq=False)
class LocalError(LocalRule):
    """Local errors: every hidden activation learns from the loss of its own fixed random classifier.

    The rule is due to Mostafa, Ramesh and Cauwenberghs 2018.

    Every hidden activation a has a fixed random linear classifier M (C, features) and learns from the objective's loss for the
    scores s of this classifier. With the cross-entropy:

        s = a Mᵀ,    error at a = (softmax(s) - y) M / N,    where y are the one-hot labels.

    The error passes through the layer's nonlinearity and normalisation to its weights but no further. The output layer learns
    from its true gradient. M neither learns nor decays. With ``separate=true``, the local error uses |K| ∘ sign(M) instead of M,
    where K has the shape of M and is also fixed and random.

    If the model's output has positions, such as tokens, every cut must have the same positions. M (C, F) then classifies each
    position, which has its own label.

    The paper does not specify the following choices. There is one classifier at every cut point, without a bias. A map with more
    than `features` features is first average-pooled: its height and width are halved alternately until it has at most that many
    features. M is Kaiming-uniform, with the number of features as the fan (``m_init``).
    """

    equations = (
        r"s &= a M^\top,\quad M \text{ fixed}",
        r"e_a &= \frac{1}{N} (\operatorname{softmax}(s) - y) M",
    )

    m_init: str = init_option("the classifiers M", "kaiming_uniform")
    features: int = option(4096, "maps with more features are average-pooled before the classifier", minimum=1)
    separate: bool = option(False, "the local error uses separate magnitudes with the signs of M")

    def auxiliary(self, cut: str, shape: tuple[int, ...], classes: int) -> torch_nn.Module:
        layers, count = flattening(cut, shape, self.features)
        self.put(cut, "M", self.m_init, (classes, count))
        if self.separate:
            matrix = self.tensor(cut, "M")
            magnitudes = sample((classes, count), self.m_init, seed_for(self.seed, cut, "K")).abs_()
            self.put(cut, "K", magnitudes.to(matrix).mul_(matrix.sign()))
        return nn.Sequential(layers)

    def local_loss(self, cut: str, auxiliary: torch_nn.Module, activation: Tensor, target: Tensor) -> Tensor:
        features = auxiliary(activation)
        scores = features.mm(self.tensor(cut, "M").t())
        if self.separate:
            # These scores have the value of a Mᵀ but the derivative of a Kᵀ.
            surrogate = features.mm(self.tensor(cut, "K").t())
            scores = surrogate + (scores - surrogate).detach()
        return self.loss_of(scores, target)
