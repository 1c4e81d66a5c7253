"""The runner's own callbacks, such as those for measurements, checkpoints, the progress bar, and stopping on a signal."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from fa_bench.callbacks.base import Callback
from fa_bench.config.labels import duration
from fa_bench.metrics.meter import AlignmentMeter
from fa_bench.metrics.tensors import named_tensors
from fa_bench.objectives.scores import ACCURACY, scores_of
from fa_bench.runs.logs import log

if TYPE_CHECKING:
    from fa_bench.runs.loop import Trainer
    from fa_bench.runs.record import Recorder
    from fa_bench.utils.energy import EnergyMeter
    from fa_bench.utils.stopping import StopRequest

#: The minimum number of seconds between two progress lines if the output is not a terminal; the last epoch always has a line.
LINE_EVERY = 10.0
#: The number of seconds between two readings of the machine's energy counters.
ENERGY_EVERY = 60.0
#: The minimum number of automatic measurements in a run that has at least this many steps, and the maximum number of steps
#: between two of them.
MEASUREMENTS, MAX_INTERVAL = 20, 500


def probe_interval(probe_every: int | None, steps: int) -> int:
    """The number of steps between two measurements in a run of `steps` steps, given the run's option `probe_every` (None:
    automatic).

    In a run of at least 20 steps, the automatic interval results in 20 to 40 measurements, or more if they would otherwise be
    more than `MAX_INTERVAL` steps apart.
    """
    return min(max(steps // MEASUREMENTS, 1), MAX_INTERVAL) if probe_every is None else probe_every


@dataclasses.dataclass(eq=False)
class Alignment(Callback):
    """Measures the alignment metrics before the first step, every `every` steps, and when training ends. If `every` is 0, the
    metrics are measured only when training ends."""

    meter: AlignmentMeter
    every: int
    on_measured: Callable[[int, dict[str, dict[str, float]]], None] = lambda step, angles: None

    def on_fit_start(self, trainer: Trainer) -> None:
        if self.every and trainer.progress.probed is None:
            self.measure(trainer)

    def on_step_end(self, trainer: Trainer) -> None:
        if self.every and trainer.progress.step % self.every == 0:
            self.measure(trainer)

    def on_batches_end(self, trainer: Trainer) -> None:
        progress = trainer.progress
        if progress.epoch + 1 == trainer.options.epochs and progress.probed != progress.step:
            self.measure(trainer)

    def on_fit_end(self, trainer: Trainer) -> None:
        progress = trainer.progress
        if progress.stopped is not None and progress.probed != progress.step:
            self.measure(trainer)
        elif progress.probed != progress.step or not progress.angles:
            # A run must not record measurements that an uninterrupted run would not make. This concerns runs that were resumed
            # after their last epoch, or were stopped by a callback outside their config.
            progress.angles = self.meter.measure()

    def measure(self, trainer: Trainer) -> None:
        """Measure the metrics, and record the values."""
        progress = trainer.progress
        progress.angles, progress.probed = self.meter.measure(), progress.step
        progress.measurements += 1
        self.on_measured(progress.step, progress.angles)


@dataclasses.dataclass(eq=False)
class Energy(Callback):
    """Adds up the energy that the machine uses while a run trains. The value remains None if the run was started without energy
    counters."""

    meter: EnergyMeter

    def on_fit_start(self, trainer: Trainer) -> None:
        if trainer.progress.step == 0:
            trainer.progress.energy_wh = 0.0
        self.meter.start()
        self._read = time.monotonic()

    def on_step_end(self, trainer: Trainer) -> None:
        # The counters are read so often that none can wrap around twice between two readings; RAPL's counters wrap around within
        # minutes.
        if time.monotonic() - self._read >= ENERGY_EVERY:
            self._add(trainer)

    def on_epoch_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        self._add(trainer)

    def on_fit_end(self, trainer: Trainer) -> None:
        self._add(trainer)

    def _add(self, trainer: Trainer) -> None:
        used, self._read = self.meter.used_wh(), time.monotonic()
        before = trainer.progress.energy_wh
        trainer.progress.energy_wh = None if before is None or used is None else before + used


@dataclasses.dataclass(eq=False)
class Histograms(Callback):
    """Logs the distributions of weights, feedback and gradients every `every` steps."""

    recorder: Recorder
    every: int

    def on_gradients(self, trainer: Trainer) -> None:
        if trainer.progress.step % self.every == 0:
            start = time.perf_counter()
            self.recorder.histograms(named_tensors(trainer.rule), trainer.progress.step)
            trainer.progress.seconds -= time.perf_counter() - start  # not part of the training time


@dataclasses.dataclass(eq=False)
class Checkpoints(Callback):
    """Calls `save` every `epochs` epochs, after the last epoch, and every `minutes` minutes within an epoch (0: never).

    This callback must come after all callbacks that may request a stop in `on_epoch_end`.
    """

    save: Callable[[], None]
    epochs: int
    minutes: float

    def on_fit_start(self, trainer: Trainer) -> None:
        self._saved = time.monotonic()

    def on_step_end(self, trainer: Trainer) -> None:
        if self.minutes and trainer.world.due(time.monotonic() - self._saved > 60 * self.minutes):
            self._save()

    def on_epoch_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        is_last = trainer.progress.epoch == trainer.options.epochs or trainer.stop_request is not None
        if is_last or trainer.progress.epoch % self.epochs == 0:
            self._save()

    def _save(self) -> None:
        self.save()
        self._saved = time.monotonic()


@dataclasses.dataclass(eq=False)
class Display(Callback):
    """Shows a progress bar on a terminal. If the output is not a terminal, this callback prints a line at most every `LINE_EVERY`
    seconds and after the last epoch.

    Attributes:
        title: the title of the run.
        later_epochs: epochs of the runs that follow, for the estimate of the remaining time.
        brief: print a line only for the last epoch, unless the run takes more than `LINE_EVERY` seconds; a sweep may have
            hundreds of runs.
    """

    title: str
    later_epochs: int
    brief: bool = False

    def on_fit_start(self, trainer: Trainer) -> None:
        options, progress = trainer.options, trainer.progress
        steps = trainer.splits.train.steps(options.batch_size, options.drop_last)
        self._bar = tqdm(
            total=steps * options.epochs,
            initial=progress.step,
            desc=self.title,
            unit="step",
            disable=None,
            leave=False,
            dynamic_ncols=True,
        )
        self._start, self._first = time.monotonic(), progress.epoch + 1
        self._compiled = progress.compile_seconds
        self._last_line = self._start if self.brief else -LINE_EVERY

    def on_step_end(self, trainer: Trainer) -> None:
        self._bar.update()

    def on_epoch_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        epoch, epochs, bar = trainer.progress.epoch, trainer.options.epochs, self._bar
        first = scores_of(metrics)[0]
        named = "" if first == ACCURACY else f" {first.title}"
        scores = [
            f"{name}{named} {first.text(value)}"
            for name in ("val", "test")
            if (value := metrics[f"{name}_{first.name}"]) is not None
        ]
        summary = "  ".join([f"train loss {metrics['train_loss']:.4f}", *scores])
        bar.set_postfix_str(summary, refresh=False)
        now = time.monotonic()
        due = bool(bar.disable) and (epoch == epochs or now - self._last_line >= LINE_EVERY)
        if due:
            self._last_line = now
        log.log(logging.INFO if due else logging.DEBUG, "%s epoch %d/%d  %s", self.title, epoch, epochs, summary)
        # Later epochs do not compile, and later runs find most of the compiled code in torch's cache.
        seconds = now - self._start - (trainer.progress.compile_seconds - self._compiled)
        if epoch == self._first and self.later_epochs and (seconds >= LINE_EVERY or not self.brief):
            remaining = seconds * (epochs - self._first + self.later_epochs)
            log.info("%s: %s per epoch; about %s remaining", self.title, duration(seconds), duration(remaining))

    def close(self) -> None:
        """Remove the bar."""
        if hasattr(self, "_bar"):
            self._bar.close()


@dataclasses.dataclass(eq=False)
class StopOnSignal(Callback):
    """Raises `Interrupted` between two training steps, or two batches of an epoch's evaluation, if a signal requested a stop."""

    stop: StopRequest

    def on_step_end(self, trainer: Trainer) -> None:
        trainer.world.check(self.stop)

    def on_evaluation_batch(self, trainer: Trainer) -> None:
        if not trainer.is_nested:  # a run cannot resume within a hook
            trainer.world.check(self.stop)
