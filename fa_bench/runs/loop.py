"""The only training and evaluation loop. It names no rule."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fa_bench.data.base import Split, Splits
from fa_bench.mechanisms.rule import Rule
from fa_bench.mechanisms.trace import evaluating
from fa_bench.metrics.probe import Probe
from fa_bench.optim import Optimizers
from fa_bench.runs.hashes import chained

Angles = dict[str, dict[str, float]]


@dataclasses.dataclass
class Progress:
    """Where a run stands between two updates; saved with its checkpoint.

    Attributes:
        epoch: finished epochs.
        batch: batches of the present epoch that have trained.
        step: updates so far.
        seconds: training time so far, without evaluation and probes.
        loss_sum, hits, samples: over the present epoch's batches; the first two are scalars on the device.
        probed: the step of the last measurement of angles.
        angles: what it gave, where it was in the present epoch.
        batches_hash: of the first batch of every epoch so far, as the model saw it.
        diverged: epoch, step and layer where the loss or a trained tensor first was not finite.
        best_epoch, best_val, test_at_best: the epoch (from 1) of the best validation accuracy, and what it had.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    seconds: float = 0.0
    loss_sum: Tensor | None = None
    hits: Tensor | None = None
    samples: int = 0
    probed: int | None = None
    angles: Angles | None = None
    batches_hash: str = ""
    diverged: dict[str, Any] | None = None
    best_epoch: int | None = None
    best_val: float | None = None
    test_at_best: float | None = None

    def begin_epoch(self, device: torch.device) -> None:
        """Forget what concerned the epoch before."""
        self.batch, self.samples, self.angles = 0, 0, None
        # Sums stay on the device: reading one would make every step wait.
        self.loss_sum = torch.zeros((), device=device)
        self.hits = torch.zeros((), dtype=torch.long, device=device)


class Diverged(Exception):
    """The loss, or a trained tensor, is not finite."""

    def __init__(self, epoch: int, step: int, layer: str | None) -> None:
        where = f" (first in {layer})" if layer else ""
        super().__init__(f"not finite in epoch {epoch} at step {step}{where}")
        self.epoch, self.step, self.layer = epoch, step, layer


def _nothing(*arguments: Any) -> None:
    """A callback that is not needed."""


