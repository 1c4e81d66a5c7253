"""Loss and scores over a whole split."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fa_bench.data.splits import Split
from fa_bench.mechanisms.contexts import evaluating
from fa_bench.mechanisms.trace import loss_output
from fa_bench.objectives.base import Objective

#: Least batch size of evaluation: it keeps no activations, so that larger batches hardly need more memory.
EVALUATION_BATCH = 512


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, objective: Objective, split: Split | None, batch_size: int,
    before_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Mean loss and scores over a whole split in evaluation mode, by name: ``loss``, ``accuracy`` (a fraction).

    Empty without samples. `before_batch` is called before every batch.
    """
    if split is None or len(split) == 0:
        return {}
    losses: list[Tensor] = []
    sums: dict[str, Tensor] = {}
    count: Any = 0
    with evaluating(model):
        for x, y in split.batches(max(batch_size, EVALUATION_BATCH)):
            before_batch()
            outputs = loss_output(model(x), objective.output)
            losses.append(objective.loss(outputs, y, reduction="sum"))
            count = count + objective.counted(y)
            add(sums, objective.sums(outputs, y))
    count = int(count)
    return with_scores(torch.stack(losses).sum().item() / max(count, 1), objective, sums, count, split)


def add(sums: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    """Add the sums of a batch to those of earlier ones, in place."""
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value


def with_scores(loss: float, objective: Objective, sums: Mapping[str, Tensor], count: int, split: Split) -> dict[str, float]:
    """The mean loss and the scores, by name, from sums over `count` targets of a split."""
    values = {name: value.tolist() for name, value in sums.items()}
    return {"loss": loss, **(objective.scored(values, loss, count, split.characters) if count else {})}
