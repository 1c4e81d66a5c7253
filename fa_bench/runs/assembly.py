"""Build the parts of a run, such as its data, model, rule and optimizers."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import NamedTuple

import torch

from fa_bench.callbacks.base import Callback
from fa_bench.config.job import Job
from fa_bench.config.scale import SCALES
from fa_bench.data.splits import Splits
from fa_bench.errors import ConfigError, CoverageError, OptionError, names, nearest
from fa_bench.mechanisms.contexts import evaluating
from fa_bench.mechanisms.rule import Rule
from fa_bench.mechanisms.trace import named_results
from fa_bench.metrics.meter import AlignmentMeter
from fa_bench.metrics.probes.base import Probes, Subject
from fa_bench.objectives.base import Objective
from fa_bench.optim.optimizers import Optimizers
from fa_bench.registry.registries import CALLBACKS
from fa_bench.registry.specs import component
from fa_bench.runs import parallel
from fa_bench.runs.batches import check_batches, check_indices, check_targets, fixed_batch
from fa_bench.runs.execution import Execution
from fa_bench.runs.hashes import state_hash
from fa_bench.runs.prediction import rule_for
from fa_bench.utils.memory_limits import require_memory, within_memory
from fa_bench.utils.process import seed_everything, set_deterministic


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
    """The data of a job, reduced if its scale requires it.

    Raises:
        FaBenchError: if the data are missing, broken, or incompatible with the dataset's options.
    """
    scale = SCALES[job.run.scale]
    return job.dataset.load(Path(job.run.data_dir), device, scale and (scale.train, scale.test))


@within_memory()
def assemble(job: Job, device: torch.device, splits: Splits | None = None) -> Parts:
    """Load the data if necessary, build the model, attach the rule, and return the parts of the run. The rule's initial phase has
    not run yet.

    Args:
        job: the job, after its scale has been applied (see `fa_bench.config.scale.scaled`).
        device: from `prepare`.
        splits: from `load`, if it was called before.

    Raises:
        FaBenchError: if the job cannot be run.
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
    """The job's objective with the name of the output that is trained, which may come from an option of the rule.

    Raises:
        OptionError: if the model has several outputs and none is named, or if the named output does not exist.
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


def prepare(job: Job) -> torch.device:
    """Set the process-wide state that a run depends on, and return the run's device.

    Raises:
        ConfigError: if the device is not available or cannot be used by several processes, or if compile=true is set for several
            processes.
    """
    # Large logits lead to probabilities below 1e-38, and a CPU computes with such denormal numbers many times more slowly. The
    # setting must be made before torch starts its worker threads, which inherit it.
    torch.set_flush_denormal(True)
    torch.set_default_dtype(torch.float32)
    if job.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    set_deterministic(job.run.deterministic)
    torch.backends.cudnn.benchmark = not job.run.deterministic
    # By default, torch computes convolutions on CUDA devices with the ten-bit mantissa of TF32, whereas a run does so only with
    # precision=tf32.
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
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(f"device={name}: this machine has {torch.cuda.device_count()} CUDA devices (allowed: auto, cpu)")
        # torch reads this variable only once in a process, at the first matrix product, and a later run in the process may be
        # deterministic.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device=mps: this machine has no MPS device (allowed: auto, cpu)")
    return device
