"""The comparison table, with one row per group of runs that differ only in the seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from fa_bench.config.labels import differing_keys, short_key
from fa_bench.report.best import Chosen
from fa_bench.report.columns import COLUMNS, floor_column, metric_columns, score_columns
from fa_bench.report.cost import ENERGY, Costs
from fa_bench.report.groups import CONTROL, FLOOR, Groups, finished_by_seed, group_runs, is_floor, status_counts, tasks
from fa_bench.report.numbers import Paired, half_width, holm, known, mean, paired, std, value_range
from fa_bench.report.published import Entry, headline, matching_entries
from fa_bench.report.references import BEST, Reference, References
from fa_bench.report.runs import VERSIONS, Run, metrics_of
from fa_bench.report.states import describe_status, rise_note


def summarise(
    runs: Sequence[Run],
    published: Sequence[Entry] = (),
    reference: str = BEST,
    context: Sequence[Run] | None = None,
    chosen: Mapping[str, Chosen] | None = None,
) -> pd.DataFrame:
    """A table with one row per group, in the order of first appearance. Its columns are `COLUMNS` (those of energy only if energy
    was measured), the keys in which the configs differ, and alignment metrics that are not in `COLUMNS`.

    Accuracies are in %, their differences are in percentage points, angles are in degrees, and times are in seconds of training.
    A primary score other than accuracy has columns like those of accuracy, with its name and in its unit. The statistics cover
    the `n` finished runs, one per seed. `runs` and `status` count all runs; `unfinished` describes those that are not finished
    (stopped, diverged, failed, interrupted, running). `*_std` is the sample standard deviation. `*_ci95` is half the width of the
    95 % Student t interval of the mean, NaN for fewer than three seeds. `*_low` and `*_high` are the lowest and the highest
    value, NaN for a single seed. A group is compared with the groups of `bp` (`bp_row`) and `frozen` (`floor_row`) that
    `references.References` chooses. The columns of references and of published numbers are blank if a group has none.

    Args:
        runs: the runs.
        published: entries to compare with.
        reference: `references.BEST` or `references.NEAREST`.
        context: all runs of the report, if `runs` are only some of them; references are chosen among all of them, and p values
            are corrected for all of them.
        chosen: the choices by row, see `best.choose_best`.
    """
    everything = group_runs(runs if context is None else context)
    references = References(everything, reference)
    groups = group_runs(runs)
    swept = [key for key in differing_keys(members[0].config for members in groups.values()) if key not in COLUMNS]
    metrics = metric_columns(metrics_of(runs))
    comparisons = {group: _compare(members, references) for group, members in (everything | groups).items()}
    corrected: dict[str, float] = {}
    for of_task in tasks(everything).values():
        corrected |= holm(
            {
                group: comparisons[group].difference.p
                for group, members in of_task.items()
                if (rule := members[0].result["algorithm"]) != CONTROL and not is_floor(rule)
            }
        )
    costs = Costs(run for members in everything.values() for run in members)
    rows = [
        _row(references.labels[group], members, comparisons[group], published, metrics, (chosen or {}).get(group))
        | {"bp_difference_p_holm": corrected.get(group, math.nan)}
        | costs.of(members)
        | {key: config[key] for key in swept if key in (config := members[0].config)}
        for group, members in groups.items()
    ]
    first, timings = list(COLUMNS).index("n"), list(COLUMNS).index("seconds")
    others = [name for name in metrics if name not in COLUMNS]
    primaries = list({members[0].primary.name: members[0].primary for members in groups.values()}.values())
    middle = list(COLUMNS)[first:timings]
    for score in primaries:
        for before, added in (("bp_difference", score_columns(score)), ("floor_row", floor_column(score))):
            at = middle.index(before)
            middle[at:at] = [name for name in added if name not in COLUMNS]
    columns = [*list(COLUMNS)[:first], *swept, *middle, *others, *list(COLUMNS)[timings:]]
    if all(math.isnan(row["energy_wh"]) for row in rows):
        columns = [name for name in columns if name not in ENERGY]
    frame = pd.DataFrame(
        {
            name: pd.Series([row.get(name, math.nan) for row in rows], dtype=object if name in ("floor", *swept) else None)
            for name in columns
        }
    )
    settings = [key for key in swept if key != "algorithm" and not _is_in_labels(key, groups, references.labels)]
    frame.attrs |= {"metrics": list(metrics), "swept": swept, "settings": settings, "scores": primaries}
    return frame


def _is_in_labels(key: str, groups: Groups, labels: Mapping[str, str]) -> bool:
    return any(f" {short_key(key, members[0].config)}=" in labels[group] for group, members in groups.items())


class _Comparison(NamedTuple):
    """A row's references, and the statistics of its paired differences from bp, in the unit of tables."""

    control: Reference
    floor: Reference
    difference: Paired


def _compare(members: Sequence[Run], references: References) -> _Comparison:
    control, floor = (references.of(algorithm, members[0]) for algorithm in (CONTROL, FLOOR))
    key = f"test_{members[0].primary.name}"
    return _Comparison(control, floor, paired(_scores(members, key), _scores(control.runs, key)))


