"""One run: build, attach, train, record."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from fa_bench.callbacks.base import Callback
from fa_bench.config.job import Job
from fa_bench.config.scale import SCALES, scaled
from fa_bench.data.splits import Splits
from fa_bench.errors import ConfigError, CoverageError, OptionError, OutputError, RunDirectoryError, names, nearest
from fa_bench.mechanisms.contexts import evaluating
from fa_bench.mechanisms.rule import Rule
from fa_bench.mechanisms.trace import named_results
from fa_bench.metrics.meter import AlignmentMeter
from fa_bench.metrics.probes.base import Probes, Subject
from fa_bench.objectives.base import Objective
from fa_bench.optim.optimizers import Optimizers
from fa_bench.registry.registries import CALLBACKS
from fa_bench.registry.specs import component
from fa_bench.runs import checkpoint, parallel
from fa_bench.runs.batches import check_batches, check_indices, check_targets, fixed_batch
from fa_bench.runs.callbacks import Alignment, Checkpoints, Display, Energy, Histograms, StopOnSignal, probe_interval
from fa_bench.runs.divergence import Diverged, Divergence
from fa_bench.runs.execution import Execution
from fa_bench.runs.hashes import compare_data, state_hash, weights_hash
from fa_bench.runs.locks import lock_directory
from fa_bench.runs.logs import log, log_file
from fa_bench.runs.loop import Progress, Trainer
from fa_bench.runs.parallel import ProcessLost, SameStop
from fa_bench.runs.prediction import predicted_cost, rule_for
from fa_bench.runs.readers import RecordError, recorded_lines, recorded_measurements
from fa_bench.runs.record import Recorder, base_result, device_name, make_loggers, progress_result
from fa_bench.runs.rundir import RunDirectory, RunState
from fa_bench.utils.energy import EnergyMeter
from fa_bench.utils.files import ANGLES, LOG, METRICS, RESULT, dump_json, write_text
from fa_bench.utils.memory_limits import require_memory, within_memory
from fa_bench.utils.process import isolated, seed_everything, set_deterministic
from fa_bench.utils.stopping import Interrupted, StopRequest, deferred_signals


def run(
    job: Job,
    directory: Path,
    title: str = "",
    experiment: str | None = None,
    later_epochs: int = 0,
    callbacks: Iterable[Callback] = (),
    swept: Mapping[str, bool] = MappingProxyType({}),
    brief: bool = False,
) -> dict[str, Any]:
    """Train one job in its directory.

    Args:
        job: the checked config.
        directory: the run directory; nothing in it changes until data, model and rule are ready.
        title: of the progress bar.
        experiment: the experiment that the config came from, for the record.
        later_epochs: epochs of the runs that follow, to estimate the remaining time.
        callbacks: further callbacks, called after those of the config. They are not part of the run's identity: they must not
            change the training, and their state is not saved. A run that they stop can be resumed without them, with the result
            of an uninterrupted run; one that a callback of its config stopped is not trained again. If both request a stop, that
            of the config decides.
        swept: the keys in which the runs of the sweep differ, for the loggers; see `fa_bench.config.labels.swept_keys`.
        brief: print fewer lines; see `fa_bench.runs.callbacks.Display`.

    Returns:
        The result, as in result.json; its status is finished, diverged or stopped.

    Raises:
        FaBenchError: if the input cannot be run, or another process has locked the directory.
        Interrupted: after SIGINT or SIGTERM, when a checkpoint and the result were written, with status interrupted.
        ProcessLost: if another process that trains the run has ended; it can be resumed from its last checkpoint.
    """
    run_dir, world = RunDirectory(directory, job), parallel.current()
    if world.rank:  # process 0 decides, and writes
        with isolated():
            start = world.listen()
            return start["result"] or _run(
                run_dir, start["resume"], title, experiment, later_epochs, list(callbacks), swept, brief
            )
    run_dir.check()
    with lock_directory(directory), isolated():
        run_dir.check()  # again: another process may have changed it before it was locked
        title = title or str(directory)
        resume = job.run.resume is not False
        if resume and run_dir.state is RunState.STALE:
            resume = _restart(run_dir, title, "was produced by a different version of the code")
        elif resume and run_dir.state is RunState.FINISHED and _is_readable(run_dir):
            result = json.loads((directory / RESULT).read_bytes())
            is_unchanged, remark = compare_data(job, result, lambda: load(scaled(job), prepare(job)).data_hash)
            if is_unchanged:
                state = f"was stopped ({result['error']['message']})" if result["status"] == "stopped" else "is already finished"
                log.info("%s %s; nothing to do%s", title, state, f"; {remark}" if remark else "")
                world.announce({"result": result, "resume": resume})
                return result
            resume = _restart(run_dir, title, remark)
        world.announce({"result": None, "resume": resume})
        return _run(run_dir, resume, title, experiment, later_epochs, list(callbacks), swept, brief)


def _restart(run_dir: RunDirectory, title: str, reason: str) -> bool:
    """False, for a run that must restart because resuming it would not give bitwise identical results.

    Raises:
        RunDirectoryError: if resume=true forbids restarting.
    """
    if run_dir.job.run.resume:
        raise RunDirectoryError(
            f"{run_dir.path}: {reason}, so that resume=true would not give bitwise identical results; resume=false restarts"
        )
    log.info("%s %s; restarting", title, reason)
    return False


def _is_readable(run_dir: RunDirectory) -> bool:
    """Whether a finished run's checkpoint can be read, unless it was deleted."""
    if run_dir.checkpoint.exists():
        try:
            checkpoint.read(run_dir.checkpoint, run_dir.job.config_hash, "cpu")
        except RunDirectoryError as error:
            log.debug("%s", error)
            return False
    return True


