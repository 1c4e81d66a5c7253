"""Write an experiment with the best config of every rule, and run it as a normal sweep."""

from __future__ import annotations

import dataclasses
import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fa_bench import cli
from fa_bench.command.compose import Composer
from fa_bench.command.jobs import Task
from fa_bench.config.job import FEEDBACK_OPTIMIZER, GRID, Job
from fa_bench.config.labels import flatten
from fa_bench.errors import ConfigError, RunDirectoryError, names
from fa_bench.registry.registries import GROUPS
from fa_bench.tuning.folder import EXPERIMENT, FINAL
from fa_bench.tuning.plan import ALGORITHM, OUTPUT, SEED, Plan, RulePlan
from fa_bench.tuning.space import as_typed
from fa_bench.utils.files import output_errors, write_text

#: The first lines of the experiment, which mark it as written by a study.
_HEAD = "# @package _global_\n# Written by fa-bench-tune: "
#: Keys that are not copied from the tuned configs. The experiment has its own seeds and output_dir, a config file must not name
#: plugins, and the final runs use the default of resume.
_OMITTED = (SEED, OUTPUT, "plugins", "resume")
_GROUPS = tuple(group.kind for group in GROUPS if group.kind != ALGORITHM)


def experiment_text(plan: Plan, jobs: Mapping[str, Job], directory: Path) -> str:
    """The text of an experiment that runs the jobs in `directory` with the final seeds.

    Args:
        plan: the plan of the study.
        jobs: the tuned config of each rule, by the rule's name in the plan.
        directory: the study's folder.
    """
    flat = {rule: _flat(job) for rule, job in jobs.items()}
    first = next(iter(flat.values()))
    shared = [
        key
        for key in first
        if key.split(".")[0] != ALGORITHM and all(key in config and config[key] == first[key] for config in flat.values())
    ]
    # If rules use different components of a group, no option of that group can be set for all rules.
    shared = [key for key in shared if (group := key.split(".")[0]) not in _GROUPS or group in shared]
    settings: dict[str, Any] = {}
    for key in shared:
        if key not in _GROUPS:
            _put(settings, key.split("."), first[key])
    grid = []
    for rule, job in jobs.items():
        usual = flatten({ALGORITHM: {"name": job.algorithm.name, **type(job.algorithm)().schema()}})
        own = {
            key: value if isinstance(value, float) else as_typed(value)
            for key, value in flat[rule].items()
            if key not in shared and (key == ALGORITHM or key not in usual or usual[key] != value)
        }
        grid.append({**own, SEED: ",".join(map(str, plan.options.seeds))})
    defaults = [{f"override /{group}": first[group]} for group in _GROUPS if group in shared]
    content = {"defaults": defaults, **settings, OUTPUT: str(directory), GRID: grid}
    lines = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, allow_unicode=True, width=130)
    return f"{_HEAD}the tuned configs of {names(jobs)}, with the seeds of the final runs.\n{lines}"


def _flat(job: Job) -> dict[str, Any]:
    """The config as a flat mapping. The feedback optimizer is kept as one value, because it may be null."""
    plain = job.plain()
    feedback = plain.pop(FEEDBACK_OPTIMIZER)
    flat = {key: value for key, value in flatten(plain).items() if key not in _OMITTED}
    return {ALGORITHM: flat.pop(ALGORITHM), **flat, FEEDBACK_OPTIMIZER: feedback}


def _put(settings: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        settings = settings.setdefault(part, {})
    settings[path[-1]] = value


def check_final(plan: Plan) -> None:
    """Check, before the first trial, that the final runs will use exactly the tuned configs.

    Raises:
        ConfigError: if a final run would use another config; the message names the rule.
        FaBenchError: if a final run could not start.
    """
    epochs = plan.options.final_epochs or plan.epochs
    jobs = {each.rule: dataclasses.replace(each.job, run=dataclasses.replace(each.job.run, epochs=epochs)) for each in plan.rules}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, EXPERIMENT, f"{FINAL}.yaml")
        path.parent.mkdir()
        path.write_text(experiment_text(plan, jobs, plan.directory), encoding="utf-8")
        composer = _composer(plan, Path(scratch))
        # It is enough to check one seed of each config.
        texts = {tuple(text for text in job if not text.startswith(f"{SEED}=")): job for job in composer.expand(multirun=True)}
        checked = [job for job, _ in composer.check(list(texts.values()), directories=False)]
    for each in plan.rules:
        if jobs[each.rule].group not in [job.group for job in checked]:
            raise ConfigError(
                f"algorithm={each.rule}: its config cannot be written as an experiment; give every rule the same "
                "optimizer and the same kinds of options"
            )


def write_experiment(plan: Plan, jobs: Mapping[str, Job]) -> Path:
    """Write the experiment into the study's folder, and return its path. Raises RunDirectoryError if a file that no study wrote
    would be overwritten."""
    path = plan.directory / EXPERIMENT / f"{FINAL}.yaml"
    with output_errors(path):
        path.parent.mkdir(exist_ok=True)
        if path.is_symlink() or (path.exists() and not path.read_bytes().startswith(_HEAD.encode())):
            raise RunDirectoryError(f"{path}: not written by fa-bench-tune, which would overwrite it; move it elsewhere")
        write_text(path, experiment_text(plan, jobs, plan.directory))
    return path


def run_final(plan: Plan) -> tuple[int, list[Path]]:
    """Run the experiment of the final runs as a sweep, and return its exit code and the directories of the runs.

    If the study's option `jobs` is above 1, the sweep uses Hydra's joblib launcher, provided that it is installed and the command
    line names no other launcher.

    Raises:
        FaBenchError: if a run cannot start.
    """
    task, jobs = Task(["fa-bench", *final_arguments(plan)]), plan.options.jobs
    launcher = []
    if (
        jobs > 1
        and not any(override.key_or_group == "hydra/launcher" for override in plan.composer.parsed)
        and (importlib.util.find_spec("hydra_plugins.hydra_joblib_launcher") is not None)
    ):
        launcher = ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={jobs}"]
    with cli.hydra_errors():
        code = cli.sweep(_composer(plan, plan.directory, launcher), task)
    return code, task.directories


def final_arguments(plan: Plan) -> list[str]:
    """The arguments of the ``fa-bench`` command that starts or resumes the final runs."""
    return ["-m", "--config-dir", str(plan.directory), *_overrides(plan)]


def _overrides(plan: Plan) -> list[str]:
    kept = [
        override.input_line or ""
        for override in plan.composer.parsed
        if override.is_hydra_override() or override.key_or_group == "plugins"
    ]
    return [f"experiment={FINAL}", *kept]


def _composer(plan: Plan, folder: Path, launcher: Sequence[str] = ()) -> Composer:
    return Composer(cli.CONFIG_NAME, str(folder), [*_overrides(plan), *launcher])


def tuned_job(plan: Plan, rule: RulePlan, values: Mapping[str, Any]) -> Job:
    """The checked config of a rule's final runs with the chosen values, but with the first seed of the trials."""
    final = {} if plan.options.final_epochs is None else {"epochs": plan.options.final_epochs}
    return plan.trial(rule, {**values, **final}, plan.options.trial_seeds[0])[0]
