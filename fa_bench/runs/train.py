"""One run: build, attach, fit, record."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from fa_bench.config.job import Job
from fa_bench.config.labels import duration
from fa_bench.config.scale import SCALES, scaled
from fa_bench.data.base import Splits
from fa_bench.errors import ConfigError, CoverageError, OptionError, OutputError, RunDirectoryError
from fa_bench.files import LOG, METRICS, RESULT, dump_json, write_text
from fa_bench.mechanisms.rule import Rule
from fa_bench.memory_limits import require, within_memory
from fa_bench.metrics.probe import Probe
from fa_bench.metrics.probes.base import LayerProbes, Subject
from fa_bench.optim import Optimizers
from fa_bench.process import isolated, seed_everything
from fa_bench.records import RecordError, recorded_lines
from fa_bench.runs import checkpoint
from fa_bench.runs.batches import check_batches, probe_batch
from fa_bench.runs.data_checks import compare
from fa_bench.runs.hashes import state_hash, weights_hash
from fa_bench.runs.logs import log, log_file
from fa_bench.runs.loop import Angles, Diverged, Loop, Progress
from fa_bench.runs.record import Recorder, base_result, device_name, progress_result
from fa_bench.runs.rundir import RunDirectory, Stage
from fa_bench.runs.stopping import Interrupted, Stop, postponed


def run(
    job: Job, directory: Path, title: str = "", experiment: str | None = None, later_epochs: int = 0
) -> dict[str, Any]:
    """Train one job in its directory.

    Args:
        job: the checked config.
        directory: where its records go; nothing in it changes until data, model and rule are ready.
        title: what the progress bar says.
        experiment: the preset that the config came from, for the record.
        later_epochs: those of the runs behind this one, for an estimate of what they will cost.

    Returns:
        The result, as in result.json; its status is finished or diverged.

    Raises:
        FaBenchError: for input that cannot be run, and where another process writes the directory.
        Interrupted: after SIGINT or SIGTERM, when a checkpoint and the result were written, with status interrupted.
    """
    place = RunDirectory(directory, job)
    place.check()
    with place.hold(), isolated():
        place.check()  # again, for what came before the lock was ours
        title = title or str(directory)
        go_on = _goes_on(place, title)
        if go_on and place.stage is Stage.FINISHED and _whole(place):
            result = json.loads((directory / RESULT).read_bytes())
            holds, said = compare(job, result, lambda: load(scaled(job), prepare(job)).data_hash)
            if holds:
                log.info("%s is finished already: nothing to do%s", title, f"; {said}" if said else "")
                return result
            go_on = _anew(place, title, said)
        return _run(place, go_on, title, experiment, later_epochs)


def _goes_on(place: RunDirectory, title: str) -> bool:
    """Whether to take up what is in the directory.

    Raises:
        RunDirectoryError: where resume=true asks for it, and other code made what is there.
    """
    if place.job.run.resume is False:
        return False
    return place.stage is not Stage.STALE or _anew(place, title, "was made by other code")


def _anew(place: RunDirectory, title: str, why: str) -> bool:
    """False, for a run that is to start anew; what is there cannot be continued bit by bit.

    Raises:
        RunDirectoryError: where resume=true asks for that.
    """
    if place.job.run.resume:
        raise RunDirectoryError(f"{place.path}: {why}, which resume=true would not continue bit by bit; resume=false starts anew")
    log.info("%s %s: starting anew", title, why)
    return False


def _whole(place: RunDirectory) -> bool:
    """Whether a finished run's checkpoint can be read, where it was kept."""
    if place.checkpoint.exists():
        try:
            checkpoint.read(place.checkpoint, place.job.config_hash, "cpu")
        except RunDirectoryError as error:
            log.debug("%s", error)
            return False
    return True


