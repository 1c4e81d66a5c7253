"""Check Hydra's own sections before anything is written, because invalid values would make Hydra fail in the middle of a
sweep."""

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
def errors_named(config: DictConfig, name: str) -> Iterator[None]:
    """Raise a ConfigError that names Hydra's section `name` if Hydra cannot use that section within the block."""
    try:
        with preserve_root_logger(), contextlib.redirect_stderr(io.StringIO()):
            yield
    except FaBenchError:
        raise
    except Exception as error:
        value = format_value(OmegaConf.to_container(config, resolve=False)["hydra"].get(name))  # type: ignore[call-overload,index]
        reason = first_line(error.__cause__ or error)
        raise ConfigError(f"hydra.{name}={truncate(value, 100)}: Hydra cannot use it ({reason})") from None


def check_sections(config: DictConfig) -> None:
    """Check options of Hydra that it reads only after a run or sweep has started. Raises ConfigError, naming the key, if a value
    is invalid.

    Args:
        config: as composed by Hydra, with the node ``hydra``.
    """
    for name in ("job_logging", "hydra_logging"):
        with errors_named(config, name):
            _configure_logging(config.hydra[name])
    verbose = config.hydra.verbose
    if not isinstance(verbose, (bool, str)) and not (
        OmegaConf.is_list(verbose) and all(isinstance(name, str) for name in verbose)
    ):
        raise ConfigError(f"hydra.verbose={verbose}: must be true, false or a list of loggers")
    # Launchers with several processes, such as joblib's, would refuse an invalid number of jobs only after the sweep has started.
    jobs = OmegaConf.select(config, "hydra.launcher.n_jobs")
    if jobs is not None and (isinstance(jobs, bool) or not isinstance(jobs, int) or jobs == 0):
        raise ConfigError(
            f"hydra.launcher.n_jobs={jobs}: must be a whole number >= 1, or negative as in joblib (-1: one job per core)"
        )


def _configure_logging(section: DictConfig | None) -> None:
    plain: Any = OmegaConf.to_container(section, resolve=False) if section is not None else None
    if plain is None or plain["root"] is None:  # Hydra skips the section under the same condition
        return
    for handler in (plain.get("handlers") or {}).values():
        if handler.pop("filename", None):  # its directory does not exist yet
            handler["class"] = "logging.NullHandler"
            handler.pop("mode", None)
    logging.config.dictConfig(plain | {"disable_existing_loggers": False})
