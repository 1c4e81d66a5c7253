"""The runs that a grid is to run, as it says before the first one starts: sweep.json in the directory that they share."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from filelock import Timeout

from fa_bench.errors import RunDirectoryError
from fa_bench.runs.readers import RecordError, read_planned
from fa_bench.utils.files import check_half_written, dump_json, resolved, write_text
from fa_bench.utils.locks import PATIENCE, locked

SWEEP, SWEEP_LOCK = "sweep.json", ".sweep.json.lock"
#: A run lies this many folders below what its grid has in common, at most: preset, rule, seed.
DEPTH = 3


class Planned(NamedTuple):
    """One run of a grid: its directory, what it is called, and the epochs that it is to train."""

    directory: Path
    label: str
    epochs: int


def write_sweep(folder: Path, command: Sequence[str], runs: Iterable[Planned]) -> None:
    """Enter `runs` into the sweep.json of `folder`, which is made where it is not there; the file is replaced in one step.

    Runs that an earlier grid entered stay; one with the same directory keeps its place and takes the new label and epochs.
    `command` is the latest. Sweeps that share a folder take turns.

    Raises:
        RunDirectoryError: the folder or the file cannot be written, or a file of that name is not one of fa_bench, which is left
            as it is.
    """
    path = Path(folder) / SWEEP
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(SWEEP_LOCK)):
            check_half_written(path, b'{\n "command"')
            known = read_sweep(path)
            # Normalised, so that a run is known again whatever its directory was called from.
            merged = {os.path.relpath(run.directory, folder): run for run in (*known, *runs)}
            listed = [{"directory": directory, "label": run.label, "epochs": run.epochs} for directory, run in merged.items()]
            write_text(path, dump_json({"command": list(command), "runs": listed}, indent=1) + "\n")
    except RecordError as error:
        raise RunDirectoryError(f"{error}; move it away") from None
    except RunDirectoryError:
        raise
    except Timeout:
        raise RunDirectoryError(f"{path}: another sweep has been writing it for {PATIENCE:g} s; try again") from None
    except OSError as error:
        raise RunDirectoryError(f"{path}: cannot be written: {error}") from error


def read_sweep(path: Path) -> list[Planned]:
    """The runs that the sweep.json at `path` lists, in its order; none where there is no such file.

    Raises:
        RecordError: it cannot be read, or is not one of fa_bench.
    """
    if path.is_symlink():
        raise RecordError(path, "a link; fa-bench follows none there")
    return [Planned(path.parent / run["directory"], run["label"], run["epochs"]) for run in read_planned(path)]


def find_planned(folders: Iterable[Path], faults: list[RecordError]) -> list[Planned]:
    """The runs at and below `folders` that sweep.json files list, each once: files at, below and up to three folders above.

    Files that cannot be read, or are not of fa_bench, are left out and added to `faults`.
    """
    found: dict[Path, Planned] = {}
    for folder in map(Path, folders):
        whole = resolved(folder)
        for path in (*sorted(folder.rglob(SWEEP)), *(above / SWEEP for above in list(whole.parents)[:DEPTH])):
            try:
                listed = read_sweep(path)
            except RecordError as error:
                if error.path not in [known.path for known in faults]:
                    faults.append(error)
                continue
            for run in listed:
                place = resolved(run.directory)
                if whole == place or whole in place.parents:
                    found.setdefault(place, run._replace(directory=folder / place.relative_to(whole)))
    return list(found.values())
