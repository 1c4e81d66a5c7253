"""Matplotlib with its default style, regardless of the settings of a notebook, a shell or a matplotlibrc file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def default_style() -> Iterator[None]:
    """Within the block, figures have matplotlib's default style. The process's settings are restored afterwards, except
    for a backend that the block selects.

    Modules that import matplotlib at the top level must not be imported before the block begins.
    """
    _load()
    import matplotlib.style

    with matplotlib.style.context("default"):
        yield


def _load() -> None:
    """Import matplotlib even if MPLBACKEND names a backend that is not installed, which would make a plain import fail."""
    if "matplotlib" in sys.modules:
        return
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib

        if backend:
            with suppress(ValueError):  # not installed, and not needed here
                matplotlib.rcParams["backend"] = backend
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
