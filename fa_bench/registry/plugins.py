"""Modules of a user's own: imported where the command line names them, and never trusted to behave."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

from fa_bench.errors import ConfigError, cut, first_line
from fa_bench.utils.stopping import Interrupted


def import_modules(modules: Iterable[str]) -> None:
    """Import modules, looked for in the working directory too.

    Raises:
        ConfigError: for one that cannot be imported, with the file and the line at fault.
    """
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    for module in modules:
        try:
            importlib.import_module(module)
        except Interrupted:
            raise
        except BaseException as error:  # sys.exit() too: whatever a user's module makes of its import
            raise ConfigError(f"plugins=[{cut(module, 200)}]: cannot be imported from {Path.cwd()} ({blame(error)})") from None


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
