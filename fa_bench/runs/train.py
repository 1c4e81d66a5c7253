"""One run: build, attach, fit, record."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from fa_bench.callbacks.base import Callback
from fa_bench.config.job import Job
from fa_bench.config.scale import SCALES, scaled
from fa_bench.data.base import Splits
from fa_bench.errors import ConfigError, CoverageError, OptionError, OutputError, RunDirectoryError
from fa_bench.mechanisms.rule import Rule
from fa_bench.metrics.meter import AlignmentMeter
from fa_bench.metrics.probes.base import Probes, Subject
from fa_bench.optim.optimizers import Optimizers
from fa_bench.registry.registries import CALLBACKS
from fa_bench.runs import checkpoint
from fa_bench.runs.batches import check_batches, fixed_batch
from fa_bench.runs.callbacks import Alignment, Checkpoints, Display, Histograms, Recording, StopOnSignal
from fa_bench.runs.data_checks import compare
from fa_bench.runs.divergence import Diverged, Divergence
from fa_bench.runs.hashes import state_hash, weights_hash
from fa_bench.runs.logs import log, log_file
from fa_bench.runs.loop import Progress, Trainer
from fa_bench.runs.readers import RecordError, recorded_lines
from fa_bench.runs.record import Recorder, base_result, device_name, make_loggers, progress_result
from fa_bench.runs.rundir import RunDirectory, Stage
from fa_bench.utils.files import LOG, METRICS, RESULT, dump_json, write_text
from fa_bench.utils.memory_limits import require, within_memory
from fa_bench.utils.process import isolated, seed_everything
from fa_bench.utils.stopping import Interrupted, Stop, postponed


def run(
    job: Job, directory: Path, title: str = "", experiment: str | None = None, later_epochs: int = 0
) -> dict[str, Any]:
    """Train one job in its directory.

    Args:
        job: the checked config.
        directory: where its records go; nothing in it changes until data, model and rule are ready.
        title: what the progress bar says.
        experiment: the experiment that the config came from, for the record.
        later_epochs: epochs of the runs that follow, to estimate how long they will take.

    Returns:
        The result, as in result.json; its status is finished or diverged.

    Raises:
        FaBenchError: for input that cannot be run, and where another process writes the directory.
        Interrupted: after SIGINT or SIGTERM, when a checkpoint and the result were written, with status interrupted.
    """
    run_dir = RunDirectory(directory, job)
    run_dir.check()
    with run_dir.hold(), isolated():
        run_dir.check()  # again, for what came before the lock was ours
        title = title or str(directory)
        resume = _should_resume(run_dir, title)
        if resume and run_dir.stage is Stage.FINISHED and _is_complete(run_dir):
            result = json.loads((directory / RESULT).read_bytes())
            unchanged, reason = compare(job, result, lambda: load(scaled(job), prepare(job)).data_hash)
            if unchanged:
                log.info("%s is finished already: nothing to do%s", title, f"; {reason}" if reason else "")
                return result
            resume = _restart(run_dir, title, reason)
        return _run(run_dir, resume, title, experiment, later_epochs)


def _should_resume(run_dir: RunDirectory, title: str) -> bool:
    """Whether to resume what is in the directory.

    Raises:
        RunDirectoryError: where resume=true asks for it, and another version of the code produced what is there.
    """
    if run_dir.job.run.resume is False:
        return False
    return run_dir.stage is not Stage.STALE or _restart(run_dir, title, "was produced by a different version of the code")


def _restart(run_dir: RunDirectory, title: str, why: str) -> bool:
    """False, for a run that must restart: what is there cannot be resumed with bitwise identical results.

    Raises:
        RunDirectoryError: where resume=true asks for that.
    """
    if run_dir.job.run.resume:
        raise RunDirectoryError(f"{run_dir.path}: {why}, so that resume=true would not give bitwise identical results; "
                                "resume=false restarts")
    log.info("%s %s: restarting", title, why)
    return False


def _is_complete(run_dir: RunDirectory) -> bool:
    """Whether a finished run's checkpoint can be read, where it was kept."""
    if run_dir.checkpoint.exists():
        try:
            checkpoint.read(run_dir.checkpoint, run_dir.job.config_hash, "cpu")
        except RunDirectoryError as error:
            log.debug("%s", error)
            return False
    return True


def _run(run_dir: RunDirectory, resume: bool, title: str, experiment: str | None, later_epochs: int) -> dict[str, Any]:
    make_loggers(run_dir.job)  # before anything is read or trained: one whose package is missing is refused
    device = prepare(run_dir.job)
    job = scaled(run_dir.job)  # as it is trained; its name and identity stay those of `run_dir.job`
    parts = assemble(job, device)
    progress, warnings = Progress(), []
    resuming = resume and (run_dir.checkpoint.exists() or run_dir.previous.exists())
    if resuming:
        try:
            progress = _load(run_dir, job, parts, warnings)
        except (RecordError, RunDirectoryError) as error:
            if run_dir.job.run.resume:
                raise RunDirectoryError(f"{error}; resume=false restarts") from None
            # Whatever a checkpoint put into the model before it failed is left behind.
            warnings, resuming, parts = [f"{error}; restarting"], False, assemble(job, prepare(run_dir.job))
    run_dir.start(keep=resuming)
    result = {**base_result(run_dir.job, experiment), "epochs": job.run.epochs, "data_hash": parts.splits.data_hash,
              "device": device_name(device), "initial_weights_hash": parts.initial_weights_hash}
    with ExitStack() as stack:
        stack.enter_context(log_file(run_dir.path / LOG))
        _log_beginning(job, parts, progress, warnings, resuming, resume and bool(run_dir.job.run.resume))
        recorder = Recorder(run_dir.path, job, progress, parts.probes)
        stack.callback(recorder.close)
        stop = stack.enter_context(postponed())

        def save() -> None:
            recorder.flush()  # everything that the checkpoint counts as recorded is in the files
            checkpoint.save(run_dir.checkpoint, run_dir.previous, run_dir.job.config_hash, parts.splits.data_hash,
                            progress, parts.rule, parts.optimizers, parts.callbacks)

        display = Display(title or parts.rule.name, later_epochs)
        stack.callback(display.close)
        trainer = Trainer(parts.rule, parts.optimizers, parts.splits, job.run, [
            Divergence(proceed=job.run.on_divergence == "continue"), *([Histograms(recorder, job.run.histograms_every)]
                                                                       if job.run.histograms_every else []),
            Alignment(parts.meter, job.run.probe_every, recorder.layers), *parts.callbacks, Recording(recorder),
            Checkpoints(save, job.run.checkpoint_epochs, job.run.checkpoint_minutes), display, StopOnSignal(stop),
        ], progress)
        with _concluding(result, job, parts, recorder, progress, save):
            _initial_phase(parts.rule, display.title, stop)
            trainer.fit()
    return result


