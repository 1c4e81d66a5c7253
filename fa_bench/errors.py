"""Errors that users can fix, and helpers that format names, values and other errors for one-line messages.

A message names the key, layer or file concerned and, where they apply, the value given, the allowed values and the most similar
valid name.
"""

from __future__ import annotations

import difflib
import importlib
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class FaBenchError(Exception):
    """Base class of the errors that users can fix; the command line prints them without a traceback.

    Examples:
        >>> import fa_bench
        >>> try:
        ...     fa_bench.run("optimizer.lr=-1")
        ... except fa_bench.FaBenchError as error:
        ...     print(error)
        optimizer.lr=-1.0 is out of range (allowed: > 0)
    """


class OptionError(FaBenchError, ValueError):
    """An option is unknown, has an invalid value, or does not fit the rest of the config.

    `path` is the option's name within its component; `with_prefix` prepends the component's key. `suggestion` is the text that
    should follow the path instead, such as ``.name=cosine``.
    """

    def __init__(self, path: str, problem: str, suggestion: str = "") -> None:
        super().__init__(path, problem, suggestion)
        self.path, self.problem, self.suggestion = path, problem, suggestion

    def __str__(self) -> str:
        message = f"{self.path}{'' if self.problem.startswith('=') else ': '}{self.problem}"
        return f"{message}; did you mean {self.path}{self.suggestion}?" if self.suggestion else message

    def with_prefix(self, prefix: str) -> OptionError:
        """The same error with the enclosing component's path prepended."""
        return OptionError(f"{prefix}.{self.path}" if prefix else self.path, self.problem, self.suggestion)


class ComponentError(FaBenchError, TypeError):
    """The class of a component, such as a user's own rule, does not meet the requirements of its base class."""


class ConfigError(FaBenchError, ValueError):
    """The command line or config is invalid."""


class CoverageError(FaBenchError, ValueError):
    """A rule cannot be attached to this model, would cover nothing, or would leave weights uncovered without permission.

    Names from `settings` that appear in braces in `text` are placeholders for what the user should write. In a call of `attach`,
    this is an argument such as ``cuts=['act1']``; after `with_prefix`, it is a command-line override such as
    ``algorithm.cuts='[act1]'``.
    """

    def __init__(self, text: str, settings: Mapping[str, Any] | None = None, prefix: str = "") -> None:
        super().__init__(text, settings, prefix)
        self.text, self.settings, self.prefix = text, dict(settings or {}), prefix

    def __str__(self) -> str:
        message = self.text
        for name, value in self.settings.items():
            typed = f"'{format_value(value)}'" if isinstance(value, (list, tuple)) else format_value(value)
            message = message.replace(f"{{{name}}}", f"{self.prefix}.{name}={typed}" if self.prefix else f"{name}={value!r}")
        return message

    def with_prefix(self, prefix: str) -> CoverageError:
        """The same error for a user who sets the options on the command line, under the key `prefix`."""
        return CoverageError(self.text, self.settings, prefix)


class DataError(FaBenchError, OSError):
    """A dataset is missing, unreadable or unusable with the given options, or a file of a run is damaged."""


class RunDirectoryError(FaBenchError, OSError):
    """An output directory cannot be used, for example because it belongs to another run or its checkpoint is damaged."""


class DirectoryLockedError(RunDirectoryError):
    """A run directory is locked by another process."""


class OutputError(FaBenchError, OSError):
    """A file cannot be written, for example because the disk is full or the location is read-only."""


class StateError(FaBenchError, ValueError):
    """A saved state does not match the rule and its model, the tensors of the model are not in the state that the rule
    requires, or a worker process of a study has failed."""


#: The maximum lengths of a message on the terminal and of a part quoted from another program or library.
MAX_MESSAGE, MAX_QUOTE = 1500, 300


def truncate(text: str, limit: int) -> str:
    """The text, shortened to at most `limit` characters by replacing its middle with ``[...]``; `limit` must be at least 9."""
    if len(text) <= limit:
        return text
    end = max(limit - limit * 2 // 3 - 7, 1)
    return f"{text[: limit - 7 - end]} [...] {text[-end:]}"


def printable(text: object) -> str:
    """A message as a single line of printable characters.

    Line breaks and unprintable characters, which may occur in file names, are escaped; the length is limited to `MAX_MESSAGE`.
    """
    # The text is also truncated before escaping, because escaping a message of many megabytes would be slow.
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in truncate(str(text), MAX_MESSAGE))
    return truncate("".join(escaped), MAX_MESSAGE)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, truncated, or the name of the error's type if the error has no message or cannot be
    converted to text."""
    try:
        text = str(error).strip()
    except Exception:  # a user's own exception class
        text = ""
    return truncate((text or type(error).__name__).splitlines()[0], MAX_QUOTE)


def describe_error(error: BaseException, locate: bool = False) -> str:
    """A one-line description of an error, such as ``TypeError: its message``.

    Args:
        error: the error.
        locate: append the file and line of the innermost frame outside fa_bench and the import system; for errors in a user's
            code.
    """
    kind, message = type(error).__name__, first_line(error)
    description = kind if message == kind else f"{kind}: {message}"
    if not locate or isinstance(error, SyntaxError):  # a syntax error's message contains its location
        return description
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_user_code(frame.filename)]
    return f"{description}, {frames[-1].filename}:{frames[-1].lineno}" if frames else description


def _is_user_code(file: str) -> bool:
    return not file.startswith("<frozen") and file != importlib.__file__ and Path(__file__).parent not in Path(file).parents


#: The minimum similarity of a suggested name: 'cuda' is suggested for 'cud', but 'optimizer' is not suggested for 'compile'.
NEAR = 0.6


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A hint of the form ``; did you mean 'fa'?``, or an empty string if no name is similar."""
    if len(str(name)) > MAX_QUOTE:
        return ""

    def similarity(other: str) -> tuple[float, int]:
        return difflib.SequenceMatcher(None, str(name).casefold(), other.casefold()).ratio(), -abs(len(str(name)) - len(other))

    best = max(allowed, key=similarity, default="")
    return f"; did you mean '{best}'?" if best and similarity(best)[0] >= NEAR else ""


def missing_method(component: object, method: str) -> ComponentError:
    """The error for a component whose class does not implement the required method `method` of its base class."""
    cls = type(component)
    base = next(each for each in cls.__mro__ if method in vars(each))
    added = [name for each in cls.__mro__[: cls.__mro__.index(base)] for name in vars(each) if not hasattr(base, name)]
    similar = difflib.get_close_matches(method, added, 1, NEAR)
    hint = f"; rename its '{similar[0]}' to '{method}'?" if similar else ""
    return ComponentError(
        f"class {cls.__qualname__} ({cls.__module__}) does not implement the method '{method}', which {base.__name__} needs{hint}"
    )


def names(allowed: Iterable[object]) -> str:
    """The items as text, separated by commas."""
    return ", ".join(map(str, allowed))


def format_value(value: Any) -> str:
    """An option's value as typed on the command line, such as ``[a,b]``, ``null`` or ``true``. Strings are not quoted."""
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(format_value, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
