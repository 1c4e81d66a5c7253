"""Values as they are typed in a shell, where two readers take them apart: the shell, and Hydra behind it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess

from fa_bench.errors import cut

#: What Hydra takes without quotes, as far as paths and names need it.
_PLAIN = re.compile(r"[A-Za-z0-9_./%+:-]+")


def word(text: str) -> str:
    """One word of a command line, quoted for the shell where it must be."""
    return subprocess.list2cmdline([text]) if os.name == "nt" else shlex.quote(text)


def quoted(value: str) -> str:
    """A text as Hydra reads it back, with quotes where it needs them.

    >>> quoted("o/x"), quoted("lr=0.1"), quoted('a"b')
    ('o/x', '"lr=0.1"', "'a\\"b'")
    """
    if _PLAIN.fullmatch(value):
        return value
    mark = '"' if '"' not in value else "'"
    # A backslash counts as one only before a quotation mark, where it has to be doubled.
    inner = re.sub(rf"(\\*)({mark}|$)", lambda match: match[1] * 2 + (f"\\{mark}" if match[2] else ""), value)
    return f"{mark}{inner}{mark}"


def unexpanded(key: str, path: str) -> str:
    """What is wrong with a path that begins with ``~`` or has ``$NAME`` in it, with what to type; empty for any other path.

    A ``~`` in quotes reaches fa-bench as it is, and would become a folder of that name.
    """
    meant = os.path.expanduser(os.path.expandvars(path))
    if meant == path and not path.startswith("~"):
        return ""
    mend = "write the whole path" if meant.startswith("~") else f"write {word(f'{key}={quoted(meant)}')}"
    return f"={cut(path, 200)}: '~' and variables of the shell are not filled in here; {mend}"
