"""Hooks for mkdocs.yml that add pages from other files of the repository, adapt links, list the rules and typeset equations.

Links in the Markdown files of the repository work on GitHub. On the site, README.md, CONTRIBUTING.md, CHANGELOG.md and the
notebook are also pages. Every other file outside docs/ that a page links to has a page with its listing. The hooks change the
links so that they lead to these pages. Equations (fenced blocks of the language ``math``) become MathML, which browsers show
without scripts.
"""

from __future__ import annotations

import html
import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parent.parent
#: Page of the site -> the file in the repository that it shows. Except for listings, all other pages show the file of the same
#: name in docs/.
ORIGINS = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "notebook.md": "docs/notebook.ipynb",
}
#: The line below the introduction of the notebook's page. The link is HTML, because `on_page_markdown` would change a Markdown
#: link so that it leads to this page instead of the file.
DOWNLOAD = '<a href="notebook.ipynb" download>Download the notebook</a>'
PAGES = {origin: page for page, origin in ORIGINS.items()}
#: Matches a Markdown link or image; the groups are everything before the target, the target without its anchor, and the anchor.
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)#\s]+)(#[^)\s]*)?(?=\))")
MATHML = "http://www.w3.org/1998/Math/MathML"
INDEX_OF_RULES = "rules/README.md"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the settings that are functions, which YAML cannot express plainly, and add the rules to the navigation."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")  # as on GitHub, so that anchors work there and on the site
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [
        {"name": "math", "class": "math", "format": _format_math}
    ]
    assert config.nav is not None
    for section in config.nav:
        if section.get("Rules") == [INDEX_OF_RULES]:
            section["Rules"] += _rules_by_kind(Path(config.docs_dir, INDEX_OF_RULES).read_text(encoding="utf-8"))
    return config


def _rules_by_kind(index: str) -> list[dict[str, list[str]]]:
    """The navigation of the rules: for each section of the index that lists rules, {title: its pages}."""
    sections = ((part.split("\n", 1)[0], re.findall(r"^- \[`\w+`\]\((\w+\.md)\)", part, re.M)) for part in index.split("\n## "))
    return [{title: [f"rules/{page}" for page in pages]} for title, pages in sections if pages]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that do not come from Markdown files in docs/."""
    for page, origin in ORIGINS.items():
        text = (ROOT / origin).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_notebook(text) if origin.endswith(".ipynb") else text))
    for file in files.documentation_pages():
        for _, target, _ in _links(file.content_string):
            path = _in_repository(file.src_uri, target)
            page = path and _page_of(path)
            if path and page and page.startswith("source/") and files.get_file_from_path(page) is None:
                files.append(File.generated(config, page, content=_listing(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Change links between files of the repository so that they lead to pages of the site."""
    here = page.file.src_uri

    def replaced(match: re.Match[str]) -> str:
        start, target, anchor = match[1], match[2], match[3] or ""
        path = _in_repository(here, target)
        if path is None:
            return match[0]
        return f"{start}{posixpath.relpath(_page_of(path), posixpath.dirname(here) or '.')}{anchor}"

    return LINK.sub(replaced, markdown)


def _links(markdown: str) -> Iterator[tuple[str, str, str]]:
    return ((match[1], match[2], match[3] or "") for match in LINK.finditer(markdown))


def _in_repository(page: str, target: str) -> str | None:
    """The repository path of the file to which a link on a page leads, or None if there is no such file in the repository."""
    if "://" in target:
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(ORIGINS.get(page, f"docs/{page}")), target))
    return path if not path.startswith("..") and (ROOT / path).is_file() else None


def _page_of(path: str) -> str:
    """The path, on the site, of the page or file that shows a file of the repository."""
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}.md"


def _listing(path: str) -> str:
    """The Markdown of a page that lists a file of the repository."""
    code = (ROOT / path).read_text(encoding="utf-8")
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", code)), 3)
    return f"---\nsearch: {{exclude: true}}\n---\n# {path}\n\n{fence}{Path(path).suffix[1:]}\n{code.rstrip()}\n{fence}\n"


def _notebook(text: str) -> str:
    """A notebook as Markdown, without outputs, because these are not committed."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    parts.insert(1, DOWNLOAD)
    return "\n\n".join(parts) + "\n"


# ------------------------------------------------------------------------------------------------ equations
def _format_math(source: str, *arguments: Any, **options: Any) -> str:
    """The HTML of a fenced block of the language ``math``."""
    return f'<div class="math">{mathml(source)}</div>'


def mathml(latex: str) -> str:
    r"""A displayed equation, or the rows of ``\begin{aligned}...\end{aligned}``, as MathML.

    Raises:
        PluginError: if latex2mathml does not know a command, and therefore leaves it as text.
    """
    latex = latex.strip()
    aligned = re.fullmatch(r"\\begin\{aligned\}(.*)\\end\{aligned\}", latex, re.S)
    rows = re.split(r"\\\\\s*", aligned[1]) if aligned else [latex]
    table = "".join(
        "<mtr>" + "".join(_cell(cell, first=not place) for place, cell in enumerate(row.split("&"))) + "</mtr>" for row in rows
    )
    if "\\" in table:
        raise PluginError(f"not converted to MathML: {latex}")
    label = html.escape(" ".join(latex.split()), quote=True)
    return f'<math xmlns="{MATHML}" display="block" alttext="{label}"><mtable>{table}</mtable></math>'


def _cell(latex: str, first: bool) -> str:
    """The MathML of one cell; the first cell of a row is aligned to the right, and the others to the left."""
    root = ElementTree.fromstring(convert(latex.strip(), display="block"))
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{MATHML}}}")
        if element.tag == "msub" and element[0].text == "∑":
            element.tag = "munder"
    for operator in root.iter("mo"):
        text = operator.text or ""
        if text == "⊤":  # an operator would have space around it
            operator.tag = "mi"
        elif space := "0" if text in "‖|" else "0.15em" if text.isalpha() else "0.3em" if text == "~" else "":
            operator.attrib |= {"stretchy": "false", "lspace": space, "rspace": space}
    inner = "".join(ElementTree.tostring(element, encoding="unicode") for element in root)
    return f'<mtd style="text-align: {"right" if first else "left"}"><mstyle displaystyle="true">{inner}</mstyle></mtd>'
