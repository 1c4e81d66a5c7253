"""The batch on which alignment metrics are measured, and checks that a run can use its targets, indices and batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fa_bench.errors import DataError, OptionError
from fa_bench.registry.kinds import CLASSES, NOUNS, POSITIONS, VALUES
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from fa_bench.config.job import RunOptions
    from fa_bench.data.splits import Splits
    from fa_bench.mechanisms.rule import Rule


def fixed_batch(splits: Splits, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The batch on which alignment metrics are measured. It contains at most `size` training samples without augmentation, with
    their targets and indices.

    The batch consists of the first samples in stored order. If these samples contain fewer than half as many classes as they
    could, for example because the data are stored class by class, the batch is instead a random selection with a fixed seed.
    """
    from fa_bench.data.splits import some_indices

    size = min(size, len(splits.train))
    x, y = next(splits.train.batches(size))
    indices = torch.arange(size)
    if splits.targets == CLASSES and 2 * len(y.unique()) < min(size, len(splits.classes)):
        indices = some_indices(splits.train, size)
        x, y = next(splits.train.subset(indices).batches(size))
    return x, y, indices


def check_indices(rule: Rule, splits: Splits, dataset: str) -> None:
    """Refuse data whose samples have no fixed indices if the rule needs them.

    Args:
        rule: the rule.
        splits: the splits of the dataset with the name `dataset`.

    Raises:
        OptionError: if the data are refused; the message names the rule and the dataset.
    """
    if rule.needs_indices and not splits.train.is_indexed:
        raise OptionError(
            "algorithm",
            f"={rule.name} stores an error for every training sample, but the samples of dataset={dataset} change in every "
            "epoch; use a rule such as dfa",
        )


def check_targets(rule: Rule, splits: Splits, dataset: str) -> None:
    """Refuse targets that the objective cannot use, or from which there is nothing to learn.

    Args:
        rule: after `attach`, with the objective of the run.
        splits: the splits of the dataset with the name `dataset`.

    Raises:
        DataError: if all training samples have the same numbers as targets; if a number is outside the range that the objective
            accepts; if no position counts; or if there is a negative label other than `ignore_index`.
    """
    for part, split in (("training", splits.train), ("validation", splits.validation), ("test", splits.test)):
        if split is None or split.targets is None:
            continue
        if splits.targets == VALUES:
            _check_values(rule, split.targets, part, f"dataset={dataset}: {part} targets")
        elif splits.targets == POSITIONS:
            _check_positions(rule, split.targets, f"dataset={dataset}: {part} targets")


def _check_values(rule: Rule, values: Tensor, part: str, where: str) -> None:
    low, high = values.amin().item(), values.amax().item()
    if part == "training" and len(values) > 1 and (values == values[0]).all():
        raise DataError(f"{where} are all {low:.6g}, so there is nothing to learn")
    allowed = rule.objective.value_range
    if allowed is not None and (low < allowed[0] or high > allowed[1]):
        raise DataError(
            f"{where} are from {low:.4g} to {high:.4g}, but objective={rule.objective.name} requires numbers from "
            f"{allowed[0]:g} to {allowed[1]:g}; use objective=mse, or scale them"
        )


def _check_positions(rule: Rule, labels: Tensor, where: str) -> None:
    ignored: int | None = getattr(rule.objective, "ignore_index", None)
    if ignored is None:
        return
    wrong = ((labels < 0) & (labels != ignored)).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        raise DataError(
            f"{where}: sequence {row} has {labels[row, column].item()} at position {column}, which is neither a "
            f"token nor objective.ignore_index={ignored}"
        )
    if (labels == ignored).all():
        raise DataError(f"{where} are all {ignored}, which do not count (objective.ignore_index), so there is nothing to score")


def check_batches(rule: Rule, splits: Splits, options: RunOptions, processes: int = 1) -> None:
    """Refuse a run in which some process would get no sample of a batch, or in which batch normalisation would fail for a single
    sample.

    Batch statistics need several values, so batch normalisation in the model or in the rule's auxiliary nets may raise an error
    for a single sample. If such a batch would occur, the nets are run with a single sample. Nets that accept it, for example
    because their normalised maps have several pixels, pass the check.

    Args:
        rule: after `attach`.
        splits, options: the splits and options of the run.
        processes: the number of processes among which each micro-batch is divided (the whole batch if accumulate=1).

    Raises:
        OptionError: if the run is refused; the message names the option that leads to such a batch, and what to set instead.
    """
    one, several = NOUNS[splits.inputs]
    count, size = len(splits.train), min(options.batch_size, len(splits.train))
    last = 0 if options.drop_last else count % size
    smallest = size // min(options.accumulate, size)
    _check_parts(size, last, options, processes)
    why = ", for which batch normalisation has no statistics"
    if size == 1:
        error = OptionError(
            "batch_size", f"={options.batch_size} makes batches of one {one} ({count} for training){why}; use 2 or more"
        )
    elif last == 1:
        error = OptionError(
            "drop_last",
            f"=false leaves a last batch of one {one}{why} ({count} training {several} in batches of "
            f"{options.batch_size}); use drop_last=true or another batch_size",
        )
    elif smallest == 1:
        error = OptionError(
            "accumulate", f"={options.accumulate} splits batches of {size} into single {several}{why}; use {size // 2} at most"
        )
    elif processes > 1 and min(smallest, last // min(options.accumulate, last) if last else smallest) < 2 * processes:
        error = OptionError(
            "batch_size",
            f"={options.batch_size} with {processes} processes leaves one of them a single {one}"
            f"{why}; use larger batches, or fewer processes",
        )
    elif min(options.probe_size, count) == 1:
        error = OptionError("probe_size", f"={options.probe_size} makes a probe batch of one {one}{why}; use 2 or more")
    else:
        return
    if not _accepts_single_sample(rule, splits):
        raise error


def _check_parts(size: int, last: int, options: RunOptions, processes: int) -> None:
    """Refuse batches and micro-batches with fewer samples than there are processes; `last` is the size of an incomplete last
    batch, or 0."""
    several = f"{processes} processes, each of which needs a sample"
    if size < processes:
        raise OptionError(
            "batch_size",
            f"={options.batch_size} makes batches of {size} for {several}; use {processes} or more, or fewer processes",
        )
    if size // min(options.accumulate, size) < processes:
        raise OptionError(
            "accumulate",
            f"={options.accumulate} splits batches of {size} into micro-batches of "
            f"{size // options.accumulate} for {several}; use {size // processes} at most",
        )
    if last and last // min(options.accumulate, last) < processes:
        raise OptionError(
            "drop_last",
            f"=false leaves a last batch of {last}, in {min(options.accumulate, last)} parts, for "
            f"{several}; use drop_last=true or another batch_size",
        )


def _accepts_single_sample(rule: Rule, splits: Splits) -> bool:
    from fa_bench.mechanisms.cut.local import TOO_FEW
    from fa_bench.mechanisms.trace import loss_output
    from fa_bench.metrics.meter import measurement_mode

    x, y = next(splits.train.batches(1))
    try:
        with measurement_mode(rule), torch.enable_grad(), rule.of_samples(torch.zeros(1, dtype=torch.int64)):
            logits = loss_output(rule.model(x), rule.loss_output)
            rule.deliver(rule.objective.loss(logits, y), logits, y)
    except ValueError as error:
        if TOO_FEW in str(error):
            return False
        raise
    return True
