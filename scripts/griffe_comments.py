"""An extension of griffe for the site's reference, which documents attributes with text from the code.

The text comes from comments above the attributes that begin with ``#:`` and, for options, from the help in their declaration.
"""

from __future__ import annotations

import ast
import inspect
from typing import Any

import griffe


class Comments(griffe.Extension):
    """Gives attributes without a docstring the text of their comment or of their option's help."""

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **_: Any) -> None:
        """Called by griffe for every attribute that it has read."""
        if attr.docstring is None and (text := _option_help(node) or _comment(attr)):
            attr.docstring = griffe.Docstring(text, parent=attr, lineno=attr.lineno)


def _option_help(node: Any) -> str:
    """The help of ``option(default, "help", ...)``; empty for anything else."""
    value = getattr(node, "value", None)
    if not isinstance(value, ast.Call) or getattr(value.func, "id", "") != "option" or len(value.args) < 2:
        return ""
    try:
        text = ast.literal_eval(value.args[1])
    except ValueError:  # not plain text
        return ""
    return inspect.cleandoc(text[0].upper() + text[1:] + ".").replace("*", "\\*")


def _comment(attr: griffe.Attribute) -> str:
    """The text of the comment lines that begin with ``#:`` right above an attribute; empty if there are none."""
    if attr.lineno is None or isinstance(attr.filepath, list):  # a list, for packages without a file
        return ""
    lines, text = attr.lines_collection[attr.filepath], []
    for line in reversed(lines[: attr.lineno - 1]):
        if not line.strip().startswith("#:"):
            break
        text.insert(0, line.strip().removeprefix("#:").strip())
    return " ".join(text)
