"""Direct random target projection."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from fa_bench.config.options import option
from fa_bench.config.registries import ALGORITHMS
from fa_bench.draws import INITIALISERS
from fa_bench.mechanisms.cuts import CutRule, Kept

if TYPE_CHECKING:
    from torch import Tensor


@ALGORITHMS.register("drtp")
@dataclasses.dataclass(eq=False)
class DRTP(CutRule):
    """Direct random target projection: the labels, projected to every hidden activation.

    Frenkel, Lefebvre and Bol 2021.

    The error at a cut is made of the labels alone: y B s / N, with y (N, C) the one-hot labels, B (C, features of the cut) fixed
    and random, s the `scale` and N the batch size. The output layer has its true gradient. The error does not depend on the
    network's output, so that a layer could be updated as soon as it has been evaluated, and never vanishes. B does not decay.

    ``error_sign=true`` is sDFA: sign(δ) B s / N with δ = ∂L/∂z the error at the logits, whose sign is that of output minus
    target. With the cross-entropy it is -1 for the label and +1 for every other class, until a probability rounds to zero.

    Choices: the error is divided by N, as that of the output layer is. The code behind the paper does so at the output only,
    which is ``scale`` = N here. The sign is that code's; since B is symmetric about zero another would do as well. B is
    Kaiming-uniform with the features of the cut for its fan (``b_init``), masked once where ``density`` is below 1. The signal
    is multiplied by what the loss was multiplied by. The paper has tanh units and no batch normalisation; the cuts are `dfa`'s.
    """

    b_init: str = option("kaiming_uniform", "initialiser of B", choices=list(INITIALISERS))
    density: float = option(1.0, "fraction of B that is not zero (mask drawn once)", above=0, maximum=1)
    scale: float = option(1.0, "factor on the error at every cut, beside one over the batch size", above=0)
    error_sign: bool = option(False, "project the sign of the output error in place of the labels (sDFA)")

    scales = True

    @property
    def needs_target(self) -> bool:
        return not self.error_sign

    def make_feedback(self, features: dict[str, tuple[int, ...]], classes: int) -> None:
        for cut, shape in features.items():
            self.put(cut, "B", (classes, math.prod(shape)), self.b_init, self.density)

    def signal(self, cut: str, kept: Kept, sent: Tensor, target: Tensor | None) -> Tensor:
        factor = self.scale * self.loss_factor / max(len(sent), 1)
        if self.error_sign:
            return self.project(cut, sent.sign() * factor, kept)
        assert target is not None
        # The rows that the one-hot labels take out of B, at its precision under autocast too, for they do not depend on δ.
        return self.in_shape(cut, self.tensor(cut, "B").index_select(0, target).mul_(factor), kept)
