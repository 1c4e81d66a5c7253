"""External memory accesses of one training step (eqs 48 and 49 of Woo et al. 2021)."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fa_bench.mechanisms.layers import weighted_layers
from fa_bench.mechanisms.trace import Trace, trace_model

if TYPE_CHECKING:
    from fa_bench.mechanisms.rule import Rule
    from fa_bench.rules.asap import ASAP

_AVERAGES = ("mean", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "avg_pool2d", "avg_pool3d")
_RELUS = ("relu", "leaky_relu", "hardtanh")
_BITS = 32


@dataclasses.dataclass(frozen=True)
class Memory:
    """What a training step reads from and writes to memory; values, not bytes.

    Attributes:
        parameters: P, numbers in ``model.parameters()``.
        activations: A, values a sample that are kept for the backward pass.
        feedback: values of B that carry an error.
        learned: those of them that learn.
        relus: values a sample that come out of a ReLU.
    """

    parameters: int
    activations: int
    feedback: int = 0
    learned: int = 0
    relus: int = 0

    def accesses(self, batch: int, strict: bool = False) -> tuple[int, int]:
        """(reads, writes) of one step: 2P + A b and P + A b.

        The forward pass reads P and writes A b (eq 48), the backward pass reads P + A b and writes P (eq 49): 3P + 2 A b in all.
        `strict` adds what the paper leaves out: reading B and writing what learns of it, and one bit for every output of a ReLU,
        32 to a value, written in the forward and read in the backward pass.
        """
        reads, writes = 2 * self.parameters + self.activations * batch, self.parameters + self.activations * batch
        if not strict:
            return reads, writes
        masks = math.ceil(self.relus * batch / _BITS)
        return reads + self.feedback + masks, writes + self.learned + masks


def memory_of(model: nn.Module, input_shape: tuple[int, ...], rule: ASAP | None = None) -> Memory:
    """Counts for a plain model, from one forward pass of one sample on the model's device; ``meta`` costs next to nothing.

    Backpropagation keeps the output of every layer, counted once: of a weighted layer behind its normalisation, nonlinearity,
    addition and max-pooling, which is what enters the next ones; of average pooling, which counts as a layer; and the logits. The
    image is not counted. asap keeps its shared activations, the inputs of layers that take their own, and the logits.

    Args:
        model: a plain model.
        input_shape: shape of one input, without the batch.
        rule: asap, in no model; None for backpropagation.

    Raises:
        CoverageError: where asap has nothing to share in the model.
    """
    device = next(model.parameters()).device
    with _Watch() as watch:
        trace = trace_model(model, torch.zeros(1, *input_shape, device=device))
    parameters, logits = sum(p.numel() for p in model.parameters()), math.prod(trace.result_shape)
    if rule is None:
        kept = [group[0] for group in trace.inputs[1:]]
        return Memory(parameters, _inputs(trace, kept) + watch.averaged() + logits, relus=watch.relus)
    sizes = {path: layer.weight.numel() for path, layer in weighted_layers(model).items()}
    learned = {path for group in rule.sharing_groups(model, trace) for path in group}
    by_weight = rule.weight_transport_layers(model)
    return Memory(
        parameters,
        _inputs(trace, rule.saved_inputs(model, trace)) + logits,
        sum(sizes[path] for path in trace.reached if path not in by_weight),
        sum(sizes[path] for path in learned - by_weight),
        watch.relus,
    )


def memories(model: nn.Module, input_shape: tuple[int, ...], rule: Rule) -> dict[str, Memory]:
    """Backpropagation's counts in a plain model and, where the paper says what the rule keeps, the rule's, by name.

    Args:
        model, input_shape: as for `memory_of`.
        rule: in no model.
    """
    from fa_bench.rules.asap import ASAP

    found = {"bp": memory_of(model, input_shape)}
    return found | {rule.name: memory_of(model, input_shape, rule)} if isinstance(rule, ASAP) else found


def _inputs(trace: Trace, layers: list[str]) -> int:
    return sum(math.prod(trace.input_shapes[path]) for path in layers)


class _Watch(TorchDispatchMode):
    """Notes what no layer's input shows: maps that are averaged, and the sizes of ReLUs."""

    def __init__(self) -> None:
        super().__init__()
        self.relus = 0
        self._averaged: dict[int, int] = {}
        self._convolved: set[int] = set()
        self._alive: list[Tensor] = []

    def averaged(self) -> int:
        """Values in maps that are averaged and enter no convolution besides."""
        return sum(size for storage, size in self._averaged.items() if storage not in self._convolved)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        operation = func._schema.name.removeprefix("aten::").strip("_")
        if operation in _RELUS:
            self.relus += out.numel()
        elif operation == "convolution" or (operation in _AVERAGES and args[0].dim() > 2 and out.numel() < args[0].numel()):
            self._alive.append(args[0])  # so that no other tensor gets its storage
            storage = args[0].untyped_storage()._cdata
            if operation == "convolution":
                self._convolved.add(storage)
            else:
                self._averaged[storage] = args[0].numel()
        return out
