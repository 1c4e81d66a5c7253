"""Standard output and error that never end a training: whatever they are, what is written there is shown as far as it can be."""

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

#: What is written in the place of signs that an encoding lacks. Letters lose their marks, Greek ones are named, others numbered.
PLAIN = {"±": "+/-", "°": "deg", "ᵀ": "^T", "×": "x", "…": "~", "√": "sqrt", "≤": "<=", "≥": ">=", "·": "*", "→": "->", "‖": "||",
         "–": "-", "ø": "o", "Ø": "O"}
_ERRORS = "fa_bench.plain"
#: Where the place is full, the text is lost to somebody who wants it; otherwise nobody reads any more.
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


class _Patient(io.FileIO):
    """A file descriptor whose writes never fail: once nobody reads, or there is no room, they go nowhere.

    Attributes:
        failure: why text was lost that somebody wants; None where none was.
    """

    failure: OSError | None = None

    def write(self, data: Any, /) -> int:
        while True:
            try:
                written = super().write(data)
            except OSError as error:
                if error.errno in _FULL:
                    self.failure = error
                _to_nowhere(self.fileno())
                return len(data)
            if written is not None:
                return written
            select.select([], [self.fileno()], [])  # somebody has made it non-blocking, and the reader is slow


class _Open(io.TextIOWrapper):
    """A text stream that stays open: what a plugin does to `sys.stdout` ends no run."""

    def close(self) -> None:
        """Write what waits to be written."""
        self.flush()


@contextmanager
def steady() -> Iterator[Callable[[], str]]:
    """Within it standard output and error take any text, and go on when nobody reads it.

    Where they are closed, text goes nowhere. Where an encoding lacks a character, `PLAIN` has what stands for it. Streams that
    others have put there, a notebook's say, stay as they are.

    Gives a function that says why what was written to standard output so far is lost to somebody who wants it; empty where
    nothing is.
    """
    before = sys.stdout, sys.stderr
    own = [_steadied(stream, number) for number, stream in enumerate(before, start=1)]
    sys.stdout, sys.stderr = own
    try:
        yield lambda: _lost(own[0])
    finally:
        for stream in own:
            stream.flush()
        sys.stdout, sys.stderr = before


def exit_code(command: str, run: Callable[[], int]) -> int:
    """What a command line exits with: what `run` gives, with steady output; 2 where output was lost that somebody wants."""
    with steady() as lost:
        code = run()
        if reason := lost():
            print(f"{command}: standard output: cannot be written ({reason})", file=sys.stderr)
            return 2
        return code


def _lost(stream: TextIO) -> str:
    stream.flush()
    raw = _raw(stream)
    return str(raw.failure.strerror) if isinstance(raw, _Patient) and raw.failure else ""


def _raw(stream: TextIO) -> Any:
    """What a text stream writes to in the end; None where that is no file descriptor."""
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)


def _steadied(stream: TextIO | None, number: int) -> TextIO:
    # A console of Windows has a kind of its own, which knows nothing of pipes and takes every character.
    if stream is not None and (type(_raw(stream)) is not io.FileIO or not _is_descriptor(stream, number)):
        return stream
    if stream is None:  # Python found it closed
        if not _is_open(number):
            _to_nowhere(number)  # lest the next file that is opened become standard output, of child processes too
        return open(os.devnull, "w", encoding="utf-8", errors="replace")
    stream.flush()
    codecs.register_error(_ERRORS, _plain)
    return _Open(io.BufferedWriter(_Patient(number, "wb", closefd=False)), encoding=stream.encoding, errors=_ERRORS,
                 line_buffering=True)


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


def _to_nowhere(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere == number:
        os.set_inheritable(number, True)
        return
    os.dup2(nowhere, number)
    os.close(nowhere)


def _plain(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start:error.end]
    return "".join(map(_spelled, text)), error.end


def _spelled(char: str) -> str:
    letters = unicodedata.normalize("NFKD", char).encode("ascii", "ignore").decode()
    greek = re.fullmatch(r"GREEK (SMALL|CAPITAL) LETTER (\w+)", unicodedata.name(char, ""))
    if greek:
        name = greek[2].replace("LAMDA", "LAMBDA")
        letters = name.lower() if greek[1] == "SMALL" else name.capitalize()
    return PLAIN.get(char) or letters or char.encode("unicode_escape").decode()
