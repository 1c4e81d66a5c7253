"""Computes the loss and the scores over a whole split."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fa_bench.data.splits import Split
from fa_bench.mechanisms.contexts import evaluating
from fa_bench.mechanisms.trace import loss_output
from fa_bench.objectives.base import Objective

#: Minimum batch size of evaluation. It may exceed the batch size of training, because evaluation keeps no activations for a
#: backward pass.
EVALUATION_BATCH = 512


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    objective: Objective,
    split: Split | None,
    batch_size: int,
    before_batch: Callable[[], None] = lambda: None,
    share: Callable[[int], Tensor] | None = None,
    gather: Callable[[Any], list[Any]] = lambda value: [value],
    predict: Callable[..., Any] | None = None,
) -> dict[str, float]:
    """The mean loss and the scores over a whole split in evaluation mode, by name, such as ``loss`` and ``accuracy`` (a
    fraction).

    The result is empty if there are no samples.

    Args:
        model, objective, split, batch_size: the model, its objective, the split to evaluate it on, and the run's batch size.
        before_batch: called before every batch.
        share: the positions of the samples that this process evaluates in a batch of the given size; None: all.
        predict: computes the outputs of a batch; None: the model.
        gather: collects a value from every process; returns them in the order of the processes.
    """
    if split is None or len(split) == 0:
        return {}
    losses: list[Tensor] = []
    sums: dict[str, Tensor] = {}
    count: Any = 0
    batch_size = max(batch_size, EVALUATION_BATCH)
    remaining = split.steps(batch_size)
    with evaluating(model):
        for x, y in split.batches(batch_size, share=share):
            before_batch()
            remaining -= 1
            outputs = loss_output((predict or model)(x), objective.output)
            losses.append(objective.loss(outputs, y, reduction="sum"))
            count = count + objective.counted(y)
            add(sums, objective.sums(outputs, y))
    for _ in range(remaining):  # other processes have batches in which this one has no samples
        before_batch()
    loss, total, totals = 0.0, 0, dict[str, Tensor]()
    for of_process in gather(
        (torch.stack(losses).sum().item() if losses else 0.0, int(count), {name: value.cpu() for name, value in sums.items()})
    ):
        loss, total = loss + of_process[0], total + of_process[1]
        add(totals, of_process[2])
    return with_scores(loss / max(total, 1), objective, totals, total, split)


def add(sums: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    """Add the values of `more` to those of `sums` with the same names, in place."""
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value


def with_scores(loss: float, objective: Objective, sums: Mapping[str, Tensor], count: int, split: Split) -> dict[str, float]:
    """The mean loss and the scores by name, computed from sums over `count` targets of a split."""
    values = {name: value.tolist() for name, value in sums.items()}
    scores = objective.scored(values, loss, count, split.characters) if count else {}
    # A plugin may return numbers of NumPy, which checkpoints cannot contain.
    return {"loss": loss, **{name: value.item() if isinstance(value, np.generic) else value for name, value in scores.items()}}
