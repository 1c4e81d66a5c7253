"""``fa-bench --dry-run``: show what a command would run and what it would cost, without training or writing anything."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from omegaconf import OmegaConf

from fa_bench.command.compose import Composer
from fa_bench.config.job import Job
from fa_bench.config.labels import differing_keys, flatten, label, sweep_summary
from fa_bench.config.scale import scaled
from fa_bench.data.fetch import downloads_refused
from fa_bench.data.splits import Split, Splits
from fa_bench.errors import DataError, RunDirectoryError, names
from fa_bench.mechanisms.rule import Rule
from fa_bench.metrics.cost import optimizer_states
from fa_bench.metrics.memory_traffic import memories
from fa_bench.registry.kinds import CLASSES, NOUNS, POSITIONS, VALUES
from fa_bench.registry.options import as_plain
from fa_bench.report.runs import read_run
from fa_bench.report.states import describe_status
from fa_bench.rules.bp import BP
from fa_bench.runs.assembly import Parts, assemble, load, prepare
from fa_bench.runs.locks import lock_holder
from fa_bench.runs.prediction import step_costs_of
from fa_bench.runs.readers import read_metrics
from fa_bench.runs.rundir import RunDirectory, RunState
from fa_bench.utils.files import CONFIG, METRICS
from fa_bench.utils.process import isolated
from fa_bench.utils.text import align_columns, format_bytes, format_count, format_shape, indent

#: Maximum number of a sweep's configs that a dry run shows; configs that differ only in the seed count once. If a sweep has more
#: than this number of configs, a dry run shows only the first one.
MOST_CONFIGS = 6
_HEAD = "Dry run: nothing is trained or written."
_CPU = torch.device("cpu")
#: The term for the items in `Splits.classes`, by the kind of targets.
_OUTPUTS = {CLASSES: "classes", VALUES: "outputs", POSITIONS: "tokens"}


def dry_run(config_name: str, config_dir: str | None, overrides: list[str], multirun: bool) -> str:
    """Describe what a command line would run.

    For a run, the text shows the config, model, feedback, costs, data and directory. For a sweep, the text shows an overview, the
    run directories, the first config and, for every config, the model, feedback, costs and data. Configs that differ only in the
    seed are shown once. If there are more than `MOST_CONFIGS` configs, only the first one is shown.

    Args:
        config_name, config_dir, overrides: as for `fa_bench.command.compose.Composer`.
        multirun: whether this is a sweep.

    Raises:
        FaBenchError: for invalid input, and for missing data, since nothing is downloaded.
    """
    with _nothing_written(), isolated():
        composer = Composer(config_name, config_dir, overrides)
        jobs = composer.check(composer.expand(multirun), directories=False)
        if not multirun:
            ((job, run_dir),) = jobs
            return "\n".join(
                [
                    _HEAD,
                    "",
                    *_section("config", _config(job)),
                    *_details(job, {}),
                    *_section("output", [f"{run_dir}: {describe(run_dir, job)}"]),
                ]
            ).rstrip()
        return "\n".join(_sweep(jobs)).rstrip()


def _sweep(jobs: Sequence[tuple[Job, Path]]) -> list[str]:
    common = Path(os.path.commonpath([run_dir.parent for _, run_dir in jobs]))
    lines = [_HEAD, "", sweep_summary([job for job, _ in jobs], common), "", *_section("output", _directories(jobs))]
    distinct: dict[str, Job] = {}
    for job, run_dir in jobs:
        distinct.setdefault(str(run_dir.parent / job.group), job)
    shown = list(distinct.values())[: 1 if len(distinct) > MOST_CONFIGS else None]
    cache: dict[str, Splits] = {}
    for number, job in enumerate(shown):
        lines += [_title(job, list(distinct.values())), "=" * 80, ""]
        lines += _section("config", _config(job)) if number == 0 else []
        lines += _details(job, cache)
    if len(shown) < len(distinct):
        lines.append(f"{len(distinct) - 1} more configs; only sweeps of at most {MOST_CONFIGS} configs are shown in full")
    return lines


def _title(job: Job, jobs: Sequence[Job]) -> str:
    """A title that names the rule and the values in which its configs differ."""
    rule = job.algorithm.name
    keys = differing_keys(flatten(other.plain()) for other in jobs if other.algorithm.name == rule)
    return label(rule, flatten(job.plain()), keys)


@contextlib.contextmanager
def _nothing_written() -> Iterator[None]:
    """Within the block, download nothing, and write no bytecode files for a user's plugins."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        with downloads_refused():
            yield
    finally:
        sys.dont_write_bytecode = before


def _load(job: Job, cache: dict[str, Splits]) -> Splits:
    """The job's data. `cache` contains only the data loaded last, which are used again if the next job has the same dataset."""
    plain = job.plain()
    key = json.dumps([plain[part] for part in ("dataset", "data_dir", "scale")], sort_keys=True)
    if key not in cache:
        cache.clear()
        cache[key] = load(job, _CPU)
    return cache[key]


