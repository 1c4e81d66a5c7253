"""Tests of the site's hooks for links, listings, the notebook, the navigation of the rules, and equations."""

from __future__ import annotations

import importlib.util
import re
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
from mkdocs.exceptions import PluginError

from .pages import ROOT

SPEC = importlib.util.spec_from_file_location("site_hooks", ROOT / "scripts" / "site_hooks.py")
assert SPEC is not None and SPEC.loader is not None
hooks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hooks)


def links(markdown: str, page: str) -> str:
    shown: Any = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    return hooks.on_page_markdown(markdown, shown, config=None, files=None)


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("index.md", "docs/rules/README.md#initialisers", "rules/README.md#initialisers"),
        ("index.md", "docs/notebook.ipynb", "notebook.md"),
        ("index.md", "CONTRIBUTING.md", "contributing.md"),
        ("contributing.md", "docs/add_a_rule.md", "add_a_rule.md"),
        ("rules/fa.md", "../../fa_bench/rules/fa.py", "../source/fa_bench/rules/fa.py.md"),
        ("rules/fa.md", "../glossary.md", "../glossary.md"),
        ("own_model.md", "../CONTRIBUTING.md#add-an-architecture", "contributing.md#add-an-architecture"),
        ("index.md", "https://example.org/a.md", "https://example.org/a.md"),
        ("index.md", "no.md", "no.md"),
        ("index.md", "#more", "#more"),
    ],
)
def test_links_are_rewritten_to_site_pages(page: str, link: str, expected: str) -> None:
    assert links(f"a [text]({link}), b", page) == f"a [text]({expected}), b"


def test_navigation_groups_rules_by_kind() -> None:
    index = "# Rules\n\n## Kind\n\n- [`a`](a.md): x\n- [`b`](b.md): y\n\n## Initialisers\n\ntext\n"
    assert hooks._rules_by_kind(index) == [{"Kind": ["rules/a.md", "rules/b.md"]}]


def test_file_listing_with_nested_fences() -> None:
    path = "docs/add_a_rule.md"
    assert "\n    ```python\n" in (ROOT / path).read_text(encoding="utf-8")
    head, _, listing = hooks._listing(path).partition("# docs/add_a_rule.md\n\n")
    assert "search: {exclude: true}" in head and re.fullmatch(r"(`{4,})md\n.*\n\1\n", listing, re.S)


def test_notebook_is_converted_to_markdown() -> None:
    cells = '{"cells": [{"cell_type": "markdown", "source": ["# A\\n", "b"]}, {"cell_type": "code", "source": ["1 + 1"]}]}'
    assert hooks._notebook(cells) == f"# A\nb\n\n{hooks.DOWNLOAD}\n\n```python\n1 + 1\n```\n"


def test_equation_rows_are_aligned() -> None:
    math = ElementTree.fromstring(hooks.mathml(r"\begin{aligned}a &= b \\ c^\top &= \sum_n \lVert d \rVert\end{aligned}"))
    rows = [["".join(cell.itertext()) for cell in row] for row in math[0]]
    assert rows == [["a", "=b"], ["c⊤", "=∑n‖d‖"]]


@pytest.mark.parametrize("latex", [r"\nosuchcommand", r"\begin{aligned}a &= \nosuchcommand b\end{aligned}"])
def test_unknown_latex_commands_are_rejected(latex: str) -> None:
    with pytest.raises(PluginError, match="not converted to MathML"):
        hooks.mathml(latex)
