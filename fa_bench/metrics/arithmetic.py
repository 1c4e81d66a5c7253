"""The number of multiplications of a training step: those of matrix products and convolutions, counted while they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fa_bench.mechanisms.rule import Rule
from fa_bench.mechanisms.trace import loss_output
from fa_bench.registry.kinds import CLASSES, IMAGES, TOKENS, VALUES

#: Sizes of the batches that are run to determine the count at any batch size.
_BATCHES = (2, 3, 4)


class Counter(TorchDispatchMode):
    """Counts multiplications. FlopCounterMode of torch hooks modules and fails if gradients are computed in a backward pass."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out) // 2
        return out


def multiplications(step: Callable[[], None]) -> int:
    """The number of multiplications in the matrix products and convolutions of one step."""
    with Counter() as counter:
        step()
    return counter.total


def at_batch(counts: Sequence[int], batch: int) -> int:
    """The count for a batch of `batch` samples, from those for 2, 3 and 4.

    Exact if the count is a polynomial of the batch size of degree at most two: products with the batch grow linearly,
    similarities between samples quadratically, and steps on a rule's own noise are constant.
    """
    two, three, four = counts
    beyond = batch - _BATCHES[0]
    return two + beyond * (three - two) + beyond * (beyond - 1) // 2 * (four - 2 * three + two)


def step_multiplications(
    rule: Rule, input_shape: tuple[int, ...], classes: int, batch: int, inputs: str = IMAGES, targets: str = CLASSES
) -> tuple[int, int]:
    """Multiplications of one training step without the optimizer: (with the rule, with backpropagation in the same model).

    Runs small steps on random inputs, which change gradients, running statistics and random feedback, but no weights.

    Args:
        rule: an attached rule.
        input_shape: shape of one input, without the batch.
        classes: number of classes, of outputs, or of tokens.
        batch: the batch size of the step.
        inputs, targets: their kinds (`fa_bench.registry.kinds`).
    """
    device = next(rule.model.parameters()).device

    def step(samples: int, exact: bool) -> None:
        shape = samples, *input_shape
        x = torch.randint(classes, shape, device=device) if inputs == TOKENS else torch.randn(shape, device=device)
        if targets == VALUES:
            y = torch.randn(samples, classes, device=device)
        else:
            y = torch.arange(samples, device=device) % classes if targets == CLASSES else x % classes
        rule.model.zero_grad()
        logits = loss_output(rule.model(x), rule.loss_output)
        rule.backward(rule.objective.loss(logits, y), logits, y)
        if not exact:
            rule.step()

    rule.model.train()
    with rule.exact():
        reference = [multiplications(lambda n=samples: step(n, exact=True)) for samples in _BATCHES]
    with_rule = [multiplications(lambda n=samples: step(n, exact=False)) for samples in _BATCHES]
    return at_batch(with_rule, batch), at_batch(reference, batch)
