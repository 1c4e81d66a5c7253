"""The diagrams of docs/concepts.md are those that the script draws."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("draw_concepts", ROOT / "scripts" / "draw_concepts.py")
assert SPEC is not None and SPEC.loader is not None
draw = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(draw)


def texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_committed_diagrams_match_script_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the text elements are compared, because other versions of matplotlib may write different bytes."""
    monkeypatch.setattr(draw, "FOLDER", tmp_path)
    assert draw.main() == 0
    made = {path.name: texts(path.read_text(encoding="utf-8")) for path in tmp_path.iterdir()}
    committed = {path.name: texts(path.read_text(encoding="utf-8")) for path in (ROOT / "docs" / "diagrams").iterdir()}
    assert committed == made and len(made) == 3, "run: python scripts/draw_concepts.py"
    assert "B₂ in place of W₂" in made["edge_rule.svg"]