def _run(
    run_dir: RunDirectory,
    resume: bool,
    title: str,
    experiment: str | None,
    later_epochs: int,
    external: list[Callback],
    swept: Mapping[str, bool],
    brief: bool,
) -> dict[str, Any]:
    make_loggers(run_dir.job)  # refuses a logger whose package is missing, before anything is read or trained
    device = prepare(run_dir.job)
    job = scaled(run_dir.job)  # as it is trained; its identity remains that of `run_dir.job`
    parts = assemble(job, device)
    progress, warnings, world = Progress(), [], parallel.current()
    resuming = resume and not world.rank and (run_dir.checkpoint.exists() or run_dir.previous.exists())
    if resuming:
        try:
            progress = _load(run_dir, job, parts, warnings)
        except (RecordError, RunDirectoryError) as error:
            if run_dir.job.run.resume:
                raise RunDirectoryError(f"{error}; resume=false restarts") from None
            # Built again: the checkpoint may have changed the model before it failed.
            warnings, resuming, parts = [f"{error}; restarting"], False, assemble(job, prepare(run_dir.job))
    progress = _shared(progress, parts, resuming)
    if not world.rank:
        run_dir.start(resuming)
    result = {
        **base_result(run_dir.job, experiment),
        "epochs": job.run.epochs,
        "data_hash": parts.splits.data_hash,
        "device": device_name(device),
        "world_size": world.size,
        "initial_weights_hash": parts.initial_weights_hash,
        "weight_transport": list(parts.rule.coverage.transport),
    }
    with ExitStack() as stack:
        if not world.rank:
            stack.enter_context(log_file(run_dir.path / LOG))
        _log_start(job, parts, progress, warnings, resuming, resume and bool(run_dir.job.run.resume))
        energy = EnergyMeter.of(device)
        result |= {"energy_counters": [] if energy is None else energy.counters}
        steps = parts.splits.train.steps(job.run.batch_size, job.run.drop_last)
        recorder = Recorder(None if world.rank else run_dir.path, job, progress, parts.probes, steps, swept)
        stack.callback(recorder.close)
        stop = stack.enter_context(deferred_signals())

        def save() -> None:
            totals = world.totals(progress)
            if not world.rank:
                recorder.flush()  # the files must contain everything that the checkpoint counts as recorded
                checkpoint.save(
                    run_dir.checkpoint,
                    run_dir.previous,
                    run_dir.job.config_hash,
                    parts.splits.data_hash,
                    totals,
                    parts.rule,
                    parts.optimizers,
                    parts.callbacks,
                )

        display = Display(title, later_epochs, brief)
        stack.callback(display.close)
        histograms = [Histograms(recorder, job.run.histograms_every)] if job.run.histograms_every else []
        probe_every = probe_interval(job.run.probe_every, steps * job.run.epochs)
        trainer = Trainer(
            parts.rule,
            parts.optimizers,
            parts.splits,
            job.run,
            [
                Divergence(proceed=job.run.on_divergence == "continue"),
                *histograms,
                Alignment(parts.meter, probe_every, recorder.measured),
                *parts.callbacks,
                *external,
                *([SameStop()] if world.size > 1 else []),
                recorder,
                *([Energy(energy)] if energy is not None else []),
                Checkpoints(save, job.run.checkpoint_epochs, job.run.checkpoint_minutes),
                display,
                StopOnSignal(stop),
            ],
            progress,
            external,
            parts.execution,
            world,
        )
        with _recording_outcome(result, job, parts, recorder, trainer, save):
            _initial_phase(parts.rule, title, stop)
            trainer.fit()
    return result


