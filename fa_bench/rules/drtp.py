"""Direct random target projection."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from fa_bench.mechanisms.cut.rule import CapturedActivation, CutRule
from fa_bench.mechanisms.feedback_options import density_option, init_option
from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS

if TYPE_CHECKING:
    from torch import Tensor


@ALGORITHMS.register("drtp")
@dataclasses.dataclass(eq=False)
class DRTP(CutRule):
    """Direct random target projection: the labels, projected to every hidden activation.

    Frenkel, Lefebvre and Bol 2021.

    The error at a cut depends on the labels only: y B s / N, with y (N, C) the one-hot labels, B (C, features of the cut) fixed
    and random, s the `scale` and N the batch size. The output layer has its true gradient. The error does not depend on the
    network's output, so that a layer can be updated as soon as it has been evaluated; it never vanishes. B does not decay.

    ``error_sign=true`` is sDFA: sign(δ) B s / N, where δ = ∂L/∂z is the error at the logits, whose sign is that of output minus
    target. With the cross-entropy it is -1 for the label and +1 for every other class, until a probability rounds to zero.

    Choices: the error is divided by N, like that of the output layer. The paper's code does so at the output only, which is
    ``scale`` = N here. The sign is that of the code; since B is symmetric about zero, it makes no difference. B is
    Kaiming-uniform with the cut's features as its fan (``b_init``), with one fixed mask if ``density`` is below 1. The error is
    scaled like the loss. The paper uses tanh units and no batch normalisation: with unbounded units such as ReLU activations grow
    without end, because the error never vanishes (``architecture.activation=tanh``). The cuts are those of `dfa`.
    """

    search_space = {"scale": "tag(log,interval(0.1,100))"}

    b_init: str = init_option("B", "kaiming_uniform")
    density: float = density_option()
    scale: float = option(1.0, "factor of the error at every cut, in addition to one over the batch size", above=0)
    error_sign: bool = option(False, "project the sign of the output error instead of the labels (sDFA)")

    scales = True

    @property
    def needs_target(self) -> bool:
        return not self.error_sign

    def make_feedback(self, features: dict[str, tuple[int, ...]], classes: int) -> None:
        for cut, shape in features.items():
            self.put(cut, "B", self.b_init, (classes, math.prod(shape)), self.density)

    def signal(self, cut: str, captured: CapturedActivation, broadcast: Tensor, target: Tensor | None) -> Tensor:
        factor = self.scale * self.loss_factor / max(len(broadcast), 1)
        if self.error_sign:
            return self.project(cut, broadcast.sign() * factor, captured)
        assert target is not None
        # The rows of B that the one-hot labels select, at B's precision even under autocast, since they do not depend on δ.
        return self.in_shape(cut, self.tensor(cut, "B").index_select(0, target).mul_(factor), captured)
