"""Figures of runs for notebooks and scripts, in the style of reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from fa_bench.errors import DataError, names
from fa_bench.report.groups import Groups, group_runs, in_order, nearest_key, swept_keys, tasks
from fa_bench.report.quantities import POSITIONS, Selection, measured_metrics, primary, quantity, scores_in
from fa_bench.report.runs import Run, Runs, metrics_of, read_run, runs_in
from fa_bench.utils.drawing import default_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_curves(*runs: Runs, rules: str | Sequence[str] = (), metric: str = "", x: str = "epoch") -> Figure:
    """Plot scores and losses, or one quantity, during training, as the mean ± standard deviation over the seeds.

    Args:
        *runs: directories with runs, or runs.
        rules: the rules to show, one or several; empty for all.
        metric: a score (accuracies are shown in %), a loss, or an alignment metric (mean over its layers); empty for all scores
            and losses. For a large sweep, one quantity is shown, with a panel for each rule; by default, this is the primary
            score of the test samples, such as ``test_accuracy``.
        x: ``epoch``, ``step`` or ``seconds``.

    Returns:
        A figure that notebooks can display and that ``figure.savefig(path)`` writes to a file; pyplot is not involved.

    Raises:
        DataError: there are no runs, or the rule, metric or x does not exist in them; the message lists those that do.

    Examples:
        >>> import fa_bench
        >>> runs = fa_bench.run("dataset=synthetic", "scale=smoke", algorithm=["bp", "fa"])
        Running 2 jobs...
        >>> figure = fa_bench.plot_curves(runs, metric="val_accuracy")
        >>> [axes.get_xlabel() for axes in figure.axes]
        ['epoch']
        >>> figure.savefig("curves.svg")
    """
    if x not in POSITIONS:
        raise DataError(f"x={x!r} is not available (allowed: {names(POSITIONS)})")
    by_task, found = _tasks(runs, Selection(rules=_names(rules), metric=metric, x=x))
    with default_style():
        from fa_bench.report.figures import curve_parts
        from fa_bench.report.plot import curves_figure

        only = quantity(metric, metrics_of(found), scores_in(found)) if metric else None
        return curves_figure([part for title, groups in by_task.items() for part in curve_parts(title, groups, only, x)[:1]])


def plot_setting(*runs: Runs, x: str = "", rules: str | Sequence[str] = (), metric: str = "") -> Figure:
    """Plot the final value of a quantity against a swept setting, with one line per rule and a ring at the setting with the best
    validation score.

    Args:
        *runs: directories with runs, or runs.
        x: the key of the setting, such as ``optimizer.lr``; it can be omitted if only one is swept.
        rules: the rules to show, one or several; empty for all.
        metric: a score (accuracies are shown in %), a loss, or an alignment metric (mean over its layers); empty for the primary
            score of the test samples, such as ``test_accuracy``.

    Returns:
        See `plot_curves`.

    Raises:
        DataError: as in `plot_curves`, or `x` is empty and several settings or none are swept.

    Examples:
        >>> import fa_bench
        >>> runs = fa_bench.run("dataset=synthetic", "scale=smoke", **{"optimizer.lr": [0.1, 0.01]})
        Running 2 jobs...
        >>> figure = fa_bench.plot_setting(runs)
        >>> [axes.get_xlabel() for axes in figure.axes]
        ['learning rate (optimizer.lr)']
    """
    by_task, found = _tasks(runs, Selection(rules=_names(rules), metric=metric))
    keys = swept_keys(group_runs(found))
    if x not in keys and (x or len(keys) != 1):
        problem = (
            f"x={x!r} is not swept" if x else "choose x, because several settings are swept" if keys else "no setting is swept"
        )
        raise DataError(f"{problem} (swept within a rule: {names(keys) or 'none'}){nearest_key(x, keys) if x else ''}")
    with default_style():
        from fa_bench.report.settings import setting_figure

        figure = setting_figure(
            by_task, x or keys[0], quantity(metric or f"test_{primary(found).name}", metrics_of(found), scores_in(found))
        )
    assert figure is not None  # a swept key has several values within some rule of a task
    return figure


def plot_layers(*runs: Runs, metric: str = "weight_angle", rules: str | Sequence[str] = (), x: str = "epoch") -> Figure:
    """Plot an alignment metric during training, with a panel for each layer. For large sweeps, only the best setting of each
    rule is shown.

    Args:
        *runs: directories with runs, or runs.
        metric: an alignment metric, such as ``weight_angle`` (degrees) or ``norm_ratio``.
        rules: the rules to show, one or several; empty for all.
        x: ``epoch``, ``step`` or ``seconds``.

    Returns:
        See `plot_curves`.

    Raises:
        DataError: as in `plot_curves`, or the metric has no values by layer.

    Examples:
        >>> import fa_bench
        >>> runs = fa_bench.run("dataset=synthetic", "scale=smoke", algorithm=["bp", "fa"])
        Running 2 jobs...
        >>> figure = fa_bench.plot_layers(runs, metric="norm_ratio")
        >>> [axes.get_title() for axes in figure.axes]
        ['fc1', 'fc2', 'fc3']
    """
    if x not in POSITIONS:
        raise DataError(f"x={x!r} is not available (allowed: {names(POSITIONS)})")
    by_task, found = _tasks(runs, Selection(rules=_names(rules), x=x))
    if metric not in (measured := measured_metrics(found)):
        raise DataError(f"metric={metric!r} has no values by layer (measured: {names(measured) or 'none'})")
    with default_style():
        from fa_bench.report.figures import layers_parts
        from fa_bench.report.plot import curves_figure

        return curves_figure([part for title, groups in by_task.items() for part in layers_parts(title, groups, metric, x)])


def _tasks(runs: Iterable[Runs], selection: Selection) -> tuple[dict[str, Groups], list[Run]]:
    """The groups of each task, and the selected runs."""
    found = [run for item in runs_in(runs) if (run := item if isinstance(item, Run) else read_run(item)) is not None]
    if not found:
        raise DataError("nothing to plot: no runs with a result")
    selected = in_order(selection.checked(found))
    return dict(tasks(group_runs(selected))), selected


def _names(rules: str | Sequence[str]) -> tuple[str, ...]:
    """The names of rules, which may be separated by commas as on the command line."""
    return tuple(name.strip() for name in rules.split(",")) if isinstance(rules, str) and rules else tuple(rules)
