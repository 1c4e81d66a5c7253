"""The batch that a run is measured on, and whether every batch is one that the model can be trained and measured on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fa_bench.errors import OptionError
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from fa_bench.config.job import RunOptions
    from fa_bench.data.base import Splits
    from fa_bench.mechanisms.rule import Rule


def fixed_batch(splits: Splits, size: int) -> tuple[Tensor, Tensor]:
    """The fixed batch that a run is measured on: at most `size` training images (N, C, H, W) and their targets, not augmented.

    The first ones as they are stored; or, where these hold less than half the classes that so many could, for the data are
    stored class by class, a choice with a fixed seed.
    """
    from fa_bench.data.base import some

    size = min(size, len(splits.train))
    x, y = next(splits.train.batches(size))
    if not y.is_floating_point() and 2 * len(y.unique()) < min(size, len(splits.classes)):
        x, y = next(some(splits.train, size).batches(size))
    return x, y


def check_batches(rule: Rule, splits: Splits, options: RunOptions) -> None:
    """Refuse a run in which batch normalisation meets a batch of one sample: it has no statistics, and torch stops there.

    A batch of one is tried only where there is going to be one; nets that can do with it pass, such as those whose normalised
    maps have several pixels. The rule's auxiliary nets count too.

    Raises:
        OptionError: naming the option that makes such a batch, and what to set instead.
    """
    images, size = len(splits.train), min(options.batch_size, len(splits.train))
    ragged = 0 if options.drop_last else images % size
    smallest = size // min(options.accumulate, size)
    if size == 1:
        found = OptionError("batch_size", f"={options.batch_size} makes batches of one image ({images} for training){_WHY}; "
                                          "take 2 or more")
    elif ragged == 1:
        found = OptionError("drop_last", f"=false leaves a last batch of one: {images} training images in batches of "
                                         f"{options.batch_size}{_WHY}; take drop_last=true or another batch_size")
    elif smallest == 1:
        found = OptionError("accumulate", f"={options.accumulate} splits batches of {size} into single images{_WHY}; take "
                                          f"{size // 2} at most")
    elif min(options.probe_size, images) == 1:
        found = OptionError("probe_size", f"={options.probe_size} makes a probe batch of one image{_WHY}; take 2 or more")
    else:
        return
    if not _takes_one(rule, splits):
        raise found


_WHY = ", of which batch normalisation has no statistics"


def _takes_one(rule: Rule, splits: Splits) -> bool:
    from fa_bench.mechanisms.cut.local import TOO_FEW
    from fa_bench.mechanisms.trace import tensors_in
    from fa_bench.metrics.meter import untouched

    x, y = next(splits.train.batches(1))
    try:
        with untouched(rule), torch.enable_grad():
            logits = next(tensors_in(rule.model(x)))
            rule.deliver(rule.objective.loss(logits, y), logits, y)
    except ValueError as error:
        if TOO_FEW in str(error):
            return False
        raise
    return True
