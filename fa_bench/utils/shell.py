"""Quote the values of a command line, which is parsed first by the shell and then by Hydra."""

from __future__ import annotations

import os
import re
import shlex
import subprocess

from fa_bench.errors import truncate

#: Matches paths and names that Hydra accepts without quotes.
_PLAIN = re.compile(r"[A-Za-z0-9_./%+:-]+")


def shell_quote(text: str) -> str:
    """One word of a command line, quoted for the shell if necessary."""
    return subprocess.list2cmdline([text]) if os.name == "nt" else shlex.quote(text)


def hydra_quote(value: str) -> str:
    """Quote a value if necessary, so that Hydra parses the result as `value`. Numbers, booleans and null are not quoted.

    >>> hydra_quote("o/x"), hydra_quote("lr=0.1"), hydra_quote('a"b')
    ('o/x', '"lr=0.1"', "'a\\"b'")
    """
    if _PLAIN.fullmatch(value):
        return value
    mark = '"' if '"' not in value else "'"
    # Hydra treats a backslash as an escape only before a quotation mark, where it has to be doubled.
    inner = re.sub(rf"(\\*)({mark}|$)", lambda match: match[1] * 2 + (f"\\{mark}" if match[2] else ""), value)
    return f"{mark}{inner}{mark}"


def expansion_problem(key: str, path: str) -> str:
    """The reason for refusing a path that begins with ``~`` or contains a shell variable that is set; empty for any other path.

    A quoted ``~`` reaches fa-bench unexpanded and would become the name of a folder.
    """
    expanded = os.path.expanduser(os.path.expandvars(path))
    if expanded == path and not path.startswith("~"):
        return ""
    fix = "write the full path" if expanded.startswith("~") else f"write {shell_quote(f'{key}={hydra_quote(expanded)}')}"
    return f"={truncate(path, 200)}: '~' and shell variables are not expanded here; {fix}"
