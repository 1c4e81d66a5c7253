"""Activation sharing with asymmetric paths."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fa_bench.mechanisms.edge.sharing import SharingRule
from fa_bench.registry.registries import ALGORITHMS

if TYPE_CHECKING:
    from torch import nn

    from fa_bench.mechanisms.trace import StepMemory, Trace


@ALGORITHMS.register("asap")
@dataclasses.dataclass(eq=False)
class ASAP(SharingRule):
    """Activation sharing with asymmetric paths: an earlier activation replaces the layer's input in the gradients of W and B.

    Algorithm 1, eqs 39-42 of Woo et al. 2021.

    e_in = g B; gradient of W = gradient of B = gᵀ h̃ (for convolutions, the weight gradient of h̃ and g). h̃ is an earlier
    activation that ``k`` layers share; ``match`` resizes it to the shape of the true input x. Counted from the stem's output,
    activation s = 1 + k ⌊(p - 2)/k⌋ replaces activation p ≥ 2. Layers whose input is activation 1 use their own input, so for
    them the rule is Kolen-Pollack. Biases and normalisation learn as usual. B (``b_init``) learns with W's optimizer, learning
    rate, momentum and decay. The first layer stays random (``freeze_stem``); its normalisation learns. Fully connected layers use
    their own input and a fixed B that is uniform in [-1, 1) (``linear=fa``, ``linear_b_init``), as in the paper's code.
    ``match=random`` replaces copying and pooling with a fixed random 1x1 convolution P.

    ``transport=true`` replaces B with W in all convolutions and in every layer that uses a shared activation. As in the paper's
    code, fully connected layers that use their own input keep their fixed B; to use the weights there as well, list them in
    ``exclude``.

    Choices: in a net without convolutions, the fully connected layers share activations (``linear=auto``), including the output
    layer, so ``transport`` uses the weights in all of them. Features are matched by copying or pooling, like channels.
    """

    equations = (
        r"e_{\text{in}} &= g B",
        r"\nabla_W = \nabla_B &= g^\top \tilde{h},\quad \tilde{h} \text{ computed from activation } s = 1 + k \lfloor (p - "
        r"2) / k \rfloor",
    )

    def step_memory(self, model: nn.Module, trace: Trace) -> StepMemory:
        """The updates need the shared activations and the inputs of layers that do not share; the stem is fixed."""
        from fa_bench.mechanisms.trace import StepMemory

        groups = self.sharing_groups(model, trace)
        shared = {groups[self.source_of(number) - 1][0] for number in range(2, len(groups) + 1)}
        sharers = {path for group in groups[1:] for path in group}
        transporting = self.weight_transport_layers(model)
        return StepMemory(
            inputs=[path for path, *_ in trace.inputs[1:] if path in shared or path not in sharers],
            feedback=[path for path in trace.reached if path not in transporting],
            learned=[path for group in groups for path in group if path not in transporting],
        )
