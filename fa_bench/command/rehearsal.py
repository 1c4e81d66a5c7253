"""Hydra's own parts, tried before anything is written: what it could not use would end a sweep once it had begun."""

from __future__ import annotations

import contextlib
import io
import logging.config
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fa_bench.errors import ConfigError, FaBenchError, first_line, format_value, truncate
from fa_bench.runs.logs import preserve_root_logger


@contextlib.contextmanager
def making(config: DictConfig, name: str) -> Iterator[None]:
    """Within it Hydra makes the part of its section `name`; raises ConfigError, naming the section, where it cannot."""
    try:
        with preserve_root_logger(), contextlib.redirect_stderr(io.StringIO()):
            yield
    except FaBenchError:
        raise
    except Exception as error:  # whatever the part makes of its options
        value = format_value(OmegaConf.to_container(config, resolve=False)["hydra"].get(name))  # type: ignore[call-overload,index]
        said = first_line(error.__cause__ or error)
        raise ConfigError(f"hydra.{name}={truncate(value, 100)}: Hydra cannot use it ({said})") from None


def check_parts(config: DictConfig) -> None:
    """Try what Hydra looks at only in its jobs; raises ConfigError, naming the section.

    Args:
        config: composed, with the node ``hydra``.
    """
    for name in ("job_logging", "hydra_logging"):
        with making(config, name):
            _set_up_log(config.hydra[name])
    verbose = config.hydra.verbose
    if not isinstance(verbose, (bool, str)) and not (
            OmegaConf.is_list(verbose) and all(isinstance(name, str) for name in verbose)):
        raise ConfigError(f"hydra.verbose={verbose}: write true, false or a list of loggers")
    # Launchers in several processes, such as joblib's, refuse a number of them once the sweep has begun.
    jobs = OmegaConf.select(config, "hydra.launcher.n_jobs")
    if jobs is not None and (isinstance(jobs, bool) or not isinstance(jobs, int) or jobs == 0):
        raise ConfigError(f"hydra.launcher.n_jobs={jobs}: write a whole number >= 1, or -1 for one job a core")


def _set_up_log(section: DictConfig | None) -> None:
    plain: Any = OmegaConf.to_container(section, resolve=False) if section is not None else None
    if plain is None or plain["root"] is None:  # as Hydra asks
        return
    for handler in (plain.get("handlers") or {}).values():
        if handler.pop("filename", None):  # in a directory that does not exist yet
            handler["class"] = "logging.NullHandler"
            handler.pop("mode", None)
    logging.config.dictConfig(plain | {"disable_existing_loggers": False})
