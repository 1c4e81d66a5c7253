"""Run jobs and hyperparameter searches from Python, for use in notebooks and scripts."""

from __future__ import annotations

import numbers
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fa_bench.errors import ConfigError, FaBenchError, OptionError, format_value, truncate
from fa_bench.report.runs import Run, read_run
from fa_bench.utils.shell import hydra_quote

if TYPE_CHECKING:
    from fa_bench.tuning.tune import TuneResult


def run(*overrides: str, config_dir: str | os.PathLike[str] | None = None, **options: Any) -> list[Run]:
    """Run the jobs that ``fa-bench`` would run with these arguments, in the same directories.

    Args:
        *overrides: as on the command line, such as ``"algorithm=bp,fa"`` or ``"optimizer.lr=0.1"``. A sweep needs no ``-m``.
        config_dir: a folder of additional configs, as with ``--config-dir``.
        **options: overrides as keywords, such as ``seed=0``; pass a key with a dot as ``**{"optimizer.lr": 0.1}``. A list, a
            range or an array is a sweep: ``seed=[0, 1, 2]``; a list within it is one value: ``probes=[["readout"]]``.

    Returns:
        The runs in the order of the jobs, each with its directory, its result, its config, and the metrics of every epoch. A run
        that fails or diverges raises no exception, apart from those below; check ``run.finished`` and ``run.result["status"]``.
        After a failure, the file ``run.log`` in the run's directory contains the traceback. Runs without a result, such as those
        that ``on_error=stop`` skipped, are omitted. Finished runs are not trained again.

    Raises:
        FaBenchError: for invalid input, before any training. A call that is not a sweep also raises such an error if the run
            encounters it during training, for example because the disk is full.
        KeyboardInterrupt: after a signal; the same call resumes.

    Examples:
        >>> import fa_bench
        >>> runs = fa_bench.run("dataset=synthetic", "scale=smoke", algorithm=["bp", "fa"], seed=[0])
        Running 2 jobs...
        >>> [(run.result["algorithm"], run.finished) for run in runs]
        [('bp', True), ('fa', True)]
    """
    from fa_bench import cli
    from fa_bench.command.compose import Composer
    from fa_bench.command.jobs import Task
    from fa_bench.config.job import register_schemas
    from fa_bench.runs import parallel
    from fa_bench.runs.hashes import clear_cache
    from fa_bench.utils.output import resilient_output
    from fa_bench.utils.stopping import interrupt_on_signals

    arguments = _arguments("run", overrides, options)
    parallel.refuse("fa_bench.run")
    register_schemas()
    with resilient_output(), interrupt_on_signals(), cli.hydra_errors(), _sweeps_explained(options):
        composer = Composer(cli.CONFIG_NAME, None if config_dir is None else str(config_dir), arguments)
        is_sweep = any(override.is_sweep_override() or override.key_or_group == "experiment" for override in composer.parsed)
        clear_cache()
        errors: list[FaBenchError] = []
        # Errors in the jobs of a sweep are printed and recorded, but not raised.
        task = Task(["fa-bench", *(["-m"] if is_sweep else []), *arguments], errors=None if is_sweep else errors)
        code = cli.sweep(composer, task) if is_sweep else cli.run(composer, task)
        for error in errors:
            raise error
    if code >= 128:
        raise KeyboardInterrupt
    return [run for run in map(read_run, task.directories) if run is not None]


