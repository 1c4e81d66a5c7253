"""The batch that alignment metrics are measured on, and a check that every batch can be trained and measured on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fa_bench.errors import OptionError
from fa_bench.registry.kinds import CLASSES, NOUNS
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from fa_bench.config.job import RunOptions
    from fa_bench.data.splits import Splits
    from fa_bench.mechanisms.rule import Rule


def fixed_batch(splits: Splits, size: int) -> tuple[Tensor, Tensor]:
    """The batch that alignment metrics are measured on: at most `size` training samples, not augmented, and their targets.

    These are the first samples as stored, or a sample with a fixed seed if the first ones contain less than half as many classes
    as possible because the data are stored class by class.
    """
    from fa_bench.data.splits import some

    size = min(size, len(splits.train))
    x, y = next(splits.train.batches(size))
    if splits.targets == CLASSES and 2 * len(y.unique()) < min(size, len(splits.classes)):
        x, y = next(some(splits.train, size).batches(size))
    return x, y


def check_batches(rule: Rule, splits: Splits, options: RunOptions) -> None:
    """Refuse a run in which batch normalisation, also of the rule's auxiliary nets, would receive a single sample.

    torch raises an error then, as there are no statistics. If such a batch would occur, one is tried: nets that accept it
    pass, such as those whose normalised maps have several pixels.

    Raises:
        OptionError: naming the option that leads to such a batch, and what to set instead.
    """
    one, several = NOUNS[splits.inputs]
    count, size = len(splits.train), min(options.batch_size, len(splits.train))
    last = 0 if options.drop_last else count % size
    smallest = size // min(options.accumulate, size)
    why = ", for which batch normalisation has no statistics"
    if size == 1:
        error = OptionError("batch_size", f"={options.batch_size} makes batches of one {one} ({count} for training){why}; "
                                          "use 2 or more")
    elif last == 1:
        error = OptionError("drop_last", f"=false leaves a last batch of one: {count} training {several} in batches of "
                                         f"{options.batch_size}{why}; use drop_last=true or another batch_size")
    elif smallest == 1:
        error = OptionError("accumulate", f"={options.accumulate} splits batches of {size} into single {several}{why}; use "
                                          f"{size // 2} at most")
    elif min(options.probe_size, count) == 1:
        error = OptionError("probe_size", f"={options.probe_size} makes a probe batch of one {one}{why}; use 2 or more")
    else:
        return
    if not _accepts_single_sample(rule, splits):
        raise error


def _accepts_single_sample(rule: Rule, splits: Splits) -> bool:
    from fa_bench.mechanisms.cut.local import TOO_FEW
    from fa_bench.mechanisms.trace import loss_output
    from fa_bench.metrics.meter import measurement_mode

    x, y = next(splits.train.batches(1))
    try:
        with measurement_mode(rule), torch.enable_grad():
            logits = loss_output(rule.model(x), rule.loss_output)
            rule.deliver(rule.objective.loss(logits, y), logits, y)
    except ValueError as error:
        if TOO_FEW in str(error):
            return False
        raise
    return True
