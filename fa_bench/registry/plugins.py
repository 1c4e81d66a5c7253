"""Imports plugins, which are modules named by the option ``plugins`` or provided by installed distributions."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import sys
from collections.abc import Iterable
from pathlib import Path

from fa_bench.errors import ConfigError, describe_error, truncate
from fa_bench.utils.stopping import Interrupted

#: The entry-point group in which a distribution declares its plugins (``[project.entry-points."fa_bench.plugins"]``).
ENTRY_POINTS = "fa_bench.plugins"


def import_modules(modules: Iterable[str]) -> None:
    """Import the named modules, which may also be in the working directory.

    Raises:
        ConfigError: if a module cannot be imported; the message gives the file and the line of an error within it.
    """
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    for module in modules:
        _import(module, f"plugins=[{truncate(module, 200)}]: cannot be imported from {Path.cwd()}")


@functools.cache
def import_installed() -> None:
    """Import the plugins of installed distributions.

    Raises:
        ConfigError: if a plugin cannot be imported; the message gives its distribution, and the file and line of an error within
            the plugin.
    """
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        dist = entry.dist.name if entry.dist else "an unknown distribution"
        _import(
            entry.module,
            f"the plugin {entry.module} of the installed distribution {dist} cannot be imported; update or uninstall it",
        )


def _import(module: str, failure: str) -> None:
    try:
        importlib.import_module(module)
    except Interrupted:
        raise
    except BaseException as error:  # sys.exit() too: importing a user's module may raise anything
        raise ConfigError(f"{failure} ({describe_error(error, locate=True)})") from None
