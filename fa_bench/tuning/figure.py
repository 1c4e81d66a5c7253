"""The figure of a study: the score against the learning rate, and the best score so far against the number of trials."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fa_bench.errors import truncate
from fa_bench.objectives.scores import Score
from fa_bench.report.groups import CONTROL
from fa_bench.report.plot import (
    LINE,
    Range,
    add_legend,
    apply_range,
    fix_layout,
    new_figure,
    readable_range,
    rule_style,
    save,
    style_axes,
)
from fa_bench.report.quantities import ACCURACY, Quantity, scalar
from fa_bench.tuning.store import Finished, RuleStudy
from fa_bench.tuning.trials import DONE
from fa_bench.utils.text import escape_mathtext

LR = "optimizer.lr"
#: COLUMNS is the maximum number of panels per row. In the panels of learning rates, the vertical axis extends the range of the
#: "Best so far" panel towards worse scores: by SHOWN points of accuracy or, for other scores, by RANGES times this range.
COLUMNS, SHOWN, RANGES = 4, 10.0, 3.0


def write_figure(studies: Sequence[RuleStudy], path: Path) -> None:
    """Write the figure as PNG and, in the same folder, as SVG. The same trials always produce byte-identical files."""
    with_lr = [study for study in studies if LR in study.plan.space]
    rows, columns = -(-(len(with_lr) + 1) // COLUMNS), min(len(with_lr) + 1, COLUMNS)
    figure = new_figure(max(4.0, 2.6 * rows, 0.8 + LINE * len(studies)))
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    of = _quantity(studies[0].score)
    curves = [_best_so_far(study) for study in studies]
    centres = [values[-1] if values else 0.0 for _, values in curves]
    limits = readable_range([values for _, values in curves], centres, of.kind)
    reference = next((best for study, best in zip(studies, centres, strict=True) if study.plan.rule == CONTROL and best), None)
    rates = [trial.values[LR] for study in with_lr for trial in study.finished if LR in trial.values]
    for axes, study in zip(grid, with_lr, strict=False):
        _plot_rates(axes, study, limits, reference)
        axes.set_xlim(min(rates, default=0.1) / 1.5, max(rates, default=1.0) * 1.5)
    axes = grid[len(with_lr)]
    style_axes(axes)
    axes.set_title("Best so far", fontsize=11)
    axes.set(xlabel="trials", ylabel=of.axis)
    for study, (numbers, values) in zip(studies, curves, strict=True):
        axes.step(numbers, values, where="post", linewidth=1.6, markersize=3, **_style(study))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    apply_range(axes, limits, [study.plan.rule for study in studies], centres, of.kind)
    for axes in grid[len(with_lr) + 1 :]:
        axes.set_axis_off()
    add_legend(figure, [(escape_mathtext(study.plan.rule), _style(study)) for study in studies], "rule")
    fix_layout(figure)
    save(figure, path, ("png", "svg"))


def _plot_rates(axes: Axes, study: RuleStudy, limits: Range, reference: float | None) -> None:
    """Plot the scores of a rule's trials against the learning rate. The chosen trial is marked with a ring. Trials with scores
    outside the axis range are drawn as triangles at the edge, and trials that were pruned, diverged or failed as crosses."""
    style_axes(axes)
    axes.set_title(escape_mathtext(truncate(study.plan.rule, 40)), fontsize=11)
    axes.set(xlabel="learning rate", ylabel=_quantity(study.score).axis, xscale="log")
    style: dict[str, Any] = _style(study)
    score, is_accuracy = study.score, _quantity(study.score).kind == ACCURACY
    points = [
        (trial.values[LR], _shown(study, trial) if trial.outcome.state == DONE else None)
        for trial in study.finished
        if LR in trial.values
    ]
    best = _shown(study, study.best) if study.best is not None else 0.0
    # Merits are compared instead of scores, because a larger merit is always better.
    low, high = sorted(map(score.merit, (limits.low, limits.high)))
    margin = SHOWN if is_accuracy else RANGES * (high - low)
    edge = low - margin if not limits.is_outside(best, _quantity(score).kind) else score.merit(best) - 2 * margin
    above = [(rate, value) for rate, value in points if value is not None and score.merit(value) >= edge]
    style["linestyle"] = ""
    axes.plot([rate for rate, _ in above], [value for _, value in above], markersize=5, alpha=0.8, **style)
    for marker, rates in (
        (
            "v" if score.higher_is_better else "^",
            [rate for rate, value in points if value is not None and score.merit(value) < edge],
        ),
        ("x", [rate for rate, value in points if value is None]),
    ):
        style["marker"] = marker
        axes.plot(
            rates, [0.97 if marker == "^" else 0.03] * len(rates), markersize=6, transform=axes.get_xaxis_transform(), **style
        )
    if study.best is not None and LR in study.best.values:
        style["marker"] = "o"
        axes.plot([study.best.values[LR]], [best], markersize=12, fillstyle="none", markeredgewidth=1.6, **style)
    if reference is not None and study.plan.rule != CONTROL:
        axes.axhline(reference, color="0.5", linewidth=0.9, linestyle=":")
    if is_accuracy:
        axes.set_ylim(max(edge, -2.0), min(max(limits.high, best + 2), 102.0))
    else:
        axes.set_ylim(*sorted(map(score.merit, (edge, max(high, score.merit(best) + 0.1 * (high - low))))))


def _best_so_far(study: RuleStudy) -> tuple[list[int], list[float]]:
    """The numbers of trials and the best validation score after each number, beginning with the first trial that has a score."""
    numbers, best = list[int](), list[float]()
    for trial in study.finished:
        value = _shown(study, trial) if trial.outcome.state == DONE and trial.outcome.value is not None else None
        if value is not None or best:
            numbers.append(trial.number + 1)
            best.append(max([*([] if value is None else [value]), *best[-1:]], key=study.score.merit))
    return numbers, best


def _shown(study: RuleStudy, trial: Finished) -> float:
    """The validation score of a trial in the unit that tables use."""
    return study.score.scale * (trial.outcome.value or 0)


def _quantity(score: Score) -> Quantity:
    return scalar(f"val_{score.name}", [score])


def _style(study: RuleStudy) -> dict[str, Any]:
    return rule_style(study.plan.job.algorithm.name)
