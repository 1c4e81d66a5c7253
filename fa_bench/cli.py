"""Parse the command line, check every job, and run the jobs with Hydra."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import hydra

from fa_bench import __version__
from fa_bench.command.jobs import Task, exit_code_of, report_interrupt
from fa_bench.config.job import conf_dir, register_schemas
from fa_bench.errors import ConfigError, FaBenchError, RunDirectoryError, describe_error, printable
from fa_bench.runs import parallel
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
        The exit code: 0 if every run finished or was stopped by a callback; 1 if one failed or diverged; 2 for invalid input or
        for files that cannot be read or written, with one or two lines on standard error; 130 after an interrupt (SIGINT), 143
        after SIGTERM, 129 after SIGHUP.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    return parallel.run_together(lambda: exit_code("fa-bench", lambda: with_errors_printed("fa-bench", lambda: _main(words))))


def with_errors_printed(program: str, function: Callable[[], int], interrupted: str = "interrupted") -> int:
    """Call `function` and return its exit code. Signals, errors that users can fix, errors of the operating system and plugins
    that exit the process are reported in one line and result in an exit code. All other exceptions propagate."""
    try:
        with interrupt_on_signals():
            return function()
    except FaBenchError as error:
        message, code = str(error), 2
    except OSError as error:
        message, code = write_failure(error), 2
    except KeyboardInterrupt as error:
        message, code = interrupted, exit_code_of(error)
    except Exception:
        raise
    except BaseException as error:  # raised by a plugin's class; errors of argparse and Hydra have been handled already
        kind = "sys.exit()" if isinstance(error, SystemExit) else "an error that is not an Exception"
        message, code = f"a plugin was terminated by {kind} ({describe_error(error, locate=True)})", 1
    parallel.current().report(printable(f"{program}: {message}"))
    return code


def _main(argv: list[str]) -> int:
    register_schemas()
    if "--version" in argv:
        print(f"fa-bench {__version__}")
        return 0
    arguments = _parse(argv)
    if arguments.hydra_help:
        return _run_hydra(["--hydra-help"])  # the config is not read, because it does not affect this text

    from fa_bench.command.compose import Composer

    overrides = [] if arguments.shell_completion else arguments.overrides
    name, folder = arguments.config_name or CONFIG_NAME, arguments.config_dir
    if arguments.help:
        from fa_bench.command.usage import usage

        print(usage(Composer(name, folder, [o for o in overrides if "=" in o]), [o for o in overrides if "=" not in o]))
        return 0
    if arguments.dry_run:
        from fa_bench.command.dry_run import dry_run

        print(dry_run(name, folder, overrides, arguments.multirun))
        return 0
    composer = Composer(name, folder, overrides)
    # Overrides are passed before flags, because a flag with an optional value would take a following override as its value.
    flags = list(argv)
    for override in arguments.overrides:
        flags.remove(override)
    if arguments.shell_completion:
        if not all(re.fullmatch(r"(install|uninstall|query)=(bash|zsh|fish)", word) for word in arguments.overrides or [""]):
            raise ConfigError("--shell-completion: pass install=bash (or zsh, fish), uninstall=bash or query=bash")
        os.environ.setdefault("COMP_LINE", "fa-bench ")
    if arguments.shell_completion or arguments.info:
        composer.compose([o.input_line or "" for o in composer.parsed if not o.is_sweep_override()])  # called for its checks
        return _run_hydra([*arguments.overrides, *flags])
    if arguments.cfg:
        # The job includes the options that an experiment sets for its rule.
        (job,) = composer.expand(multirun=False, instead="--cfg shows the config of one run; pass --dry-run -m instead")
        composer.compose(job)  # called for its checks
        return 2 if _run_hydra([*job, *flags]) else 0  # Hydra reports a --package that does not exist
    clear_cache()
    with hydra_errors():
        task = Task(["fa-bench", *arguments.overrides, *flags], owns_process=True)
        return sweep(composer, task) if arguments.multirun else run(composer, task)


def run(composer: Composer, task: Task) -> int:
    """Run one job and return the exit code."""
    from hydra.core.utils import run_job
    from hydra.types import RunMode

    from fa_bench.command.hydra_sections import check_sections
    from fa_bench.runs.logs import preserve_root_logger

    is_main = parallel.current().rank == 0
    [(_, directory)] = jobs = composer.check(composer.expand(multirun=False), directories=is_main)
    task.directories.append(directory)
    config = composer.config
    assert config is not None
    config.hydra.mode = RunMode.RUN
    check_sections(config)
    context = _context(composer, config)
    try:
        with _removed_if_empty(directory), preserve_root_logger():
            context.callbacks.on_run_start(config=config, config_name=composer.config_name)
            job_return = run_job(
                task_function=task, config=config, job_dir_key="hydra.run.dir", job_subdir_key=None, hydra_context=context
            )
            context.callbacks.on_run_end(config=config, config_name=composer.config_name, job_return=job_return)
    except KeyboardInterrupt as error:
        return report_interrupt(jobs, error)
    return job_return.return_value or (_print_result(directory) if is_main else 0)


def sweep(composer: Composer, task: Task) -> int:
    """Run a sweep with fa-bench's own Hydra sweeper and return the exit code."""
    from hydra.core.plugins import Plugins
    from hydra.types import RunMode

    from fa_bench.command.hydra_sections import check_sections, errors_named

    parallel.refuse("a sweep (-m)")
    config = composer.compose(mode=RunMode.MULTIRUN)
    config.hydra.mode = RunMode.MULTIRUN
    check_sections(config)
    context = _context(composer, config)
    with errors_named(config, "sweeper"):
        sweeper = Plugins.instance().instantiate_sweeper(config=config, hydra_context=context, task_function=task)
    context.callbacks.on_multirun_start(config=config, config_name=composer.config_name)
    code = sweeper.sweep([o.input_line or "" for o in composer.parsed if not o.is_hydra_override()])
    context.callbacks.on_multirun_end(config=config, config_name=composer.config_name)
    return code


