"""Format numbers, shapes and tables as plain text, and escape arbitrary text for Markdown and figures."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from fa_bench.errors import printable

_NAMES = ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"))


def align_columns(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """One line per row, with columns separated by two spaces. The columns with indices in `right` are right-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def indent(lines: Iterable[str], by: int = 2) -> list[str]:
    """The lines, indented by `by` spaces; empty lines stay empty."""
    return [" " * by + line if line else line for line in lines]


def format_shape(shape: Iterable[int]) -> str:
    """A shape as text, such as ``512x784``; ``1`` for a scalar."""
    return "x".join(map(str, shape)) or "1"


def format_bytes(size: float) -> str:
    """A size in bytes with a decimal unit, such as ``0 B`` or ``2.68 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if round(size, 2 if size < 10 else 1 if size < 100 else 0) < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def format_count(number: float) -> str:
    """A number in a readable form, such as ``1,797`` or ``25.7 million``."""
    for unit, name in _NAMES if number >= _NAMES[-1][0] else ():
        if float(f"{number / unit:.3g}") >= 1:
            return f"{number / unit:.3g} {name}"
    return f"{number:,.0f}"


def escape_markdown(text: str) -> str:
    """The text escaped so that Markdown renders it literally in one line or one table cell.

    Control characters, HTML, emphasis, links, code, formulas, headings and lists are escaped.
    """
    text = re.sub(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", printable(text))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("://", ":\\//")
    return re.sub(r"^(\s*)(\d*)([#+=.)-])", r"\1\2\\\3", text)


def escape_mathtext(text: str) -> str:
    """The text as one line for a figure, escaped so that matplotlib does not parse any part as a formula."""
    return printable(text).replace("$", r"\$")
