"""The log of a run: whole in its own file, and in short on the terminal."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from fa_bench.errors import OutputError, printable

log = logging.getLogger("fa_bench")


class _Console(logging.Handler):
    """Log lines on standard output, above a progress bar; at most one epoch line a second and run."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write("\n".join(map(printable, self.format(record).splitlines())), file=sys.stdout)


class _LogFile(logging.FileHandler):
    """A log that a full disk does not turn into tracebacks: what else is written says so."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Say nothing."""


class log_file:
    """While it is open, the log goes to a file, whole, and to the terminal, in short."""

    def __init__(self, path: Path) -> None:
        try:
            self.file = _LogFile(path, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from None
        self.file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def __enter__(self) -> None:
        log.setLevel(logging.DEBUG)
        log.addHandler(self.file)

    def __exit__(self, *exception: object) -> None:
        log.removeHandler(self.file)
        with suppress(OSError):
            self.file.close()


@contextmanager
def shown() -> Iterator[None]:
    """Within it the log's short form is shown on the terminal."""
    before = log.level, log.propagate
    console = None if any(isinstance(handler, _Console) for handler in log.handlers) else _Console(level=logging.INFO)
    if console:
        log.addHandler(console)
    log.setLevel(logging.DEBUG)
    log.propagate = False
    try:
        yield
    finally:
        if console:
            log.removeHandler(console)
        log.level, log.propagate = before


@contextmanager
def root_kept() -> Iterator[None]:
    """Whatever a config of Hydra's sets up for logs within it, the process's own are afterwards as they were."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    try:
        yield
    finally:
        for handler in [handler for handler in root.handlers if handler not in before]:
            root.removeHandler(handler)
            handler.close()
        for handler in before:
            if handler not in root.handlers:
                root.addHandler(handler)
        root.setLevel(level)