# ------------------------------------------------------------------------------------------------ one config
def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [title, *indent(lines), ""]


def _config(job: Job) -> list[str]:
    return OmegaConf.to_yaml(OmegaConf.create(job.plain())).splitlines()


def _details(job: Job, cache: dict[str, Splits]) -> list[str]:
    """Lines on the model, feedback, costs and data of one config, after its scale has been applied."""
    prepare(job)  # raises if the device does not exist
    trained = scaled(job)
    splits = _load(trained, cache)
    parts = assemble(trained, _CPU, splits)
    return [
        *_section("model", [*str(parts.rule.coverage).splitlines(), *_uncovered(parts.rule), *_without_error(parts)]),
        *_section("feedback", _feedback(parts.rule)),
        *_section("cost", align_columns(_costs(trained, parts))),
        *_section("training", align_columns(_training(job, trained, splits))),
    ]


def _uncovered(rule: Rule) -> list[str]:
    """Lines that count, by type, the modules with parameters that the rule does not cover, such as normalisation layers."""
    covered = {entry.layer for entry in rule.coverage.covered}
    sizes_of: dict[tuple[str, bool], list[int]] = {}
    learned = {id(tensor) for tensor in rule.feedback_parameters()}
    for path, module in rule.model.named_modules():
        parameters = [parameter for parameter in module.parameters(recurse=False) if id(parameter) not in learned]
        if parameters and path not in covered:
            key = type(module).__name__, any(parameter.requires_grad for parameter in parameters)
            sizes_of.setdefault(key, []).append(sum(parameter.numel() for parameter in parameters))
    return [
        f"and {len(sizes)} {kind} with {format_count(sum(sizes))} parameters{'' if learns else ', frozen'}"
        for (kind, learns), sizes in sizes_of.items()
    ]


def _without_error(parts: Parts) -> list[str]:
    """A line that names the layers with feedback that send no error back, because no layer before them learns; empty if there are
    none."""
    reached, pairs = parts.meter.trace.reached, parts.rule.weight_pairs()
    first = [path for path in parts.meter.trace.order if path in pairs and path not in reached]
    return [f"no error is sent back from {names(first)}, because no earlier layer learns"] if first else []


def _feedback(rule: Rule) -> list[str]:
    stored, learned = _stored_feedback(rule), {id(tensor) for tensor in rule.feedback_parameters()}
    rows = [("at", "tensor", "shape", "memory", "")]
    for path, tensors in rule.feedback.items():
        for name, tensor in tensors.items():
            is_stored = (path, name) in stored
            kind = "learned" if id(tensor) in learned else "fixed" if is_stored else "computed from the weight when needed"
            rows.append((path, name, format_shape(tensor.shape), format_bytes(_bytes([tensor])) if is_stored else "-", kind))
    return align_columns(rows, right=(3,)) if len(rows) > 1 else ["none"]


def _stored_feedback(rule: Rule) -> dict[tuple[str, str], torch.Tensor]:
    """The feedback tensors that the rule stores, by module and name; other feedback tensors are computed at each access."""
    first, second = rule.feedback, rule.feedback
    return {
        (path, name): tensor
        for path, tensors in first.items()
        for name, tensor in tensors.items()
        if second[path][name] is tensor
    }


def _costs(job: Job, parts: Parts) -> list[tuple[str, str]]:
    rule, model, splits = parts.rule, parts.rule.model, parts.splits
    batch = min(job.run.batch_size, len(splits.train))
    parameters, learned = rule.weight_parameters(), rule.feedback_parameters()
    trains = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    feedback = _bytes(_stored_feedback(rule).values())
    of_rule, of_backprop = step_costs_of(job, rule, splits)
    parts.optimizers.step()  # creates the optimizers' state, with the gradients of the counted steps
    state = optimizer_states(parts.optimizers)
    rule.detach()
    return [
        ("parameters", f"{sum(parameter.numel() for parameter in parameters):,}, {trains:,} of them trained"),
        ("weights", format_bytes(_bytes(parameters))),
        ("feedback", f"{format_bytes(feedback)}, {format_bytes(_bytes(learned))} of it learned"),
        ("optimizer state", f"{format_bytes(_bytes(state))} ({_optimizers(job, bool(learned))})"),
        (
            "multiplications",
            f"{_compared(of_rule.multiplications, of_backprop.multiplications, format_count)} (batch of {batch})",
        ),
        (
            "of these",
            ", ".join(
                f"{format_count(number)} {phase}"
                for phase, number in (
                    ("forward", of_rule.forward),
                    ("backward", of_rule.backward),
                    ("for learning feedback", of_rule.feedback),
                    *([("in the optimizer", of_rule.optimizer)] if of_rule.optimizer else []),
                )
            ),
        ),
        ("bytes moved", _compared(of_rule.bytes_moved, of_backprop.bytes_moved, format_bytes)),
        ("peak memory", _compared(of_rule.peak_memory, of_backprop.peak_memory, format_bytes)),
        *_accesses(job, model, splits, batch),
    ]


