"""The command line: check every job, hand them to Hydra, compare what came out."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import hydra
from omegaconf import DictConfig

from fa_bench import __version__
from fa_bench.command.clock import STARTED
from fa_bench.config.job import Job, conf_dir, register_schemas
from fa_bench.config.labels import differing, flat, label, plan
from fa_bench.config.plugins import blame
from fa_bench.config.scale import scaled
from fa_bench.errors import ConfigError, FaBenchError, HeldError, RunDirectoryError, first_line, printable
from fa_bench.files import LOG, cannot_write
from fa_bench.output import exit_code, steady
from fa_bench.runs.data_checks import forget
from fa_bench.runs.locks import holder
from fa_bench.runs.parent import end_with
from fa_bench.runs.rundir import RunDirectory, Stage
from fa_bench.runs.stopping import Interrupted, raised
from fa_bench.runs.sweep import Planned, write_sweep

if TYPE_CHECKING:
    from fa_bench.command.compose import Composer

CONFIG_NAME = "config"
#: The epochs of each job of a grid, the number of the first job of its present part, the keys in which each rule's jobs
#: differ, a file that is there once a job has failed after which no other is to start, and the number of the process that
#: started the grid; also seen by jobs in other processes.
JOB_EPOCHS, JOB_FIRST, JOB_KEYS, JOB_FAILED = "FA_BENCH_EPOCHS", "FA_BENCH_FIRST", "FA_BENCH_KEYS", "FA_BENCH_FAILED"
JOB_STARTER = "FA_BENCH_STARTER"
#: Seconds that jobs in other processes are given to write their checkpoints.
FAREWELL = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``fa-bench``.

    Returns:
        The exit code: 0 where every run finished; 1 where one failed or diverged; 2 for input that cannot be run, with one
        or two lines on standard error; 130 after an interrupt (SIGINT), 143 after SIGTERM, 129 after SIGHUP.
    """
    return exit_code("fa-bench", lambda: _guarded(list(sys.argv[1:] if argv is None else argv)))


