"""Build the parts of one run, attach the rule, train, and record the result."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from tqdm import tqdm

from fa_bench.callbacks.base import Callback
from fa_bench.config.job import Job
from fa_bench.config.scale import scaled
from fa_bench.errors import RunDirectoryError
from fa_bench.mechanisms.rule import Rule
from fa_bench.runs import checkpoint, parallel
from fa_bench.runs.assembly import Parts, assemble, load, prepare
from fa_bench.runs.callbacks import Alignment, Checkpoints, Display, Energy, Histograms, StopOnSignal, probe_interval
from fa_bench.runs.checked_json import RecordError
from fa_bench.runs.divergence import Divergence
from fa_bench.runs.hashes import compare_data
from fa_bench.runs.locks import lock_directory
from fa_bench.runs.logs import log, log_file
from fa_bench.runs.loop import Progress, Trainer
from fa_bench.runs.outcome import recording_outcome
from fa_bench.runs.parallel import SameStop
from fa_bench.runs.readers import recorded_lines, recorded_measurements
from fa_bench.runs.record import Recorder, base_result, device_name, make_loggers
from fa_bench.runs.rundir import RunDirectory, RunState
from fa_bench.utils.energy import EnergyMeter
from fa_bench.utils.files import ANGLES, LOG, METRICS, RESULT
from fa_bench.utils.process import isolated
from fa_bench.utils.stopping import StopRequest, deferred_signals


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
        directory: the run directory; apart from its lock, nothing in it changes until data, model and rule are ready.
        title: the title of the run in the log and in the progress bar.
        experiment: the experiment that the config came from, for the record.
        later_epochs: epochs of the runs that follow, to estimate the remaining time.
        callbacks: additional callbacks, called after those of the config. They are not part of the run's identity: they must not
            change the training, and their state is not saved. A run that they stop can be resumed without them, with the result
            of an uninterrupted run; a run that was stopped by a callback of its config is not trained again. If callbacks of both
            kinds request a stop, the request of the config's callback takes precedence.
        swept: the keys in which the runs of the sweep differ, for the loggers; see `fa_bench.config.labels.swept_keys`.
        brief: print fewer lines; see `fa_bench.runs.callbacks.Display`.

    Returns:
        The content of result.json, with the status finished, diverged or stopped.

    Raises:
        FaBenchError: if the job cannot be run, or another process has locked the directory.
        Interrupted: after a signal such as SIGINT, once a checkpoint and a result with the status interrupted have been written;
            after a second SIGINT, immediately and without a new checkpoint.
        ProcessLost: if another process that trains the run has ended; the run can be resumed from its last checkpoint.
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
        run_dir.check()  # again, because another process may have changed it before it was locked
        title = title or str(directory)
        resume = job.run.resume is not False
        if resume and run_dir.is_stale:
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
    """Log why a run restarts instead of resuming, and return False, the new value of `resume`.

    Raises:
        RunDirectoryError: if resume=true forbids restarting.
    """
    if run_dir.job.run.resume:
        raise RunDirectoryError(
            f"{run_dir.path}: {reason}, so resume=true would not give bitwise identical results; pass resume=false to restart"
        )
    log.info("%s %s; restarting", title, reason)
    return False


def _is_readable(run_dir: RunDirectory) -> bool:
    """Whether the checkpoint of a finished run can be read, if it has one."""
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
                raise RunDirectoryError(f"{error}; pass resume=false to restart") from None
            # The parts are built again, because loading the checkpoint may have changed the model before it failed.
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
        "weight_transport": parts.rule.coverage.all_transport(),
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
        with recording_outcome(result, job, parts, recorder, trainer, save):
            _initial_phase(parts.rule, title, stop)
            trainer.fit()
    return result


def _load(run_dir: RunDirectory, job: Job, parts: Parts, warnings: list[str]) -> Progress:
    """Restore the newest usable checkpoint. Raises a RunDirectoryError if there is none, and a RecordError if records up to that
    checkpoint are missing or damaged."""
    steps = parts.splits.train.steps(job.run.batch_size, job.run.drop_last)
    expected = checkpoint.Expected(run_dir.job.config_hash, parts.splits.data_hash, job.run.epochs, steps)
    progress = checkpoint.load(
        (run_dir.checkpoint, run_dir.previous), expected, parts.rule, parts.optimizers, warnings.append, parts.callbacks
    )
    recorded_lines(run_dir.path / METRICS, progress.epoch)
    recorded_measurements(run_dir.path / ANGLES, progress.measurements, progress.probed)
    return progress


def _shared(progress: Progress, parts: Parts, resuming: bool) -> Progress:
    """The progress of this process; if the run is resumed, `parts` also take over the state that process 0 has loaded."""
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
    if job.run.batch_size > (samples := len(parts.splits.train)):
        log.info(
            "batch_size=%d is more than the %d training samples: an epoch is one step on all of them", job.run.batch_size, samples
        )
    if resuming or requested:
        batch = f", batch {progress.batch}" if progress.batch else ""
        log.info(f"resuming after epoch {progress.epoch}{batch}" if resuming else "no checkpoint: starting from the beginning")
    log.debug("%s", parts.rule.coverage)
    if job.feedback_optimizer is not None and not parts.rule.feedback_parameters():
        log.info("feedback_optimizer=%s is not used: %s learns no feedback", job.feedback_optimizer.name, parts.rule.name)


def _initial_phase(rule: Rule, title: str, stop: StopRequest) -> None:
    """Run the rule's initial phase, which comes before training."""
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
