"""Runs one analysis, which writes a table as CSV and a figure as PNG.

fa-bench-analyse                              # lists the analyses
fa-bench-analyse NAME --help                  # its options
fa-bench-analyse NAME OPTION=VALUE ... [--out outputs/analyses]
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from omegaconf import DictConfig, OmegaConf

from fa_bench.errors import ConfigError, FaBenchError, printable
from fa_bench.registry.options import option_fields
from fa_bench.registry.registries import ANALYSES
from fa_bench.utils.output import exit_code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see fa-bench-analyse --help")


def _parsed(options: list[str]) -> DictConfig:
    for word in options:
        if "=" not in word:
            raise ConfigError(f"{word}: options are written OPTION=VALUE")
    try:
        return OmegaConf.from_dotlist(options)
    except Exception as error:  # the parser raises many kinds of errors
        raise ConfigError(f"{' '.join(options)}: cannot be read ({type(error).__name__})") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``fa-bench-analyse`` and return its exit code. Invalid input results in an error message and exit code 2."""
    return exit_code("fa-bench-analyse", lambda: _guarded(list(sys.argv[1:] if argv is None else argv)))


def _guarded(argv: list[str]) -> int:
    try:
        _main(argv)
    except FaBenchError as error:
        print(printable(f"fa-bench-analyse: {error}"), file=sys.stderr)
        return 2
    return 0


def _main(argv: list[str]) -> None:
    parser = _Parser(add_help=False)
    parser.add_argument("name", nargs="?")
    parser.add_argument("options", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("outputs/analyses"))
    parser.add_argument("--help", "-h", action="store_true")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.name is None:
        print(__doc__)
        for name in ANALYSES:
            print(f"  {name:<22} {(inspect.getdoc(ANALYSES[name]) or '').splitlines()[0]}")
        return
    cls = ANALYSES[arguments.name]
    if arguments.help:
        print(f"{inspect.getdoc(cls)}\n")
        for field in option_fields(cls):
            print(f"  {field.name}={getattr(cls(), field.name)}  {field.metadata['help']}")
        return
    analysis = cls.from_mapping(OmegaConf.to_container(_parsed(arguments.options)))  # type: ignore[arg-type]
    table, csv, png = analysis.write(arguments.out)
    print(analysis.summary(table).to_string(index=False))
    print(f"{csv}\n{png}")