def _guarded(argv: list[str]) -> int:
    try:
        with raised(), _environment({STARTED: datetime.now().isoformat()}):
            return _main(argv)
    except FaBenchError as error:
        print(printable(f"fa-bench: {error}"), file=sys.stderr)
        return 2
    except OSError as error:
        print(printable(f"fa-bench: {cannot_write(error)}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print("fa-bench: interrupted", file=sys.stderr)
        return _code(error)
    except Exception:
        raise
    except BaseException as error:  # argparse and Hydra leave none: a plugin's class that is checked, built or measured
        by = "sys.exit()" if isinstance(error, SystemExit) else "an error that is no Exception"
        print(printable(f"fa-bench: ended by {by} ({blame(error)}), which is left to fa-bench"), file=sys.stderr)
        return 1


def _code(error: KeyboardInterrupt) -> int:
    return error.code if isinstance(error, Interrupted) else 130


def _main(argv: list[str]) -> int:
    register_schemas()
    if "--version" in argv:
        print(f"fa-bench {__version__}")
        return 0
    arguments = _parse(argv)
    # Overrides first: a flag with an optional value would take the one behind it.
    flags = _without(argv, arguments.overrides)
    argv = [*arguments.overrides, *flags]
    if arguments.dry_run and not arguments.help:
        from fa_bench.command.dry_run import dry_run

        print(dry_run(arguments.config_name or CONFIG_NAME, arguments.config_dir, arguments.overrides, arguments.multirun))
        return 0
    if arguments.hydra_help:
        return _hydra(["--hydra-help"])  # the same text whatever a config says

    from fa_bench.command.compose import Composer

    words = [] if arguments.shell_completion else arguments.overrides
    composer = Composer(arguments.config_name or CONFIG_NAME, arguments.config_dir, words)
    if arguments.shell_completion:
        if not all(re.fullmatch(r"(install|uninstall|query)=(bash|zsh|fish)", word) for word in arguments.overrides or [""]):
            raise ConfigError("--shell-completion: write install=bash (or zsh, fish), uninstall=bash or query=bash")
        os.environ.setdefault("COMP_LINE", "fa-bench ")
        composer.compose_once()
        return _hydra(argv)
    if arguments.help:
        from fa_bench.command.usage import usage

        print(usage(composer))
        return 0
    if arguments.info:
        composer.compose_once()
        return _hydra(argv)
    grid = composer.grid(arguments.multirun)
    if not arguments.multirun:
        argv = [*composer.sweeps[0][1], *flags]  # with what a preset gives to its rule
    if arguments.cfg:
        return 2 if _hydra(argv) else 0  # Hydra names a --package that is not there
    jobs = composer.check(grid)
    forget()
    try:
        return _run(jobs, composer, argv, flags, arguments.multirun)
    except KeyboardInterrupt as error:
        kept = any(RunDirectory(place, job).checkpoint.exists() for job, place in jobs)
        same = "the same command without resume=false" if any(job.run.resume is False for job, _ in jobs) else "the same command"
        print(f"fa-bench: interrupted; {f'checkpoint saved: rerun {same} to resume' if kept else 'no checkpoint yet'}",
              file=sys.stderr)
        return _code(error)


def _run(jobs: list[tuple[Job, Path]], composer: Composer, argv: list[str], flags: list[str], multirun: bool) -> int:
    if not multirun:
        with _empty_removed(jobs[0][1]):
            return _hydra(argv) or _report_single(jobs[0][1])
    from fa_bench.process import THREADS
    from fa_bench.report.own import check

    places = [place for _, place in jobs]
    folders = _folders(jobs)
    for folder in folders:
        check(folder)
    print(plan([job for job, _ in jobs], *folders), flush=True)
    print(_stages(jobs), end="", flush=True)
    keys = _differing([job for job, _ in jobs])
    for folder, members in folders.items():
        write_sweep(folder, ["fa-bench", *argv],
                    [Planned(place, _name(job, keys), scaled(job).run.epochs) for job, place in jobs if place in members])
    code = 0
    with tempfile.TemporaryDirectory() as scratch, raised(lambda number: _dismiss(places)), _environment({
        JOB_EPOCHS: json.dumps([scaled(job).run.epochs for job, _ in jobs]),
        JOB_KEYS: json.dumps(keys),
        JOB_FAILED: str(Path(scratch, "failed")),
        JOB_STARTER: str(os.getpid()),
        THREADS: str(_threads()),
    }):
        for first, sweep in composer.sweeps:
            with _environment({JOB_FIRST: str(first)}):
                code = _hydra([*sweep, *flags]) or code
    return max(_report_grid(members, folder) for folder, members in folders.items()) or code


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables that processes started within it see too."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _threads() -> int:
    """Threads that a run takes in this process, and so in others."""
    import torch

    return torch.get_num_threads()


def _stages(jobs: list[tuple[Job, Path]]) -> str:
    """A line on what an earlier start of the grid left, or nothing."""
    counts = Counter(RunDirectory(place, job).stage for job, place in jobs if job.run.resume is not False)
    left = [f"{counts[stage]} {stage.value}" for stage in (Stage.FINISHED, Stage.UNFINISHED, Stage.STALE) if counts[stage]]
    return f"  of these: {', '.join(left)}\n" if left else ""


def _dismiss(places: list[Path]) -> None:
    """Ask jobs in other processes of this machine to write their checkpoints, and wait for them."""
    until = time.monotonic() + FAREWELL
    asked: set[int] = set()
    while time.monotonic() < until:
        holders = [about for about in map(holder, places) if about and about.get("host") == platform.node()]
        others = {int(about["pid"]) for about in holders if about.get("pid") not in (None, os.getpid())}
        if not others:
            return
        for pid in others - asked:
            with suppress(OSError):
                os.kill(pid, signal.SIGTERM)
        asked |= others
        time.sleep(0.1)


def _parse(argv: list[str]) -> Any:
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
                                 ("--experimental-rerun", arguments.experimental_rerun, "give the run's options anew")):
        if given is not None:
            refuse(f"{flag}: no such flag here, {instead}")
    modes = [flag for flag, given in (("--multirun", arguments.multirun), ("--run", arguments.run), ("--cfg", arguments.cfg),
                                      ("--info", arguments.info), ("--shell-completion", arguments.shell_completion)) if given]
    if arguments.dry_run:  # of one run or of a grid: it goes with --multirun
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


def _hydra(argv: list[str]) -> int:
    """Let Hydra run the jobs; 0 unless Hydra itself gave up."""
    from fa_bench.runs.logs import root_kept

    before, sys.argv = sys.argv, ["fa-bench", *argv]
    traced = os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        # Hydra then hands its errors on instead of printing a traceback.
        with root_kept(), _environment({"HYDRA_FULL_ERROR": "1"}):
            hydra.main(config_path=str(conf_dir()), config_name=CONFIG_NAME, version_base="1.3")(_job)()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except FaBenchError:
        raise
    except OSError as error:
        raise RunDirectoryError(cannot_write(error)) from None
    except Exception as error:
        if traced:
            raise
        raise ConfigError(f"Hydra gave up ({type(error).__name__}: {first_line(error)}); "
                          "HYDRA_FULL_ERROR=1 shows where") from None
    finally:
        sys.argv = before
    return 0


def _job(config: DictConfig) -> None:
    """One job, called by Hydra; never raises in a grid, so that the others run."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if JOB_STARTER in os.environ:
        end_with(int(os.environ[JOB_STARTER]))
    register_schemas()  # a launcher may have put us into a process of our own
    from fa_bench.memory_limits import short
    from fa_bench.runs.logs import shown
    from fa_bench.runs.train import record_failure, run

    settings = HydraConfig.get()
    directory = Path(settings.runtime.output_dir)
    job = Job.from_config(config)
    experiment = settings.runtime.choices.get("experiment")
    alone = settings.mode != RunMode.MULTIRUN
    epochs = [] if alone else json.loads(os.environ.get(JOB_EPOCHS, "[]"))
    number = 0 if alone else int(os.environ.get(JOB_FIRST, "0")) + settings.job.num
    counted = "" if alone else f"[{number + 1}/{len(epochs) or '?'}] "
    keys = {} if alone else json.loads(os.environ.get(JOB_KEYS, "{}"))
    title = f"{counted}{_name(job, keys)}"
    failed = Path(os.environ[JOB_FAILED]) if JOB_FAILED in os.environ and job.run.on_error == "stop" else None
    if failed and failed.exists():
        print(f"fa-bench: {title} is left out: a job failed, on_error=stop", file=sys.stderr)
        return
    try:
        with steady(), shown(), raised():
            run(job, directory, title=title, experiment=experiment, later_epochs=sum(epochs[number + 1:]))
        return
    except HeldError as error:
        reason: BaseException = error
        logged = True
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a plugin raises, by sys.exit() too, ends its own job alone
        reason = error
        logged = (alone and isinstance(error, FaBenchError)) or _record(record_failure, job, directory, error, experiment)
    known = isinstance(reason, FaBenchError)
    where = f" (traceback: {directory / LOG})" if logged else f" (in {directory}, where no log can be written)"
    print(printable(f"fa-bench: {counted}{reason if known else f'failed: {short(reason)}{where}'}"), file=sys.stderr)
    if failed:
        failed.touch()
    if alone:
        sys.exit(2 if known else 1)


def _name(job: Job, keys: Mapping[str, Sequence[str]]) -> str:
    """What to call a job: its rule, the values of what the rule's jobs differ in, and its seed."""
    return f"{label(job.algorithm.name, flat(job.plain()), keys.get(job.algorithm.name, ()))} seed {job.run.seed}"


def _record(record_failure: Callable[..., None], *arguments: Any) -> bool:
    """Whether a failure could be recorded: on a full disk the other jobs must have their turn all the same."""
    try:
        record_failure(*arguments)
    except OSError:
        return False
    return True


def _differing(jobs: list[Job]) -> dict[str, list[str]]:
    """Rule -> the keys in which its jobs differ."""
    configs: dict[str, list[dict[str, Any]]] = {}
    for job in jobs:
        configs.setdefault(job.algorithm.name, []).append(flat(job.plain()))
    return {rule: differing(found) for rule, found in configs.items()}


@contextmanager
def _empty_removed(directory: Path) -> Iterator[None]:
    """Remove what is made for a run in it and stays empty, for the run never started: its directory and parents of that."""
    missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        yield
    finally:
        with suppress(OSError):  # something is in it
            for folder in missing:
                folder.rmdir()


def _report_single(directory: Path) -> int:
    from fa_bench.report.runs import read_run

    found = read_run(directory)
    if found is None:
        return 1
    result = found.result
    accuracy = "none" if result.get("test_accuracy") is None else f"{result['test_accuracy']:.2%}"
    seconds = result.get("seconds") or 0
    print(f"{result['status']}: test accuracy {accuracy}, {seconds:.1f} s of training, in {printable(directory)}")
    return 0 if found.finished else 1


def _report_grid(places: list[Path], folder: Path) -> int:
    from fa_bench.report import write_report

    written = write_report(places, folder)
    print(f"\n{written.text}\n\nreport: {printable(written.markdown)}\ncurves: {printable(written.figure)}")
    bad = {place: status for place in places if (status := _status(place)) != "finished"}
    for place, status in bad.items():
        print(printable(f"fa-bench: {status}: {place}"), file=sys.stderr)
    return 1 if bad else 0


def _status(place: Path) -> str:
    """How the run in a directory ended, in a word."""
    from fa_bench.records import RecordError
    from fa_bench.report.runs import read_run

    try:
        found = read_run(place)
    except RecordError:  # the report says what is wrong with it
        return "damaged record"
    return found.result["status"] if found else "no result"


def _folders(jobs: list[tuple[Job, Path]]) -> dict[Path, list[Path]]:
    """Where the list of a grid's runs and the report on them go: folder -> the directories of its runs.

    One folder for each `output_dir`, so that nothing is written beside those that somebody has chosen.
    """
    by_output: dict[str, list[Path]] = {}
    for job, place in jobs:
        by_output.setdefault(job.run.output_dir, []).append(place)
    folders: dict[Path, list[Path]] = {}
    for places in by_output.values():
        folders.setdefault(_common(places), []).extend(places)
    return folders


def _common(places: list[Path]) -> Path:
    common = Path(os.path.commonpath(places))
    return common.parent if len(places) == 1 else common


if __name__ == "__main__":
    sys.exit(main())
