"""Direct random target projection."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from fa_bench.mechanisms.cut.positions import ignored_label
from fa_bench.mechanisms.cut.rule import CapturedActivation, CutRule
from fa_bench.mechanisms.feedback_options import density_option, init_option, within_option
from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@ALGORITHMS.register("drtp")
@dataclasses.dataclass(eq=False)
class DRTP(CutRule):
    """Direct random target projection: the labels are projected directly to every hidden activation.

    The rule is due to Frenkel, Lefebvre and Bol 2021.

    The error at a cut depends only on the labels. It is y B s / N, where y (N, C) are the one-hot labels, B (C, features of the
    cut) is fixed and random, s is the option `scale`, and N is the batch size. The output layer learns from its true gradient.
    Since the error does not depend on the network's output, a layer can be updated as soon as it has been evaluated. For the same
    reason, the error never vanishes. B does not decay.

    ``error_sign=true`` is sDFA: the error at a cut is sign(δ) B s / N, where δ = ∂L/∂z has the sign of output minus target. With
    the cross-entropy, sign(δ) is -1 for the label and +1 for every other class, unless a probability is rounded to 0 or 1.

    If the model's output has positions (tokens, pixels), each label is projected to its own position. All positions share one B
    (C, F), and N is the number of positions with a label. Positions whose label is ignored (-100 by default) get no error. At a
    cut with fewer positions, each position gets the sum of the errors that it covers. As in `dfa`, ``within=block`` places cuts
    only at the ends of the model's blocks, and the layers of each block learn by backpropagation from its end. There is no option
    ``error_at``, because labels exist only at the output.

    Our choices: the error is divided by N, like the error of the output layer. The paper's code divides only the error of the
    output layer by N, which corresponds to ``scale`` = N here. The sign of the error is that of the code; it makes no difference
    if the distribution of B is symmetric about zero. B is Kaiming-uniform, with the number of the cut's features as the fan
    (``b_init``); if ``density`` is below 1, a fixed mask sets entries of B to zero. If the loss is scaled, the error is scaled by
    the same factor.

    The paper uses tanh units (``architecture.activation=tanh``) and no batch normalisation. With unbounded units such as ReLU,
    the activations can grow without bound, because the error never vanishes. The cuts are those of `dfa`.
    """

    equations = (
        r"e_a &= \frac{s}{N} y B,\quad B \text{ fixed}",
        r"e_a &= \frac{s}{N} \operatorname{sign}(\delta) B \quad \text{for sDFA}",
    )

    search_space = {"scale": "tag(log,interval(0.1,100))"}

    b_init: str = init_option("B", "kaiming_uniform")
    density: float = density_option()
    scale: float = option(1.0, "factor of the error at every cut, in addition to one over the batch size", above=0)
    error_sign: bool = option(False, "project the sign of the output error instead of the labels (sDFA)")
    within: str = within_option()

    scales = True
    without_target = "error_sign=true"

    @property
    def needs_target(self) -> bool:
        return not self.error_sign

    def make_feedback(self, features: dict[str, tuple[int, ...]], classes: int) -> None:
        for cut, shape in features.items():
            self.put(cut, "B", self.b_init, (classes, math.prod(shape)), self.density)

    def signal(self, cut: str, captured: CapturedActivation, broadcast: Tensor, target: Tensor | None) -> Tensor:
        if self._layouts:
            return self._at_positions(cut, captured, broadcast, target)
        factor = self.scale * self.loss_factor / max(len(broadcast), 1)
        if self.error_sign:
            return self.project(cut, broadcast.sign() * factor, captured)
        assert target is not None
        # The one-hot labels select rows of B. These rows keep the precision of B even under autocast, because they do not depend
        # on δ.
        return self.in_shape(cut, self.matrix(cut, captured).index_select(0, target).mul_(factor), captured)

    def _at_positions(self, cut: str, captured: CapturedActivation, broadcast: Tensor, target: Tensor | None) -> Tensor:
        """The signal for an output with positions; positions without a label have no error and are not counted."""
        labelled = target != ignored_label(self.objective) if target is not None else broadcast.ne(0).any(-1)
        feedback = self.tensor(cut, "B")
        count = labelled.sum().clamp_min(1).to(torch.promote_types(feedback.dtype, torch.float32))
        factor = self.scale * self.loss_factor / count
        if self.error_sign:
            return self.project(cut, broadcast.sign() * factor, captured)
        assert target is not None
        rows = feedback.index_select(0, target.where(labelled, 0).flatten()).unflatten(0, target.shape)
        rows = rows * (labelled * factor).to(feedback.dtype).unsqueeze(-1)
        return self.in_shape(cut, self._layouts[cut].matched(rows, captured.shape), captured)
