"""The only training and evaluation loop. It names no rule."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fa_bench.data.base import Split, Splits
from fa_bench.metrics.probe import Probe
from fa_bench.optim import Optimizers
from fa_bench.rules.base import Rule
from fa_bench.trace import evaluating

Angles = dict[str, dict[str, float]]


@dataclasses.dataclass
class Progress:
    """Where a run stands; saved with its checkpoint.

    Attributes:
        epoch: finished epochs.
        step: updates so far.
        seconds: training time so far, without evaluation and probes.
        best_epoch, best_val, test_at_best: the epoch (from 1) of the best validation accuracy, and what it had.
    """

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    best_epoch: int | None = None
    best_val: float | None = None
    test_at_best: float | None = None


class Diverged(Exception):
    """The loss, or a trained tensor, is not finite."""

    def __init__(self, epoch: int, step: int, layer: str | None) -> None:
        where = f" (first in {layer})" if layer else ""
        super().__init__(f"not finite in epoch {epoch} at step {step}{where}")
        self.epoch, self.step, self.layer = epoch, step, layer


@dataclasses.dataclass
class Loop:
    """Trains an attached model and reports to callbacks.

    Attributes:
        rule: an attached rule; its model is trained.
        optimizers: for the weights and learned feedback.
        splits: the data.
        batch_size, drop_last, seed: how training batches are made.
        probe: measures angles, every `probe_every` steps (0 for the last step alone).
        on_probe: called with (step, angles).
        on_step: called after every update.
        on_epoch: called with (progress, metrics of the epoch) when an epoch is complete.
    """

    rule: Rule
    optimizers: Optimizers
    splits: Splits
    batch_size: int
    drop_last: bool
    seed: int
    probe: Probe
    probe_every: int
    on_probe: Callable[[int, Angles], None]
    on_step: Callable[[Progress], None]
    on_epoch: Callable[[Progress, dict[str, Any]], None]

    def fit(self, progress: Progress, epochs: int) -> Angles:
        """Train from `progress` to the last epoch; returns the angles at the end.

        Raises:
            Diverged: at the end of the epoch in which a loss or a weight stopped being finite.
        """
        angles: Angles | None = None
        if progress.step == 0 and self.probe_every:
            self.on_probe(0, self.probe.measure())
        while progress.epoch < epochs:
            angles = self._epoch(progress, last=progress.epoch + 1 == epochs)
        return self.probe.measure() if angles is None else angles

    def _epoch(self, progress: Progress, last: bool) -> Angles | None:
        model, epoch = self.rule.model, progress.epoch
        model.train()
        self.optimizers.begin_epoch(epoch)
        lr, angles = self.optimizers.lr, None
        device = next(model.parameters()).device
        loss_sum, hits, samples = torch.zeros((), device=device), torch.zeros((), dtype=torch.long, device=device), 0
        clock = time.perf_counter()
        for x, y in self.splits.train.batches(self.batch_size, seed=self.seed, epoch=epoch, drop_last=self.drop_last):
            self.optimizers.zero_grad()
            logits = model(x)
            loss = F.cross_entropy(logits, y)
            self.rule.backward(loss, logits, y)
            self.optimizers.step()
            self.rule.step()
            progress.step += 1
            # Sums stay on the device: reading one would make every step wait.
            loss_sum += loss.detach() * len(y)
            hits += (logits.detach().argmax(1) == y).sum()
            samples += len(y)
            self.on_step(progress)
            if self.probe_every and progress.step % self.probe_every == 0:
                progress.seconds += time.perf_counter() - clock
                angles = self.probe.measure()
                self.on_probe(progress.step, angles)
                clock = time.perf_counter()
        train_loss = (loss_sum / samples).item()
        progress.seconds += time.perf_counter() - clock
        progress.epoch += 1
        self._check_finite(train_loss, progress)
        self.optimizers.end_epoch()
        if last and (angles is None or progress.step % max(self.probe_every, 1)):
            angles = self.probe.measure()
            self.on_probe(progress.step, angles)
        metrics: dict[str, Any] = {
            "epoch": progress.epoch, "step": progress.step, "lr": lr,
            "train_loss": train_loss, "train_accuracy": hits.item() / samples,
        }
        for name, split in (("val", self.splits.validation), ("test", self.splits.test)):
            metrics[f"{name}_loss"], metrics[f"{name}_accuracy"] = evaluate(model, split, self.batch_size)
        val = metrics["val_accuracy"]
        if val is not None and (progress.best_val is None or val > progress.best_val):
            progress.best_epoch, progress.best_val = progress.epoch, val
            progress.test_at_best = metrics["test_accuracy"]
        metrics["seconds"], metrics["angles"] = progress.seconds, angles
        self.on_epoch(progress, metrics)
        return angles

    def _check_finite(self, train_loss: float, progress: Progress) -> None:
        total = torch.stack([tensor.detach().sum() for tensor in self.optimizers.trained()]).sum()
        if train_loss == train_loss and abs(train_loss) != float("inf") and torch.isfinite(total):
            return
        named = ((name, p) for name, p in self.rule.model.named_parameters() if not torch.isfinite(p).all())
        raise Diverged(progress.epoch, progress.step, next((name for name, _ in named), None))


@torch.no_grad()
def evaluate(model: torch.nn.Module, split: Split | None, batch_size: int) -> tuple[float | None, float | None]:
    """Mean loss and accuracy (a fraction) over a whole split in evaluation mode; (None, None) without samples."""
    if split is None or len(split) == 0:
        return None, None
    losses: list[Tensor] = []
    hits: list[Tensor] = []
    # Evaluation keeps no activations, so that larger batches cost no more memory than training.
    with evaluating(model):
        for x, y in split.batches(max(batch_size, EVALUATION_BATCH)):
            logits = model(x)
            losses.append(F.cross_entropy(logits, y, reduction="sum"))
            hits.append((logits.argmax(1) == y).sum())
    return torch.stack(losses).sum().item() / len(split), int(torch.stack(hits).sum().item()) / len(split)


EVALUATION_BATCH = 512