def _run(place: RunDirectory, go_on: bool, title: str, experiment: str | None, later_epochs: int) -> dict[str, Any]:
    device = prepare(place.job)
    job = scaled(place.job)  # as it is trained; what it is called and known by stays `place.job`
    splits, rule, optimizers, probe, initial = assemble(job, device)
    probes = _probes(job, splits, rule, probe)  # before a checkpoint is loaded: some keep the initial weights

    progress, told = Progress(), []
    resuming = go_on and (place.checkpoint.exists() or place.previous.exists())
    if resuming:
        try:
            steps = splits.train.steps(job.run.batch_size, job.run.drop_last)
            expected = checkpoint.Expected(place.job.config_hash, splits.data_hash, job.run.epochs, steps)
            progress = checkpoint.load((place.checkpoint, place.previous), expected, rule, optimizers, told.append)
            recorded_lines(place.path / METRICS, progress.epoch)
        except (RecordError, RunDirectoryError) as error:
            if place.job.run.resume:
                raise RunDirectoryError(f"{error}; resume=false starts anew") from None
            # Whatever a checkpoint put into the model before it failed is left behind.
            told, resuming, progress = [f"{error}; starting anew"], False, Progress()
            splits, rule, optimizers, probe, initial = assemble(job, prepare(place.job))
            probes = _probes(job, splits, rule, probe)
    place.start(keep=resuming)
    result = {**base_result(place.job, experiment), "epochs": job.run.epochs, "data_hash": splits.data_hash,
              "device": device_name(device), "initial_weights_hash": initial}
    with log_file(place.path / LOG):
        for line in told:
            log.warning("%s", line)
        for line in splits.notes:
            log.info("%s", line)
        if resuming or (go_on and place.job.run.resume):
            where = f"going on after epoch {progress.epoch}, batch {progress.batch}" if progress.batch else \
                f"going on after epoch {progress.epoch}"
            log.info("%s", where if resuming else "no checkpoint: starting at the beginning")
        log.debug("%s", rule.coverage)
        if job.feedback_optimizer is not None and not rule.feedback_parameters():
            log.info("feedback_optimizer=%s is not used: %s learns no feedback", job.feedback_optimizer.name, rule.name)
        recorder = Recorder(place.path, job, progress, probes)
        session = _Session(job, place, rule, optimizers, splits, probe, recorder, progress, title or rule.name, later_epochs)
        angles = None
        try:
            with postponed() as stop:
                try:
                    angles = session.fit(stop)
                    if progress.diverged is None:
                        result |= {"probes": recorder.measure_probes(progress), "status": "finished"}
                    else:
                        result |= _diverged(progress)
                except Diverged:
                    result |= _diverged(progress)
                except BaseException as error:
                    error = _explained(error, job)
                    if isinstance(error, Interrupted):
                        session.save()
                    interrupted = isinstance(error, KeyboardInterrupt)
                    result |= {"status": "interrupted" if interrupted else "failed", "error": _error(error)}
                    raise error
                finally:
                    result |= progress_result(recorder, progress, probe, angles)
                    result |= {"batches_hash": progress.batches_hash, "weights_hash": weights_hash(rule.model),
                               "feedback_hash": state_hash([rule.feedback, rule.state_dict()]),
                               "optimizer_hash": state_hash(optimizers.state_dict())}
                    _finish(recorder, result)
        finally:
            recorder.close()
    return result


def _probes(job: Job, splits: Splits, rule: Rule, probe: Probe) -> LayerProbes:
    return LayerProbes(job.run.probes, job.run.probes_epochs, Subject(rule, splits, probe, job.run.batch_size))


def _diverged(progress: Progress) -> dict[str, Any]:
    assert progress.diverged is not None
    log.warning("diverged: %s", progress.diverged["message"])
    return {"status": "diverged", "error": {"type": "Diverged", **progress.diverged}}


def _finish(recorder: Recorder, result: dict[str, Any]) -> None:
    """Write the result; where that cannot be done, an error that is under way is not hidden by it."""
    under_way = sys.exc_info()[1]
    try:
        recorder.finish(result)
    except OutputError as error:
        if under_way is None:
            raise
        log.warning("%s", error)


