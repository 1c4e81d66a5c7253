"""Helpers that read the code blocks and shell commands of README.md, CONTRIBUTING.md and the pages in docs/."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
#: A line that is indented by four spaces and starts with a program of one of these two tuples is a command. Other indented lines,
#: such as output, are not.
PROGRAMS = ("fa-bench", "fa-bench-report", "fa-bench-tune", "fa-bench-analyse", "torchrun", "python", "python3", "pip")
OTHER_PROGRAMS = ("tensorboard", "export", "mkdocs", "bash")
FENCE = re.compile(r"^( *)(`{3,})(\w*)\n(.*?)^\1\2$", re.S | re.M)


class Block(NamedTuple):
    """The language and the code of a fenced block."""

    language: str
    code: str


def name_of(page: Path) -> str:
    """The page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


def fences(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return [Block(match[3], textwrap.dedent(match[4])) for match in FENCE.finditer(page.read_text(encoding="utf-8"))]


def prose(page: Path) -> str:
    """The text of the page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def indented(page: Path) -> list[str]:
    """The lines outside fenced blocks that are indented by four spaces, without their indentation.

    A line that ends in a backslash is joined to the next one.
    """
    return re.findall(r"^    (?=\S)(.*)$", prose(page).replace("\\\n", ""), re.M)


def commands(page: Path) -> list[str]:
    """The shell commands on a page, without their comments."""
    lines = [line for line in indented(page) if line.split()[0].rpartition("/")[2] in (*PROGRAMS, *OTHER_PROGRAMS)]
    return [re.sub(r"\s{2,}#.*|\s+# .*", "", line).strip() for line in lines]