def _load(run_dir: RunDirectory, job: Job, parts: Parts, warnings: list[str]) -> Progress:
    """Restore the newest usable checkpoint; raises RecordError or RunDirectoryError if there is none."""
    steps = parts.splits.train.steps(job.run.batch_size, job.run.drop_last)
    expected = checkpoint.Expected(run_dir.job.config_hash, parts.splits.data_hash, job.run.epochs, steps)
    progress = checkpoint.load(
        (run_dir.checkpoint, run_dir.previous), expected, parts.rule, parts.optimizers, warnings.append, parts.callbacks
    )
    recorded_lines(run_dir.path / METRICS, progress.epoch)
    recorded_measurements(run_dir.path / ANGLES, progress.measurements, progress.probed)
    return progress


def _shared(progress: Progress, parts: Parts, resuming: bool) -> Progress:
    """The progress of this process; if the run is resumed, its parts have the state that process 0 has loaded."""
    world, buffer = parallel.current(), io.BytesIO()
    if world.size > 1:
        if resuming:
            torch.save(checkpoint.capture(progress, parts.rule, parts.optimizers, parts.callbacks), buffer)
        state = world.from_main(buffer.getvalue())
        if state and world.rank:
            device = next(parts.rule.model.parameters()).device
            loaded = torch.load(io.BytesIO(state), map_location=device, weights_only=True)
            checkpoint.restore(loaded, parts.rule, parts.optimizers, parts.callbacks)
            progress = Progress(**loaded["progress"])
            if progress.loss_sum is not None:  # process 0 has the sums of the batches so far
                progress.loss_sum, progress.sums, progress.samples = torch.zeros_like(progress.loss_sum), {}, 0
    return progress


def _log_start(job: Job, parts: Parts, progress: Progress, warnings: list[str], resuming: bool, requested: bool) -> None:
    for line in warnings:
        log.warning("%s", line)
    world_notes = parallel.current().notes(parts.rule.model, job.run.sync_batch_norm, parts.rule.coverage.notes)
    for line in (*parts.splits.notes, *world_notes):
        log.info("%s", line)
    if resuming or requested:
        batch = f", batch {progress.batch}" if progress.batch else ""
        log.info(f"resuming after epoch {progress.epoch}{batch}" if resuming else "no checkpoint: starting from the beginning")
    log.debug("%s", parts.rule.coverage)
    if job.feedback_optimizer is not None and not parts.rule.feedback_parameters():
        log.info("feedback_optimizer=%s is not used: %s learns no feedback", job.feedback_optimizer.name, parts.rule.name)


def _initial_phase(rule: Rule, title: str, stop: StopRequest) -> None:
    """Run the rule's phase before training."""
    steps = rule.initial_steps_left
    if steps:
        log.info("%s: %d steps before training", title, steps)
    for _ in tqdm(
        rule.initial_phase(),
        total=steps,
        desc=f"{title} before training",
        unit="step",
        disable=None if steps else True,
        leave=False,
    ):
        parallel.current().check(stop)


