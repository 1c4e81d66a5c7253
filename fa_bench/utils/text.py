"""Numbers, shapes and tables as plain text, and text of others made safe for where it is shown."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from fa_bench.errors import printable

_NAMES = ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"))


def aligned(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """One line a row, cells in columns two blanks apart; the columns numbered in `right` end flush, the others begin so."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) if column in right else cell.ljust(width)
                      for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]


def indented(lines: Iterable[str], by: int = 2) -> list[str]:
    """The lines, moved to the right."""
    return [" " * by + line if line else line for line in lines]


def by_x(shape: Iterable[int]) -> str:
    """A shape as one would say it, ``512x784``; ``1`` for a single number."""
    return "x".join(map(str, shape)) or "1"


def format_bytes(size: float) -> str:
    """A number of bytes in units of powers of a thousand: ``0 B``, ``2.68 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if round(size, 2 if size < 10 else 1 if size < 100 else 0) < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def count(number: float) -> str:
    """A number to be read, not to be computed with: ``1,797``, ``25.7 million``."""
    for unit, name in _NAMES:
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:,.0f}"


def shortened(text: str, most: int) -> str:
    """The text, of at most so many characters."""
    return text if len(text) <= most else f"{text[:most - 3]}..."


def markdown(text: str) -> str:
    """Text of others for one line, or one cell, of Markdown: it reads there as it is, whatever marks it has.

    Control characters are escaped; HTML, emphasis, links, code, formulas, headings and lists stay plain text.
    """
    text = re.sub(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", printable(text))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("://", ":\\//")
    return re.sub(r"^(\s*)(\d*)([#+=.)-])", r"\1\2\\\3", text)


def drawn(text: str) -> str:
    """Text of others for a figure: one line without formulas, which matplotlib sees between two `$`."""
    return printable(text).replace("$", r"\$")
