"""What a report lacks: runs that did not end well, seeds that only some rows have, published rows that no run answers to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from fa_bench.report.groups import finished_by_seed, group_labels, group_runs, tasks
from fa_bench.report.published import Entry
from fa_bench.report.runs import Run, place
from fa_bench.report.states import ending
from fa_bench.runs.sweep import PlannedRun
from fa_bench.utils.files import RESULT, resolved


def not_finished(runs: Sequence[Run]) -> list[str]:
    """A line for each run that diverged, failed, was interrupted or is still running: how far it came, and its reason."""
    labels = group_labels(group_runs(runs))
    return [f"{labels[run.row]} seed {run.result['seed']}: {ending(run)}"
            f"{'' if (run.directory / RESULT).is_file() else f', no {RESULT}'} ({place(run.directory)})"
            for run in runs if not run.finished]


def not_begun(directories: Iterable[Path], planned: Iterable[PlannedRun]) -> list[str]:
    """A line for each run that a grid announced and that has no record yet."""
    called = {resolved(run.directory): run.label for run in planned}
    found = ((called.get(resolved(directory)), place(directory)) for directory in directories)
    return [f"{name}: not begun ({where})" if name else f"not begun ({where})" for name, where in found]


def missing_seeds(runs: Sequence[Run]) -> list[str]:
    """A line for each row that lacks finished runs of seeds which another row of its task has."""
    lines = []
    labels = group_labels(group_runs(runs))
    for groups in tasks(group_runs(runs)).values():
        seeds = {group: set(finished_by_seed(members)) for group, members in groups.items()}
        every = set().union(*seeds.values())
        lines += [f"{labels[group]}: no finished run of seed {', '.join(map(str, sorted(every - own)))}"
                  for group, own in seeds.items() if every - own]
    return lines


def unanswered(entries: Iterable[Entry], runs: Sequence[Run]) -> list[str]:
    """A line for each published row of the runs' presets that no finished run answers to."""
    presets = {run.preset for run in runs}
    finished = [run for run in runs if run.finished]
    of_presets = [entry for entry in entries if presets & set(entry.presets)]
    answered = {_cell(entry) for entry in of_presets if any(entry.answers(run) and _reached(entry, run) for run in finished)}
    return list(dict.fromkeys(_cell(entry) for entry in of_presets if _cell(entry) not in answered))


def _reached(entry: Entry, run: Run) -> bool:
    return entry.at is None or any(line["epoch"] == entry.at for line in run.metrics)


def _cell(entry: Entry) -> str:
    options = " ".join(f"{key}={value}" for key, value in entry.where.items() if key.startswith("algorithm."))
    rule = f"{entry.rule} {options}".strip()
    where = ", ".join(filter(None, (entry.dataset, entry.architecture)))
    return f"{rule}: {entry.source}{f', {entry.row}' if entry.row else ''} ({where})"
