"""Performs runs of fa_bench within a part of the GPU check."""

from __future__ import annotations

import itertools
from typing import Any

import fa_bench
from fa_bench.errors import first_line
from fa_bench.mechanisms.compiled import too_old_to_compile

from .page import Section
from .parts import Context

_numbers = itertools.count()


class RunFailed(Exception):
    """Raised if a run does not finish; the message gives the reason."""


def train(context: Context, *overrides: str) -> dict[str, Any]:
    """The result of a run in its own folder, including the metrics of the last epoch.

    Raises:
        RunFailed: if the run does not finish.
    """
    folder = context.scratch / f"run{next(_numbers)}"
    try:
        runs = fa_bench.run(*overrides, f"output_dir={folder}", f"device={context.device}", "loggers=[]", "probe_every=0")
    except Exception as error:
        raise RunFailed(f"{type(error).__name__}: {first_line(error)}") from error
    if not runs or runs[0].result["status"] != "finished":
        why = (runs[0].result["error"] or {}).get("message", "") if runs else "no result"
        raise RunFailed(first_line(Exception(why)))
    return {**runs[0].metrics[-1], **runs[0].result}


def can_compile(section: Section) -> bool:
    """Whether this version of torch can compile every rule; if not, the function adds a note to the section."""
    if problem := too_old_to_compile():
        section.notes.append(f"Nothing was compiled: {problem}.")
    return not problem