@contextmanager
def _recording_outcome(
    result: dict[str, Any], job: Job, parts: Parts, recorder: Recorder, trainer: Trainer, save: Any
) -> Iterator[None]:
    """Complete `result` and write it, however the training in the block ends."""
    progress, complete, raised = trainer.progress, False, None
    try:
        yield
        complete = True
        request = trainer.stop_request if progress.epoch < job.run.epochs else None
        if progress.diverged is not None:
            result |= _diverged(progress)
        elif request is not None:
            result |= _stopped(progress, request)
        else:
            result |= {"status": "finished"}
        # A run that can be resumed must not record what an uninterrupted one does not measure.
        if result["status"] == "finished" or (result["status"] == "stopped" and progress.stopped is not None):
            result |= {"probes": recorder.measure_probes(progress)}
    except Diverged:
        result |= _diverged(progress)
    except BaseException as error:
        error = raised = _explain(error, job)
        if isinstance(error, Interrupted) and trainer.world.stops_together:
            save()
        # A process that is lost without a reason was killed, or stopped.
        is_stopped = isinstance(error, KeyboardInterrupt) or (isinstance(error, ProcessLost) and not error.reason)
        status = "interrupted" if is_stopped else "failed"
        result |= {"status": status, "error": _error(error)}
        raise error
    finally:
        result |= progress_result(recorder, progress, parts.meter, complete)
        if raised is None and not trainer.world.rank:  # a signal or a failure is not to wait for it; after the peak memory
            result |= {"cost": predicted_cost(job, parts.splits, parts.meter.x[:2], parts.rule.objective)}
        result |= {
            "batches_hash": progress.batches_hash,
            "weights_hash": weights_hash(parts.rule.model),
            "feedback_hash": state_hash([parts.rule.feedback, parts.rule.state_dict()]),
            "optimizer_hash": state_hash(parts.optimizers.state_dict()),
        }
        try:
            recorder.finish(result)
        except OutputError as error:
            if raised is None:
                raise
            log.warning("%s", error)  # does not hide the error that is being raised


def _diverged(progress: Progress) -> dict[str, Any]:
    assert progress.diverged is not None
    log.warning("diverged: %s", progress.diverged["message"])
    return {"status": "diverged", "error": {"type": "Diverged", **progress.diverged}}


def _stopped(progress: Progress, request: dict[str, Any]) -> dict[str, Any]:
    log.info("stopped after epoch %d: %s", progress.epoch, request["reason"])
    return {
        "status": "stopped",
        "error": {
            "type": "Stopped",
            "message": request["reason"],
            "epoch": progress.epoch,
            "step": progress.step,
            "callback": request["callback"],
        },
    }


def _explain(error: BaseException, job: Job) -> BaseException:
    """The error, ProcessLost if it means that, or a ConfigError if torch found an operation that is not deterministic."""
    error = parallel.current().explained(error)
    operation = re.match(r"(\S+) does not have a deterministic implementation", str(error))
    if isinstance(error, RuntimeError) and operation and job.run.deterministic:
        return ConfigError(
            f"deterministic=true: {operation[1]} has no deterministic implementation on {job.run.device}; "
            "use another architecture, or deterministic=false"
        )
    return error


class Parts(NamedTuple):
    """The parts of a run, ready for training."""

    splits: Splits
    rule: Rule
    optimizers: Optimizers
    meter: AlignmentMeter
    probes: Probes
    callbacks: list[Callback]
    execution: Execution
    initial_weights_hash: str


def load(job: Job, device: torch.device) -> Splits:
    """The data of a job, limited to its scale.

    Raises:
        FaBenchError: if they are missing, broken, or incompatible with the dataset's options.
    """
    scale = SCALES[job.run.scale]
    return job.dataset.load(Path(job.run.data_dir), device, scale and (scale.train, scale.test))


@within_memory()
def assemble(job: Job, device: torch.device, splits: Splits | None = None) -> Parts:
    """Load the data, build the model and attach the rule; the rule's phase before training is not run yet.

    Args:
        job: the job as it is trained, see `fa_bench.config.scale.scaled`.
        device: from `prepare`.
        splits: from `load`, if it was called before.

    Raises:
        FaBenchError: if the input cannot be run.
    """
    splits = splits or load(job, device)
    try:
        job.objective.check_data(splits.train.characters)
    except OptionError as error:
        raise error.with_prefix("objective") from None
    execution = Execution(job.run, device)
    try:
        model = execution.placed(job.architecture.build(splits.input_shape, len(splits.classes)))
    except OptionError as error:
        raise error.with_prefix("architecture") from None
    if device.type == "cpu":
        require_memory(4 * sum(weight.numel() for weight in model.parameters()), "the gradients of this architecture")
    if job.run.sync_batch_norm:
        model = parallel.current().synchronised(model)
    initial = state_hash(model.state_dict())
    x, y, indices = fixed_batch(splits, job.run.probe_size)
    rule = rule_for(job, splits)
    check_indices(rule, splits, job.dataset.name)
    objective = _with_output(job, rule, model, x[:2])
    try:
        rule.attach(model, seed=job.run.seed, sample_input=x[:2], initial_phase=False, objective=objective)
    except CoverageError as error:
        raise error.with_prefix("algorithm") from None
    check_targets(rule, splits, job.dataset.name)
    check_batches(rule, splits, job.run, parallel.current().size)
    steps = splits.train.steps(job.run.batch_size, job.run.drop_last)
    optimizers = Optimizers(job.optimizer, rule, job.run.epochs, job.feedback_optimizer, steps)
    meter = AlignmentMeter(rule, x, y, job.run.metrics, indices)
    probes = Probes(job.run.probes, job.run.probes_epochs, Subject(rule, splits, meter, job.run.batch_size))
    callbacks = [component(CALLBACKS, spec) for spec in job.run.callbacks]
    return Parts(splits, rule, optimizers, meter, probes, callbacks, execution, initial)


