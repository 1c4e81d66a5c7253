"""Writes docs/rules: one page for each rule, from its docstring and its options, and their index.

    python scripts/make_docs.py

A test compares the committed pages with what this makes; run it after a change to a rule's docstring or options.
"""

from __future__ import annotations

import inspect
import re
import sys
import typing
from pathlib import Path

from omegaconf import OmegaConf

from fa_bench.config.job import conf_dir
from fa_bench.config.options import Options, limits_text, option_fields, summary, type_name, value_text
from fa_bench.config.registries import ALGORITHMS
from fa_bench.mechanisms.cuts import CutRule
from fa_bench.mechanisms.edge import EdgeRule
from fa_bench.mechanisms.local import LocalRule, ModuleRule
from fa_bench.mechanisms.rule import Rule

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "rules"
#: Kinds of rules, the more special first, and what they change.
KINDS: tuple[tuple[type[Rule], str], ...] = (
    (ModuleRule, "blocks with losses of their own"),
    (LocalRule, "a loss at every hidden activation"),
    (CutRule, "errors delivered directly"),
    (EdgeRule, "an error that each layer carries on"),
    (Rule, "backpropagation"),
)


def pages() -> dict[str, str]:
    """File name in docs/rules -> text."""
    return {"README.md": _index(), **{f"{name}.md": _page(name) for name in ALGORITHMS}}


def _index() -> str:
    lines = ["# Rules", "", "Made by `python scripts/make_docs.py` from what each rule says of itself. "
             "[Which one?](../choose_a_rule.md)", ""]
    for kind, title in KINDS:
        lines += [f"## {title[0].upper()}{title[1:]}", ""]
        lines += [f"- [`{name}`]({name}.md): {_summary(name)}" for name in ALGORITHMS if _kind(name) is kind] + [""]
    return "\n".join(lines)


def _page(name: str) -> str:
    cls = ALGORITHMS[name]
    source = Path(inspect.getfile(cls)).resolve().relative_to(ROOT).as_posix()
    lines = [
        f"# `{name}`", "", _summary(name), "", f"Kind: {dict(KINDS)[_kind(name)]}. Source: [{source}](../../{source}). "
        f"{_presets(name)}[All rules](README.md).", "",
        f"    fa-bench algorithm={name}", f"    rule = fa_bench.attach(model, \"{name}\")", "",
        _markdown((inspect.getdoc(cls) or "").partition("\n\n")[2]), "", "## Options", "",
        "On the command line `algorithm.NAME=VALUE`, in Python keywords of `attach`.", "",
        "| option | default | allowed | what it is |", "|---|---|---|---|", *_rows(cls), "",
    ]
    return "\n".join(lines)


def _markdown(docstring: str) -> str:
    """Code in single backticks, and without any in equations that stand by themselves."""
    return "\n".join(line.replace("``", "") if line.startswith("    ") else re.sub(r"``(.+?)``", r"`\1`", line)
                     for line in docstring.splitlines())


def _summary(name: str) -> str:
    return _markdown(summary(ALGORITHMS[name]))


def _kind(name: str) -> type[Rule]:
    return next(kind for kind, _ in KINDS if issubclass(ALGORITHMS[name], kind))


def _presets(name: str) -> str:
    """The presets whose grid names the rule."""
    found = []
    for path in sorted((conf_dir() / "experiment").glob("*.yaml")):
        parts = OmegaConf.to_container(OmegaConf.load(path), resolve=False)["grid"]  # type: ignore[index]
        if any(name in str(part.get("algorithm", "")).split(",") for part in parts):
            found.append(f"`{path.stem}`")
    return f"Presets: {', '.join(found)}. " if found else ""


def _rows(cls: type[Options]) -> list[str]:
    hints, values = typing.get_type_hints(cls), cls()
    return [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in (
            f"`{field.name}`", f"`{value_text(getattr(values, field.name))}`", limits_text(field) or type_name(hints[field.name]),
            field.metadata["help"].replace("*", "\\*"))) + " |"
        for field in option_fields(cls)
    ]


def main() -> int:
    """Write the pages, and remove those of rules that are no more."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    made = pages()
    for path in FOLDER.glob("*.md"):
        if path.name not in made:
            path.unlink()
    for name, text in made.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    print(f"{len(made)} pages in {FOLDER}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
