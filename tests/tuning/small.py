"""A study that takes seconds, with two rules and, for each of them, three trials of two epochs on synthetic data."""

from __future__ import annotations

from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

SMALL = [
    "algorithm=bp,frozen",
    "dataset=synthetic",
    "dataset.samples=192",
    "dataset.test_samples=64",
    "dataset.validation=0.3",
    "architecture.widths=[8]",
    "epochs=2",
    "batch_size=16",
    "probe_every=0",
    "probe_size=8",
    "loggers=[]",
    "threads=1",
]
STUDY = [*SMALL, "budget=3", "seeds=0,1", "name=study"]
#: Files that are bitwise identical, no matter how often a study was killed.
EQUAL = ("tune.csv", "trials.csv", "tune.md", "tune.png", "tune.svg")


def stored_trials(folder: Path) -> dict[str, list[optuna.trial.FrozenTrial]]:
    """The trials of every rule, as optuna reads them."""
    storage = JournalStorage(JournalFileBackend(str(folder / "study.journal")))
    return {name: optuna.load_study(study_name=name, storage=storage).trials for name in optuna.get_all_study_names(storage)}


def files(folder: Path) -> dict[str, bytes]:
    """The contents of the files in `EQUAL`."""
    return {name: (folder / name).read_bytes() for name in EQUAL}
