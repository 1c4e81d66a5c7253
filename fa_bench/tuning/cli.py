"""The command line of studies: ``fa-bench-tune [key=value ...]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from fa_bench import __version__
from fa_bench.cli import with_errors_printed
from fa_bench.config.job import register_schemas
from fa_bench.errors import ConfigError, format_value, printable
from fa_bench.registry.options import limits_text, option_fields
from fa_bench.runs.hashes import clear_cache
from fa_bench.tuning.options import TuneOptions
from fa_bench.utils.output import exit_code

_HEAD = """\
usage: fa-bench-tune [key=value ...]

  fa-bench-tune algorithm=bp,frozen,fa,kp,dfa dataset=mnist budget=20 tune_seeds=1 seeds=0,1,2
  fa-bench-tune experiment=tune_digits        an experiment with a `tune` section
  fa-bench-tune --dry-run ...                 show what would run; train and write nothing
  fa-bench-tune --config-dir FOLDER ...       add a folder of configs

Every rule gets the same number of trials, optuna chooses values by the validation score, and the best config of each rule is
trained with new seeds and tested once. Keys other than those of the study (see below) are those of
fa-bench. Values to search are written as Hydra's sweeps:

  optimizer.lr='tag(log,interval(1e-3,1))'    a logarithmic range
  optimizer.momentum='interval(0,0.99)'       a range
  optimizer.weight_decay=0,1e-4,1e-3          choices
  'architecture.widths=[100,100]'             a single value: the key is not searched

keys of the study:
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``fa-bench-tune``.

    Returns:
        The exit code: 0 if every final run finished or was stopped by a callback; 1 if one failed or diverged, or if there was
        none; 2 for invalid input or for files that cannot be read or written, with one or two lines on standard error; 130 after
        an interrupt (SIGINT), 143 after SIGTERM, 129 after SIGHUP.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    return exit_code(
        "fa-bench-tune",
        lambda: with_errors_printed("fa-bench-tune", lambda: _main(words), "Interrupted. Rerun the same command to resume"),
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see fa-bench-tune --help")


def _main(argv: list[str]) -> int:
    parser = _Parser(prog="fa-bench-tune", add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--config-dir", "-cd")
    for flag in ("--help", "-h"), ("--dry-run",), ("--version",):
        parser.add_argument(*flag, action="store_true")
    arguments = parser.parse_intermixed_args(argv)
    register_schemas()
    if arguments.version:
        print(f"fa-bench-tune {__version__}")
        return 0
    if arguments.help:
        print(_usage())
        return 0
    clear_cache()
    if arguments.dry_run:
        from fa_bench.data.fetch import downloads_refused
        from fa_bench.tuning.plan import describe
        from fa_bench.tuning.tune import check_data, prepared

        plan = prepared(arguments.overrides, arguments.config_dir)
        with downloads_refused():
            check_data(plan)
        print(describe(plan))
        return 0
    from fa_bench.tuning.tune import FIGURE, MARKDOWN, tune

    result = tune(arguments.overrides, arguments.config_dir)
    print(f"\n{result.text}\n\ntuning: {printable(result.directory / MARKDOWN)}\nfigure: {printable(result.directory / FIGURE)}")
    return result.code


def _usage() -> str:
    lines = []
    for field in option_fields(TuneOptions):
        limits = limits_text(field)
        lines += [
            f"  {field.name}={format_value(getattr(TuneOptions(), field.name))}",
            f"      {field.metadata['help']}{f' ({limits})' if limits else ''}",
        ]
    return "\n".join([_HEAD.rstrip(), *lines])


if __name__ == "__main__":
    sys.exit(main())
