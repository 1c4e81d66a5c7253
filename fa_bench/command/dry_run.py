"""``fa-bench --dry-run``: what a command would run and what that takes, without training and without writing anything."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from omegaconf import OmegaConf

from fa_bench.command.compose import Composer
from fa_bench.config.job import Job
from fa_bench.config.labels import differing_keys, flatten, label, sweep_summary
from fa_bench.config.scale import scaled
from fa_bench.data.base import Split, Splits
from fa_bench.data.fetch import nothing_fetched
from fa_bench.errors import DataError, RunDirectoryError, names
from fa_bench.mechanisms.rule import Rule
from fa_bench.metrics.arithmetic import step_multiplications
from fa_bench.metrics.memory_traffic import memories
from fa_bench.registry.options import as_plain
from fa_bench.report.runs import read_run
from fa_bench.rules.bp import BP
from fa_bench.runs.locks import lock_holder
from fa_bench.runs.readers import read_metrics
from fa_bench.runs.rundir import RunDirectory, RunState
from fa_bench.runs.train import Parts, assemble, load, prepare
from fa_bench.utils.files import CONFIG, METRICS
from fa_bench.utils.process import isolated
from fa_bench.utils.text import align_columns, format_bytes, format_count, format_shape, indent

#: Configs of a sweep, seeds apart, that are all shown; of more only the first one is.
MOST = 6
_HEAD = "Dry run: nothing is trained, nothing is written."
_CPU = torch.device("cpu")


def dry_run(config_name: str, config_dir: str | None, overrides: list[str], multirun: bool) -> str:
    """What a command line would run, as text.

    One run: its config, model, feedback, sizes and costs, data and directory. A sweep: its plan, its directories, and the same
    for every config that differs in more than the seed, or for the first one where there are more than `MOST`.

    Args:
        config_name, config_dir, overrides: as for `fa_bench.command.compose.Composer`.
        multirun: whether it is a sweep.

    Raises:
        FaBenchError: for input that cannot be run; data that is missing too, for nothing is downloaded.
    """
    with _nothing_written(), isolated():
        composer = Composer(config_name, config_dir, overrides)
        jobs = composer.check(composer.expand(multirun), directories=False)
        if not multirun:
            job, place = jobs[0]
            return "\n".join([_HEAD, "", *_section("config", _config(job)),
                              *_sheet(job, _Loader()), *_section("output", [f"{place}: {found_in(place, job)}"])]).rstrip()
        return "\n".join(_sweep(jobs)).rstrip()


def _sweep(jobs: Sequence[tuple[Job, Path]]) -> list[str]:
    places = [place for _, place in jobs]
    common = Path(os.path.commonpath([place.parent for place in places]))
    lines = [_HEAD, "", sweep_summary([job for job, _ in jobs], common), "", *_section("output", _places(jobs))]
    distinct: dict[str, Job] = {}
    for job, place in jobs:
        distinct.setdefault(str(place.parent / job.group), job)
    shown = list(distinct.values())[:1 if len(distinct) > MOST else None]
    loader = _Loader()
    for number, job in enumerate(shown):
        lines += [_title(job, list(distinct.values())), "=" * 80, ""]
        lines += _section("config", _config(job)) if number == 0 else []
        lines += _sheet(job, loader)
    if len(shown) < len(distinct):
        lines.append(f"{len(distinct) - 1} more configs; --dry-run without -m, or of at most {MOST} configs, shows each")
    return lines


def _title(job: Job, jobs: Sequence[Job]) -> str:
    """The rule, and what its configs differ in."""
    rule = job.algorithm.name
    keys = differing_keys(flatten(other.plain()) for other in jobs if other.algorithm.name == rule)
    return label(rule, flatten(job.plain()), keys)


@contextlib.contextmanager
def _nothing_written() -> Iterator[None]:
    """No downloads, and no compiled files beside a user's plugins."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        with nothing_fetched():
            yield
    finally:
        sys.dont_write_bytecode = before


class _Loader:
    """Loads each dataset of a sweep once."""

    def __init__(self) -> None:
        self._key, self._splits = "", None

    def __call__(self, job: Job) -> Splits:
        plain = job.plain()
        key = json.dumps([plain[part] for part in ("dataset", "data_dir", "scale")], sort_keys=True)
        if self._splits is None or key != self._key:
            self._splits = None  # so that two never are in memory at once
            self._key, self._splits = key, load(job, _CPU)
        return self._splits


