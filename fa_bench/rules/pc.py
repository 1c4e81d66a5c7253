"""Predictive coding."""

from __future__ import annotations

import dataclasses

from fa_bench.mechanisms.cut.energy import EnergyRule
from fa_bench.registry.registries import ALGORITHMS


@ALGORITHMS.register("pc")
@dataclasses.dataclass(eq=False)
class PC(EnergyRule):
    """Predictive coding: the states between the blocks are optimised first, and then each block learns to predict the state at
    its end.

    The rule has the form of PCX (Pinchetti et al. 2025, arXiv 2407.01163), which is based on Whittington and Bogacz 2017. Let s_l
    be the state at the end of block l, f_l the block's function and L the loss of a sample or, as an index, the number of blocks.
    The following equation defines the energy of N samples:

        E = Σ_n [ Σ_l ½‖s_l - f_l(s_{l-1})‖² + L(f_L(s_{L-1})) ],    s_0 = x.

    The states start from those of the forward pass, where E is the sum of the losses. With e_l = s_l - f_l(s_{l-1}), they take
    `steps` gradient steps with step size η (`rate`) and momentum μ (`momentum`):

        v_l ← μ v_l + ∂E/∂s_l,    ∂E/∂s_l = e_l - (∂f_{l+1}/∂s_l)ᵀ e_{l+1},    s_l ← s_l - η v_l.

    For the last state, the gradient of L at the output replaces -e_{l+1}. The update of a state depends only on its neighbours,
    so errors move by one block per step; with fewer steps than states, the first blocks do not learn. Then every block learns
    from the gradient of E / N with the states fixed, -e_lᵀ ∂f_l(s_{l-1})/∂W_l / N, and the output layer learns from the gradient
    of the loss at the final state. `epc` has the same minima, and its errors reach all blocks in the first step.

    **When this is backpropagation.** After a few small steps without momentum, the error d blocks before the last cut is -(T
    choose d + 1) η^(d + 1) times the error of backpropagation, to leading order in η, where T is the number of steps. Each hidden
    layer then learns from the gradient of backpropagation times a constant factor, which Adam cancels, as in `epc`. Coverage
    includes a note if a constant gradient of length 1 would move a state by less than 0.1 (T η without momentum).
    ``probes=[energy]`` measures how far the states have converged, and the cosine between each layer's gradient and that of
    backpropagation.

    Far from the last cut, these errors can fall below the rounding error of the states, which is about 1e-7 times their size in
    single precision. We measured this with four hidden layers of 128 GELU units, initial weights and random data, for 5 steps of
    0.0183 with momentum 0.35. The gradient of the first layer was 7e-7 times that of backpropagation, and its cosine to the same
    gradient in double precision was only 0.25. This problem does not occur in `epc`, which stores the errors instead of the
    states.

    The blocks are those that the model declares, or those that end at `cuts`. Within a step, no error passes through more than
    one block. The derivatives of a block are exact, however, so the rule uses weight transport within blocks, even if a block has
    only one layer.

    We took the equations from the code of PCX and derived the rest ourselves; we did not check them against a paper. Nudged
    outputs, weight updates in every step (iPC) and the scaling of μPC are not implemented. The default of 20 steps of 0.1 without
    momentum is our choice. The MNIST network of PCX uses 5 steps of 0.0183 with momentum 0.35, and the VGG-5 of PCX uses 8 steps
    of 0.0266 in the code of the `epc` paper. E is a sum over samples, so the optimisation of the states does not depend on the
    batch size. If the output has positions, E is also a sum over positions.

    Since the rule delivers no errors at activations, there are no delta angles; ``probes=[energy]`` compares gradients instead.

    Dropout masks are the same in all passes. Batch normalisation uses the statistics of each pass, so the samples of a batch are
    not independent. The running statistics are updated only in the first pass. An update needs T + 1 additional forward passes
    and T + 1 backward passes; T of the backward passes compute only the gradients of the states, and one computes only those of
    the weights.
    """

    equations = (
        r"E &= \sum_n \left[\sum_l \tfrac{1}{2} \lVert e_l \rVert^2 + L(f_L(s_{L-1}))\right],\quad e_l = s_l - "
        r"f_l(s_{l-1}),\quad s_0 = x",
        r"v_l &\leftarrow \mu v_l + \frac{\partial E}{\partial s_l},\quad \frac{\partial E}{\partial s_l} = e_l - "
        r"\left(\frac{\partial f_{l+1}}{\partial s_l}\right)^\top e_{l+1},\quad s_l \leftarrow s_l - \eta v_l",
        r"\nabla_{W_l} &= -\frac{1}{N} e_l^\top \frac{\partial f_l(s_{l-1})}{\partial W_l}",
    )

    search_space = {"steps": "choice(5,20,80)", "rate": "tag(log,interval(0.01,0.5))", "momentum": "choice(0,0.5)"}

    moves_states = True
    learns_beside_output = True  # a state that does not affect the output lags behind its prediction, so it has an error
