"""Predictive coding, formulated in terms of errors."""

from __future__ import annotations

import dataclasses

from fa_bench.mechanisms.cut.energy import EnergyRule
from fa_bench.registry.registries import ALGORITHMS


@ALGORITHMS.register("epc")
@dataclasses.dataclass(eq=False)
class EPC(EnergyRule):
    """Error-based predictive coding: the errors between the blocks are optimised first, and then each block learns from its own
    error.

    The rule is due to Goemaere, Oliviers, Bogacz and Demeester, arXiv 2505.20137. Let s_l be the state at the end of block l, f_l
    the block's function and L the loss of a sample or, as an index, the number of blocks. The following equation defines the
    energy of N samples:

        E = Σ_n [ Σ_l ½‖e_l‖² + L(f_L(s_{L-1})) ],    s_l = f_l(s_{l-1}) + e_l,    s_0 = x.

    The errors start from zero, where E is the sum of the losses. They are then updated by `steps` steps of gradient descent on E,
    with step size η (`rate`) and momentum μ (`momentum`):

        v_l ← μ v_l + ∂E/∂e_l,    e_l ← e_l - η v_l.

    The derivative ∂E/∂e_l is e_l plus the error that backpropagation passes from the loss to s_l through all later blocks, so
    each step needs exact reverse-mode differentiation of the whole network. Then every block learns from the gradient of E / N
    with the states fixed, -e_lᵀ ∂f_l(s_{l-1})/∂W_l / N, and the output layer learns from the gradient of the loss at the final
    state. In `pc`, the states are optimised instead of the errors; the minima are the same.

    **When this is backpropagation.** After a few small steps without momentum, e_l = -T η ∂L/∂s_l + O(η²), where T is the number
    of steps. Every hidden layer then learns from the gradient of backpropagation times T η, and the output layer from the
    unscaled gradient. With T = 5 and η = 0.001, the values in the paper's code for CIFAR-10, the factor is 0.005, which Adam
    cancels. With Adam, such a run is backpropagation except for the effect of Adam's ε. With SGD, it is backpropagation with a
    relatively high learning rate in the output layer. With ``steps=1 rate=1``, the gradient of the first block is exactly that of
    backpropagation. Coverage includes a note if a constant gradient of length 1 would move an error by less than 0.1 (T η without
    momentum). ``probes=[energy]`` measures how far the errors have converged, and the cosine between each layer's gradient and
    that of backpropagation. Accuracies close to those of `bp` mean nothing without these measurements.

    The blocks are those that the model declares, or those that end at `cuts`. The rule uses weight transport within every block
    and, because each step differentiates the whole network, also between blocks.

    The equations come from the paper's code and a derivation; we did not check them against the text of the paper. Our choices:
    the default is 20 steps of 0.1, whereas the paper's code uses 5 steps of 0.001 for CIFAR-10 and 64 to 256 steps of 0.1 to 0.3
    for MNIST. Without momentum, the optimisation of the errors is stable while η times the largest curvature of E is below 2. E
    is a sum over samples, so this optimisation does not depend on the batch size. If the output has positions, E is also a sum
    over positions.

    Since the rule delivers no errors at activations, there are no delta angles; ``probes=[energy]`` compares gradients instead.

    Dropout masks are the same in all passes. Batch normalisation uses the statistics of each pass, so the samples of a batch are
    not independent. The running statistics are updated only in the first pass. An update needs T + 1 additional forward passes
    and T + 1 backward passes; T of the backward passes compute only the gradients of the errors, and one computes only those of
    the weights.
    """

    equations = (
        r"E &= \sum_n \left[\sum_l \tfrac{1}{2} \lVert e_l \rVert^2 + L(f_L(s_{L-1}))\right],\quad s_l = f_l(s_{l-1}) "
        r"+ e_l,\quad s_0 = x",
        r"v_l &\leftarrow \mu v_l + \frac{\partial E}{\partial e_l},\quad e_l \leftarrow e_l - \eta v_l",
        r"\nabla_{W_l} &= -\frac{1}{N} e_l^\top \frac{\partial f_l(s_{l-1})}{\partial W_l}",
    )

    search_space = {"steps": "choice(5,20,80)", "rate": "tag(log,interval(0.01,0.5))"}