def _explained(error: BaseException, job: Job) -> BaseException:
    """The error in the user's terms, where torch tells it in its own."""
    undetermined = re.match(r"(\S+) does not have a deterministic implementation", str(error))
    if isinstance(error, RuntimeError) and undetermined and job.run.deterministic:
        return ConfigError(f"deterministic=true: the operation {undetermined[1]} has no deterministic form on {job.run.device}; "
                           "another architecture, or deterministic=false")
    return error


class Parts(NamedTuple):
    """What a run is made of, ready to be trained."""

    splits: Splits
    rule: Rule
    optimizers: Optimizers
    probe: Probe
    initial_weights_hash: str = ""


def load(job: Job, device: torch.device) -> Splits:
    """The data of a job, as much of it as its scale says.

    Raises:
        FaBenchError: where it is missing, broken, or unfit for its options.
    """
    trial = SCALES[job.run.scale]
    return job.dataset.load(Path(job.run.data_dir), device, trial and (trial.train, trial.test))


@within_memory
def assemble(job: Job, device: torch.device, splits: Splits | None = None) -> Parts:
    """Load the data, build the model and put the rule into it; what the rule does before training is left to be done.

    Args:
        job: the job as it is trained, see `fa_bench.config.scale.scaled`.
        device: what `prepare` gave.
        splits: what `load` gave, where it was called before.

    Raises:
        FaBenchError: for input that cannot be run.
    """
    splits = splits or load(job, device)
    model = _build(job, splits).to(device)
    if device.type == "cpu":
        require(4 * sum(weight.numel() for weight in model.parameters()), "the gradients of this architecture")
    initial = state_hash(model.state_dict())
    x, y = probe_batch(splits, job.run.probe_size)
    try:
        rule = job.fresh_algorithm().attach(model, seed=job.run.seed, sample_input=x[:2], initial_phase=False)
    except CoverageError as error:
        raise error.under("algorithm") from None
    check_batches(rule, splits, job.run)
    optimizers = Optimizers(job.optimizer, rule, job.run.epochs, job.feedback_optimizer)
    return Parts(splits, rule, optimizers, Probe(rule, x, y), initial)


def record_failure(job: Job, directory: Path, error: BaseException, experiment: str | None = None) -> None:
    """Log why a run failed, with the traceback, and write its result unless it wrote one itself; keeps another run's files.

    What an earlier start of the run left, such as a checkpoint, is kept.
    """
    place = RunDirectory(directory, job)
    place.check()
    with place.hold():
        written = (directory / RESULT).exists() and place.stage is not Stage.STALE
        if not written:
            place.start(keep=True)
        with log_file(directory / LOG):
            log.debug("failed: %s", error, exc_info=error)
        if not written:
            write_text(directory / RESULT, dump_json(base_result(job, experiment) | {"error": _error(error)}, indent=1) + "\n")


