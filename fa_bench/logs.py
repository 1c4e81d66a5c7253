"""The log of a run: whole in its own file, and in short on the terminal."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from fa_bench.errors import OutputError

log = logging.getLogger("fa_bench")


class _Console(logging.Handler):
    """Log lines on standard output, above a progress bar; at most one epoch line a second and run."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)


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


def show_log() -> None:
    """Show the log's short form on the terminal."""
    if not any(isinstance(handler, _Console) for handler in log.handlers):
        console = _Console(level=logging.INFO)
        log.addHandler(console)
    log.setLevel(logging.DEBUG)
    log.propagate = False