def tune(*overrides: str, config_dir: str | os.PathLike[str] | None = None, **options: Any) -> TuneResult:
    """Run the study that ``fa-bench-tune`` would run with these arguments, in the same directory.

    Args:
        *overrides: as on the command line, such as ``"algorithm=bp,fa"`` or ``"optimizer.lr=tag(log,interval(1e-3,1))"``.
        config_dir: a folder of additional configs, as with ``--config-dir``.
        **options: overrides as keywords, such as ``budget=20`` or ``seeds=[0, 1, 2]``; pass a key with a dot as
            ``**{"optimizer.lr": [0.1, 0.01]}``, where a list holds the values to choose from. With ``jobs`` above 1, a script
            must call this function under ``if __name__ == "__main__":``, because the function starts processes.

    Returns:
        The study, which prints as its table. Its attribute `table` is a data frame with one row per rule, `trials` is a data
        frame with one row per trial, and `directory` is the study's folder.

    Raises:
        FaBenchError: for invalid input, before any training; later, if a file cannot be read or written or a worker process ends
            unexpectedly.
        KeyboardInterrupt: after a signal; the same call resumes.

    Examples:
        >>> import fa_bench
        >>> study = fa_bench.tune("dataset=synthetic", "scale=smoke", algorithm=["bp", "fa"], budget=1, seeds=[0])
        Tuning 2 rules...
        >>> list(study.table["rule"])
        ['bp', 'fa']
    """
    from fa_bench.config.job import register_schemas
    from fa_bench.runs.hashes import clear_cache
    from fa_bench.tuning.tune import tune as run_study
    from fa_bench.utils.output import resilient_output
    from fa_bench.utils.stopping import interrupt_on_signals

    arguments = _arguments("tune", overrides, options)
    register_schemas()
    clear_cache()
    with resilient_output(), interrupt_on_signals(), _sweeps_explained(options):
        return run_study(arguments, None if config_dir is None else str(config_dir))


def _arguments(function: str, overrides: Sequence[Any], options: Mapping[str, Any]) -> list[str]:
    """Convert the arguments of a call to command-line overrides.

    Raises:
        ConfigError: if an override is a flag or not a string, or if a value cannot be written on the command line.
    """
    for each in overrides:
        if not isinstance(each, str):
            star = "**" if isinstance(each, Mapping) else "*" if isinstance(each, (list, tuple)) else ""
            hint = f"; unpack it: fa_bench.{function}({star}{truncate(repr(each), 200)})" if star else ""
            raise ConfigError(f"{truncate(repr(each), 200)} is not an override (a string such as 'seed=0'){hint}")
        if each.startswith("-"):
            raise ConfigError(f"{each}: fa_bench.{function} accepts no flags; omit -m, and pass --config-dir as config_dir=")
    return [*overrides, *(f"{key}={_sweep(key, value)}" for key, value in options.items())]


def _sweep(key: str, value: Any) -> str:
    if hasattr(value, "tolist"):  # arrays of NumPy, pandas and torch
        value = value.tolist()
    if not isinstance(value, (list, tuple, range)):
        return _value(key, value)
    if not value:
        raise ConfigError(f"{key}={value!r} is a sweep without values; for a value that is an empty list, {_nested(key, value)}")
    return ",".join(_value(key, each) for each in value)


def _value(key: str, value: Any) -> str:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(_value(key, each) for each in value)}]"
    if isinstance(value, os.PathLike):
        return hydra_quote(str(os.fspath(value)))
    if value is None or isinstance(value, (str, numbers.Real)):
        return format_value(value)
    hint = "; pass a list" if isinstance(value, (set, frozenset)) else ""
    if isinstance(value, Mapping):
        hint = f"; pass its keys one by one: **{ ({f'{key}.{name}': each for name, each in value.items()})!r}"
    raise ConfigError(
        f"{key}={truncate(repr(value), 200)}: {type(value).__name__} is not an allowed type "
        f"(allowed: a string, a number, True, False, None, a path, a list of these){hint}"
    )


@contextmanager
def _sweeps_explained(options: Mapping[str, Any]) -> Iterator[None]:
    """Replace the error raised when a list is passed for a list-valued option. The new error explains that a list is a sweep, and
    shows how to pass the list as a single value."""
    try:
        yield
    except OptionError as error:
        value = options.get(error.path)
        if not isinstance(value, (list, tuple)) or not re.search(r"is not .*\ba list\b", error.problem):
            raise
        raise OptionError(
            error.path, f"={value!r} is a sweep; for one value that is a list, {_nested(error.path, value)}"
        ) from None


def _nested(key: str, value: Any) -> str:
    """A hint that shows how to pass a list as a single value."""
    return f"pass **{{{key!r}: {[value]!r}}}" if "." in key else f"pass {key}={[value]!r}"
