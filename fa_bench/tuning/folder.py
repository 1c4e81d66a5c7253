"""The folder of a study, with checks that it belongs to the study and contains only files that a study wrote."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fa_bench.config.job import Job
from fa_bench.config.labels import flatten, result_options
from fa_bench.errors import ConfigError, RunDirectoryError, format_value, names, truncate
from fa_bench.runs.hashes import code_hash
from fa_bench.runs.locks import lock_directory
from fa_bench.runs.ownership import HOLDER, IGNORED, LOCK
from fa_bench.tuning.plan import TRIALS, Plan
from fa_bench.tuning.store import JOURNAL
from fa_bench.utils.files import dump_json, temporary_name, write_text

#: The file that describes the study and marks the folder as that of a study.
STUDY = "tune.json"
#: The folder of the experiment's file, and the name of the experiment, which is also the name of the folder of the final runs.
EXPERIMENT, FINAL = "experiment", "tuned"
#: Tables and figures.
MARKDOWN, TABLE, TRIAL_TABLE, SECONDS, FIGURE, VECTOR = (
    "tune.md",
    "tune.csv",
    "trials.csv",
    "trial_seconds.csv",
    "tune.png",
    "tune.svg",
)
REPORTS = (MARKDOWN, TABLE, TRIAL_TABLE, SECONDS, FIGURE, VECTOR)
_FILES = (STUDY, JOURNAL, *REPORTS)
_FOLDERS = (TRIALS, EXPERIMENT, FINAL)
#: Files that may be left by a process that was killed before it wrote `STUDY`.
_EARLY = (LOCK, HOLDER, temporary_name(HOLDER), temporary_name(STUDY))


def identity(plan: Plan, data_hash: str) -> dict[str, Any]:
    """Everything that the trials of a study depend on. The budget and the options of the final runs are not included, because
    they may change."""
    import optuna

    options = plan.options
    plugins = [module for each in plan.rules for module in each.job.run.plugins]
    classes = [cls for each in plan.rules for cls in each.job.own_classes]
    return {
        "tune_seeds": options.trial_seeds,
        "sampler": options.sampler,
        "pruner": options.pruner,
        "study_seed": options.study_seed,
        "experiment": plan.experiment,
        "code": code_hash(plugins, dict.fromkeys(classes)),
        "data": data_hash,
        "optuna": optuna.__version__,
        "rules": {
            each.rule: {"space": {key: one.text for key, one in each.space.items()}, "config": _config(each.job)}
            for each in plan.rules
        },
    }


def _config(job: Job) -> dict[str, Any]:
    return {key: value for key, value in sorted(result_options(flatten(job.plain())).items())}


@contextmanager
def study_folder(plan: Plan, study: Mapping[str, Any]) -> Iterator[None]:
    """Hold the lock on a study's folder while the block runs. The folder is created if it does not exist.

    Args:
        plan: the plan of the study.
        study: its `identity`.

    Raises:
        RunDirectoryError: as in `check_folder`.
        DirectoryLockedError: if another process holds the lock.
    """
    check_folder(plan.directory, study)
    with lock_directory(plan.directory):
        check_folder(plan.directory, study)  # again, as it may have changed before it was locked
        if not (plan.directory / STUDY).exists():
            write_text(plan.directory / STUDY, dump_json({"study": study}, indent=1) + "\n")
        yield


def check_folder(directory: Path, study: Mapping[str, Any]) -> None:
    """Refuse a folder that belongs to another study or that contains files that no study wrote.

    Raises:
        RunDirectoryError: if the folder is refused; the message names the key that differs, with both values, or the files.
    """
    if not directory.is_dir():
        return
    path = directory / STUDY
    is_study = os.path.lexists(path)
    known = {*_FILES, *_FOLDERS, *map(temporary_name, _FILES), *_EARLY} if is_study else {*_EARLY}
    foreign = sorted(name for name in os.listdir(directory) if name not in known and not IGNORED.fullmatch(name))
    if foreign:
        listed = names(map(repr, foreign[:3])) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise RunDirectoryError(
            f"{directory}: contains {listed}, which no study wrote; choose another name=NAME, or move foreign files elsewhere"
        )
    for name in (*_FILES, *_FOLDERS):
        if os.path.lexists(directory / name):
            mode, is_folder = (directory / name).lstat().st_mode, name in _FOLDERS
            if not (stat.S_ISDIR(mode) if is_folder else stat.S_ISREG(mode)):
                raise RunDirectoryError(
                    f"{directory / name}: not a {'folder' if is_folder else 'file'} that a study wrote; choose another name=NAME"
                )
    if is_study and (difference := _difference(stored := _read(path), study)):
        mend = "choose another name=NAME"
        if difference.startswith("tune_seeds="):  # if tune_seeds is a number, these seeds follow the largest of `seeds`
            seeds = truncate(format_value(stored.get("tune_seeds")), 80)
            mend += f", or pass tune_seeds={seeds} and other seeds=... to keep its trials"
        raise RunDirectoryError(f"{directory}: belongs to another study ({difference}); {mend}")


def _read(path: Path) -> dict[str, Any]:
    try:
        study = json.loads(path.read_bytes())["study"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        study = None
    if not isinstance(study, dict):
        raise RunDirectoryError(f"{path}: not the description of a study; choose another name=NAME")
    return study


def _difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The first key in which two studies differ, with both values; empty if the studies are equal."""
    before, now = there.get("rules"), here.get("rules")
    if isinstance(before, dict) and isinstance(now, dict) and (added := [rule for rule in now if rule not in before]):
        return f"of {names(before)}, to which {names(added)} cannot be added"
    old, new = flatten(there), flatten(json.loads(dump_json(here)))
    # Keys that the user chose are compared before the hashes of code and data and the version of optuna.
    order = [*new, *(key for key in old if key not in new)]
    late = ("code", "data", "optuna")
    for key in sorted(order, key=lambda key: (key in late, order.index(key))):
        if old.get(key) != new.get(key) or (key in old) != (key in new):
            values = [truncate(format_value(side[key]), 80) if key in side else "none" for side in (old, new)]
            return f"{_readable(key)}={values[0]} there, {values[1]} here"
    return ""


def _readable(key: str) -> str:
    """A key of the description as users know it, for example ``fa: optimizer.lr`` for ``rules.fa.space.optimizer.lr``."""
    parts = key.split(".", 3)
    return f"{parts[1]}: {parts[3]}" if parts[0] == "rules" and len(parts) == 4 else key


def check_budget(budget: int, done: Mapping[str, int], directory: Path) -> None:
    """Refuse a budget that is smaller than the number of finished trials.

    Raises:
        ConfigError: if the budget is too small; the message names the rule.
    """
    for rule, count in done.items():
        if count > budget:
            raise ConfigError(
                f"budget={budget}: {directory} has {count} finished trials of {rule}; pass budget={count} or more, "
                "or choose another name=NAME"
            )
