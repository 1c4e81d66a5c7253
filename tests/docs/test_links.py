"""Every internal link on a page, in the notebook and in the built site leads to an existing target, including its anchor."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from filelock import FileLock

import fa_bench

from .pages import DOCS, PAGES, ROOT, fences, name_of, prose

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
#: Maps an element to the attribute that contains the address of something that a browser loads or opens.
ADDRESSES = {"a": "href", "link": "href", "img": "src", "script": "src", "source": "src", "iframe": "src"}


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub assigns to the headings of a page: punctuation is dropped, and spaces become hyphens."""
    seen: Counter[str] = Counter()
    result = set()
    for heading in re.findall(r"^#+ (.+?)\s*$", prose(page), re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
        anchor = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        result.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return result


def broken(links: list[str], page: Path) -> list[str]:
    """Those of a page's links into the repository whose target or anchor does not exist."""
    bad = []
    for link in links:
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and (target.suffix != ".md" or anchor not in anchors(target))):
            bad.append(link)
    return bad


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=name_of)
def test_page_links_are_valid(page: Path) -> None:
    assert broken(LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page))), page) == []


def test_notebook_links_and_anchors_are_valid() -> None:
    notebook = DOCS / "notebook.ipynb"
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    links = [link for cell in cells if cell["cell_type"] == "markdown" for link in LINK.findall("".join(cell["source"]))]
    assert links and broken(links, notebook) == []


def test_dead_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A `b`: c\n\n# A b c\n")
    assert broken(["page.md#a-b-c", "#a-b-c-1", "https://example.org"], page) == []
    assert broken(["no.md", "#a-b", "page.md#c"], page) == ["no.md", "#a-b", "page.md#c"]


# ------------------------------------------------------------------------------------------------ the site
class Elements(HTMLParser):
    """Collects the addresses that a page of the site uses, and the anchors that it defines.

    Attributes:
        opened: the addresses of links, and of the canonical, previous and next page.
        loaded: the addresses of scripts, styles, images and frames.
        ids: the anchors.
        math: the number of equations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.math = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.ids |= {value for key, value in attributes if key in ("id", "name") and value}
        self.math += tag == "math"
        if (address := values.get(ADDRESSES.get(tag, ""))) is not None:
            is_metadata = tag == "link" and values.get("rel") in ("canonical", "prev", "next")
            (self.opened if tag == "a" or is_metadata else self.loaded).append(address)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site in strict mode, once for all processes of a test run."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_TESTRUNUID" in os.environ:
        shared = shared.parent
    folder = shared / "site"
    with FileLock(shared / "site.lock"):
        if not (shared / "built").exists():
            command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
            environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
            built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
            assert built.returncode == 0, built.stdout + built.stderr
            (shared / "built").touch()
    return folder


@pytest.fixture(scope="module")
def parsed(site: Path) -> dict[Path, Elements]:
    """The parsed pages of the site."""
    pages = {}
    for path in site.rglob("*.html"):
        pages[path] = Elements()
        pages[path].feed(path.read_text(encoding="utf-8"))
    return pages


def test_every_page_is_in_the_site(site: Path) -> None:
    pages = {path.relative_to(DOCS).with_suffix(".html").as_posix().replace("README", "index") for path in DOCS.rglob("*.md")}
    pages |= {"index.html", "contributing.html", "changelog.html", "notebook.html"}
    assert [page for page in pages if not (site / page).is_file()] == []


def test_site_links_and_anchors_are_valid(site: Path, parsed: dict[Path, Elements]) -> None:
    bad = []
    for path, page in parsed.items():
        for address in {*page.opened, *page.loaded}:
            parts = urlsplit(address)
            if parts.scheme or path.name == "404.html":  # the addresses on 404.html are relative to the root of the server
                continue
            target = Path(os.path.normpath(path.parent / unquote(parts.path))) if parts.path else path
            if not target.is_file() or (
                parts.fragment and target in parsed and unquote(parts.fragment) not in parsed[target].ids
            ):
                bad.append((path.relative_to(site).as_posix(), address))
    assert bad == []


def test_site_loads_nothing_from_network(parsed: dict[Path, Elements]) -> None:
    assert {address for page in parsed.values() for address in page.loaded if urlsplit(address).netloc} == set()


def test_equations_are_typeset(site: Path, parsed: dict[Path, Elements]) -> None:
    with_math = [path for path in PAGES if any(block.language == "math" for block in fences(path))]
    assert with_math
    for path in with_math:
        page = site / path.relative_to(DOCS).with_suffix(".html")
        assert parsed[page].math == sum(block.language == "math" for block in fences(path)), path


def test_every_public_name_is_in_the_reference(parsed: dict[Path, Elements]) -> None:
    ids = {anchor for path, page in parsed.items() if path.parent.name == "reference" for anchor in page.ids}
    text = (DOCS / "reference" / "registration.md").read_text(encoding="utf-8")
    names = [name for name in fa_bench.__all__ if name != "__version__"]
    assert [name for name in names if f"fa_bench.{name}" not in ids and f"`fa_bench.{name}`" not in text] == []


def test_attribute_comments_and_option_help_are_documented(site: Path) -> None:
    text = (site / "reference" / "components.html").read_text(encoding="utf-8")
    assert "that the architecture supports.</p>" in text  # the comment on Architecture.tasks
    assert "<p>Weight decay per unit of learning rate.</p>" in text
