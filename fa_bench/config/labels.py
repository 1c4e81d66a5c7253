"""What to call runs that are compared: the rule, and whatever else their configs differ in, as one would type it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fa_bench.config.job import VOLATILE
from fa_bench.config.scale import scaled
from fa_bench.registry.registries import DATASETS

if TYPE_CHECKING:
    from fa_bench.config.job import Job

NAME = ".name"
#: The folder that is the dataset itself for some datasets, and of no account for the others.
DATA_DIR = "data_dir"
Flat = Mapping[str, Any]


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config by the keys of its command line, ``optimizer.lr``; a component's name has its group's own, ``optimizer``."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if not isinstance(value, Mapping):
            found[path] = value
            continue
        inner = flat(value, path)
        if not prefix and path + NAME in inner:
            found[path] = inner.pop(path + NAME)
        found |= inner
    return found


def counted(config: Flat) -> dict[str, Any]:
    """What of a config decides its numbers, the seed apart: `data_dir` where the dataset is what lies there."""
    dataset = config.get("dataset")
    own_folder = dataset in DATASETS and DATASETS[str(dataset)].content_is_data_dir
    return {key: value for key, value in config.items()
            if key.split(".")[0] not in ("seed", *VOLATILE) or (key == DATA_DIR and own_folder)}


def differing(configs: Iterable[Flat]) -> list[str]:
    """The keys in which these configs differ, seed and what changes no numbers apart.

    An option counts only where configs with the same component have it differently: sgd and adam differ in ``optimizer`` alone.
    """
    configs = [counted(config) for config in configs]
    return [key for key in dict.fromkeys(key for config in configs for key in config) if _differs(key, configs)]


def _differs(key: str, configs: Iterable[Flat]) -> bool:
    alike: dict[str, set[str]] = {}
    for config in configs:
        if key in config:
            alike.setdefault(repr([config.get(chooser) for chooser in _choosers(key)]), set()).add(repr(config[key]))
    return any(len(values) > 1 for values in alike.values())


def _choosers(key: str) -> list[str]:
    """The keys that choose the components which `key` is an option of."""
    parts = key.split(".")
    groups = [".".join(parts[:depth]) for depth in range(1, len(parts))]
    return [name for name in (group if "." not in group else group + NAME for group in groups) if name != key]


def label(rule: str, config: Flat, keys: Iterable[str]) -> str:
    """The rule and the config's values of `keys`: ``kp optimizer.lr=0.05``."""
    own = counted(config)
    return " ".join([rule, *(f"{key}={shown(own[key])}" for key in keys if key in own)])


def plan(jobs: list[Job], *places: Path) -> str:
    """What a sweep is about to run, in a few lines: the values in which its runs differ, and what they share.

    What only some rules have, or have differently, is in each run's config.yaml.
    """
    configs = [flat(job.plain()) for job in jobs]
    shared = ("algorithm", "architecture", "dataset", "optimizer", "epochs", "batch_size", "scale", "seed")
    within = {key for rule in {job.algorithm.name for job in jobs}
              for key in differing(config for config in configs if config["algorithm"] == rule)}
    trained = [scaled(job).run for job in jobs]
    runs, epochs = len(jobs), sum(run.epochs for run in trained)
    lines = [f"{runs} job{'s' * (runs > 1)} ({epochs} epoch{'s' * (epochs > 1)}); output: {', '.join(map(str, places))}"]
    for key in [*shared, *sorted(within.difference(shared))]:
        having = configs if key in shared else map(counted, configs)
        values = list(dict.fromkeys(shown(config[key]) for config in having if key in config))
        if key == "scale" and values == ["full"]:
            continue
        lines.append(f"  {key}: {', '.join(values)}")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """A length of time as one would say it: ``14 s``, ``3 min``, ``2 h 05 min``."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def shown(value: Any) -> str:
    """An option's value as one would type it: ``[a,b]``, ``null``, ``true``."""
    if isinstance(value, list):
        return f"[{','.join(map(shown, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
