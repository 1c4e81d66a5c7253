"""Tests of the script that updates the table and the picture of the README's quick start."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import make_quickstart

OUTPUT = """\
[18/18] kp seed 2 epoch 30/30  train loss 0.0043  val 98.61%  test 97.50%

rule    val %  test accuracy % (mean ± std)  n
------  -----  ----------------------------  -
bp      98.15  97.13 ± 0.16                  3

report: outputs/quickstart/report.md
"""


def test_replace_table_replaces_previous_table():
    readme = f"# Title\n{make_quickstart.START}    old\n{make_quickstart.END}\nafter\n"
    assert make_quickstart.replace_table(readme, OUTPUT) == (
        f"# Title\n{make_quickstart.START}"
        "    rule    val %  test accuracy % (mean ± std)  n\n"
        "    ------  -----  ----------------------------  -\n"
        "    bp      98.15  97.13 ± 0.16                  3\n"
        f"{make_quickstart.END}\nafter\n"
    )


def test_missing_table_or_readme_marker_is_rejected():
    with pytest.raises(SystemExit, match="printed no table"):
        make_quickstart.replace_table(make_quickstart.START + make_quickstart.END, "nothing\n")
    with pytest.raises(SystemExit, match=r"README\.md lacks"):
        make_quickstart.replace_table("# Title\n", OUTPUT)


def test_readme_has_marker_and_picture():
    readme = make_quickstart.README.read_text(encoding="utf-8")
    assert make_quickstart.replace_table(readme, OUTPUT) != readme
    assert f"]({make_quickstart.PICTURE.relative_to(make_quickstart.ROOT).as_posix()})" in readme
    assert make_quickstart.PICTURE.stat().st_size < 200_000
