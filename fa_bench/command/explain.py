"""Why a command line cannot be composed: one line that names the override at fault, what is allowed and the nearest name."""

from __future__ import annotations

from typing import Any

from hydra import compose
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from fa_bench.command.overrides import parse
from fa_bench.errors import ConfigError, cut, names, nearest

#: Choices of Hydra's own groups that come with packages of their own: where from.
_PACKAGES = {
    "hydra/launcher": {"joblib": "hydra-joblib-launcher", "submitit_local": "hydra-submitit-launcher",
                       "submitit_slurm": "hydra-submitit-launcher", "ray": "hydra-ray-launcher", "ray_aws": "hydra-ray-launcher",
                       "rq": "hydra-rq-launcher"},
    "hydra/sweeper": {"optuna": "hydra-optuna-sweeper", "ax": "hydra-ax-sweeper", "nevergrad": "hydra-nevergrad-sweeper"},
    "hydra/job_logging": {"colorlog": "hydra-colorlog"},
    "hydra/hydra_logging": {"colorlog": "hydra-colorlog"},
}


def groups_of(loader: ConfigLoader) -> dict[str, list[str]]:
    """The groups of components and presets, with their options."""
    listed = [group for group in loader.list_groups("") if not group.startswith(("_", "hydra"))]
    return {group: loader.get_group_options(group) for group in listed}


def explained(config_name: str, overrides: list[str], error: Exception) -> ConfigError:
    """One line that names the override at fault, what is allowed and the nearest name, or what to install.

    Args:
        config_name: name of the primary config.
        overrides: that it could not be composed with.
        error: what Hydra said.
    """
    if isinstance(error, RecursionError):
        return ConfigError("nested too deeply, or a config whose `defaults` lead back to itself")
    loader = GlobalHydra.instance().config_loader()
    try:
        base = compose(config_name, return_hydra_config=True)
    except Exception:
        return ConfigError(_said(error))
    groups = {**groups_of(loader), **_hydra_groups(loader)}
    for override in (parse(text) for text in overrides):
        key = override.key_or_group
        if key in groups and not override.is_delete():
            options = groups[key]
            wanted = override.value()
            for name in map(str, wanted if isinstance(wanted, list) else [wanted]):
                if name not in options:
                    hint = _install(key, name) or nearest(name, [*options, *_PACKAGES.get(key, ())])
                    return ConfigError(f"{key}={cut(name, 100)}: no such {key}{hint} (available: {names(options)})")
    # Keys are looked up in the config that the chosen groups make.
    chosen = [o.input_line for o in map(parse, overrides) if o.key_or_group in groups]
    try:
        base = compose(config_name, overrides=chosen, return_hydra_config=True)
    except Exception:
        return ConfigError(_said(error))
    for override in (parse(text) for text in overrides):
        key = override.key_or_group
        if key not in groups and not override.is_add():
            node: Any = base
            parts = key.split(".")
            for depth, part in enumerate(parts):
                if not isinstance(node, DictConfig) or part not in node:
                    allowed = sorted(str(k) for k in node if k != "hydra") if isinstance(node, DictConfig) else []
                    allowed += [group for group in groups if depth == 0 and group not in (*allowed, *_hydra_groups(loader))]
                    where = ".".join(parts[:depth])
                    hint = nearest(part, allowed)
                    return ConfigError(f"{key}: unknown key{f' {part} in {where}' if where else ''}{hint} "
                                       f"(allowed: {names(allowed)})")
                node = node._get_node(part)
    return ConfigError(_said(error))


def _hydra_groups(loader: ConfigLoader) -> dict[str, list[str]]:
    """Hydra's own groups, with the options of those of its plugins that are installed."""
    return {f"hydra/{group}": loader.get_group_options(f"hydra/{group}") for group in loader.list_groups("hydra")}


def _install(group: str, name: str) -> str:
    """What to install for a choice of Hydra's that comes with a package of its own; empty for any other."""
    package = _PACKAGES.get(group, {}).get(name)
    return f"; it comes with a package of its own: pip install {package}" if package else ""


def _said(error: Exception) -> str:
    """An error's first line, with the next one where that is but a heading, and with what to install."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = cut(" ".join(lines[: 2 if len(lines) > 1 and lines[0].endswith(":") else 1]), 400) or type(error).__name__
    hints = [_install(group, name) for group, packages in _PACKAGES.items() for name in packages if f"{group}/{name}'" in said]
    return said + next(iter(hints), "")