def _with_output(job: Job, rule: Rule, model: torch.nn.Module, x: torch.Tensor) -> Objective:
    """The job's objective with the name of the output that is trained, which may be an option of the rule.

    Raises:
        OptionError: if the model has several outputs and none is named, or no such output.
    """
    output = job.objective.output if job.objective.output is not None else getattr(rule, "output", None)
    with evaluating(model), torch.enable_grad():
        results = named_results(model(x))
    listed = names(f"{name} {tuple(tensor.shape)}" for name, tensor in results.items())
    if output is None and len(results) > 1:
        raise OptionError(
            "objective.output",
            f"=null: architecture={job.architecture.name} returns several outputs ({listed}); "
            f"name the one that is trained: objective.output={next(iter(results))}",
        )
    if output is not None and list(results) != [""] and str(output) not in results:
        raise OptionError(
            "objective.output",
            f"={output}: architecture={job.architecture.name} has no such output"
            f"{nearest(str(output), results)} (outputs: {listed or 'none'})",
        )
    return dataclasses.replace(job.objective, output=output)


def record_failure(job: Job, directory: Path, error: BaseException, experiment: str | None = None) -> None:
    """Log why a run failed, with the traceback, and write its result unless it has written one itself.

    Files of another run are not touched, and those of earlier attempts, such as checkpoints, are kept.
    """
    run_dir = RunDirectory(directory, job)
    run_dir.check()
    with lock_directory(directory):
        has_result = (directory / RESULT).exists() and run_dir.state is not RunState.STALE
        if not has_result:
            run_dir.start(resume=True)
        with log_file(directory / LOG):
            log.debug("failed: %s", error, exc_info=error)
        if not has_result:
            write_text(directory / RESULT, dump_json(base_result(job, experiment) | {"error": _error(error)}, indent=1) + "\n")


def prepare(job: Job) -> torch.device:
    """Set all process-wide state that a run depends on, and return the run's device.

    Raises:
        ConfigError: if the device is not available.
    """
    # Large logits give probabilities below 1e-38, and arithmetic on denormal numbers is many times slower on a CPU. Set before
    # torch starts its worker threads, which inherit the setting.
    torch.set_flush_denormal(True)
    torch.set_default_dtype(torch.float32)
    if job.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    set_deterministic(job.run.deterministic)
    torch.backends.cudnn.benchmark = not job.run.deterministic
    # By default, convolutions on CUDA devices are computed with the ten bits of TF32; precision=tf32 asks for it.
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    torch.set_num_threads(job.run.threads or torch.get_num_threads())
    seed_everything(job.run.seed)
    name = job.run.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    name = parallel.current().device(name)
    if job.run.compile is True and parallel.current().size > 1:
        raise ConfigError("compile=true is not possible in several processes; use compile=false")
    if job.run.compile is True and job.algorithm.repeats:
        raise ConfigError(
            f"compile=true is not possible with algorithm={job.algorithm.name}, which runs the model again in the "
            f"backward pass; use compile=false"
        )
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(f"device={name}: this machine has {torch.cuda.device_count()} CUDA devices (allowed: auto, cpu)")
        # torch reads it once in a process, at the first product: a deterministic run may come later.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device=mps: this machine has no MPS device (allowed: auto, cpu)")
    return device


def _error(error: BaseException) -> dict[str, str]:
    return {"type": type(error).__name__, "message": str(error)}