# ------------------------------------------------------------------------------------------------ one config
def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [title, *indent(lines), ""]


def _config(job: Job) -> list[str]:
    return OmegaConf.to_yaml(OmegaConf.create(job.plain())).splitlines()


def _sheet(job: Job, loader: _Loader) -> list[str]:
    """Model, feedback, costs and data of one config, as it is trained at its scale."""
    prepare(job)  # refuses a device that is not there
    trained = scaled(job)
    splits = loader(trained)
    parts = assemble(trained, _CPU, splits)
    return [
        *_section("model", [*str(parts.rule.coverage).splitlines(), *_others(parts.rule), *_ends(parts)]),
        *_section("feedback", _feedback(parts.rule)),
        *_section("cost", align_columns(_costs(trained, parts))),
        *_section("training", align_columns(_training(job, trained, splits))),
    ]


def _others(rule: Rule) -> list[str]:
    """The modules whose parameters are no covered weight's: normalisation and the like."""
    covered = {entry.layer for entry in rule.coverage.covered}
    found: dict[tuple[str, bool], list[int]] = {}
    learned = {id(tensor) for tensor in rule.feedback_parameters()}
    for path, module in rule.model.named_modules():
        own = [parameter for parameter in module.parameters(recurse=False) if id(parameter) not in learned]
        if own and path not in covered:
            key = type(module).__name__, any(parameter.requires_grad for parameter in own)
            found.setdefault(key, []).append(sum(parameter.numel() for parameter in own))
    return [f"and {len(sizes)} {kind} with {format_count(sum(sizes))} parameters{'' if learns else ', frozen'}"
            for (kind, learns), sizes in found.items()]


def _ends(parts: Parts) -> list[str]:
    """The layers that could carry an error on and are not asked to: nothing that learns lies in front of them."""
    reached, pairs = parts.meter.trace.reached, parts.rule.weight_pairs()
    ends = [path for path in parts.meter.trace.order if path in pairs and path not in reached]
    return [f"{names(ends)} sends no error back: nothing before it learns"] if ends else []


def _feedback(rule: Rule) -> list[str]:
    kept, learned = _kept(rule), {id(tensor) for tensor in rule.feedback_parameters()}
    rows = [("at", "tensor", "shape", "memory", "")]
    for place, tensors in rule.feedback.items():
        for name, tensor in tensors.items():
            is_kept = (place, name) in kept
            how = "learned" if id(tensor) in learned else "not learned" if is_kept else "made of the weight when it is needed"
            rows.append((place, name, format_shape(tensor.shape), format_bytes(_bytes([tensor])) if is_kept else "-", how))
    return align_columns(rows, right=(3,)) if len(rows) > 1 else ["none"]


def _kept(rule: Rule) -> dict[tuple[str, str], torch.Tensor]:
    """The feedback tensors that the rule keeps, by place and name; others it makes anew each time they are asked for."""
    now, again = rule.feedback, rule.feedback
    return {(place, name): tensor for place, tensors in now.items() for name, tensor in tensors.items()
            if again[place][name] is tensor}


def _costs(job: Job, parts: Parts) -> list[tuple[str, str]]:
    rule, model, splits = parts.rule, parts.rule.model, parts.splits
    batch, shape = min(job.run.batch_size, len(splits.train)), splits.input_shape
    parameters, learned = rule.weight_parameters(), rule.feedback_parameters()
    trains = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    feedback = _bytes(_kept(rule).values())
    own, exact = step_multiplications(rule, shape, len(splits.classes), batch)
    parts.optimizers.step()  # on the gradients that the counted steps left: it makes the optimizers' state
    state = [tensor for optimizer in parts.optimizers.optimizers for of_one in optimizer.state.values()
             for tensor in of_one.values() if isinstance(tensor, torch.Tensor)]
    rule.detach()
    return [
        ("parameters", f"{sum(parameter.numel() for parameter in parameters):,}, {trains:,} of them trained"),
        ("weights", format_bytes(_bytes(parameters))),
        ("feedback", f"{format_bytes(feedback)}, {format_bytes(_bytes(learned))} of it learned"),
        ("optimizer state", f"{format_bytes(_bytes(state))} ({_optimizers(job, bool(learned))})"),
        ("multiplications", f"{format_count(own)} a step, {own / exact:.2f} of backpropagation's {format_count(exact)} "
                            f"(batch of {batch})"),
        *_accesses(job, model, shape, batch),
    ]


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _optimizers(job: Job, learned: bool) -> str:
    if job.feedback_optimizer is None:
        return job.optimizer.name
    unused = "" if learned else ", unused: no feedback is learned"
    return f"{job.optimizer.name}; feedback: {job.feedback_optimizer.name}{unused}"


