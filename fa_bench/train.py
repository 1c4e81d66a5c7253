"""One run: build, attach, fit, record."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from fa_bench import checkpoint
from fa_bench.config import Job
from fa_bench.data.base import Splits
from fa_bench.errors import ConfigError, FaBenchError, OptionError
from fa_bench.files import LOG, RESULT, dump_json, write_text
from fa_bench.labels import duration
from fa_bench.loop import Diverged, Loop, Progress
from fa_bench.memory import require, within_memory
from fa_bench.metrics.probe import Probe
from fa_bench.optim import Optimizers
from fa_bench.record import Recorder, base_result, device_name, progress_result
from fa_bench.report.runs import read_run
from fa_bench.rules.base import Rule
from fa_bench.rundir import RunDirectory
from fa_bench.scale import SCALES, scaled

log = logging.getLogger("fa_bench")


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
        FaBenchError: for input that cannot be run.
        KeyboardInterrupt: after the result was written with status interrupted.
    """
    place = RunDirectory(directory, job)
    place.check()
    device = prepare(job)
    if job.run.resume and (done := _finished(place)) is not None:
        log.info("%s is finished already: nothing to do", title or directory)
        return done
    job = scaled(job)  # as it is trained; what it is called and known by stays `place.job`
    splits, rule, optimizers, probe = assemble(job, device)

    progress = Progress()
    resuming = job.run.resume and place.checkpoint.exists()
    if resuming:
        progress = checkpoint.load(place.checkpoint, place.job.config_hash, rule, optimizers)
    place.start(keep=resuming)
    result = {**base_result(place.job, experiment), "epochs": job.run.epochs, "data_hash": splits.data_hash,
              "device": device_name(device)}
    with _log_file(directory / LOG):
        if job.run.resume:
            log.info("%s", f"going on after epoch {progress.epoch}" if resuming else "no checkpoint: starting at the beginning")
        log.debug("%s", rule.coverage)
        if job.feedback_optimizer is not None and not rule.feedback_parameters():
            log.info("feedback_optimizer=%s is not used: %s learns no feedback", job.feedback_optimizer.name, rule.name)
        recorder = Recorder(directory, job, progress)
        try:
            angles = _fit(job, place, rule, optimizers, splits, probe, recorder, progress, title, later_epochs)
            result |= progress_result(recorder, progress, probe, angles) | {"status": "finished"}
        except Diverged as error:
            log.warning("diverged: %s", error)
            result |= progress_result(recorder, progress, probe, None)
            result |= {"status": "diverged", "error": _error(error) | {"epoch": error.epoch, "layer": error.layer}}
        except KeyboardInterrupt as error:
            result |= progress_result(recorder, progress, probe, None) | {"status": "interrupted", "error": _error(error)}
            raise
        except Exception as error:
            result |= progress_result(recorder, progress, probe, None) | {"error": _error(error)}
            raise
        finally:
            recorder.finish(result)
    return result


class Parts(NamedTuple):
    """What a run is made of, ready to be trained."""

    splits: Splits
    rule: Rule
    optimizers: Optimizers
    probe: Probe


@within_memory
def assemble(job: Job, device: torch.device) -> Parts:
    """Load the data, build the model and put the rule into it.

    Args:
        job: the job as it is trained, see `fa_bench.scale.scaled`.
        device: what `prepare` gave.

    Raises:
        FaBenchError: for input that cannot be run.
    """
    trial = SCALES[job.run.scale]
    splits = job.dataset.load(Path(job.run.data_dir), device, trial and (trial.train, trial.test))
    model = _build(job, splits).to(device)
    if device.type == "cpu":
        require(4 * sum(weight.numel() for weight in model.parameters()), "the gradients of this architecture")
    x, y = next(splits.train.batches(min(job.run.probe_size, len(splits.train))))
    rule = job.fresh_algorithm().attach(model, seed=job.run.seed, sample_input=x[:2])
    return Parts(splits, rule, Optimizers(job.optimizer, rule, job.run.epochs, job.feedback_optimizer), Probe(rule, x, y))