def _load(run_dir: RunDirectory, job: Job, parts: Parts, warnings: list[str]) -> Progress:
    """Restore the newest usable checkpoint; raises RecordError or RunDirectoryError where there is none."""
    steps = parts.splits.train.steps(job.run.batch_size, job.run.drop_last)
    expected = checkpoint.Expected(run_dir.job.config_hash, parts.splits.data_hash, job.run.epochs, steps)
    progress = checkpoint.load((run_dir.checkpoint, run_dir.previous), expected, parts.rule, parts.optimizers,
                               warnings.append, parts.callbacks)
    recorded_lines(run_dir.path / METRICS, progress.epoch)
    return progress


def _log_beginning(job: Job, parts: Parts, progress: Progress, warnings: list[str], resuming: bool, asked: bool) -> None:
    for line in warnings:
        log.warning("%s", line)
    for line in parts.splits.notes:
        log.info("%s", line)
    if resuming or asked:
        batch = f", batch {progress.batch}" if progress.batch else ""
        log.info(f"resuming after epoch {progress.epoch}{batch}" if resuming else "no checkpoint: starting from the beginning")
    log.debug("%s", parts.rule.coverage)
    if job.feedback_optimizer is not None and not parts.rule.feedback_parameters():
        log.info("feedback_optimizer=%s is not used: %s learns no feedback", job.feedback_optimizer.name, parts.rule.name)


def _initial_phase(rule: Rule, title: str, stop: Stop) -> None:
    """What the rule does before training."""
    steps = rule.initial_steps_left
    if steps:
        log.info("%s: %d steps before training", title, steps)
    for _ in tqdm(rule.initial_phase(), total=steps, desc=f"{title} before training", unit="step",
                  disable=None if steps else True, leave=False):
        stop.check()


@contextmanager
def _concluding(
    result: dict[str, Any], job: Job, parts: Parts, recorder: Recorder, progress: Progress, save: Any
) -> Iterator[None]:
    """Completes `result` and writes it, however the training within it ends."""
    complete = False
    try:
        yield
        complete = True
        if progress.diverged is None:
            result |= {"probes": recorder.measure_probes(progress), "status": "finished"}
        else:
            result |= _diverged(progress)
    except Diverged:
        result |= _diverged(progress)
    except BaseException as error:
        error = _explained(error, job)
        if isinstance(error, Interrupted):
            save()
        interrupted = isinstance(error, KeyboardInterrupt)
        result |= {"status": "interrupted" if interrupted else "failed", "error": _error(error)}
        raise error
    finally:
        result |= progress_result(recorder, progress, parts.meter, complete)
        result |= {"batches_hash": progress.batches_hash, "weights_hash": weights_hash(parts.rule.model),
                   "feedback_hash": state_hash([parts.rule.feedback, parts.rule.state_dict()]),
                   "optimizer_hash": state_hash(parts.optimizers.state_dict())}
        _finish(recorder, result)


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
    meter: AlignmentMeter
    probes: Probes
    callbacks: list[Callback]
    initial_weights_hash: str


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
    x, y = fixed_batch(splits, job.run.probe_size)
    rule = job.fresh_algorithm()
    try:
        rule.attach(model, seed=job.run.seed, sample_input=x[:2], initial_phase=False, objective=job.objective)
    except CoverageError as error:
        raise error.under("algorithm") from None
    check_batches(rule, splits, job.run)
    steps = splits.train.steps(job.run.batch_size, job.run.drop_last)
    optimizers = Optimizers(job.optimizer, rule, job.run.epochs, job.feedback_optimizer, steps)
    meter = AlignmentMeter(rule, x, y, job.run.metrics)
    probes = Probes(job.run.probes, job.run.probes_epochs, Subject(rule, splits, meter, job.run.batch_size))
    callbacks = [CALLBACKS[name]() for name in dict.fromkeys(job.run.callbacks)]
    return Parts(splits, rule, optimizers, meter, probes, callbacks, initial)


def record_failure(job: Job, directory: Path, error: BaseException, experiment: str | None = None) -> None:
    """Log why a run failed, with the traceback, and write its result unless it wrote one itself; keeps another run's files.

    What an earlier start of the run left, such as a checkpoint, is kept.
    """
    run_dir = RunDirectory(directory, job)
    run_dir.check()
    with run_dir.hold():
        written = (directory / RESULT).exists() and run_dir.stage is not Stage.STALE
        if not written:
            run_dir.start(keep=True)
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


def _error(error: BaseException) -> dict[str, str]:
    return {"type": type(error).__name__, "message": str(error)}
