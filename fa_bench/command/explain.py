"""Why a command line cannot be composed: one line that names the override at fault, what is allowed and the nearest name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.types import RunMode
from omegaconf import DictConfig

from fa_bench.command.overrides import parse
from fa_bench.config.job import GRID, RULES
from fa_bench.errors import ConfigError, names, nearest, truncate

#: Choices of Hydra's own groups that come with packages of their own: where from.
_PACKAGES = {
    "hydra/launcher": {"joblib": "hydra-joblib-launcher", "submitit_local": "hydra-submitit-launcher",
                       "submitit_slurm": "hydra-submitit-launcher", "ray": "hydra-ray-launcher", "ray_aws": "hydra-ray-launcher",
                       "rq": "hydra-rq-launcher"},
    "hydra/job_logging": {"colorlog": "hydra-colorlog"},
    "hydra/hydra_logging": {"colorlog": "hydra-colorlog"},
}


def groups_of(loader: ConfigLoader) -> dict[str, list[str]]:
    """The groups of components and experiments, with their choices."""
    listed = [group for group in loader.list_groups("") if not group.startswith(("_", "hydra"))]
    return {group: loader.get_group_options(group) for group in listed}


def explained(loader: ConfigLoader, config_name: str, overrides: list[str], error: Exception) -> ConfigError:
    """One line that names the override at fault, what is allowed and the nearest name, or what to install.

    Args:
        loader: what the configs are composed with.
        config_name: name of the primary config.
        overrides: what could not be composed.
        error: what Hydra said.
    """
    if isinstance(error, RecursionError):
        return ConfigError("nested too deeply, or a config whose `defaults` lead back to itself")
    hydras = {f"hydra/{group}": loader.get_group_options(f"hydra/{group}") for group in loader.list_groups("hydra")}
    groups = {**groups_of(loader), **hydras}
    parsed = [parse(text) for text in overrides]
    try:
        loader.load_configuration(config_name, [], run_mode=RunMode.RUN)  # a fault of the config itself is no override's
        for override in parsed:
            key = override.key_or_group
            if key in groups and not override.is_delete():
                wanted = override.value()
                for name in map(str, wanted if isinstance(wanted, list) else [wanted]):
                    if name not in groups[key]:
                        hint = _install(key, name) or nearest(name, [*groups[key], *_PACKAGES.get(key, ())])
                        return ConfigError(f"{key}={truncate(name, 100)}: no such {key}{hint} (available: {names(groups[key])})")
        # Keys are looked up in the config that the chosen groups make.
        chosen = [o.input_line or "" for o in parsed if o.key_or_group in groups]
        base = loader.load_configuration(config_name, chosen, run_mode=RunMode.RUN)
    except Exception:
        return ConfigError(_said(error))
    for override in parsed:
        key = "" if override.is_add() or override.key_or_group in groups else override.key_or_group
        if key and (problem := unknown_key(key, base, [group for group in groups if group not in hydras])):
            return ConfigError(problem)
    return ConfigError(_said(error))


def unknown_key(key: str, config: DictConfig, groups: list[str]) -> str:
    """What is wrong with a key that `config` has not, with the nearest name; empty for one that it has."""
    node: Any = config
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if not isinstance(node, DictConfig) or part not in node:
            allowed = sorted(str(name) for name in node if name != "hydra") if isinstance(node, DictConfig) else []
            allowed += [group for group in groups if depth == 0 and group not in allowed]
            within = ".".join(parts[:depth])
            return f"{key}: unknown key{f' {part} in {within}' if within else ''}" \
                   f"{_elsewhere(parts[-1], config) or nearest(part, allowed)} (allowed: {names(allowed)})"
        node = node._get_node(part)
    return ""


def _elsewhere(last: str, config: DictConfig) -> str:
    """A hint at the keys of components that end as the one that is not there."""
    def keys(node: DictConfig, prefix: str) -> Iterator[str]:
        for name in node:
            child = node._get_node(name)
            if isinstance(child, DictConfig) and not child._is_none() and not child._is_interpolation():
                yield from keys(child, f"{prefix}{name}.")
            elif str(name) == last:
                yield f"{prefix}{name}"

    found = [key for key in keys(config, "") if key.split(".")[0] not in ("hydra", GRID, RULES)][:3]
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""


def _install(group: str, name: str) -> str:
    """What to install for a choice of Hydra's that comes with a package of its own; empty for any other."""
    package = _PACKAGES.get(group, {}).get(name)
    return f"; it comes with a package of its own: pip install {package}" if package else ""


def _said(error: Exception) -> str:
    """An error's first line, with the next one where that is but a heading, and with what to install."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = truncate(" ".join(lines[: 2 if len(lines) > 1 and lines[0].endswith(":") else 1]), 400) or type(error).__name__
    hints = [_install(group, name) for group, packages in _PACKAGES.items() for name in packages if f"{group}/{name}'" in said]
    return said + next(iter(hints), "")
