"""The command line: read it, check every job, and let Hydra run them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import hydra

from fa_bench import __version__
from fa_bench.command.jobs import Task, exit_code_of, interrupted
from fa_bench.config.job import conf_dir, register_schemas
from fa_bench.errors import ConfigError, FaBenchError, RunDirectoryError, describe_error, printable
from fa_bench.runs.hashes import clear_cache
from fa_bench.utils.files import write_failure
from fa_bench.utils.output import exit_code
from fa_bench.utils.stopping import interrupt_on_signals

if TYPE_CHECKING:
    from fa_bench.command.compose import Composer

CONFIG_NAME = "config"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``fa-bench``.

    Returns:
        The exit code: 0 if every run finished; 1 if one failed or diverged; 2 for input that cannot be run, with one
        or two lines on standard error; 130 after an interrupt (SIGINT), 143 after SIGTERM, 129 after SIGHUP.
    """
    return exit_code("fa-bench", lambda: _guarded(list(sys.argv[1:] if argv is None else argv)))


def _guarded(argv: list[str]) -> int:
    try:
        with interrupt_on_signals():
            return _main(argv)
    except FaBenchError as error:
        said, code = str(error), 2
    except OSError as error:
        said, code = write_failure(error), 2
    except KeyboardInterrupt as error:
        said, code = "interrupted", exit_code_of(error)
    except Exception:
        raise
    except BaseException as error:  # argparse and Hydra leave none: a plugin's class that is checked, built or measured
        by = "sys.exit()" if isinstance(error, SystemExit) else "an error that is no Exception"
        said, code = f"ended by {by} ({describe_error(error, locate=True)}), which is left to fa-bench", 1
    print(printable(f"fa-bench: {said}"), file=sys.stderr)
    return code


def _main(argv: list[str]) -> int:
    register_schemas()
    if "--version" in argv:
        print(f"fa-bench {__version__}")
        return 0
    arguments = _parse(argv)
    if arguments.hydra_help:
        return _hydra(["--hydra-help"])  # the same text whatever a config says

    from fa_bench.command.compose import Composer

    words = [] if arguments.shell_completion else arguments.overrides
    name, folder = arguments.config_name or CONFIG_NAME, arguments.config_dir
    if arguments.help:
        from fa_bench.command.usage import usage

        print(usage(Composer(name, folder, [word for word in words if "=" in word]), [word for word in words if "=" not in word]))
        return 0
    if arguments.dry_run:
        from fa_bench.command.dry_run import dry_run

        print(dry_run(name, folder, words, arguments.multirun))
        return 0
    composer = Composer(name, folder, words)
    # Overrides first: a flag with an optional value would take the one behind it.
    flags = _without(argv, arguments.overrides)
    if arguments.shell_completion:
        if not all(re.fullmatch(r"(install|uninstall|query)=(bash|zsh|fish)", word) for word in arguments.overrides or [""]):
            raise ConfigError("--shell-completion: write install=bash (or zsh, fish), uninstall=bash or query=bash")
        os.environ.setdefault("COMP_LINE", "fa-bench ")
    if arguments.shell_completion or arguments.info:
        composer.compose([o.input_line or "" for o in composer.parsed if not o.is_sweep_override()])  # checked
        return _hydra([*arguments.overrides, *flags])
    if arguments.cfg:
        job, = composer.expand(multirun=False)  # with what an experiment gives to its rule
        return 2 if _hydra([*job, *flags]) else 0  # Hydra names a --package that does not exist
    clear_cache()
    with hydras_errors():
        task = Task(["fa-bench", *arguments.overrides, *flags])
        return sweep(composer, task) if arguments.multirun else run(composer, task)


def run(composer: Composer, task: Task) -> int:
    """Run one job; the exit code."""
    from hydra.core.utils import run_job
    from hydra.types import RunMode

    from fa_bench.command.rehearsal import check_parts
    from fa_bench.runs.logs import preserve_root_logger

    [(_, directory)] = jobs = composer.check(composer.expand(multirun=False))
    task.directories.append(directory)
    config = composer.config
    assert config is not None
    config.hydra.mode = RunMode.RUN
    check_parts(config)
    context = _context(composer, config)
    try:
        with _empty_removed(directory), preserve_root_logger():
            context.callbacks.on_run_start(config=config, config_name=composer.config_name)
            returned = run_job(task_function=task, config=config, job_dir_key="hydra.run.dir",
                               job_subdir_key=None, hydra_context=context)
            context.callbacks.on_run_end(config=config, config_name=composer.config_name, job_return=returned)
    except KeyboardInterrupt as error:
        return interrupted(jobs, error)
    return returned.return_value or _report(directory)