def _compared(of_rule: int, of_backprop: int, text: Callable[[int], str]) -> str:
    return f"{text(of_rule)} per step, {of_rule / of_backprop:.2f} times backpropagation's {text(of_backprop)}"


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _optimizers(job: Job, learned: bool) -> str:
    if job.feedback_optimizer is None:
        return job.optimizer.name
    return f"{job.optimizer.name}; feedback: {job.feedback_optimizer.name}{'' if learned else ', unused: no feedback is learned'}"


def _accesses(job: Job, model: torch.nn.Module, splits: Splits, batch: int) -> list[tuple[str, str]]:
    """A row with the external memory accesses (Woo et al. 2021) of backpropagation, and of the rule if defined for it."""
    counts = memories(model, splits.input_shape, job.fresh_algorithm(), splits.inputs)
    reference, of_rule = (memory and sum(memory.accesses(batch)) for memory in counts)
    assert reference is not None
    if of_rule is None:
        undefined = "" if type(job.algorithm) is BP else f"; not defined for {job.algorithm.name}"
        return [("memory accesses", f"{format_count(reference)} per step for backpropagation{undefined}")]
    return [("memory accesses", _compared(of_rule, reference, format_count))]


def _training(job: Job, trained: Job, splits: Splits) -> list[tuple[str, str]]:
    steps, epochs = splits.train.steps(trained.run.batch_size, trained.run.drop_last), trained.run.epochs
    parts: dict[str, Split | None] = {"training": splits.train, "validation": splits.validation, "test": splits.test}
    counts = ", ".join(f"{format_count(len(split)) if split is not None else 'no'} {name}" for name, split in parts.items())
    rows = [
        (
            NOUNS[splits.inputs][1],
            f"{counts}; {format_shape(splits.input_shape)}, {len(splits.classes)} {_OUTPUTS[splits.targets]}",
        ),
        *(("data", note) for note in splits.notes),
        ("steps", f"{steps:,} per epoch, {steps * epochs:,} in {epochs} epoch{'s' * (epochs > 1)}"),
    ]
    if job.run.scale != "full":
        keys = ("epochs", "batch_size", "probe_size")
        smaller = [f"{key}={getattr(trained.run, key)}" for key in keys if getattr(trained.run, key) != getattr(job.run, key)]
        before, after = as_plain(job.algorithm), as_plain(trained.algorithm)
        smaller += [f"algorithm.{key}={after[key]}" for key in after if after[key] != before[key]]
        text = f"trains with {', '.join(smaller) or 'the options above'}; all numbers above are for this shortened run"
        rows.append((f"scale={job.run.scale}", text))
    return rows


# ------------------------------------------------------------------------------------------------ directories
def describe(run_dir: Path, job: Job) -> str:
    """The state of a run directory as text, for example ``empty``, ``finished: ...`` or ``unfinished: ...``."""
    try:
        RunDirectory(run_dir, job).check()
    except RunDirectoryError as error:
        return f"cannot be used ({str(error).removeprefix(f'{run_dir}: ')})"
    try:
        run, epochs = read_run(run_dir), len(read_metrics(run_dir / METRICS))
    except DataError as error:
        return f"unfinished: {error}"
    if run is None and not (run_dir / CONFIG).exists():
        return "empty"
    if (owner := lock_holder(run_dir)) is not None:
        return f"running: locked by process {owner.get('pid')} on {owner.get('host')}"
    if RunDirectory(run_dir, job).is_stale:
        return "stale: produced by a different version of the code; would restart"
    if run is not None and run.finished:
        return ": ".join(filter(None, ("finished", run.test_score)))
    status = "without a result" if run is None else run.result["status"]
    if run is not None and RunDirectory(run_dir, job).state is RunState.FINISHED:  # diverged, or stopped by a callback
        return f"{status}: {describe_status(run).removeprefix(status).strip()}"
    return f"unfinished: {status} after {epochs} of {scaled(job).run.epochs} epochs"


def _directories(jobs: Sequence[tuple[Job, Path]]) -> list[str]:
    """Lines that count the run directories of a sweep by state, followed by a line for each directory that is not empty."""
    states = {run_dir: describe(run_dir, job) for job, run_dir in jobs}
    counts = collections.Counter(text.split(":")[0].split(" (")[0] for text in states.values())
    used = [f"{run_dir}: {text}" for run_dir, text in states.items() if text != "empty"]
    return [*(f"{number} of {len(jobs)}: {text}" for text, number in counts.items()), *used]