@dataclasses.dataclass
class Loop:
    """Trains an attached model and reports to callbacks.

    Attributes:
        rule: an attached rule; its model is trained.
        optimizers: for the weights and learned feedback.
        splits: the data.
        batch_size, drop_last, seed: how training batches are made.
        probe: measures angles, every `probe_every` steps (0 for the last step alone).
        on_epoch: called with (progress, metrics of the epoch) when an epoch is complete.
        on_probe: called with (step, angles).
        on_step: called with the progress after every update, where a checkpoint may be written or the run be left by raising.
        on_wait: called between batches of an evaluation, where the run may be left as from `on_step`.
        go_on: train on where the loss or a weight stops being finite.
        histograms_every: steps between two calls of `on_histograms`; 0 for none.
        on_histograms: called with the step before its update, when the gradients of the next batch are there.
    """

    rule: Rule
    optimizers: Optimizers
    splits: Splits
    batch_size: int
    drop_last: bool
    seed: int
    probe: Probe
    probe_every: int
    on_epoch: Callable[[Progress, dict[str, Any]], None]
    on_probe: Callable[[int, Angles], None] = _nothing
    on_step: Callable[[Progress], None] = _nothing
    on_wait: Callable[[], None] = _nothing
    go_on: bool = False
    histograms_every: int = 0
    on_histograms: Callable[[int], None] = _nothing

    def fit(self, progress: Progress, epochs: int) -> Angles:
        """Train from `progress`, which may stand within an epoch, to the last epoch; returns the angles at the end.

        Raises:
            Diverged: where a loss or a weight stopped being finite, unless `go_on`.
        """
        if self.probe_every and progress.probed is None:
            self._measure(progress)
        while progress.epoch < epochs:
            self._epoch(progress, last=progress.epoch + 1 == epochs)
        return progress.angles if progress.probed == progress.step and progress.angles else self.probe.measure()

    def _epoch(self, progress: Progress, last: bool) -> None:
        model = self.rule.model
        model.train()
        self.optimizers.begin_epoch(progress.epoch)
        lr = self.optimizers.lr
        device = next(model.parameters()).device
        check_every = 1 if device.type == "cpu" else CHECK_EVERY
        if progress.batch == 0:
            progress.begin_epoch(device)
        assert progress.loss_sum is not None and progress.hits is not None
        clock = time.perf_counter()
        for x, y in self.splits.train.batches(
            self.batch_size, seed=self.seed, epoch=progress.epoch, drop_last=self.drop_last, start=progress.batch
        ):
            if progress.batch == 0:
                progress.batches_hash = chained(progress.batches_hash, x, y)
            self.optimizers.zero_grad()
            logits = model(x)
            loss = F.cross_entropy(logits, y)
            progress.loss_sum += loss.detach() * len(y)
            if progress.step % check_every == 0 and not math.isfinite(progress.loss_sum.item()):
                # Before the update, which would spread it to all layers.
                self._diverge(progress, x)
            self.rule.backward(loss, logits, y)
            if self.histograms_every and progress.step % self.histograms_every == 0:
                progress.seconds += time.perf_counter() - clock
                self.on_histograms(progress.step)
                clock = time.perf_counter()
            self.optimizers.step()
            self.rule.step()
            progress.hits += (logits.detach().argmax(1) == y).sum()
            progress.samples += len(y)
            progress.step += 1
            progress.batch += 1
            progress.seconds += time.perf_counter() - clock
            if self.probe_every and progress.step % self.probe_every == 0:
                self._measure(progress)
            self.on_step(progress)
            clock = time.perf_counter()
        train_loss = (progress.loss_sum / progress.samples).item()
        progress.seconds += time.perf_counter() - clock
        total = torch.stack([tensor.detach().sum() for tensor in self.optimizers.trained()]).sum()
        if not (math.isfinite(train_loss) and torch.isfinite(total)):
            self._diverge(progress, None)
        if last and progress.probed != progress.step:
            self._measure(progress)
        metrics: dict[str, Any] = {
            "epoch": progress.epoch + 1, "step": progress.step, "lr": lr,
            "train_loss": train_loss, "train_accuracy": progress.hits.item() / progress.samples,
        }
        for name, split in (("val", self.splits.validation), ("test", self.splits.test)):
            metrics[f"{name}_loss"], metrics[f"{name}_accuracy"] = evaluate(model, split, self.batch_size, self.on_wait)
        # From here on nothing can be left half done: until now a run that is left goes on at the end of this epoch's batches.
        val = metrics["val_accuracy"]
        if val is not None and (progress.best_val is None or val > progress.best_val):
            progress.best_epoch, progress.best_val = progress.epoch + 1, val
            progress.test_at_best = metrics["test_accuracy"]
        self.optimizers.end_epoch()
        progress.epoch += 1
        progress.batch = 0
        metrics["seconds"], metrics["angles"] = progress.seconds, progress.angles
        self.on_epoch(progress, metrics)

    def _measure(self, progress: Progress) -> None:
        progress.angles, progress.probed = self.probe.measure(), progress.step
        self.on_probe(progress.step, progress.angles)

    def _diverge(self, progress: Progress, x: Tensor | None) -> None:
        if progress.diverged is not None:
            return
        found = Diverged(progress.epoch + 1, progress.step, self._first_hit(x))
        progress.diverged = {"epoch": found.epoch, "step": found.step, "layer": found.layer, "message": str(found)}
        if not self.go_on:
            raise found

    def _first_hit(self, x: Tensor | None) -> str | None:
        """The first tensor that is not finite: a weight, in the model's order, learned feedback, or what `x` makes of a layer."""
        feedback = [(f"{layer}.{name}", tensor) for layer, own in self.rule.feedback.items() for name, tensor in own.items()]
        weights = {id(weight) for weight in self.rule.weight_parameters()}
        named = [(name, tensor) for name, tensor in self.rule.model.named_parameters() if id(tensor) in weights]
        for name, tensor in (*named, *feedback):
            if not torch.isfinite(tensor).all():
                return name
        return None if x is None else first_not_finite(self.rule.model, x)


@torch.no_grad()
def first_not_finite(model: torch.nn.Module, x: Tensor) -> str | None:
    """The first module whose output for `x` is not finite, in evaluation mode; None where there is none."""
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not torch.isfinite(output).all():
                found.append(name)
        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        with evaluating(model):
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, split: Split | None, batch_size: int, on_wait: Callable[[], None] = _nothing
) -> tuple[float | None, float | None]:
    """Mean loss and accuracy (a fraction) over a whole split in evaluation mode; (None, None) without samples.

    `on_wait` is called before every batch.
    """
    if split is None or len(split) == 0:
        return None, None
    losses: list[Tensor] = []
    hits: list[Tensor] = []
    # Evaluation keeps no activations, so that larger batches cost no more memory than training.
    with evaluating(model):
        for x, y in split.batches(max(batch_size, EVALUATION_BATCH)):
            on_wait()
            logits = model(x)
            losses.append(F.cross_entropy(logits, y, reduction="sum"))
            hits.append((logits.argmax(1) == y).sum())
    return torch.stack(losses).sum().item() / len(split), int(torch.stack(hits).sum().item()) / len(split)


#: Samples of an evaluation batch at least.
EVALUATION_BATCH = 512
#: Steps between two looks at the loss where looking makes an accelerator wait.
CHECK_EVERY = 50