def _accesses(job: Job, model: torch.nn.Module, shape: tuple[int, ...], batch: int) -> list[tuple[str, str]]:
    """External memory accesses of Woo et al. 2021, of backpropagation and of the rule where they are defined."""
    reference, of_rule = (memory and sum(memory.accesses(batch)) for memory in memories(model, shape, job.fresh_algorithm()))
    assert reference is not None
    if of_rule is None:
        undefined = "" if type(job.algorithm) is BP else f"; not defined for {job.algorithm.name}"
        return [("memory accesses", f"{format_count(reference)} a step for backpropagation{undefined}")]
    return [("memory accesses", f"{format_count(of_rule)} a step, {of_rule / reference:.2f} of backpropagation's "
                                f"{format_count(reference)}")]


def _training(job: Job, trained: Job, splits: Splits) -> list[tuple[str, str]]:
    steps, epochs = splits.train.steps(trained.run.batch_size, trained.run.drop_last), trained.run.epochs
    parts: dict[str, Split | None] = {"training": splits.train, "validation": splits.validation, "test": splits.test}
    images = ", ".join(f"{format_count(len(split)) if split is not None else 'no'} {name}" for name, split in parts.items())
    rows = [
        ("images", f"{images}; {format_shape(splits.input_shape)}, {len(splits.classes)} classes"),
        *(("data", note) for note in splits.notes),
        ("steps", f"{steps:,} an epoch, {steps * epochs:,} in {epochs} epoch{'s' * (epochs > 1)}"),
    ]
    if job.run.scale != "full":
        keys = ("epochs", "batch_size", "probe_size")
        smaller = [f"{key}={getattr(trained.run, key)}" for key in keys if getattr(trained.run, key) != getattr(job.run, key)]
        before, after = as_plain(job.algorithm), as_plain(trained.algorithm)
        smaller += [f"algorithm.{key}={after[key]}" for key in after if after[key] != before[key]]
        said = f"trains with {', '.join(smaller) or 'the options above'}; the figures are this trial's"
        rows.append((f"scale={job.run.scale}", said))
    return rows


# ------------------------------------------------------------------------------------------------ directories
def found_in(place: Path, job: Job) -> str:
    """What lies in a run's directory, in words: nothing yet, finished, unfinished, or another config's run."""
    try:
        RunDirectory(place, job).check()
    except RunDirectoryError as error:
        return f"holds a run of another config; fa-bench would refuse it ({str(error).removeprefix(f'{place}: ')})"
    try:
        run, epochs = read_run(place), len(read_metrics(place / METRICS))
    except DataError as error:
        return f"unfinished: {error}"
    if run is None and not (place / CONFIG).exists():
        return "nothing there yet"
    if (writer := lock_holder(place)) is not None:
        return f"running: process {writer.get('pid')} on {writer.get('host')} writes it"
    if RunDirectory(place, job).state is RunState.STALE:
        return "stale: produced by a different version of the code; would restart"
    if run is not None and run.finished:
        accuracy = run.result.get("test_accuracy")
        return f"finished{'' if accuracy is None else f': test accuracy {accuracy:.2%}'}"
    status = "without a result" if run is None else run.result["status"]
    return f"unfinished: {status} after {epochs} of {scaled(job).run.epochs} epochs"


def _places(jobs: Sequence[tuple[Job, Path]]) -> list[str]:
    """A sweep's directories, counted by what is in them; those that hold something are named."""
    found = {place: found_in(place, job) for job, place in jobs}
    counts = collections.Counter(text.split(":")[0].split(" (")[0] for text in found.values())
    named = [f"{place}: {text}" for place, text in found.items() if text != "nothing there yet"]
    return [*(f"{number} of {len(jobs)}: {text}" for text, number in counts.items()), *named]
