"""Direct Kolen-Pollack."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fa_bench.mechanisms.cut.learned import LearnedCutRule
from fa_bench.mechanisms.cut.rule import CapturedActivation
from fa_bench.mechanisms.feedback_options import density_option, error_at_option, init_option, positions_option, within_option
from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS

if TYPE_CHECKING:
    from torch import Tensor


@ALGORITHMS.register("dkp")
@dataclasses.dataclass(eq=False)
class DKP(LearnedCutRule):
    """Direct Kolen-Pollack: direct feedback is trained as a readout of the activations.

    The rule is given by eqs 3, 7 and 8 of "Learning the connections in direct feedback alignment".

    δ = ∂L/∂z of shape (N, C) is the error at the logits. The error at a cut is δ B, as in direct feedback alignment, with B of
    shape (C, features of the cut), and B learns from the following gradient:

        gradient of B = δᵀ a,    where a (N, features) is the flattened activation at the cut.

    B is thus a linear readout of the activation a, trained on the network's output error, and a Bᵀ aligns with the logits. At the
    last hidden activation, the gradient of B is that of the output layer's weight.

    If δ has positions (tokens, pixels), all of them share one B (C, F), and its gradient is the sum of δᵀ a over samples and
    positions. The options `within`, `error_at` and `positions` are those of `dfa`. With `error_at`, a Bᵀ aligns with the output
    of the selected module. With ``positions=shared``, the gradient of B is δᵀ times the sum of a over its positions.

    B needs a much lower learning rate than W, because training can diverge otherwise. To give B its own optimizer, schedule and
    decay, use ``optimizer@feedback_optimizer=sgd feedback_optimizer.lr=1e-4 ...``. Otherwise, B shares the optimizer and the
    decay of W, and `b_lr_scale` sets its learning rate relative to that of W; 0 gives direct feedback alignment. For a network
    with two convolutions, the paper trains W and B by SGD with Nesterov momentum 0.9 and decay 1e-6. The learning rate is 1e-2
    for W and 1e-4 for B; the latter is multiplied by 0.85 after every epoch. For AlexNet, the paper uses a decay of 1e-4, a
    learning rate of 1e-2 for W, and Adam with a learning rate of 5e-4 for B.

    As in the paper, B is initially Kaiming-uniform, with the number of the cut's features as the fan; for AlexNet, the paper's
    code uses ``b_init=zeros``. The default ``b_lr_scale`` of 0.01 is the ratio of the paper's learning rates for the network with
    two convolutions. If `density` is below 1, a fixed mask sets entries of B to zero and is reapplied after every update. In the
    paper, training diverged without batch normalisation.
    """

    equations = (
        r"e_a &= \delta B",
        r"\nabla_B &= \delta^\top a",
    )

    search_space = {"b_lr_scale": "tag(log,interval(1e-3,1))"}

    b_init: str = init_option("B", "kaiming_uniform")
    b_lr_scale: float = option(0.01, "learning rate of B relative to that of W, unless B has its own optimizer", minimum=0)
    density: float = density_option()
    within: str = within_option()
    error_at: str | None = error_at_option()
    positions: str = positions_option()

    reads_values = True

    def make_feedback(self, features: dict[str, tuple[int, ...]], classes: int) -> None:
        self.put_learned(features, classes, self.b_init, self.density)

    def feedback_gradients(
        self, cut: str, captured: CapturedActivation, delta: Tensor, target: Tensor | None
    ) -> list[Tensor | None]:
        dtype = self.tensor(cut, "B").dtype
        activation = captured.tensor
        if self._layouts:
            delta, activation = self._layouts[cut].pairs(delta.to(dtype), activation.to(dtype))
        return [_product(delta.to(dtype), activation.to(dtype))]


def _product(delta: Tensor, activation: Tensor) -> Tensor:
    """The product δᵀ a (C, F) of δ (N, C) and an activation a (N, ...) with F features."""
    if activation.dim() != 4 or activation.is_contiguous():
        return delta.t().mm(activation.flatten(1))
    # Compiled graphs may store feature maps with their channels last. The product is reordered instead of the map, which is many
    # times larger.
    last = activation.movedim(1, -1)
    return delta.t().mm(last.flatten(1)).unflatten(1, last.shape[1:]).movedim(-1, 1).flatten(1)
