"""Standard output and standard error that never end a run, even if they are closed or full or cannot encode a character."""

from __future__ import annotations

import codecs
import errno
import io
import os
import re
import select
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

#: ASCII replacements for characters that an encoding lacks. Of the characters not listed here, letters lose their accents, Greek
#: letters are spelled out, and those without an ASCII equivalent are escaped.
ASCII = {
    "±": "+/-",
    "°": "deg",
    "ᵀ": "^T",
    "×": "x",
    "…": "~",
    "√": "sqrt",
    "≤": "<=",
    "≥": ">=",
    "·": "*",
    "→": "->",
    "‖": "||",
    "–": "-",
    "ø": "o",
    "Ø": "O",
}
_ERRORS = "fa_bench.plain"
#: Errors after which a reader still wants the lost output. After a broken pipe, for example, nobody reads the output.
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


class _ResilientFile(io.FileIO):
    """A file descriptor on which writes never fail. After the first error, all output is discarded.

    Attributes:
        failure: the error that caused a loss of wanted output; None if none was lost.
    """

    failure: OSError | None = None

    def write(self, data: Any, /) -> int:
        while True:
            try:
                written = super().write(data)
            except OSError as error:
                if error.errno in _FULL:
                    self.failure = error
                _redirect_to_null(self.fileno())
                return len(data)
            if written is not None:
                return written
            select.select([], [self.fileno()], [])  # the descriptor is non-blocking, and the reader is slow


class _UnclosableStream(io.TextIOWrapper):
    """A text stream that cannot be closed, since a plugin might close `sys.stdout`."""

    def close(self) -> None:
        """Flush, but stay open."""
        self.flush()


@contextmanager
def resilient_output() -> Iterator[Callable[[], str]]:
    """Within the block, standard output and standard error accept any text, and writing to them never fails.

    Output to a closed stream is discarded, and characters that the encoding lacks are replaced by ASCII characters. Streams that
    another program has installed, such as those of a notebook, are not changed.

    Yields: A function that returns the reason why text on standard output was lost, or an empty string if no wanted text was
    lost.
    """
    original = sys.stdout, sys.stderr
    streams = [_resilient(stream, number) for number, stream in enumerate(original, start=1)]
    sys.stdout, sys.stderr = streams
    try:
        yield lambda: _failure(streams[0])
    finally:
        for stream in streams:
            stream.flush()
        sys.stdout, sys.stderr = original


def exit_code(command: str, run: Callable[[], int]) -> int:
    """Call `run` under `resilient_output` and return its exit code. If wanted output was lost, print an error message that begins
    with `command`, and return 2."""
    with resilient_output() as failure:
        code = run()
        if reason := failure():
            print(f"{command}: standard output: cannot be written ({reason})", file=sys.stderr)
            return 2
        return code


def _failure(stream: TextIO) -> str:
    stream.flush()
    raw = _raw(stream)
    return str(raw.failure.strerror) if isinstance(raw, _ResilientFile) and raw.failure else ""


def _raw(stream: TextIO) -> Any:
    """The raw stream below a text stream, or its buffer if there is no raw stream; None if there is neither."""
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)


def _resilient(stream: TextIO | None, number: int) -> TextIO:
    # The Windows console has its own stream class, which supports every character and is not a pipe that could break.
    if stream is not None and (type(_raw(stream)) is not io.FileIO or not _is_descriptor(stream, number)):
        return stream
    if stream is None:  # it was closed when Python started
        if not _is_open(number):
            _redirect_to_null(number)  # otherwise, child processes could write to a file opened with this descriptor
        return open(os.devnull, "w", encoding="utf-8", errors="replace")
    stream.flush()
    codecs.register_error(_ERRORS, _to_ascii)
    return _UnclosableStream(
        io.BufferedWriter(_ResilientFile(number, "wb", closefd=False)),
        encoding=stream.encoding,
        errors=_ERRORS,
        line_buffering=True,
    )


def _is_descriptor(stream: TextIO, number: int) -> bool:
    try:
        return isinstance(stream, io.TextIOWrapper) and stream.fileno() == number
    except (OSError, ValueError):
        return False


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _redirect_to_null(number: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    if null == number:
        os.set_inheritable(number, True)
        return
    os.dup2(null, number)
    os.close(null)


def _to_ascii(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(map(_spell_out, error.object[error.start : error.end])), error.end


def _spell_out(char: str) -> str:
    letters = unicodedata.normalize("NFKD", char).encode("ascii", "ignore").decode()
    greek = re.fullmatch(r"GREEK (SMALL|CAPITAL) LETTER (\w+)", unicodedata.name(char, ""))
    if greek:
        name = greek[2].replace("LAMDA", "LAMBDA")
        letters = name.lower() if greek[1] == "SMALL" else name.capitalize()
    return ASCII.get(char) or letters or char.encode("unicode_escape").decode()
