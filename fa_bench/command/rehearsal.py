"""Hydra's own parts, made once before anything is written: what it could not make would end a command after it had begun."""

from __future__ import annotations

import contextlib
import copy
import io
import logging.config
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from fa_bench.config.options import value_text
from fa_bench.errors import ConfigError, RunDirectoryError, cut, first_line
from fa_bench.runs.logs import root_kept

_LOGS = ("job_logging", "hydra_logging")


def rehearse(config: DictConfig, overrides: list[str], multirun: bool) -> None:
    """Make Hydra's logs and callbacks of a composed config, and its sweeper and launcher for a grid, and leave them.

    Args:
        config: of one job, with the node ``hydra``.
        overrides: that it was composed with.
        multirun: whether it is a job of a grid.

    Raises:
        ConfigError: naming the section that Hydra cannot make its part of.
    """
    parts: list[tuple[str, Callable[[], Any]]] = [(name, lambda name=name: _set_up_logs(config, name)) for name in _LOGS]
    parts += [("overrides", lambda: _check_record(config, overrides)), ("verbose", lambda: _check_verbose(config)),
              ("callbacks", lambda: Callbacks(config))]
    if multirun:
        # Hydra asks for it before there is any job.
        parts += [("sweep.dir", lambda: _check_copy(Path(str(config.hydra.sweep.dir)) / "multirun.yaml")),
                  ("sweeper", lambda: _check_batches(config)),
                  ("launcher", lambda: _check_jobs(config)),
                  ("launcher", lambda: _launcher(config)), ("sweeper", lambda: _sweeper(config))]
    for name, make in parts:
        try:
            with root_kept(), contextlib.redirect_stderr(io.StringIO()):
                make()
        except (ConfigError, RunDirectoryError):
            raise
        except Exception as error:  # whatever the part makes of its options
            cause = error.__cause__ or error
            raise ConfigError(f"hydra.{name}={_brief(config, name)}: Hydra cannot use it ({first_line(cause)})") from None


def _brief(config: DictConfig, name: str) -> str:
    value: Any = OmegaConf.to_container(config.hydra, resolve=False)
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return cut(value_text(value), 100)


def _check_record(config: DictConfig, overrides: list[str]) -> None:
    """Hydra's record of the command line, from which it composes a grid's jobs anew."""
    record: Any = OmegaConf.to_container(config.hydra.overrides, resolve=False)
    if sorted(map(str, [*record["hydra"], *record["task"]])) != sorted(overrides):
        raise ConfigError("hydra.overrides: Hydra's own record of the command line; leave it as it is")


def _set_up_logs(config: DictConfig, name: str) -> None:
    section = config.hydra[name]
    if section is None:
        return
    plain: Any = OmegaConf.to_container(section, resolve=False)
    if plain["root"] is None:  # as Hydra asks
        return
    plain = copy.deepcopy(plain) | {"disable_existing_loggers": False}
    for handler in (plain.get("handlers") or {}).values():
        if "filename" in handler:  # lies in a directory that is not there yet
            del handler["filename"]
            handler["class"] = "logging.NullHandler"
            handler.pop("mode", None)
    logging.config.dictConfig(plain)


def _check_verbose(config: DictConfig) -> None:
    value = config.hydra.verbose
    if not isinstance(value, (bool, str)) and not (OmegaConf.is_list(value) and all(isinstance(name, str) for name in value)):
        raise ConfigError(f"hydra.verbose={value}: write true, false or a list of loggers")


def _check_batches(config: DictConfig) -> None:
    """Hydra's own sweeper starts its jobs in batches of this size, and asks of it no more than that it is a number."""
    size = OmegaConf.select(config, "hydra.sweeper.max_batch_size")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ConfigError(f"hydra.sweeper.max_batch_size={size}: write a whole number >= 1, or null for all jobs in one batch")


def _check_jobs(config: DictConfig) -> None:
    """Launchers in several processes, such as joblib's, refuse a number of them once the sweep has begun."""
    jobs = OmegaConf.select(config, "hydra.launcher.n_jobs")
    if jobs is not None and (isinstance(jobs, bool) or not isinstance(jobs, int) or jobs == 0):
        raise ConfigError(f"hydra.launcher.n_jobs={jobs}: write a whole number >= 1, or -1 for one job a core")


def _check_copy(path: Path) -> None:
    """Hydra writes its config of a grid there, whatever there is: only what it wrote for fa-bench may be replaced."""
    if not os.path.lexists(path):
        return
    own = path.is_file() and not path.is_symlink()
    text = path.read_text(encoding="utf-8", errors="replace") if own else ""
    if not (text.startswith("hydra:\n") and "${fa_bench." in text):
        raise RunDirectoryError(f"{path}: not written by a sweep of fa-bench, which would replace it; move it away, or choose "
                                f"another output_dir")


def _context(config: DictConfig) -> HydraContext:
    return HydraContext(config_loader=GlobalHydra.instance().config_loader(), callbacks=Callbacks(config))


def _launcher(config: DictConfig) -> None:
    Plugins.instance().instantiate_launcher(_context(config), _nothing, config)


def _sweeper(config: DictConfig) -> None:
    Plugins.instance().instantiate_sweeper(hydra_context=_context(config), task_function=_nothing, config=config)


def _nothing(config: DictConfig) -> None:
    """A job that is never run."""
