"""Every cell of the notebook runs."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "notebook.ipynb"
#: A replacement for the cell with the tag "parameters"; it sets the same names to values with which the notebook runs in seconds.
SMALL = """
common = ["dataset=synthetic", "dataset.samples=192", "dataset.test_samples=32", "dataset.validation=0.3",
          "architecture.widths=[8]", "epochs=1", "loggers=[]", "threads=1"]
rules = ["bp", "kp"]
rates = [0.1, 0.02]
seeds = [0]
budget = 1
"""


def code_cells() -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def names(code: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}


def execute(code: str, name: str, variables: dict[str, Any]) -> Any:
    """Execute a cell, and return what a notebook displays: the value of its last expression, or None if it ends otherwise."""
    tree = ast.parse(code, f"cell {name}")
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, f"cell {name}", "exec"), variables)
    return eval(compile(ast.Expression(last.value), f"cell {name}", "eval"), variables) if isinstance(last, ast.Expr) else None


def test_notebook_is_committed_without_outputs() -> None:
    cells = code_cells()
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    [parameters] = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", ())]
    assert names("".join(parameters["source"])) == names(SMALL)


def test_notebook_links_point_to_existing_files() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", NOTEBOOK.read_text(encoding="utf-8"))
    assert links and all((NOTEBOOK.parent / link).is_file() for link in links)


def test_every_cell_of_the_notebook_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    variables: dict[str, Any] = {"__name__": "__main__"}
    shown = {}
    for cell in code_cells():
        code = SMALL if "parameters" in cell["metadata"].get("tags", ()) else "".join(cell["source"])
        shown[cell["id"]] = repr(execute(code, cell["id"], variables))
    assert len(variables["runs"]) == 4 and all(run.finished for run in variables["runs"])
    assert variables["accuracy"] > 0.9 and max(variables["measured"][5].values()) < 60
    assert "0.02" in shown["best"] or "0.10" in shown["best"]
    assert "difference from bp" in shown["tune"] and (tmp_path / "weight_angles.png").is_file()
    printed = capsys.readouterr().out
    assert "lr: unknown key; did you mean 'optimizer.lr'?" in printed
    assert len(printed.splitlines()) < 100
