"""What a report lacks: runs that did not end well, seeds that only some rows have, published rows that no run answers to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from fa_bench.files import RESULT
from fa_bench.report.groups import finished_by_seed, group_labels, group_runs, tasks
from fa_bench.report.published import Entry
from fa_bench.report.runs import Run, place, read_config, read_metrics


def without_result(directories: Iterable[Path]) -> list[str]:
    """A line for each run directory that holds no result: whose run it is, and how far it came."""
    return sorted(_unended(Path(directory)) for directory in directories)


def _unended(directory: Path) -> str:
    config, metrics = read_config(directory), read_metrics(directory)
    of = f" of {config['epochs']}" if "epochs" in config else ""
    whose = f"{config['algorithm']} seed {config.get('seed')}: " if "algorithm" in config else ""
    return f"{whose}no {RESULT}, {metrics[-1]['epoch'] if metrics else 0}{of} epochs done ({place(directory)})"


def not_finished(runs: Sequence[Run]) -> list[str]:
    """A line for each run that failed, diverged or was interrupted, with the reason that it recorded."""
    labels = group_labels(group_runs(runs))
    lines = []
    for run in runs:
        if not run.finished:
            error = run.result.get("error") or {}
            reason = ": ".join(str(error[key]).splitlines()[0] for key in ("type", "message") if error.get(key))
            of = f" of {run.result['epochs']}" if run.result.get("epochs") else ""
            lines.append(f"{labels[run.result['group']]} seed {run.result['seed']}: {run.result['status']} after "
                         f"{len(run.metrics)}{of} epochs{f', {reason}' if reason else ''} ({place(run.directory)})")
    return lines


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
