"""The log of a run, which is complete in a file and abbreviated on the terminal."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from fa_bench.errors import printable
from fa_bench.utils.files import output_errors

log = logging.getLogger("fa_bench")


class _Console(logging.Handler):
    """Writes log lines to standard output, above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write("\n".join(map(printable, self.format(record).splitlines())), file=sys.stdout)


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore errors such as a full disk, which would otherwise cause a traceback for every line. They are reported when other
        files are written."""


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Within the block, write the complete log to a file; raises an OutputError if the file cannot be opened."""
    with output_errors(path):
        handler = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.setLevel(logging.DEBUG)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        with suppress(OSError):
            handler.close()


@contextmanager
def console_log() -> Iterator[None]:
    """Within the block, show the abbreviated log on the terminal."""
    previous = log.level, log.propagate
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
        log.level, log.propagate = previous


@contextmanager
def preserve_root_logger() -> Iterator[None]:
    """Restore the root logger's handlers and level after the block, in which Hydra may change them."""
    root = logging.getLogger()
    previous, level = list(root.handlers), root.level
    try:
        yield
    finally:
        for handler in [handler for handler in root.handlers if handler not in previous]:
            root.removeHandler(handler)
            handler.close()
        for handler in previous:
            if handler not in root.handlers:
                root.addHandler(handler)
        root.setLevel(level)
