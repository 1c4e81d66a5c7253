"""The packages of fa_bench depend on each other in one direction only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import fa_bench

ROOT = Path(fa_bench.__file__).parent
#: The packages and top-level modules from top to bottom; each imports only from those that follow.
ORDER = (
    "__main__",
    "api",
    "tuning",
    "cli",
    "command",
    "analyses",
    "report",
    "runs",
    "loggers",
    "callbacks",
    "metrics",
    "config",
    "rules",
    "mechanisms",
    "models",
    "data",
    "objectives",
    "optim",
    "schedules",
    "registry",
    "utils",
    "errors",
)


def imported(tree: ast.AST) -> Iterator[str]:
    """The names that a module imports from fa_bench with ``from ... import`` at run time, including imports in functions but not
    those for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fa_bench"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from imported(node)


def test_packages_import_only_downwards_and_have_bounded_size() -> None:
    upwards: set[tuple[str, str]] = set()
    lines: dict[str, int] = {}
    for path in ROOT.rglob("*.py"):
        folder, text = path.relative_to(ROOT).parent.as_posix(), path.read_text(encoding="utf-8")
        lines[folder] = lines.get(folder, 0) + text.count("\n")
        if path == ROOT / "__init__.py":
            continue
        package = path.relative_to(ROOT).with_suffix("").parts[0]
        upwards |= {
            (package, used)
            for name in imported(ast.parse(text))
            if (used := name.split(".")[1]) != package and used in ORDER and ORDER.index(used) < ORDER.index(package)
        }
    assert upwards == set()
    assert {folder: count for folder, count in lines.items() if count > sum(lines.values()) / 5} == {}
