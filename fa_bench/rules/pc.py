"""Predictive coding."""

from __future__ import annotations

import dataclasses

from fa_bench.mechanisms.cut.energy import EnergyRule
from fa_bench.registry.registries import ALGORITHMS


@ALGORITHMS.register("pc")
@dataclasses.dataclass(eq=False)
class PC(EnergyRule):
    """Predictive coding: the states between the blocks settle, and each block learns to predict the state after it.

    The form of PCX (Pinchetti et al. 2025, arXiv 2407.01163), after Whittington and Bogacz 2017. Let s_l be the state at the end
    of block l, f_l the block's function and L the loss of a sample. The energy of N samples is

        E = Σ_n [ Σ_l ½‖s_l - f_l(s_{l-1})‖² + L(f_L(s_{L-1})) ],    s_0 = x.

    Beginning with the states of the forward pass, where E is the loss, there are `steps` steps with step size η (`rate`) and
    momentum μ (`momentum`), with e_l = s_l - f_l(s_{l-1}):

        v_l ← μ v_l + ∂E/∂s_l,    ∂E/∂s_l = e_l - (∂f_{l+1}/∂s_l)ᵀ e_{l+1},    s_l ← s_l - η v_l;

    for the last state, the error of the loss replaces -e_L. A state depends only on its neighbours, so an error moves by one
    block per step; with fewer steps than blocks, the first blocks do not learn. Then every block learns from the gradient of E /
    N with the states fixed, -e_lᵀ ∂f_l(s_{l-1})/∂W_l / N, and the output layer learns from the gradient of the loss at the
    settled state. `epc` has the same minima and reaches all blocks in its first step.

    **When this is backpropagation.** After a few small steps, the error d blocks before the last cut is -(T choose d + 1) η^(d +
    1) times the error of backpropagation, to leading order in η, where T is the number of steps. Each hidden layer then learns
    from backpropagation's gradient times a number, which Adam cancels, as in `epc`. Coverage has a note if T η is below 0.1, and
    ``probes=[energy]`` measures how far the states have settled and the cosine between each layer's gradient and
    backpropagation's.

    This error soon falls below the rounding error of the states, a relative 1e-7 in single precision. With 5 steps of 0.0183 and
    momentum 0.35, the first of four hidden layers (128 GELU units each, initial weights, random data) had 7e-7 times the gradient
    of backpropagation, and its cosine to the same gradient in double precision was only 0.25. `epc` stores the errors themselves,
    so it does not have this problem.

    The blocks are those that the model declares, or those that end at `cuts`. No error passes from one block to the next within
    a step, but the derivatives of a block are exact, so weights are transported within blocks, even if a block has a single
    layer.

    Not checked against a paper: the equations come from the code and a derivation. Nudged outputs, weight updates in every step
    (iPC) and the scaling of μPC are not included. Choices: the default is 20 steps of 0.1 without momentum; the MNIST net of PCX
    uses 5 steps of 0.0183 with momentum 0.35, and its VGG-5 in the error-based paper's code uses 8 steps of 0.0266. E sums over
    samples, so settling does not depend on the batch size, and over positions if the output has them.

    The rule delivers no errors at activations, so there are no delta angles; ``probes=[energy]`` compares gradients instead.

    Dropout masks are the same in all passes. Batch normalisation uses each pass's own statistics, which couples the samples of a
    batch, and updates its running statistics in the first pass. Multiplications: T + 1 additional forward passes and T + 1
    backward passes. Of the backward passes, T are only for the states and one is only for the weights.
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
    learns_beside_output = True  # states there do not change at once with those before them