def sweep(composer: Composer, task: Task) -> int:
    """Hand a sweep to Hydra's sweeper, which is fa-bench's own; the exit code."""
    from hydra.core.plugins import Plugins
    from hydra.types import RunMode

    from fa_bench.command.compose import check_swept
    from fa_bench.command.rehearsal import check_parts, making

    check_swept(composer.parsed)
    config = composer.compose(mode=RunMode.MULTIRUN)
    config.hydra.mode = RunMode.MULTIRUN
    check_parts(config)
    context = _context(composer, config)
    with making(config, "sweeper"):
        sweeper = Plugins.instance().instantiate_sweeper(config=config, hydra_context=context, task_function=task)
    context.callbacks.on_multirun_start(config=config, config_name=composer.config_name)
    code = sweeper.sweep([o.input_line or "" for o in composer.parsed if not o.is_hydra_override()])
    context.callbacks.on_multirun_end(config=config, config_name=composer.config_name)
    return code


def _context(composer: Composer, config: Any) -> Any:
    """What Hydra's launchers and jobs are given."""
    # A context needs the callbacks that a config asks for, and nothing public makes them.
    from hydra._internal.callbacks import Callbacks
    from hydra.types import HydraContext

    from fa_bench.command.rehearsal import making

    with making(config, "callbacks"):
        return HydraContext(config_loader=composer.loader, callbacks=Callbacks(config))


def _parse(argv: list[str]) -> Any:
    # Hydra's flags are declared nowhere else, and their help is Hydra's.
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.add_argument("--dry-run", action="store_true", help="say what would be run; train and write nothing")

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{message}; see fa-bench --help")

    parser.error = refuse  # type: ignore[method-assign]
    # Abbreviations would read --experiment=quickstart as a flag of Hydra's that begins like it.
    parser.allow_abbrev = False
    arguments, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        meant = unknown[0].lstrip("-")
        hint = f"; did you mean '{meant}'?" if "=" in meant else ""
        refuse(f"{unknown[0]}: no such flag{hint}")
    for flag, given, instead in (("--config-path", arguments.config_path, "add a folder of configs by --config-dir"),
                                 ("--experimental-rerun", arguments.experimental_rerun, "repeat the run's options")):
        if given is not None:
            refuse(f"{flag}: not supported, {instead}")
    modes = [flag for flag, given in (("--multirun", arguments.multirun), ("--run", arguments.run), ("--cfg", arguments.cfg),
                                      ("--info", arguments.info), ("--shell-completion", arguments.shell_completion)) if given]
    if arguments.dry_run:  # of one run or of a sweep: it goes with --multirun
        modes = ["--dry-run", *(mode for mode in modes if mode != "--multirun")]
    if len(modes) > 1:
        refuse(f"{' and '.join(modes)} do not go together")
    if arguments.resolve and not arguments.cfg:
        refuse("--resolve goes with --cfg")
    return arguments


def _without(words: list[str], some: list[str]) -> list[str]:
    """`words` without one occurrence of each of `some`."""
    left = list(words)
    for word in some:
        left.remove(word)
    return left


@contextmanager
def hydras_errors() -> Iterator[None]:
    """What fails within Hydra is said in a line, unless HYDRA_FULL_ERROR=1 asks for the traceback."""
    try:
        yield
    except FaBenchError:
        raise
    except OSError as error:
        raise RunDirectoryError(write_failure(error)) from None
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        raise ConfigError(f"Hydra failed ({describe_error(error)}); "
                          "HYDRA_FULL_ERROR=1 shows where") from None


def _hydra(argv: list[str]) -> int:
    """Let Hydra show configs, itself, or completions; the exit code."""
    from fa_bench.runs.logs import preserve_root_logger

    argv_before, traced = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = ["fa-bench", *argv], "1"  # Hydra raises its errors, and prints no traceback
    try:
        with preserve_root_logger():
            hydra.main(config_path=str(conf_dir()), config_name=CONFIG_NAME, version_base="1.3")(Task([]))()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    finally:
        sys.argv = argv_before
        os.environ.pop("HYDRA_FULL_ERROR")
        os.environ |= {} if traced is None else {"HYDRA_FULL_ERROR": traced}
    return 0


@contextmanager
def _empty_removed(directory: Path) -> Iterator[None]:
    """Remove what is made for a run and stays empty, as the run never started: its directory and parents of that."""
    missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        yield
    finally:
        with suppress(OSError):  # something is in it
            for folder in missing:
                folder.rmdir()


def _report(directory: Path) -> int:
    from fa_bench.report.runs import read_run

    found = read_run(directory)
    if found is None:
        return 1
    result = found.result
    accuracy = "none" if result.get("test_accuracy") is None else f"{result['test_accuracy']:.2%}"
    seconds = result.get("seconds") or 0
    print(f"{result['status']}: test accuracy {accuracy}, {seconds:.1f} s of training, in {printable(directory)}")
    return 0 if found.finished else 1


if __name__ == "__main__":
    sys.exit(main())
