"""The figure of a study: accuracy against learning rate, and the best accuracy so far against the number of trials."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fa_bench.report.plot import add_legend, fix_layout, new_figure, rule_style, save, style_axes
from fa_bench.tuning.store import RuleStudy
from fa_bench.tuning.trials import DONE
from fa_bench.utils.text import escape_mathtext

LR = "optimizer.lr"


def write_figure(studies: Sequence[RuleStudy], path: Path) -> None:
    """Write the figure as PNG, and as SVG beside it; equal trials give equal bytes."""
    figure = new_figure(4.0)
    with_lr = any(LR in study.plan.space for study in studies)
    axes = list(figure.subplots(1, 1 + with_lr, squeeze=False).flat)
    if with_lr:
        _plot_rates(axes[0], studies)
    _plot_best(axes[-1], studies)
    add_legend(figure, [(escape_mathtext(study.plan.rule), _style(study)) for study in studies], "rule")
    fix_layout(figure)
    save(figure, path, ("png", "svg"))


def _plot_rates(axes: Axes, studies: Sequence[RuleStudy]) -> None:
    style_axes(axes)
    axes.set(title="All trials; the chosen one in a ring", xlabel="learning rate", ylabel="validation accuracy (%)", xscale="log")
    for study in studies:
        style: dict[str, Any] = _style(study) | {"linestyle": ""}
        colour = style["color"]
        usable = [trial for trial in study.finished if trial.outcome.state == DONE]
        axes.plot(*_points(usable), markersize=4, alpha=0.7, **style)
        others = [trial.values[LR] for trial in study.finished if trial.outcome.state != DONE and LR in trial.values]
        # Trials without an accuracy are crosses on the lower edge.
        axes.plot(others, [0.02] * len(others), "x", color=colour, markersize=5, transform=axes.get_xaxis_transform())
        if study.best is not None:
            axes.plot(*_points([study.best]), "o", color=colour, markersize=11, fillstyle="none", markeredgewidth=1.6)


def _points(trials: Sequence[Any]) -> Any:
    present = [trial for trial in trials if LR in trial.values]
    return [trial.values[LR] for trial in present], [100 * trial.outcome.value for trial in present]


def _plot_best(axes: Axes, studies: Sequence[RuleStudy]) -> None:
    style_axes(axes)
    axes.set(title="Best so far", xlabel="trials", ylabel="validation accuracy (%)")
    for study in studies:
        numbers, best = [], []
        for trial in study.finished:
            value = 100 * (trial.outcome.value or 0) if trial.outcome.state == DONE else 0
            if value or best:
                numbers.append(trial.number + 1)
                best.append(max([value, *best[-1:]]))
        axes.step(numbers, best, where="post", linewidth=1.6, markersize=3, **_style(study))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _style(study: RuleStudy) -> dict[str, Any]:
    return rule_style(study.plan.job.algorithm.name)
