"""Errors that a user can mend: each names the key or layer, the value, what is allowed and the nearest name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class FaBenchError(Exception):
    """Base of every error that is the input's fault; the command line prints it without a traceback."""


class OptionError(FaBenchError, ValueError):
    """An option of a component is unknown, of the wrong type or out of range.

    `path` is the option's name within its component; the config layer puts the component's key in front of it. `meant` is what
    to write behind the path in its place, such as ``.name=cosine``.
    """

    def __init__(self, path: str, problem: str, meant: str = "") -> None:
        super().__init__(path, problem, meant)
        self.path, self.problem, self.meant = path, problem, meant

    def __str__(self) -> str:
        said = f"{self.path}{self.problem}" if self.problem.startswith("=") else f"{self.path}: {self.problem}"
        return f"{said}; did you mean {self.path}{self.meant}?" if self.meant else said

    def under(self, prefix: str) -> OptionError:
        """The same error with the path of the enclosing component in front."""
        return OptionError(f"{prefix}.{self.path}" if prefix else self.path, self.problem, self.meant)


class ConfigError(FaBenchError, ValueError):
    """A command line or config that cannot be run."""


class CoverageError(FaBenchError, ValueError):
    """A rule would cover nothing, leave weights uncovered without being asked to, or cannot be put into this model.

    Where `text` has the name of one of `settings` in braces, the message shows what to write there: ``cuts=['act1']``, an
    argument of `attach`; once `under` was called, ``algorithm.cuts='[act1]'``, an argument of the command line.
    """

    def __init__(self, text: str, settings: Mapping[str, Any] | None = None, prefix: str = "") -> None:
        super().__init__(text, settings, prefix)
        self.text, self.settings, self.prefix = text, dict(settings or {}), prefix

    def __str__(self) -> str:
        said = self.text
        for name, value in self.settings.items():
            said = said.replace(f"{{{name}}}", f"{self.prefix}.{name}={_override(value)}" if self.prefix else f"{name}={value!r}")
        return said

    def under(self, prefix: str) -> CoverageError:
        """The same error for someone who sets the options on the command line, below the key `prefix`."""
        return CoverageError(self.text, self.settings, prefix)


def _override(value: Any) -> str:
    """A value as the command line takes it, from any shell."""
    if isinstance(value, (list, tuple)):
        return f"'[{','.join(map(str, value))}]'"
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


class DataError(FaBenchError, OSError):
    """A dataset that is missing, unreadable or unfit for its options."""


class RunDirectoryError(FaBenchError, OSError):
    """An output directory that holds another run, or a checkpoint that is not this run's."""


class HeldError(RunDirectoryError):
    """A run's directory that another process is writing."""


class OutputError(FaBenchError, OSError):
    """A file that cannot be written: a full disk, a place that may only be read."""


class StateError(FaBenchError, ValueError):
    """A saved state that is not one of this rule in this model."""


#: Most characters of a message on the terminal, and of another program's or library's words in it.
MOST_MESSAGE, MOST_SAID = 1500, 300


def printable(text: object) -> str:
    """A message as one line that any terminal takes.

    Line ends and what is no text, as in odd file names, are escaped; a message longer than `MOST_MESSAGE` is cut in its middle.
    """
    # Cut first too: escaping a message of many megabytes takes its time.
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut(str(text), MOST_MESSAGE))
    return cut("".join(escaped), MOST_MESSAGE)


def cut(text: str, most: int) -> str:
    """The text, with the middle left out where it is longer than `most` characters: how it begins and how it ends stays."""
    return text if len(text) <= most else f"{text[:most * 2 // 3]} [...] {text[-(most - most * 2 // 3 - 7):]}"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, cut where it is long; its type's name where it has none, or cannot say it."""
    try:
        text = str(error).strip()
    except Exception:  # an error of a user's own class
        text = ""
    return cut((text or type(error).__name__).splitlines()[0], MOST_SAID)


#: From this share of common letters on a name is near another: 'cuda' to 'cud', but not 'compile' to 'optimizer'.
NEAR = 0.6


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A hint of the form ``; did you mean 'fa'?``, or nothing where no name is close."""
    if len(str(name)) > MOST_SAID:
        return ""

    def likeness(other: str) -> tuple[float, int]:
        return difflib.SequenceMatcher(None, str(name), other).ratio(), -abs(len(str(name)) - len(other))

    best = max(allowed, key=likeness, default="")
    return f"; did you mean '{best}'?" if best and likeness(best)[0] >= NEAR else ""


def names(allowed: Iterable[object]) -> str:
    """The allowed names as one readable list."""
    return ", ".join(str(name) for name in allowed)
