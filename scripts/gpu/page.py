"""Writes the page of a GPU check, with a section and a table for each part, as Markdown and as JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from fa_bench.utils.files import write_text

WAITING, RUNNING, OUT_OF_TIME = "not started", "running", "OUT OF TIME"
PASSED, FAILED, ERROR, MEASURED, SKIPPED = "passed", "FAILED", "ERROR", "measured", "skipped"


@dataclasses.dataclass
class Section:
    """The section of the page that describes one part of the check.

    Attributes:
        name, title: the name and title of the part.
        status: one of the constants above.
        notes: sentences above the table, for example about the comparison and its tolerances.
        columns, rows: the table.
        checks, misses: the number of rows that are checks, and the number of these that failed.
        missing: descriptions of the runs that were left out for lack of time.
        error: the error that ended the part, if any.
        budget, seconds: the time that the part was given and the time that it took, in seconds.
        path: the file to which the section is saved; None if it is not saved.
    """

    name: str
    title: str
    status: str = WAITING
    notes: list[str] = dataclasses.field(default_factory=list)
    columns: list[str] = dataclasses.field(default_factory=list)
    rows: list[list[str]] = dataclasses.field(default_factory=list)
    checks: int = 0
    misses: int = 0
    missing: list[str] = dataclasses.field(default_factory=list)
    error: str = ""
    budget: float | None = None
    seconds: float | None = None
    path: Path | None = None

    def add(self, *cells: Any, passed: bool | None = None) -> None:
        """Add a row, and save the section.

        `passed` says whether the check in this row passed; None means that the row is not a check.
        """
        self.checks += passed is not None
        self.misses += passed is False
        self.rows.append([*map(str, cells), *([] if passed is None else ["pass" if passed else "**FAIL**"])])
        self.save()

    def end(self) -> None:
        """Derive the status from the rows and the error, and save the section."""
        self.status = (
            ERROR if self.error else FAILED if self.misses else PASSED if self.checks else MEASURED if self.rows else SKIPPED
        )
        self.save()

    def save(self) -> None:
        """Write the section to `path` as JSON, unless `path` is None."""
        if self.path is not None:
            write_text(self.path, json.dumps(self.plain()))

    def plain(self) -> dict[str, Any]:
        """The section as a dictionary of plain values."""
        return {**dataclasses.asdict(self), "path": None}

    def update(self, path: Path) -> None:
        """Update this section from the one that another process saved to `path`, if the file exists. The section keeps its own
        path, budget and seconds."""
        if path.exists():
            for key, value in json.loads(path.read_text(encoding="utf-8")).items():
                if key not in ("path", "budget", "seconds"):
                    setattr(self, key, value)


def write_page(folder: Path, header: dict[str, str], sections: list[Section]) -> None:
    """Write gpu_check.md and gpu_check.json to `folder`."""
    plain = [section.plain() for section in sections]
    write_text(folder / "gpu_check.json", json.dumps({"header": header, "sections": plain}, indent=1) + "\n")
    write_text(folder / "gpu_check.md", markdown(header, sections))


def markdown(header: dict[str, str], sections: list[Section]) -> str:
    """The text of gpu_check.md."""
    lines = [
        "# GPU check",
        "",
        *(f"- {name}: {value}" for name, value in header.items()),
        "",
        "| part | result | checks | failed | budget (s) | used (s) |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for section in sections:
        lines.append(
            f"| {section.title} | {section.status} | {section.checks} | {section.misses} | {_number(section.budget)} "
            f"| {_number(section.seconds)} |"
        )
    for section in sections:
        lines += ["", f"## {section.title}: {section.status}", "", *(f"{note}\n" for note in section.notes)]
        if section.error:
            lines += ["Error:", "", *(f"    {line}" for line in section.error.splitlines()), ""]
        if section.missing:
            lines += [f"Not run, for lack of time: {', '.join(section.missing)}.", ""]
        if section.rows:
            width = max(len(section.columns), *map(len, section.rows))
            columns = section.columns + [""] * (width - len(section.columns))
            lines += [_row(columns), "|" + "---|" * width, *(_row(row + [""] * (width - len(row))) for row in section.rows)]
    return "\n".join(lines).rstrip() + "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def _number(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.0f}"
