"""External memory accesses of one training step (eqs 48 and 49 of Woo et al. 2021)."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fa_bench.mechanisms.trace import Trace, trace_model
from fa_bench.mechanisms.weighted_layers import weighted_layers
from fa_bench.registry.kinds import IMAGES, TOKENS

if TYPE_CHECKING:
    from fa_bench.mechanisms.rule import Rule

_AVERAGES = ("mean", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "avg_pool2d", "avg_pool3d")
_RELUS = ("relu", "leaky_relu", "hardtanh")
_BITS = 32


@dataclasses.dataclass(frozen=True)
class Memory:
    """The sizes that determine how many values a training step reads from and writes to memory; all sizes are in values, not
    bytes.

    Attributes:
        parameters: P, the number of values in ``model.parameters()``.
        activations: A, values per sample that are kept for the backward pass.
        feedback: number of values in feedback tensors that propagate an error.
        learned: number of those values that are learned.
        relus: number of outputs of ReLUs per sample.
    """

    parameters: int
    activations: int
    feedback: int = 0
    learned: int = 0
    relus: int = 0

    def accesses(self, batch: int, strict: bool = False) -> tuple[int, int]:
        """The (reads, writes) of one step with a batch of b samples, which are 2P + A b and P + A b.

        The forward pass reads P and writes A b (eq 48), and the backward pass reads P + A b and writes P (eq 49), so the total is
        3P + 2 A b. If `strict` is set, the counts include accesses that the paper omits: reading the feedback, writing its
        learned part, and one bit for every output of a ReLU. This bit is written in the forward pass and read in the backward
        pass; 32 bits count as one value.
        """
        reads, writes = 2 * self.parameters + self.activations * batch, self.parameters + self.activations * batch
        if not strict:
            return reads, writes
        masks = math.ceil(self.relus * batch / _BITS)
        return reads + self.feedback + masks, writes + self.learned + masks


def memories(
    model: nn.Module, input_shape: tuple[int, ...], rule: Rule | None = None, inputs: str = IMAGES
) -> tuple[Memory, Memory | None]:
    """The sizes for backpropagation in a plain model, and those for a rule (None without a rule or if its `step_memory` returns
    None).

    The sizes are obtained from a forward pass of one sample on the model's device. On the device ``meta``, this forward pass is
    cheap.

    Backpropagation keeps the output of every layer, and each output is counted once. Here, the output of a weighted layer is the
    activation after normalisation, nonlinearity, addition and max-pooling, that is, the input of the next layers. Average pooling
    counts as a layer that keeps its input. The logits are also counted, but the input of the model is not. A rule keeps the
    logits and the inputs that its `step_memory` lists.

    Args:
        model: a plain model.
        input_shape: shape of one input, without the batch.
        rule: a rule that is not attached.
        inputs: the kind of the inputs (`fa_bench.registry.kinds`).

    Raises:
        CoverageError: if the rule cannot be attached to the model.
    """
    device, dtype = next(model.parameters()).device, torch.int64 if inputs == TOKENS else torch.float32
    with _Watch() as watch:
        trace = trace_model(model, torch.zeros(1, *input_shape, device=device, dtype=dtype))
    parameters, logits = sum(p.numel() for p in model.parameters()), math.prod(trace.result_shape)
    kept = _inputs(trace, [group[0] for group in trace.inputs[1:]])
    reference = Memory(parameters, kept + watch.averaged() + logits, relus=watch.relus)
    step = None if rule is None else rule.step_memory(model, trace)
    if step is None:
        return reference, None
    sizes = {path: layer.weight.numel() for path, layer in weighted_layers(model).items()}
    feedback, learned = (sum(sizes[path] for path in paths) for paths in (step.feedback, step.learned))
    return reference, Memory(parameters, _inputs(trace, step.inputs) + logits, feedback, learned, watch.relus)


def _inputs(trace: Trace, layers: list[str]) -> int:
    return sum(math.prod(trace.input_shapes[path]) for path in layers)


class _Watch(TorchDispatchMode):
    """Counts values that cannot be derived from the inputs of layers: the values in maps that are averaged, and the outputs of
    ReLUs."""

    def __init__(self) -> None:
        super().__init__()
        self.relus = 0
        self._averaged: dict[int, int] = {}
        self._convolved: set[int] = set()
        self._alive: list[Tensor] = []

    def averaged(self) -> int:
        """The number of values in maps that are averaged but are not the input of a convolution."""
        return sum(size for storage, size in self._averaged.items() if storage not in self._convolved)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        operation = func._schema.name.removeprefix("aten::").strip("_")
        if operation in _RELUS:
            self.relus += out.numel()
        elif operation == "convolution" or (operation in _AVERAGES and args[0].dim() > 2 and out.numel() < args[0].numel()):
            self._alive.append(args[0])  # no other tensor may reuse its storage
            storage = args[0].untyped_storage()._cdata
            if operation == "convolution":
                self._convolved.add(storage)
            else:
                self._averaged[storage] = args[0].numel()
        return out