def _row(
    label: str,
    members: Sequence[Run],
    comparison: _Comparison,
    published: Sequence[Entry],
    metrics: Iterable[str],
    chosen: Chosen | None,
) -> dict[str, Any]:
    finished = finished_by_seed(members)
    primary = members[0].primary
    keys = test, val = f"test_{primary.name}", f"val_{primary.name}"
    final = _scores(members, test)
    control, floor, difference = comparison
    floor_mean = mean(_scores(floor.runs, test).values())
    final_mean = mean(final.values())
    beats = None if math.isnan(final_mean) or math.isnan(floor_mean) else primary.is_better(final_mean, floor_mean)
    repeated = sum(run.finished for run in members) - len(finished)
    entry, ours = headline(matching_entries(published, members), members)
    notes = [
        f"does not beat {FLOOR}" if beats is False else "",
        control.note,
        floor.note,
        *(f"weight transport {where}" for where in dict.fromkeys(_weight_transport(members))),
        chosen.note if chosen else "",
        f"{repeated} run{'s' * (repeated > 1)} with a repeated seed not counted" if repeated else "",
        *(_missing_note(members, key) for key in keys),
        "2 seeds: the range in place of a 95 % interval" if len(final) == 2 else "",
        _pairs_note(final, control, difference),
        rise_note(finished),
        entry.remark(members) if entry else "",
    ]
    return {
        "label": label,
        **{key: members[0].result.get(key) for key in ("group", *VERSIONS, "architecture", "dataset", "optimizer", "epochs")},
        "n": len(finished),
        "runs": len(members),
        "seeds": " ".join(map(str, sorted(finished))),
        "status": status_counts(members),
        "unfinished": _unfinished(members),
        **_statistics(val, members),
        **_statistics(test, members),
        **_statistics(f"{test}_at_best_val", members),
        "bp_difference": difference.mean,
        "bp_difference_ci95": difference.half_width,
        "bp_difference_low": difference.low,
        "bp_difference_high": difference.high,
        "bp_difference_n": difference.n if control.runs else math.nan,
        "bp_difference_dz": difference.effect,
        "bp_difference_p": difference.p,
        "bp_row": control.label,
        **{name: mean(run.layer_mean(name, run.result.get("angles")) for run in finished.values()) for name in metrics},
        "seconds": mean(run.result.get("seconds") for run in finished.values()),
        "seconds_per_epoch": mean(_over(run.result.get("seconds"), run.epochs) for run in finished.values()),
        f"floor_{primary.name}": floor_mean,
        "floor_row": floor.label,
        "floor": beats,
        "published": entry.value if entry else math.nan,
        "published_std": entry.std if entry else math.nan,
        "published_difference": ours - entry.value if entry else math.nan,
        "published_source": entry.source if entry else "",
        "tried": chosen.tried if chosen else math.nan,
        "chosen": chosen.values if chosen else "",
        "note": "; ".join(filter(None, notes)),
    }


def _weight_transport(members: Sequence[Run]) -> Iterable[str]:
    """Where the rule passes errors through weights by design; a run without a result does not say so."""
    return (where for run in members for where in run.result.get("weight_transport") or ())


def _pairs_note(final: Mapping[int, float], control: Reference, difference: Paired) -> str:
    """A note if not all of the row's seeds are paired."""
    if not final or difference.n == len(final) or not finished_by_seed(control.runs):
        return ""
    return f"{difference.n} of {len(final)} seeds are paired with {control.label}"


def _missing_note(members: Sequence[Run], key: str) -> str:
    """A note if only some of the finished runs have a value, so that the statistics cover fewer than n runs."""
    present, n = len(_scores(members, key)), len(finished_by_seed(members))
    part = "test" if key.startswith("test") else "validation"
    return f"{present} of {n} finished runs have a {part} {members[0].primary.title}" if 0 < present < n else ""


def _unfinished(runs: Sequence[Run]) -> str:
    """A description of the runs that have not finished, such as ``1 of 3: seed 2 diverged in epoch 3, first in fc1``."""
    unfinished = [f"seed {run.result['seed']} {describe_status(run)}" for run in runs if not run.finished]
    return f"{len(unfinished)} of {len(runs)}: {'; '.join(unfinished)}" if unfinished else ""


def _scores(runs: Sequence[Run], key: str) -> dict[int, float]:
    """The known values of a score in the finished runs, by seed, in the unit of tables."""
    return {seed: value for seed, run in finished_by_seed(runs).items() for value in known([run.score(key)])}


def _statistics(key: str, runs: Sequence[Run]) -> dict[str, float]:
    """Mean, standard deviation, interval and range of a score over the finished runs, in the unit of tables."""
    values = _scores(runs, key).values()
    low, high = value_range(values)
    return {
        key: mean(values),
        f"{key}_std": std(values),
        f"{key}_ci95": half_width(values),
        f"{key}_low": low,
        f"{key}_high": high,
    }


def _over(seconds: float | None, epochs: int | None) -> float | None:
    return seconds / epochs if seconds is not None and epochs else None
