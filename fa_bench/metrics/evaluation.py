"""Loss and accuracy over a whole split."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fa_bench.data.base import Split
from fa_bench.mechanisms.trace import evaluating
from fa_bench.objectives.base import Objective

#: Least batch size of evaluation: it keeps no activations, so that larger batches hardly need more memory.
EVALUATION_BATCH = 512


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, objective: Objective, split: Split | None, batch_size: int,
    before_batch: Callable[[], None] = lambda: None,
) -> tuple[float | None, float | None]:
    """Mean loss and accuracy (a fraction) over a whole split in evaluation mode.

    (None, None) without samples; the accuracy is None if targets are numbers. `before_batch` is called before every batch.
    """
    if split is None or len(split) == 0:
        return None, None
    losses: list[Tensor] = []
    hits: list[Tensor] = []
    with evaluating(model):
        for x, y in split.batches(max(batch_size, EVALUATION_BATCH)):
            before_batch()
            outputs = model(x)
            losses.append(objective.loss(outputs, y, reduction="sum"))
            if (correct := objective.correct(outputs, y)) is not None:
                hits.append(correct.sum())
    loss = torch.stack(losses).sum().item() / len(split)
    return loss, int(torch.stack(hits).sum().item()) / len(split) if hits else None
