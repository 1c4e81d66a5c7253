"""Explain in one line why a command line cannot be composed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.types import RunMode
from omegaconf import DictConfig

from fa_bench.command.overrides import parse, values_of
from fa_bench.config.job import GRID, RULES, TUNE
from fa_bench.errors import ConfigError, first_line, names, nearest, truncate

#: The additional packages that choices in Hydra's own groups require, by group and choice.
_PACKAGES = {
    "hydra/launcher": {
        "joblib": "hydra-joblib-launcher",
        "submitit_local": "hydra-submitit-launcher",
        "submitit_slurm": "hydra-submitit-launcher",
        "ray": "hydra-ray-launcher",
        "ray_aws": "hydra-ray-launcher",
        "rq": "hydra-rq-launcher",
    },
    "hydra/job_logging": {"colorlog": "hydra-colorlog"},
    "hydra/hydra_logging": {"colorlog": "hydra-colorlog"},
}


#: Maps names that other libraries use for options to fa-bench's names.
_SYNONYMS = {"learning_rate": "lr", "num_epochs": "epochs", "wd": "weight_decay", "bs": "batch_size"}


def list_groups(loader: ConfigLoader) -> dict[str, list[str]]:
    """The groups of components and experiments, with their choices."""
    return {group: loader.get_group_options(group) for group in loader.list_groups("") if not group.startswith(("_", "hydra"))}


def explain(
    loader: ConfigLoader, config_name: str, overrides: list[str], error: Exception, given: dict[str, list[str]] | None = None
) -> ConfigError:
    """An error that names the wrong override, the allowed values and the nearest name, or the package to install. If no override
    is found to be wrong, the error repeats the beginning of Hydra's message.

    Args:
        loader: Hydra's config loader.
        config_name: name of the primary config.
        overrides: the overrides that could not be composed.
        error: raised by Hydra.
        given: the values on the whole command line, by key, including all values of a sweep.
    """
    if isinstance(error, RecursionError):
        return ConfigError("a config is nested too deeply, or its `defaults` refer to the config itself")
    hydra_groups = {f"hydra/{group}": loader.get_group_options(f"hydra/{group}") for group in loader.list_groups("hydra")}
    groups = {**list_groups(loader), **hydra_groups}
    parsed = [parse(text) for text in overrides]
    try:
        loader.load_configuration(config_name, [], run_mode=RunMode.RUN)  # raises if the config itself is wrong
        for override in parsed:
            key = override.key_or_group
            if key in groups and not override.is_delete():
                value = override.value()
                for name in values_of(override) if not isinstance(value, list) else map(str, value):
                    if name not in groups[key] and key == "hydra/sweeper":
                        return ConfigError(other_sweeper(name))
                    if name not in groups[key]:
                        hint = _install_hint(key, name) or nearest(name, [*groups[key], *_PACKAGES.get(key, ())])
                        if not hint and key not in hydra_groups and key != "experiment":
                            hint = "; if a plugin provides it, pass plugins=[MODULE]"
                        return ConfigError(f"{key}={truncate(name, 100)}: no such {key}{hint} (available: {names(groups[key])})")
        # Keys are looked up in the config composed from those overrides that choose from groups, such as algorithm=kp.
        chosen = [
            f"{o.get_key_element()}={values_of(o)[0]}" if o.is_sweep_override() else o.input_line or ""
            for o in parsed
            if o.key_or_group in groups
        ]
        base = loader.load_configuration(config_name, chosen, run_mode=RunMode.RUN)
    except Exception:
        return ConfigError(_summary(error))
    for override in parsed:
        key = "" if override.is_add() or override.key_or_group in groups else override.key_or_group
        if key and (problem := unknown_key(key, base, [group for group in groups if group not in hydra_groups])):
            group = key.split(".")[0]
            swept = (given or {}).get(group, []) if group in groups and group != key else []
            return ConfigError(_unknown_in_some(loader, config_name, key, swept) or problem)
    return ConfigError(_summary(error))


def _unknown_in_some(loader: ConfigLoader, config_name: str, key: str, swept: list[str]) -> str:
    """The message for a key that only some of a sweep's components have, such as an option of a rule; otherwise empty."""
    group = key.split(".")[0]
    having = [
        name
        for name in swept
        if not unknown_key(key, loader.load_configuration(config_name, [f"{group}={name}"], run_mode=RunMode.RUN), [])
    ]
    lacking = [name for name in swept if name not in having]
    if not having or not lacking:
        return ""
    return (
        f"{key}: {group}={','.join(lacking)} {'has' if len(lacking) == 1 else 'have'} no such option. Sweep it in a separate "
        f"command with {group}={','.join(having)}, and run {','.join(lacking)} in another command"
    )


def other_sweeper(name: str) -> str:
    """The message for a sweeper that is not fa-bench's own."""
    return (
        f"hydra/sweeper={truncate(name, 100)}: not supported; only fa-bench's own sweeper checks all jobs before the first "
        "one starts (allowed: fa_bench)"
    )


def unknown_key(key: str, config: DictConfig, groups: list[str]) -> str:
    """The message for a key that is missing in `config`, with the nearest name; empty if the key exists."""
    node: Any = config
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if not isinstance(node, DictConfig) or part not in node.keys():  # noqa: SIM118 (`in node` is False for a missing value)
            allowed = sorted(str(name) for name in node if name != "hydra") if isinstance(node, DictConfig) else []
            allowed += [group for group in groups if depth == 0 and group not in allowed]
            within = ".".join(parts[:depth])
            return (
                f"{key}: unknown key{f' {part} in {within}' if within else ''}"
                f"{_same_name_hint(parts[-1], config) or nearest(part, allowed)} (allowed: {names(allowed) or 'none'})"
            )
        node = node._get_node(part)
    return ""


def _same_name_hint(last: str, config: DictConfig) -> str:
    """A hint that lists up to three keys of the config whose last part is `last` or, if `last` is a synonym, fa-bench's name for
    it."""

    def keys(node: DictConfig, prefix: str) -> Iterator[str]:
        for name in node:
            child = node._get_node(name)
            if isinstance(child, DictConfig) and not child._is_none() and not child._is_interpolation():
                yield from keys(child, f"{prefix}{name}.")
            elif str(name) == last:
                yield f"{prefix}{name}"

    last = _SYNONYMS.get(last, last)
    matches = [key for key in keys(config, "") if key.split(".")[0] not in ("hydra", GRID, RULES, TUNE)][:3]
    return f"; did you mean {' or '.join(map(repr, matches))}?" if matches else ""


def _install_hint(group: str, name: str) -> str:
    """A hint on the package to install for a choice in one of Hydra's groups; empty if no additional package is needed."""
    package = _PACKAGES.get(group, {}).get(name)
    return f"; provided by another package: pip install {package}" if package else ""


def _summary(error: Exception) -> str:
    """The first line of an error, or two lines if the first is a heading, with the reason that Hydra leaves out of the message,
    and a hint on the package to install if one is missing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = truncate(" ".join(lines[: 2 if len(lines) > 1 and lines[0].endswith(":") else 1]), 400) or type(error).__name__
    if text.startswith("Error merging override") and error.__cause__ is not None:
        text += f" ({first_line(error.__cause__)})"
    choices = [(group, name) for group, packages in _PACKAGES.items() for name in packages if f"{group}/{name}'" in text]
    return text + (_install_hint(*choices[0]) if choices else "")