def prepare(job: Job) -> torch.device:
    """Set every process-wide state that a run depends on, whatever an earlier run in this process left; the device.

    Raises:
        ConfigError: where the device is not there.
    """
    # A rule with large logits makes probabilities below 1e-38, and arithmetic on such numbers is many times slower on a CPU.
    # Set before torch starts its worker threads, which inherit it.
    torch.set_flush_denormal(True)
    torch.set_default_dtype(torch.float32)
    if job.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(job.run.deterministic)
    torch.backends.cudnn.benchmark = not job.run.deterministic
    torch.set_num_threads(job.run.threads or torch.get_num_threads())
    seed_everything(job.run.seed)
    name = job.run.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(f"device={name}: this machine has {torch.cuda.device_count()} CUDA devices (allowed: auto, cpu)")
        torch.cuda.reset_peak_memory_stats(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device=mps: this machine has none (allowed: auto, cpu)")
    return device


def _build(job: Job, splits: Any) -> torch.nn.Module:
    try:
        return job.architecture.build(splits.input_shape, len(splits.classes))
    except OptionError as error:
        raise error.under("architecture") from None


#: Seconds between two epochs that are shown off a terminal, the first and the last apart.
SHOWN_EVERY = 10.0


@dataclasses.dataclass
class _Session:
    """The training of one run, with its progress bar, checkpoints and log."""

    job: Job
    place: RunDirectory
    rule: Rule
    optimizers: Optimizers
    splits: Splits
    probe: Probe
    recorder: Recorder
    progress: Progress
    title: str
    later_epochs: int

    def save(self) -> None:
        """Write a checkpoint, once everything that it counts as recorded is in the files."""
        self.recorder.flush()
        checkpoint.save(self.place.checkpoint, self.place.previous, self.place.job.config_hash, self.splits.data_hash,
                        self.progress, self.rule, self.optimizers)
        self._saved = time.monotonic()

    def fit(self, stop: Stop) -> Angles:
        """Train to the end; raises Interrupted, with everything whole, soon after `stop` asks for it."""
        run, progress = self.job.run, self.progress
        self._initial_phase(stop)
        self._saved = self._started = self._shown = time.monotonic()
        self._first = progress.epoch + 1
        steps = self.splits.train.steps(run.batch_size, run.drop_last)
        with tqdm(total=steps * run.epochs, initial=progress.step, desc=self.title, unit="step", disable=None,
                  leave=False, dynamic_ncols=True) as self._bar:
            return Loop(
                self.rule, self.optimizers, self.splits, run.batch_size, run.drop_last, run.seed, self.probe, run.probe_every,
                on_epoch=self._on_epoch, on_probe=self.recorder.probe, on_step=lambda progress: self._on_step(stop),
                on_wait=stop.check, go_on=run.on_divergence == "continue", histograms_every=run.histograms_every,
                on_histograms=lambda step: self.recorder.histograms(step, self.rule),
            ).fit(progress, run.epochs)

    def _initial_phase(self, stop: Stop) -> None:
        """What the rule does before training."""
        steps = self.rule.initial_steps_left
        if steps:
            log.info("%s: %d steps before training", self.title, steps)
        for _ in tqdm(self.rule.initial_phase(), total=steps, desc=f"{self.title} before training", unit="step",
                      disable=None if steps else True, leave=False):
            stop.check()

    def _on_step(self, stop: Stop) -> None:
        self._bar.update()
        stop.check()
        minutes = self.job.run.checkpoint_minutes
        if minutes and time.monotonic() - self._saved > 60 * minutes:
            self.save()

    def _on_epoch(self, progress: Progress, metrics: dict[str, Any]) -> None:
        run, bar = self.job.run, self._bar
        self.recorder.epoch(progress, metrics)
        if progress.epoch % run.checkpoint_epochs == 0 or progress.epoch == run.epochs:
            self.save()
        val = "" if metrics["val_accuracy"] is None else f"  val {metrics['val_accuracy']:.2%}"
        shown = f"train loss {metrics['train_loss']:.4f}{val}  test {metrics['test_accuracy']:.2%}"
        bar.set_postfix_str(shown, refresh=False)
        # Off a terminal there is no bar: the log shows that the run is alive.
        now = time.monotonic()
        due = progress.epoch in (self._first, run.epochs) or now - self._shown > SHOWN_EVERY
        self._shown = now if due else self._shown
        level = logging.INFO if bar.disable and due else logging.DEBUG
        log.log(level, "%s epoch %d/%d  %s", self.title, progress.epoch, run.epochs, shown)
        if progress.epoch == self._first and self.later_epochs:
            took = time.monotonic() - self._started
            left = took * (run.epochs - self._first + self.later_epochs)
            log.info("%s: %s an epoch; %s left, if the other runs take as long", self.title, duration(took), duration(left))


def _error(error: BaseException) -> dict[str, str]:
    return {"type": type(error).__name__, "message": str(error)}
