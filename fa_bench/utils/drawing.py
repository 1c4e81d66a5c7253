"""Matplotlib as it comes, whatever a notebook, a shell or a matplotlibrc has set: figures are written, never shown."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def default_style() -> Iterator[None]:
    """Within it figures look alike on every machine; settings and backend of the process are afterwards as they were.

    Modules that import matplotlib at their head are imported within it, or after it.
    """
    _load()
    import matplotlib.style

    with matplotlib.style.context("default"):
        yield


def _load() -> None:
    """Import matplotlib, which refuses to be imported where MPLBACKEND names a backend that is not installed."""
    if "matplotlib" in sys.modules:
        return
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib

        if backend:
            with suppress(ValueError):  # one that is not there: nothing here needs it
                matplotlib.rcParams["backend"] = backend
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
