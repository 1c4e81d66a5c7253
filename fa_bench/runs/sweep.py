"""The file sweep.json lists the runs of a sweep. The sweep writes it to the common directory of the runs before the first run
starts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from filelock import Timeout

from fa_bench.errors import RunDirectoryError
from fa_bench.runs.checked_json import RecordError
from fa_bench.runs.readers import PlannedRun, read_sweep
from fa_bench.utils.files import check_temporary, dump_json, output_errors, resolved, write_text
from fa_bench.utils.locks import PATIENCE, locked

SWEEP, SWEEP_LOCK = "sweep.json", ".sweep.json.lock"
#: The maximum depth of a run directory below the common directory of its sweep (experiment, rule, seed).
DEPTH = 3


def write_sweep(folder: Path, command: Sequence[str], runs: Iterable[PlannedRun]) -> None:
    """Add `runs` to the sweep.json of `folder`, which is created if it does not exist; the file is replaced atomically.

    Runs of earlier sweeps are kept, except that a run with the same directory is replaced. The `command` is also replaced.

    Raises:
        RunDirectoryError: another sweep holds the file's lock, or fa_bench did not write the file, which is left unchanged.
        OutputError: the folder or the file cannot be written.
    """
    path = Path(folder) / SWEEP
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with locked(path.with_name(SWEEP_LOCK)):
                check_temporary(path, b'{\n "command"')
                # Runs are compared by normalised directories, so that they are recognised from any working directory.
                merged = {os.path.relpath(run.directory, folder): run for run in (*read_sweep(path), *runs)}
                listed = [{**run._asdict(), "directory": directory} for directory, run in merged.items()]
                write_text(path, dump_json({"command": list(command), "runs": listed}, indent=1) + "\n")
        except RecordError as error:
            raise RunDirectoryError(f"{error}; move it elsewhere") from None
        except Timeout:
            raise RunDirectoryError(f"{path}: locked by another sweep for {PATIENCE:g} s; try again") from None


def find_planned_runs(folders: Iterable[Path], faults: list[RecordError]) -> list[PlannedRun]:
    """The distinct runs in `folders` and their subfolders that sweep.json files list. These files may be in the folders or their
    subfolders, or up to three levels above the folders.

    Files that cannot be read or were not written by fa_bench are skipped, and their errors are added to `faults`.
    """
    planned: dict[Path, PlannedRun] = {}
    for folder in map(Path, folders):
        root = resolved(folder)
        for path in (*sorted(folder.rglob(SWEEP)), *(parent / SWEEP for parent in list(root.parents)[:DEPTH])):
            try:
                runs = read_sweep(path)
            except RecordError as error:
                if error.path not in [fault.path for fault in faults]:
                    faults.append(error)
                continue
            for run in runs:
                run_dir = resolved(run.directory)
                if run_dir.is_relative_to(root):
                    planned.setdefault(run_dir, run._replace(directory=folder / run_dir.relative_to(root)))
    return list(planned.values())
