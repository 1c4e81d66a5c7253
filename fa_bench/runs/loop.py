"""The training loop, which is the same for all rules and objectives."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fa_bench.callbacks.base import Callback
from fa_bench.config.job import RunOptions
from fa_bench.data.splits import Split, Splits
from fa_bench.mechanisms.rule import Rule
from fa_bench.mechanisms.trace import loss_output
from fa_bench.metrics.evaluation import add, evaluate, with_scores
from fa_bench.objectives.scores import ACCURACY, Score, as_records
from fa_bench.optim.optimizers import Optimizers
from fa_bench.runs.execution import Execution
from fa_bench.runs.hashes import chained
from fa_bench.runs.logs import log
from fa_bench.runs.parallel import World

Angles = dict[str, dict[str, float]]


@dataclasses.dataclass
class Progress:
    """The progress of a run between two updates, which is saved in its checkpoints.

    Attributes:
        epoch: finished epochs.
        batch: finished batches of the current epoch.
        step: updates so far.
        seconds: training time so far, without evaluation, measurements and compilation.
        compile_seconds: the total duration of the steps in which torch.compile compiled a graph.
        energy_wh: energy that the machine has used so far, including evaluation and measurements; None if it was not always
            counted.
        loss_sum, sums, samples: totals over the current epoch's batches, namely the summed loss, the sums from which the
            objective computes scores, and the number of targets that count. They are on the device, except that `samples` is an
            int if it is known without reading the targets.
        probed: the step of the last recorded measurement of alignment metrics.
        measurements: the number of recorded measurements.
        angles: the result of the last measurement, if it was made in the current epoch.
        batches_hash: a hash of the first batches of all epochs so far, as the model received them.
        diverged: the epoch, step and layer at which the loss or a trained tensor was first found not to be finite.
        stopped: the reason of the first request to stop by a callback of the run's config, and the name of that callback.
        best_epoch, best_val, test_at_best: the epoch (from 1) with the best primary validation score, and the primary validation
            and test scores of this epoch.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0
    energy_wh: float | None = None
    loss_sum: Tensor | None = None
    sums: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    samples: int | Tensor = 0
    probed: int | None = None
    measurements: int = 0
    angles: Angles | None = None
    batches_hash: str = ""
    diverged: dict[str, Any] | None = None
    stopped: dict[str, Any] | None = None
    best_epoch: int | None = None
    best_val: float | None = None
    test_at_best: float | None = None

    def begin_epoch(self, device: torch.device) -> None:
        """Reset the attributes of the current epoch."""
        self.batch, self.samples, self.sums, self.angles = 0, 0, {}, None
        # The sums stay on the device, because reading them would synchronise every step.
        self.loss_sum = torch.zeros((), device=device)

    @property
    def mean_loss(self) -> float:
        """The mean loss over the targets of the current epoch that count; 0 if no target counts."""
        assert self.loss_sum is not None
        return (self.loss_sum / (self.samples if isinstance(self.samples, int) else self.samples.clamp(min=1))).item()

    def end_epoch(self, metrics: dict[str, Any], primary: Score = ACCURACY) -> None:
        """Count the epoch as finished, and record it as the best epoch if its primary validation score is the best so far."""
        val = metrics[f"val_{primary.name}"]
        if (
            val is not None
            and math.isfinite(val)
            and (self.best_val is None or primary.merit(val) > primary.merit(self.best_val))
        ):
            self.best_epoch, self.best_val, self.test_at_best = self.epoch + 1, val, metrics[f"test_{primary.name}"]
        self.epoch += 1
        self.batch = 0


