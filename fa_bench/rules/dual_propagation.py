"""Dual propagation."""

from __future__ import annotations

import dataclasses

from fa_bench.mechanisms.edge.pathways import FeedbackPathway, TransposeFeedback
from fa_bench.mechanisms.edge.rule import EdgeRule, LayerContext
from fa_bench.mechanisms.feedback_options import beta_option, derivative_option
from fa_bench.registry.registries import ALGORITHMS


@ALGORITHMS.register("dual_propagation")
@dataclasses.dataclass(eq=False)
class DualPropagation(EdgeRule):
    """Dual propagation: errors pass through the weights, with a finite difference in place of the derivative of every
    nonlinearity.

    Høier, Staudt and Zach 2023 (arXiv 2302.01228), in the form of the authors' code for convolutional nets.

    e_in = g W. A nonlinearity φ with the input a and the error g at its output passes on

        g_in = (φ(a + β s g) - φ(a - β s g)) / (2 β s),    s = N / c

    for N samples and a loss that is c times the mean of their losses, so s g is the error of a sample's own loss. Gradients
    of W and b are those of backpropagation with these errors; pooling, normalisation and softmax have exact derivatives. With
    ``beta`` → 0, and for linear φ with every ``beta``, this is backpropagation; for ReLU and β s |g| ≥ |a| the slope tends to 1/2
    on both sides.

    ``derivative=dual`` does the same in every rule that passes errors through feedback in each layer; ``kp`` with this option is
    KP-DP. ``derivative=exact`` makes this rule `bp`.

    Choices: the code differentiates the mean loss with β = 1 and without s, so its finite difference depends on the batch size.
    Its setting corresponds to ``beta`` = 1/N here, and the default is the value for its batches of 100. Every elementwise module
    of torch.nn is covered, not only ReLU; nonlinear functions outside of modules, such as those of `nn.LSTM`, are refused. The
    equations were taken from the code and were not compared with the paper, whose accuracies have not been reproduced.
    """

    equations = (
        r"e_{\text{in}} &= g W",
        r"g_{\text{in}} &= \frac{\varphi(a + \beta s g) - \varphi(a - \beta s g)}{2 \beta s},\quad s = \frac{N}{c}",
    )

    search_space = {"beta": "choice(0.01,0.1,1)"}

    derivative: str = derivative_option("dual", identifying=True)
    beta: float = beta_option(identifying=True)

    def pathway(self, layer: LayerContext) -> FeedbackPathway:
        return TransposeFeedback()
