"""Predictive coding."""

from __future__ import annotations

import dataclasses

from fa_bench.mechanisms.cut.energy import EnergyRule
from fa_bench.registry.registries import ALGORITHMS


@ALGORITHMS.register("pc")
@dataclasses.dataclass(eq=False)
class PC(EnergyRule):
    """Predictive coding: the states between the blocks settle, and each block learns to predict the state after it.

    The form of PCX (Pinchetti et al. 2025, arXiv 2407.01163), after Whittington and Bogacz 2017. With s_l the state at the end
    of block l, f_l its function and L the loss of a sample, the energy of N samples is

        E = Σ_n [ Σ_l ½‖s_l - f_l(s_{l-1})‖² + L(f_L(s_{L-1})) ],    s_0 = x.

    From the states of the forward pass, where E is the loss, `steps` steps with step size η (`rate`) and momentum μ (`momentum`),
    with e_l = s_l - f_l(s_{l-1}):

        v_l ← μ v_l + ∂E/∂s_l,    ∂E/∂s_l = e_l - (∂f_{l+1}/∂s_l)ᵀ e_{l+1},    s_l ← s_l - η v_l;

    the last state has the error of the loss in place of -e_L. A state sees its neighbours only: an error moves by one block in
    a step, and with fewer steps than blocks the first ones do not learn. Then every block learns by the gradient of E / N with
    the states fixed, -e_lᵀ ∂f_l(s_{l-1})/∂W_l / N, and the output layer by that of the loss at the settled state. `epc` has the
    same minima, and reaches all blocks in its first step.

    **When this is backpropagation.** After few small steps the error d blocks before the last cut is -(T choose d + 1) η^(d + 1)
    times the error of backpropagation, to leading order in η, with T the number of steps: each hidden layer learns by
    backpropagation's gradient times a number, which Adam removes, as in `epc`. Coverage has a note where T η is below 0.1, and
    ``probes=[energy]`` measures how far the states have settled and the cosine of each layer's gradient to backpropagation's.

    The product is soon below the rounding of the states, 1e-7 of them in single precision: with 5 steps of 0.0183 and momentum
    0.35 the first of four hidden layers (128 GELU units each, initial weights, random data) had 7e-7 times the gradient of
    backpropagation, and a cosine of only 0.25 to the same in double precision. `epc` stores errors, and does not lose them.

    Blocks are those that the model declares, or end at `cuts`. No error passes from one block to the next within a step, but
    the derivatives of a block are exact: weights are transported within blocks, even if a block has a single layer.

    Not checked against a paper: the equations come from the code and a derivation. Nudged outputs, weight updates in every
    step (iPC) and the scaling of μPC are not included. Choices: 20 steps of 0.1 without momentum; the MNIST net of PCX has
    5 of 0.0183 with momentum 0.35, and its VGG-5 in the error-based paper's code has 8 of 0.0266. E sums over samples, so that
    settling does not depend on the batch's size, and over positions where the output has them.

    Dropout masks are the same in all passes. Batch normalisation uses each pass's own statistics, which couples the samples of a
    batch, and updates the running ones in the first pass. Multiplications: T + 1 further forward passes and T + 1 backward
    passes, of which T are for the states alone and one for the weights alone.
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
    learns_beside_output = True  # states there do not follow those before them at once
