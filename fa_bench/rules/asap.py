"""Activation sharing with asymmetric paths."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fa_bench.config.registries import ALGORITHMS
from fa_bench.mechanisms.sharing import SharingRule

if TYPE_CHECKING:
    from torch import nn

    from fa_bench.mechanisms.trace import Trace


@ALGORITHMS.register("asap")
@dataclasses.dataclass(eq=False)
class ASAP(SharingRule):
    """Activation sharing with asymmetric paths: an earlier activation enters the gradients of W and B.

    Algorithm 1, eqs 39-42 of Woo et al. 2021.

    e_in = g B; gradient of W = gradient of B = gᵀ h̃ (for convolutions the weight gradient of h̃ and g), where h̃ is an earlier
    activation shared by ``k`` layers, brought to the shape of the true input x by ``match``: activation s = 1 + k ⌊(p - 2)/k⌋
    stands in for activation p ≥ 2, counted from the stem's output. Layers that take activation 1 use it: there the rule is
    Kolen-Pollack. Biases and normalisation learn as usual. B (``b_init``) learns with W's optimizer, rate, momentum and
    decay.
    The first layer stays random (``freeze_stem``); its normalisation learns. Fully connected layers take their own input and a
    fixed B, uniform in [-1, 1) (``linear=fa``, ``linear_b_init``), as in the code behind the paper. ``match=random`` is a fixed
    random 1x1 convolution P in place of copies and pooling.

    ``transport=true`` carries the error by W in place of B in all convolutions and in every layer that shares, and in no other:
    as in that code, fully connected layers that take their own input keep their fixed B. To carry the error by the weights there
    too, name them in ``exclude``.

    Choices: a net without convolutions shares among its fully connected layers (``linear=auto``), the output layer's own
    gradient included, so that ``transport`` carries the error by the weights in all of them; features are matched by copies or
    pooling as channels are.
    """

    def kept_inputs(self, model: nn.Module, trace: Trace) -> list[str]:
        """The layers whose true inputs the updates need, one for each activation, in the order of execution.

        They are the first layers that take a shared activation, and those that take their own; the stem is fixed.
        """
        groups = self.sharing_groups(model, trace)
        shared = {groups[self.source_of(number) - 1][0] for number in range(2, len(groups) + 1)}
        sharers = {path for group in groups[1:] for path in group}
        firsts = [group[0] for group in trace.inputs[1:]]
        return [path for path in firsts if path in shared or path not in sharers]
