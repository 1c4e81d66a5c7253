"""Labels of compared runs. A label consists of the rule and the options in which the configs differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

from fa_bench.config.job import VOLATILE, RunOptions
from fa_bench.config.scale import scaled
from fa_bench.errors import format_value
from fa_bench.registry.registries import DATASETS

if TYPE_CHECKING:
    from fa_bench.config.job import Job

NAME = ".name"
#: The option that determines the data of some datasets; for others, it only gives the location of the data.
DATA_DIR = "data_dir"
#: The groups whose options have short keys in labels, and the options of the run itself. A short key must not equal the name of
#: an option of the run.
_SHORTENED = ("algorithm", "optimizer")
_RUN_OPTIONS = {field.name for field in dataclasses.fields(RunOptions)}
Flat = Mapping[str, Any]
Key = TypeVar("Key", bound=Hashable)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config with flat keys as on the command line, for example ``optimizer.lr``. The name of a component has its group as the
    key, for example ``optimizer``."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if not isinstance(value, Mapping):
            flat[path] = value
            continue
        inner = flatten(value, path)
        if not prefix and path + NAME in inner:
            flat[path] = inner.pop(path + NAME)
        flat |= inner
    return flat


def result_options(config: Flat) -> dict[str, Any]:
    """The options of a config that determine its results, except for the seed. The option `data_dir` is included only if it
    determines the data."""
    dataset = config.get("dataset")
    includes_data_dir = dataset in DATASETS and DATASETS[str(dataset)].content_is_data_dir
    return {
        key: value
        for key, value in config.items()
        if key.split(".")[0] not in ("seed", *VOLATILE) or (key == DATA_DIR and includes_data_dir)
    }


def differing_keys(configs: Iterable[Flat]) -> list[str]:
    """The keys of `result_options` in which these configs differ.

    An option counts only if it differs between configs with the same component. For example, sgd and adam differ only in
    ``optimizer``.
    """
    configs = [result_options(config) for config in configs]
    return [key for key in dict.fromkeys(key for config in configs for key in config) if _differs(key, configs)]


def swept_keys(configs: Iterable[Flat]) -> dict[str, bool]:
    """The keys in which configs differ. Each key is mapped to whether its value is a number in every config that has the key."""
    configs = list(configs)
    return {key: all(is_number(config[key]) for config in configs if key in config) for key in differing_keys(configs)}


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of a config or record is a number; booleans, which Python counts as numbers, are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _differs(key: str, configs: Iterable[Flat]) -> bool:
    values: dict[str, set[str]] = {}
    for config in configs:
        if key in config:
            components = repr([config.get(name) for name in _component_keys(key)])
            values.setdefault(components, set()).add(repr(config[key]))
    return any(len(different) > 1 for different in values.values())


def _component_keys(key: str) -> list[str]:
    """The keys that select the components to which the option `key` belongs."""
    parts = key.split(".")
    groups = [".".join(parts[:depth]) for depth in range(1, len(parts))]
    return [name for name in (group if "." not in group else group + NAME for group in groups) if name != key]


def short_key(key: str, config: Flat) -> str:
    """A key as shown in labels: options of the rule and the optimizer have no prefix, for example ``lr`` for ``optimizer.lr``.

    The full key is used if the short form would be ambiguous within the config. The choice does not depend on other configs, so
    a key is shown in the same form regardless of what the run is compared with.
    """
    group, _, name = key.partition(".")
    if group not in _SHORTENED or not name or name == "name" or name in config or name in _RUN_OPTIONS:
        return key
    return key if any(f"{other}.{name}" in config for other in _SHORTENED if other != group) else name


def label(rule: str, config: Flat, keys: Iterable[str]) -> str:
    """The rule and the config's values of `keys`, for example ``kp lr=0.05``."""
    options = result_options(config)
    return " ".join([rule, *(f"{short_key(key, config)}={format_value(options[key])}" for key in keys if key in options)])


def distinct_labels(names: Mapping[Key, str], configs: Mapping[Key, Flat]) -> dict[Key, str]:
    """The names as labels. If several names are equal, the values of the keys in which their configs differ are appended.

    Reports and the live view use these labels for compared runs. Keys that differ only between runs with different names are not
    appended.
    """
    by_name: dict[str, list[Key]] = {}
    for key, name in names.items():
        by_name.setdefault(name, []).append(key)
    labels = dict(names)
    for name, members in by_name.items():
        if len(members) > 1:
            keys = differing_keys(configs[key] for key in members)
            labels |= {key: label(name, configs[key], keys) for key in members}
    return labels


def sweep_summary(jobs: list[Job], *directories: Path) -> str:
    """A few lines about a sweep: its main options, and any other options in which runs of the same rule differ."""
    configs = [flatten(job.plain()) for job in jobs]
    shared = ("algorithm", "architecture", "dataset", "optimizer", "epochs", "batch_size", "scale", "seed")
    differing = {
        key
        for rule in {job.algorithm.name for job in jobs}
        for key in differing_keys(config for config in configs if config["algorithm"] == rule)
    }
    trained = [scaled(job).run for job in jobs]
    runs, epochs = len(jobs), sum(run.epochs for run in trained)
    lines = [f"{runs} job{'s' * (runs > 1)} ({epochs} epoch{'s' * (epochs > 1)}); output: {', '.join(map(str, directories))}"]
    for key in [*shared, *sorted(differing.difference(shared))]:
        options = configs if key in shared else map(result_options, configs)
        values = list(dict.fromkeys(format_value(config[key]) for config in options if key in config))
        if key == "scale" and values == ["full"]:
            continue
        lines.append(f"  {key}: {', '.join(values)}")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """A duration as text, such as ``14 s``, ``3 min`` or ``2 h 05 min``."""
    minutes = round(seconds / 60)
    if seconds < 99.5:  # two digits of a larger number would be written as 1e+02
        return f"{seconds:.2g} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
