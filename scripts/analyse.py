"""Runs one analysis: a table as CSV and a figure as PNG.

    python scripts/analyse.py                              # lists the analyses
    python scripts/analyse.py NAME --help                  # its options
    python scripts/analyse.py NAME OPTION=VALUE ... [--out outputs/analyses]
"""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path

from omegaconf import OmegaConf

from fa_bench.errors import FaBenchError
from fa_bench.options import option_fields
from fa_bench.registries import ANALYSES


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("name", nargs="?")
    parser.add_argument("options", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("outputs/analyses"))
    parser.add_argument("--help", "-h", action="store_true")
    arguments = parser.parse_args()
    if arguments.name is None:
        print(__doc__)
        for name in ANALYSES:
            print(f"  {name:<22} {(inspect.getdoc(ANALYSES[name]) or '').splitlines()[0]}")
        return
    try:
        cls = ANALYSES[arguments.name]
        if arguments.help:
            print(f"{inspect.getdoc(cls)}\n")
            for field in option_fields(cls):
                print(f"  {field.name}={getattr(cls(), field.name)}  {field.metadata['help']}")
            return
        given = OmegaConf.to_container(OmegaConf.from_dotlist(arguments.options))
        table, csv, png = cls.from_mapping(given).write(arguments.out)  # type: ignore[arg-type]
    except FaBenchError as error:
        sys.exit(f"analyse: {error}")
    print(table.to_string(index=False))
    print(f"{csv}\n{png}")


if __name__ == "__main__":
    main()
