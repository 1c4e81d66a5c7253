"""Plugins: modules that the command line names, and those that installed distributions offer. They are not trusted to behave."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

from fa_bench.errors import ConfigError, cut, first_line
from fa_bench.utils.stopping import Interrupted

#: The entry points by which an installed distribution offers its module: ``[project.entry-points."fa_bench.plugins"]``.
ENTRY_POINTS = "fa_bench.plugins"


def import_modules(modules: Iterable[str]) -> None:
    """Import modules, which may also be in the working directory.

    Raises:
        ConfigError: if one cannot be imported, with the file and the line at fault.
    """
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    for module in modules:
        _import(module, f"plugins=[{cut(module, 200)}]: cannot be imported from {Path.cwd()}")


@functools.cache
def import_installed() -> None:
    """Import the plugins that installed distributions offer.

    Raises:
        ConfigError: if one cannot be imported, with its distribution and the file and the line at fault.
    """
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        dist = entry.dist.name if entry.dist else "an unknown distribution"
        _import(entry.module, f"the plugin {entry.module} of the installed distribution {dist} cannot be imported, update or "
                              "uninstall it")


def _import(module: str, failure: str) -> None:
    try:
        importlib.import_module(module)
    except Interrupted:
        raise
    except BaseException as error:  # sys.exit() too: a user's module may do anything when it is imported
        raise ConfigError(f"{failure} ({blame(error)})") from None


def blame(error: BaseException) -> str:
    """An error of a user's code: its type, what it says in short, and the last line of code that it went through.

    Errors of the import system and of fa_bench's own checks name no line of the user's code; it is the innermost one outside.
    """
    said = first_line(error)
    kind = type(error).__name__
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    where = f", {own[-1].filename}:{own[-1].lineno}" if own and not isinstance(error, SyntaxError) else ""
    return f"{kind}{f': {said}' if said != kind else ''}{where}"


def _is_users(file: str) -> bool:
    return not file.startswith("<frozen") and file != importlib.__file__ and Path(__file__).parents[1] not in Path(file).parents
