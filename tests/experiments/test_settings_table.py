"""Every experiment runs the rules and settings that settings_table.py lists."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fa_bench.command.compose import Composer
from fa_bench.config.job import Job, RunOptions, conf_dir, register_schemas
from fa_bench.config.labels import flatten
from fa_bench.registry.options import as_plain, defaults
from fa_bench.registry.registries import GROUPS

from .settings_table import PRESETS, Settings

SEED = "seed="


def composed_runs(name: str) -> list[tuple[Settings, Settings, list[int]]]:
    """For each group of runs that differ only in the seed, return the settings, the defaults of the components, and the seeds.

    Composing is slow, so only the first run of each group is composed; the seeds are read from the overrides.
    """
    register_schemas()
    composer = Composer("config", None, [f"experiment={name}"])
    seeds: dict[tuple[str, ...], list[int]] = {}
    firsts: list[list[str]] = []
    for overrides in composer.expand(multirun=True):
        rest = tuple(override for override in overrides if not override.startswith(SEED))
        if rest not in seeds:
            firsts.append(overrides)
        seeds.setdefault(rest, []).extend(int(text.removeprefix(SEED)) for text in overrides if text.startswith(SEED))
    jobs = [job for job, _ in composer.check(firsts, directories=False)]
    assert [job.run.seed for job in jobs] == [numbers[0] for numbers in seeds.values()]
    return [(flatten(job.plain()), default_settings(job), numbers) for job, numbers in zip(jobs, seeds.values(), strict=True)]


def default_settings(job: Job) -> Settings:
    """The settings that the job would have if the experiment chose its components but set no options."""
    kinds = [group.kind for group in GROUPS]
    chosen = {key: getattr(job, key) for key in (*kinds, "feedback_optimizer")}
    parts = {key: part and {"name": part.name} | as_plain(type(part)()) for key, part in chosen.items()}
    return flatten(defaults(RunOptions) | parts)


def identity(settings: Settings, keys: list[str]) -> str:
    """The values of the swept keys, as a name for a run within its experiment."""
    return json.dumps({key: settings[key] for key in keys if key in settings})


def by_identity(runs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(runs)
    assert len(found) == len(runs), f"two runs have the same swept values: {sorted(name for name, _ in runs)}"
    return found


def differences(actual: Settings, default: Settings, wanted: Settings) -> list[str]:
    """A line for each setting that differs from the table, or from its default although the table does not name it."""
    found = [f"{key}: no such option; the table has {wanted[key]!r}" for key in wanted.keys() - actual.keys()]
    for key, value in actual.items():
        if key in wanted and value != wanted[key]:
            found.append(f"{key} = {value!r}; the table has {wanted[key]!r}")
        elif key not in wanted and key != "seed" and value != default[key]:
            found.append(f"{key} = {value!r}; the table does not name it, and its default is {default[key]!r}")
    return found


def check(name: str) -> None:
    """Check that the runs of an experiment have the settings and seeds in the table."""
    wanted_runs, actual_runs = list(PRESETS[name].runs()), composed_runs(name)
    swept = sorted({"algorithm", "architecture", "dataset", *(key for part in PRESETS[name].sweep for key in part)} - {"seed"})
    wanted = by_identity([(identity(settings, swept), (settings, seeds)) for settings, seeds in wanted_runs])
    actual = by_identity([(identity(settings, swept), (settings, default, seeds)) for settings, default, seeds in actual_runs])
    assert sorted(actual) == sorted(wanted)
    for run, (settings, default, seeds) in actual.items():
        assert seeds == wanted[run][1], run
        assert not differences(settings, default, wanted[run][0]), f"{name}, {run}"


def test_table_covers_every_preset() -> None:
    assert sorted(PRESETS) == sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("name", PRESETS)
def test_preset_matches_table(name: str) -> None:
    check(name)


def test_default_config_components() -> None:
    """Experiments that choose no dataset, architecture or optimizer use the components of the default config."""
    register_schemas()
    composer = Composer("config", None, [])
    [(job, _)] = composer.check(composer.expand(multirun=False), directories=False)
    assert (job.algorithm.name, job.architecture.name, job.dataset.name, job.optimizer.name) == ("fa", "mlp", "digits", "sgd")
    assert job.feedback_optimizer is None
    assert flatten(job.plain()) == default_settings(job)


def test_component_choice_equals_declared_defaults() -> None:
    """For example, ``algorithm=kp`` selects kp with its declared defaults, because no config file changes them."""
    register_schemas()
    composer = Composer("config", None, [])
    for group in GROUPS:
        assert [path for path in (conf_dir() / group.kind).glob("*.yaml")] == []
        for name in group:
            assert composer.component(group.kind, name) == {"name": name, **defaults(group[name])}
