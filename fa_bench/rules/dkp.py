"""Direct Kolen-Pollack."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from fa_bench.config.options import option
from fa_bench.config.registries import ALGORITHMS
from fa_bench.draws import INITIALISERS, draw_mask, seed_for
from fa_bench.mechanisms.cuts import CutRule, Kept

if TYPE_CHECKING:
    from torch import Tensor

    from fa_bench.mechanisms.updates import LearnedFeedback


@ALGORITHMS.register("dkp")
@dataclasses.dataclass(eq=False)
class DKP(CutRule):
    """Direct Kolen-Pollack: direct feedback that learns to read the activations out.

    Eqs 3, 7 and 8 of "Learning the connections in direct feedback alignment".

    With δ = ∂L/∂z of shape (N, C) the error at the logits: the error at a cut is δ B, as in direct feedback alignment with one
    row of B (C, features of the cut) for every class, and B learns by

        gradient of B = δᵀ a,    a (N, features) the activation at the cut, flattened.

    So B is a linear readout of a, trained on the network's output error, and a Bᵀ aligns with the logits. At the last hidden
    activation the gradient of B is that of the output layer's weight.

    B needs a learning rate far below that of W, or training explodes. It has an optimizer, a schedule and a decay of its own with
    ``optimizer@feedback_optimizer=sgd feedback_optimizer.lr=1e-4 ...``; without one it shares W's, and `b_lr_scale` sets its
    rate relative to W's (0: direct feedback alignment). Weight decay acts on B as on W. The paper's settings: net of two
    convolutions, both with SGD, Nesterov momentum 0.9 and decay 1e-6, W at lr 1e-2, B at lr 1e-4 times 0.85 an epoch; AlexNet
    with decay 1e-4, W at lr 1e-2, B by Adam at lr 5e-4.

    Choices: B is Kaiming-uniform with the features of the cut for its fan, as the paper says; the code behind it starts from
    ``b_init=zeros`` for AlexNet. ``b_lr_scale`` 0.01 is the paper's ratio for the net of two convolutions. `density` below 1 puts
    a mask, drawn once, on B and again on it after every update. Without batch normalisation the paper found training to explode.
    """

    b_init: str = option("kaiming_uniform", "initialiser of B", choices=list(INITIALISERS))
    b_lr_scale: float = option(0.01, "learning rate of B relative to that of W, where B has no optimizer of its own", minimum=0)
    density: float = option(1.0, "fraction of B that is not zero (mask drawn once)", above=0, maximum=1)

    #: The gradient of B is made of the activations.
    reads_values = True

    def make_feedback(self, features: dict[str, tuple[int, ...]], classes: int) -> None:
        from fa_bench.mechanisms.layers import put_tensor, register_learned

        self._learned: dict[str, list[LearnedFeedback]] = {}
        for cut, shape in features.items():
            size = (classes, math.prod(shape))
            self.put(cut, "B", size, self.b_init, self.density)
            self._learned[cut] = [register_learned(self._at[cut], cut, "B", self._witness)]
            if self.density < 1:
                mask = draw_mask(size, self.density, seed_for(self.seed, cut, "B"))
                put_tensor(self._at[cut], "mask", mask.to(self.tensor(cut, "B")))

    def tensor(self, cut: str, name: str) -> Tensor:
        return self._at[cut]._parameters["feedback_B"].detach() if name == "B" else super().tensor(cut, name)

    def learned_at(self, cut: str) -> list[LearnedFeedback]:
        return self._learned[cut]

    def feedback_gradients(self, cut: str, kept: Kept, delta: Tensor, target: Tensor | None) -> list[Tensor | None]:
        dtype = self.tensor(cut, "B").dtype
        return [delta.to(dtype).t().mm(kept.tensor.flatten(1).to(dtype))]

    def learned_feedback(self) -> list[LearnedFeedback]:
        return [one for learned in self._learned.values() for one in learned]

    @property
    def feedback_lr_scale(self) -> float:
        return self.b_lr_scale

    def step(self) -> None:
        super().step()
        if self.density < 1:
            for cut in self._at:
                self.tensor(cut, "B").mul_(self.tensor(cut, "mask"))
