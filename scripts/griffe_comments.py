"""A griffe extension that documents attributes in the site's reference with text from the code.

The text comes from comments that begin with ``#:`` above an attribute, or, for an option, from the help in its declaration.
"""

from __future__ import annotations

import ast
import inspect
from typing import Any

import griffe


class Comments(griffe.Extension):
    """Documents each attribute without a docstring by its option's help or by the comment above it."""

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **_: Any) -> None:
        """Document an attribute; griffe calls this method for every attribute that it has read."""
        if attr.docstring is None and (text := _option_help(node) or _comment(attr)):
            attr.docstring = griffe.Docstring(text, parent=attr, lineno=attr.lineno)


def _option_help(node: Any) -> str:
    """The help text in ``option(default, "help", ...)`` as a Markdown sentence, or an empty string for any other value."""
    value = getattr(node, "value", None)
    if not isinstance(value, ast.Call) or getattr(value.func, "id", "") != "option" or len(value.args) < 2:
        return ""
    try:
        text = ast.literal_eval(value.args[1])
    except ValueError:  # the help is not a literal
        return ""
    return inspect.cleandoc(text[0].upper() + text[1:] + ".").replace("*", "\\*")


def _comment(attr: griffe.Attribute) -> str:
    """The text of the comment lines that begin with ``#:`` directly above an attribute, or an empty string."""
    if attr.lineno is None or isinstance(attr.filepath, list):  # namespace packages have a list of paths
        return ""
    lines, text = attr.lines_collection[attr.filepath], []
    for line in reversed(lines[: attr.lineno - 1]):
        if not line.strip().startswith("#:"):
            break
        text.insert(0, line.strip().removeprefix("#:").strip())
    return " ".join(text)
