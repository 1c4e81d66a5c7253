"""The command line as a function, for notebooks and scripts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fa_bench.errors import format_value
from fa_bench.report.runs import Run, read_run

if TYPE_CHECKING:
    from fa_bench.tuning.tune import TuneResult


def run(*overrides: str, config_dir: str | os.PathLike[str] | None = None, **options: Any) -> list[Run]:
    """Run what ``fa-bench`` with the same arguments would run, in the same directories.

    Args:
        *overrides: as on the command line, such as ``"algorithm=bp,fa"`` or ``"optimizer.lr=0.1"``.
        config_dir: a folder of additional configs, as ``--config-dir``.
        **options: keys without a dot, such as ``seed=0``; a list is a sweep: ``seed=[0, 1, 2]``.

    Returns:
        The runs in the order of the jobs, each with its directory, result, config and metrics of every epoch. Runs without a
        result are omitted; ``result["status"]`` shows which failed, diverged or were stopped. Finished runs are not trained
        again.

    Raises:
        FaBenchError: for invalid input, before any training.
        KeyboardInterrupt: after a signal; the same call resumes.
    """
    from fa_bench import cli
    from fa_bench.command.compose import Composer
    from fa_bench.command.jobs import Task
    from fa_bench.config.job import register_schemas
    from fa_bench.runs.hashes import clear_cache
    from fa_bench.utils.output import resilient_output
    from fa_bench.utils.stopping import interrupt_on_signals

    register_schemas()
    arguments = [*overrides, *_as_overrides(options)]
    with resilient_output(), interrupt_on_signals(), cli.hydra_errors():
        composer = Composer(cli.CONFIG_NAME, None if config_dir is None else str(config_dir), arguments)
        is_sweep = any(override.is_sweep_override() or override.key_or_group == "experiment" for override in composer.parsed)
        clear_cache()
        task = Task(["fa-bench", *(["-m"] if is_sweep else []), *arguments])
        code = cli.sweep(composer, task) if is_sweep else cli.run(composer, task)
    if code >= 128:
        raise KeyboardInterrupt
    return [run for run in map(read_run, task.directories) if run is not None]


def tune(*overrides: str, config_dir: str | os.PathLike[str] | None = None, **options: Any) -> TuneResult:
    """Tune what ``fa-bench-tune`` with the same arguments would tune, in the same directories.

    Args:
        *overrides: as on the command line, such as ``"algorithm=bp,fa"`` or ``"optimizer.lr=tag(log,interval(1e-3,1))"``.
        config_dir: a folder of additional configs, as ``--config-dir``.
        **options: keys without a dot, such as ``budget=20`` or ``seeds=[0, 1, 2]``. With ``jobs`` above 1, call this only under
            ``if __name__ == "__main__":`` in a script, since processes are started.

    Returns:
        The study: `table` has one row a rule and `trials` one row a trial, as data frames; `directory` is the study's folder.

    Raises:
        FaBenchError: for invalid input, before any training.
        KeyboardInterrupt: after a signal; the same call resumes.
    """
    from fa_bench.config.job import register_schemas
    from fa_bench.runs.hashes import clear_cache
    from fa_bench.tuning.tune import tune as run_study
    from fa_bench.utils.output import resilient_output
    from fa_bench.utils.stopping import interrupt_on_signals

    register_schemas()
    clear_cache()
    with resilient_output(), interrupt_on_signals():
        return run_study([*overrides, *_as_overrides(options)], None if config_dir is None else str(config_dir))


def _as_overrides(options: Mapping[str, Any]) -> list[str]:
    return [f"{key}={','.join(map(format_value, value if isinstance(value, (list, tuple, range)) else [value]))}"
            for key, value in options.items()]