def _finished(place: RunDirectory) -> dict[str, Any] | None:
    """The result of a run that trained to its last epoch; None for one that may go on.

    Raises:
        RunDirectoryError: where its checkpoint cannot be read or is another config's.
    """
    if not place.checkpoint.exists() or not (place.path / RESULT).exists():
        return None
    progress = Progress(**checkpoint.read(place.checkpoint, place.job.config_hash, "cpu")["progress"])
    found = read_run(place.path)
    whole = progress.epoch >= scaled(place.job).run.epochs
    return found.result if whole and found is not None and found.finished else None


def record_failure(job: Job, directory: Path, error: BaseException, experiment: str | None = None) -> None:
    """Log why a run failed, with the traceback, and write its result unless it wrote one itself; keeps another run's files."""
    place = RunDirectory(directory, job)
    place.check()
    place.start(keep=True)
    with _log_file(directory / LOG):
        log.debug("failed: %s", error, exc_info=error)
    if not (directory / RESULT).exists():
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
    checkpoint.seed_everything(job.run.seed)
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


def _fit(
    job: Job, place: RunDirectory, rule: Rule, optimizers: Optimizers, splits: Any, probe: Probe, recorder: Recorder,
    progress: Progress, title: str, later_epochs: int,
) -> dict[str, dict[str, float]]:
    steps = splits.train.steps(job.run.batch_size, job.run.drop_last)
    first, start = progress.epoch + 1, time.perf_counter()
    with tqdm(total=steps * job.run.epochs, initial=progress.step, desc=title or rule.name, unit="step", disable=None,
              leave=False, dynamic_ncols=True) as bar:

        def on_epoch(progress: Progress, metrics: dict[str, Any]) -> None:
            recorder.epoch(progress, metrics)
            checkpoint.save(place.checkpoint, place.job.config_hash, progress, rule, optimizers)
            val = "" if metrics["val_accuracy"] is None else f"  val {metrics['val_accuracy']:.2%}"
            shown = f"train loss {metrics['train_loss']:.4f}{val}  test {metrics['test_accuracy']:.2%}"
            bar.set_postfix_str(shown, refresh=False)
            # Off a terminal there is no bar: the log is what shows that the run is alive.
            log.log(logging.INFO if bar.disable else logging.DEBUG, "%s epoch %d/%d  %s",
                    title or rule.name, progress.epoch, job.run.epochs, shown)
            if progress.epoch == first and later_epochs:
                took = time.perf_counter() - start
                left = took * (job.run.epochs - first + later_epochs)
                log.info("%s: %s an epoch; %s left, if the other runs take as long", title or rule.name,
                         duration(took), duration(left))

        return Loop(
            rule, optimizers, splits, job.run.batch_size, job.run.drop_last, job.run.seed, probe, job.run.probe_every,
            on_probe=recorder.probe, on_step=lambda progress: bar.update(), on_epoch=on_epoch,
        ).fit(progress, job.run.epochs)


def _error(error: BaseException) -> dict[str, str]:
    return {"type": type(error).__name__, "message": str(error)}


class _Console(logging.Handler):
    """Log lines on standard output, above a progress bar; at most one epoch line a second and run."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)


class _log_file:
    """While it is open, the log goes to a file, whole, and to the terminal, in short."""

    def __init__(self, path: Path) -> None:
        self.file = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
        self.file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def __enter__(self) -> None:
        log.setLevel(logging.DEBUG)
        log.addHandler(self.file)

    def __exit__(self, *exception: object) -> None:
        log.removeHandler(self.file)
        self.file.close()


def show_log() -> None:
    """Show the log's short form on the terminal."""
    if not any(isinstance(handler, _Console) for handler in log.handlers):
        console = _Console(level=logging.INFO)
        log.addHandler(console)
    log.setLevel(logging.DEBUG)
    log.propagate = False


__all__ = ["FaBenchError", "Parts", "assemble", "prepare", "record_failure", "run", "show_log"]
