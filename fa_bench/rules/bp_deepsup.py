"""Backpropagation with deep supervision, the reference for rules with local losses."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from fa_bench.mechanisms.coverage import Coverage, Covered
from fa_bench.mechanisms.cut.local import LocalRule, linear_classifier
from fa_bench.mechanisms.feedback_options import decoder_init_option
from fa_bench.mechanisms.rule import Rule
from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS

if TYPE_CHECKING:
    from torch import Tensor
    from torch import nn as torch_nn

    from fa_bench.mechanisms.trace import Trace


@ALGORITHMS.register("bp_deepsup")
@dataclasses.dataclass(eq=False)
class BPDeepSup(LocalRule):
    """Backpropagation with deep supervision: every hidden activation has a classifier, whose loss is added to that of the
    network.

    This rule is the reference for rules with local losses (Chen 2026, arXiv 2606.06539). Deep supervision is due to Lee et
    al. 2015. The loss is

        loss = L(z) + w Σ L(D_l(a_l)),    where the sum is over the cuts l.

    Here L is the objective's mean loss, z the logits, a_l the activation at a cut, D_l a linear classifier, and w the option
    `weight`. All weights learn from the exact gradient of this sum. Errors pass through the weights and across the cuts, so this
    rule uses weight transport everywhere. At a cut, the error w ∂L(D_l(a_l))/∂a_l of the classifier is added to the error from
    the layers above. With ``weight=0``, the network learns as with `bp`.

    The cuts and the classifiers are those of `predsim` with ``loss=pred``. D_l average-pools maps with more than `decoder_size`
    features, has weights that are initially zero (`decoder_init`), and learns with the optimizer of the network's weights. The
    difference in accuracy between `bp_deepsup` and this form of `predsim` shows how much is lost by stopping errors at the cuts.

    We did not check the form and the weights of the auxiliary losses against the papers. Lee et al. reduce the auxiliary losses
    during training, whereas w is constant here. If the model's output has positions, such as tokens, every cut must have the same
    positions.
    """

    equations = (
        r"\mathcal{L} &= L(z) + w \sum_l L(D_l(a_l))",
        r"\nabla_W &= \frac{\partial \mathcal{L}}{\partial W}",
    )

    search_space = {"weight": "tag(log,interval(1e-2,10))"}

    weight: float = option(1.0, "weight of each classifier's loss relative to the network's", minimum=0)
    decoder_size: int = option(4096, "maps with more features are average-pooled before the classifier", minimum=1)
    decoder_init: str = decoder_init_option()

    crosses = True

    def auxiliary(self, cut: str, shape: tuple[int, ...], classes: int) -> torch_nn.Module:
        return linear_classifier(cut, shape, classes, self.decoder_size, self.decoder_init)

    def local_loss(self, cut: str, auxiliary: torch_nn.Module, activation: Tensor, target: Tensor) -> Tensor:
        return self.weight * self.loss_of(auxiliary(activation), target)

    def wire(self, sample_input: Any) -> Coverage:
        from fa_bench.mechanisms.weighted_layers import kind_of, weighted_layers

        super().wire(sample_input)
        self._layers = weighted_layers(self.model)
        return Coverage(
            self.name,
            tuple(
                Covered(path, kind_of(layer), tuple(layer.weight.shape), "passes through the weight")
                for path, layer in self._layers.items()
            ),
            {},
            transport=("in all layers",),
        )

    def transporting_layers(self) -> dict[str, Any]:
        return {}

    def effective_feedback(self, layer: str) -> Tensor:
        return self._layers[layer].weight.detach()

    def weight_pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        weights = {path: layer.weight for path, layer in self._layers.items()}
        return {path: (weight.detach(), weight.detach()) for path, weight in weights.items() if weight.requires_grad}

    def error_points(self, trace: Trace) -> dict[str, tuple[str, str]]:
        return Rule.error_points(self, trace)

    def input_error(self, layer: str, x: Tensor, g: Tensor, delta: Tensor) -> Tensor:
        """The error of backpropagation. At a layer that is a cut, `g` includes the error of the cut's classifier."""
        with self.exact():  # a cut's hook refuses calls outside of a forward pass of the model
            return super().input_error(layer, x, g, delta)
