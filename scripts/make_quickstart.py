"""Runs the sweep of the README's quick start, and updates the table and the picture (docs/quickstart.png) in the README.

    python scripts/make_quickstart.py

The picture is the overview of the report, with fewer colours so that the file stays small.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PICTURE = ROOT / "docs" / "quickstart.png"
#: The lines of the README before and after the table.
START, END = "<!-- quickstart -->\n", "<!-- end of quickstart -->"
COLOURS = 128


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fa_bench", "-m", "experiment=quickstart"]
        output = subprocess.run(command, cwd=folder, text=True, check=True, stdout=subprocess.PIPE).stdout
        with Image.open(Path(folder, "outputs", "quickstart", "report.png")) as picture:
            picture.convert("RGB").quantize(COLOURS).save(PICTURE, optimize=True)
    README.write_text(replace_table(README.read_text(encoding="utf-8"), output), encoding="utf-8")


def replace_table(readme: str, output: str) -> str:
    """The README with the table from `output`, the text that the sweep printed.

    Raises:
        SystemExit: if the output has no table, or the README has no place for it.
    """
    table = re.search(r"^rule  .*?(?=\n\n)", output, re.MULTILINE | re.DOTALL)
    if table is None or START not in readme or END not in readme:
        raise SystemExit("the sweep printed no table" if table is None else f"README.md lacks {START.strip()} or {END}")
    before, rest = readme.split(START)
    indented = "\n".join(f"    {line}".rstrip() for line in table[0].splitlines())
    return f"{before}{START}{indented}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    main()