class Trainer:
    """Trains an attached model.

    Args:
        rule: an attached rule; its model is trained for the rule's objective.
        optimizers: the optimizers of the weights and the learned feedback.
        splits: the data.
        options: the run's options, such as epochs, batch size and seed.
        callbacks: see `fa_bench.callbacks.base.Callback`; their hooks are called in this order.
        progress: the progress of the run, which may be within an epoch.
        external: those of `callbacks` that are not part of the run's config. A stop that they request is not saved in
            checkpoints, so that the run can be resumed without them.
        execution: precision and compilation; by default, those of the options, on the model's device.
        world: the processes of the run, each of which has a trainer and its part of every batch; None: this is the only process.

    Attributes:
        is_nested: whether the current hook was called within another hook, because that hook calls `evaluate`.
    """

    def __init__(
        self,
        rule: Rule,
        optimizers: Optimizers,
        splits: Splits,
        options: RunOptions,
        callbacks: Iterable[Callback] = (),
        progress: Progress | None = None,
        external: Iterable[Callback] = (),
        execution: Execution | None = None,
        world: World | None = None,
    ) -> None:
        self.world = world or World()
        self.rule, self.optimizers, self.splits, self.options = rule, optimizers, splits, options
        self.model, self.objective = rule.model, rule.objective
        self.scores = tuple(self.objective.scores[splits.targets])
        self.callbacks, self.progress = list(callbacks), progress or Progress()
        # Only overridden hooks are called, because a step of a small net takes only a few hundred microseconds.
        self._hooks = {
            name: [
                (callback, getattr(callback, name))
                for callback in self.callbacks
                if getattr(type(callback), name) is not getattr(Callback, name)
            ]
            for name in _HOOKS
        }
        self._external, self._external_stop = list(external), None
        if self.world.size == 1:  # DistributedDataParallel waits for every gradient
            optimizers.share_gradients()
        self.execution = execution or Execution(options, next(self.model.parameters()).device)
        self._forward = self.execution.forward(
            self._outputs_and_loss,
            self.model,
            options.epochs * splits.train.steps(options.batch_size, options.drop_last),
            self.world.size,
            rule.repeats,
        )
        self._calling: Callback | None = None
        self.is_nested = False
        self._called = self.world.wrapped(self.model)
        self._share = self.world.share(options.accumulate)

    def fit(self) -> None:
        """Train to the last epoch, or to the end of the epoch in which a callback requests a stop."""
        self._call("on_fit_start")
        progress = self.progress
        while progress.epoch < self.options.epochs and (progress.batch or self.stop_request is None):
            self._epoch()
        self._call("on_fit_end")

    def stop(self, reason: str) -> None:
        """Request that training ends early. Hooks of callbacks call this method. Of several requests, the first one counts, but
        requests by callbacks of the config take precedence.

        An epoch that has begun is completed, including its evaluation, the hooks `on_epoch_end` of all callbacks and a
        checkpoint. After that, `on_fit_end` is called. A call before the first epoch prevents that epoch. A call in the last
        epoch has no effect, because the run finishes anyway.

        Args:
            reason: recorded in the result, whose status is `stopped`.

        Raises:
            ValueError: if the reason is not text, or is empty.
        """
        if not isinstance(reason, str) or not reason.strip():
            raise ValueError(f"trainer.stop({reason!r}): pass the reason as text")
        if self._calling in self._external:
            self._external_stop = self._external_stop or {"reason": reason, "callback": None}
        else:
            self.progress.stopped = self.progress.stopped or {"reason": reason, "callback": getattr(self._calling, "name", None)}

    @property
    def stop_request(self) -> dict[str, Any] | None:
        """The reason to stop, with the callback that requested it (None if that callback is not part of the config); None if no
        callback has requested a stop. Requests by callbacks of the config take precedence."""
        return self.progress.stopped or self._external_stop

    def agree_on_stop(self) -> None:
        """Make all processes adopt the same request to stop, which is that of the first process that has one."""
        requests = self.world.gather((self.progress.stopped, self._external_stop))
        stopped, external = zip(*requests, strict=True)
        self.progress.stopped, self._external_stop = next(filter(None, stopped), None), next(filter(None, external), None)

    def train_step(self, x: Tensor, y: Tensor, indices: Tensor | None = None) -> None:
        """Update weights and learned feedback with this process's part of a batch, which has the inputs `x` and the targets `y`.

        `indices` are the indices of these samples in the training data (see `Rule.backward`).
        """
        self.optimizers.begin_step(self.progress.step)
        end = 0
        for part_x, part_y, share in self.world.micro_batches(x, y, self._samples, self.options.accumulate, self.objective):
            start, end = end, end + len(part_y)
            part = None if indices is None else indices[start:end]
            with self.execution.products():
                outputs, loss = self._forward(part_x, part_y)
                self._count(loss, part_y)
                self._call("on_loss", part_x)
                self.rule.backward(loss if share == 1 else loss * share, outputs, part_y, share, part)
            add(self.progress.sums, self.objective.sums(outputs.detach(), part_y))
        if self._hooks["on_gradients"]:
            self.optimizers.fill_gradients()
            self._call("on_gradients")
        if self.options.clip_norm is not None:
            self.optimizers.clip(self.options.clip_norm)
        self.optimizers.step()
        self.rule.step()

    def _outputs_and_loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        outputs = loss_output(self._called(x), self.rule.loss_output)
        return outputs, self.objective.loss(outputs, y)

    def evaluate(self, split: Split | None) -> dict[str, float]:
        """The loss and the scores of a split (see `fa_bench.metrics.evaluation.evaluate`)."""
        with self.execution.autocast():
            return evaluate(
                self.model,
                self.objective,
                split,
                self.options.batch_size,
                lambda: self._call("on_evaluation_batch"),
                self.world.share(),
                self.world.gather,
                self.rule.predict,
            )

    def _epoch(self) -> None:
        progress, options = self.progress, self.options
        self.model.train()
        self.optimizers.begin_epoch(progress.epoch, progress.step)
        self.rule.begin_epoch(progress.epoch)
        if progress.batch == 0:
            progress.begin_epoch(next(self.model.parameters()).device)
        lr = self.optimizers.lr
        self._call("on_epoch_start")
        clock = time.perf_counter()
        order: dict[str, Any] = {
            "seed": options.seed,
            "epoch": progress.epoch,
            "drop_last": options.drop_last,
            "start": progress.batch,
            "shuffle": options.shuffle,
            "share": self._share,
        }
        batches, indices = self.splits.train.batches(options.batch_size, **order), itertools.repeat(None)
        if self.rule.needs_indices:
            indices = self.splits.train.batch_indices(options.batch_size, **order)
        for (x, y), of_batch in zip(batches, indices, strict=False):
            if progress.batch == 0:
                progress.batches_hash = chained(progress.batches_hash, *self.world.whole_batch(x, y, self._share, self._samples))
            self.world.begin_step(options.seed, progress.step)
            before = progress.seconds
            self.train_step(x, y, of_batch)
            progress.step += 1
            progress.batch += 1
            seconds = time.perf_counter() - clock
            # Callbacks have subtracted the time of their measurements within the step.
            seconds, progress.seconds = seconds + progress.seconds - before, before
            if self.execution.step_compiled():
                progress.compile_seconds += seconds
                log.info("compiled in %.1f s", seconds)
            else:
                progress.seconds += seconds
            self._call("on_step_end")
            clock = time.perf_counter()
        self.world.same_buffers(self.model)
        totals = self.world.totals(progress)
        values = {"train": with_scores(totals.mean_loss, self.objective, totals.sums, int(totals.samples), self.splits.train)}
        progress.seconds += time.perf_counter() - clock
        self._call("on_batches_end")
        values |= {name: self.evaluate(split) for name, split in (("val", self.splits.validation), ("test", self.splits.test))}
        metrics: dict[str, Any] = {
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "lr": lr,
            **{
                f"{part}_{name}": of_part.get(name)
                for part, of_part in values.items()
                for name in ("loss", *(score.name for score in self.scores))
            },
        }
        # A run interrupted before this point resumes after the epoch's last batch.
        progress.end_epoch(metrics, self.scores[0])
        metrics |= {"seconds": progress.seconds, "angles": progress.angles}
        if self.scores != (ACCURACY,):
            metrics["scores"] = as_records(self.scores)
        self._call("on_epoch_end", metrics)

    @property
    def _samples(self) -> int:
        """The total number of samples in the current batch over all processes."""
        size = self.options.batch_size
        return min(size, len(self.splits.train) - self.progress.batch * size)

    def _count(self, loss: Tensor, y: Tensor) -> None:
        assert self.progress.loss_sum is not None
        count = self.objective.counted(y)
        self.progress.loss_sum += loss.detach() * count
        self.progress.samples = self.progress.samples + count

    def _call(self, hook: str, *arguments: Any) -> None:
        outer, was_nested = self._calling, self.is_nested
        self.is_nested = outer is not None
        for callback, method in self._hooks[hook]:
            self._calling = callback
            method(self, *arguments)
        self._calling, self.is_nested = outer, was_nested


_HOOKS = [name for name in vars(Callback) if name.startswith("on_")]
