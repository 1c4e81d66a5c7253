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
    """Activation sharing with asymmetric paths (ASAP): an earlier activation replaces a layer's input in the gradients of its W
    and B.

    The rule is Algorithm 1 of Woo et al. 2021 (eqs 39-42).

    The rule computes e_in = g B; gradient of W = gradient of B = gᵀ h̃ (for convolutions, the weight gradient for the input h̃
    and the error g). The activation h̃ comes from an earlier layer, and ``match`` resizes it to the shape of the true input x.
    Activations are numbered from 1, the stem's output, and activation s = 1 + k ⌊(p - 2)/k⌋ replaces activation p ≥ 2, so a
    shared activation replaces up to ``k`` others. Layers whose input is activation 1 use their own input, so they learn by
    Kolen-Pollack. Biases and normalisation layers learn as usual.

    B (``b_init``) learns with the optimizer, learning rate, momentum and decay of W. The first layer keeps its random weights
    (``freeze_stem``), but the normalisation after it learns. In networks with convolutions, fully connected layers use their own
    input and a fixed B that is uniform in [-1, 1), as in the paper's code (``linear=fa``, ``linear_b_init``). ``match=random``
    replaces copying and pooling with a fixed random 1x1 convolution P.

    ``transport=true`` replaces B with W in all convolutions and, if fully connected layers share activations, in these layers as
    well. Otherwise, fully connected layers keep their fixed B, as in the paper's code; to replace it with W, list the layers in
    ``exclude``.

    Our choices: in a network without convolutions, fully connected layers share activations (``linear=auto``), including the
    output layer, so ``transport`` applies to all layers. The features of fully connected layers are matched by copying or
    pooling.
    """

    equations = (
        r"e_{\text{in}} &= g B",
        r"\nabla_W = \nabla_B &= g^\top \tilde{h},\quad \tilde{h} \text{ computed from activation } s = 1 + k \lfloor (p - "
        r"2) / k \rfloor",
    )

    def step_memory(self, model: nn.Module, trace: Trace) -> StepMemory:
        """The layers whose tensors a training step keeps or reads. The updates need the shared activations and the inputs of
        layers that use their own input. The stem's input is not listed, because the stem is fixed by default."""
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