def _context(composer: Composer, config: Any) -> Any:
    """The `HydraContext` that Hydra passes to sweepers and jobs."""
    # The context needs the config's callbacks, and Hydra has no public API for creating them.
    from hydra._internal.callbacks import Callbacks
    from hydra.types import HydraContext

    from fa_bench.command.hydra_sections import errors_named

    with errors_named(config, "callbacks"):
        return HydraContext(config_loader=composer.loader, callbacks=Callbacks(config))


def _parse(argv: list[str]) -> Any:
    # Hydra declares its flags only in this private function.
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.add_argument("--dry-run", action="store_true", help="show what would run; train and write nothing")

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{message}; see fa-bench --help")

    parser.error = refuse  # type: ignore[method-assign]
    # If abbreviations were allowed, --experiment=quickstart would be read as Hydra's flag --experimental-rerun.
    parser.allow_abbrev = False
    arguments, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        override = unknown[0].lstrip("-")
        hint = f"; did you mean '{override}'?" if "=" in override else ""
        refuse(f"{unknown[0]}: no such flag{hint}")
    for flag, given, instead in (
        ("--config-path", arguments.config_path, "add a folder of configs with --config-dir"),
        ("--experimental-rerun", arguments.experimental_rerun, "pass the run's options again"),
    ):
        if given is not None:
            refuse(f"{flag}: not supported; {instead}")
    modes = [
        flag
        for flag, given in (
            ("--multirun", arguments.multirun),
            ("--run", arguments.run),
            ("--cfg", arguments.cfg),
            ("--info", arguments.info),
            ("--shell-completion", arguments.shell_completion),
        )
        if given
    ]
    if arguments.dry_run:  # compatible with --multirun
        modes = ["--dry-run", *(mode for mode in modes if mode != "--multirun")]
    if len(modes) > 1:
        refuse(f"{' and '.join(modes)} cannot be used together")
    for flag, given in (("--resolve", arguments.resolve), ("--package", arguments.package)):
        if given and not arguments.cfg:
            refuse(f"{flag} requires --cfg")
    return arguments


@contextmanager
def hydra_errors() -> Iterator[None]:
    """Convert exceptions raised within Hydra to errors that are reported in one line. With HYDRA_FULL_ERROR=1, only errors of the
    operating system are converted, and all other exceptions keep their traceback."""
    try:
        yield
    except FaBenchError:
        raise
    except OSError as error:
        raise RunDirectoryError(write_failure(error)) from None
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        raise ConfigError(f"Hydra failed ({describe_error(error)}); set HYDRA_FULL_ERROR=1 for the traceback") from None


def _run_hydra(argv: list[str]) -> int:
    """Run Hydra's command line, which prints configs, information or completions, and return its exit code."""
    from fa_bench.runs.logs import preserve_root_logger

    argv_before, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = ["fa-bench", *argv], "1"  # Hydra then raises its errors
    try:
        with preserve_root_logger():
            hydra.main(config_path=str(conf_dir()), config_name=CONFIG_NAME, version_base="1.3")(Task([]))()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    finally:
        sys.argv = argv_before
        os.environ.pop("HYDRA_FULL_ERROR")
        os.environ |= {} if full_error is None else {"HYDRA_FULL_ERROR": full_error}
    return 0


@contextmanager
def _removed_if_empty(directory: Path) -> Iterator[None]:
    """On exit from the block, remove the run directory and its parents if they were created within the block and are empty, for
    example because the run did not start."""
    missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        yield
    finally:
        with suppress(OSError):  # not empty
            for folder in missing:
                folder.rmdir()


def _print_result(directory: Path) -> int:
    from fa_bench.report.runs import read_run
    from fa_bench.report.states import STOPPED, describe_status, rise_note
    from fa_bench.runs.schemas import SUCCESSES

    run = read_run(directory)
    if run is None:
        return 1
    status = describe_status(run) if run.result["status"] == STOPPED else run.result["status"]
    print(
        f"{printable(status)}: {run.test_score or f'no test {run.primary.title}'}, "
        f"{run.result.get('seconds') or 0:.1f} s of training; run directory: {printable(directory)}"
    )
    if note := rise_note({run.result["seed"]: run}):
        print(printable(f"note: {note}"))
    return 0 if run.result["status"] in SUCCESSES else 1


if __name__ == "__main__":
    sys.exit(main())
