"""End a trial early if optuna's pruner finds it worse than the others."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fa_bench.callbacks.base import Callback
from fa_bench.objectives.scores import scores_of
from fa_bench.runs.readers import recorded_lines
from fa_bench.tuning.optuna_parts import make_pruner
from fa_bench.utils.files import METRICS

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from fa_bench.runs.loop import Trainer

REASON = "pruned"


@dataclasses.dataclass(frozen=True)
class Rivals:
    """The trials with which a trial is compared.

    Attributes:
        pruner: the name of the pruner.
        rule: the name of the rule's study.
        trials: the rule's finished trials, including pruned ones.
        direction: the direction of the search, `fa_bench.objectives.scores.Score.direction`.
    """

    pruner: str
    rule: str
    trials: Sequence[FrozenTrial]
    direction: Literal["maximize", "minimize"] = "maximize"


class Judge:
    """Decides whether one trial should end early. A judge works on a copy of the trial's study, so it can run in another process.

    Args:
        rivals: the trials before this one.
    """

    def __init__(self, rivals: Rivals) -> None:
        import optuna
        from optuna.trial import TrialState, create_trial

        study = optuna.create_study(
            study_name=rivals.rule,
            direction=rivals.direction,
            pruner=make_pruner(rivals.pruner),
            sampler=optuna.samplers.RandomSampler(),
        )
        study.add_trials(rivals.trials)
        study.add_trial(create_trial(state=TrialState.RUNNING))
        self._study, self._steps = study, 0
        self._trial = optuna.trial.Trial(study, study.get_trials(deepcopy=False)[-1]._trial_id)

    def is_hopeless(self, step: int, value: float) -> bool:
        """Whether the trial should end early, given its latest validation score. `step` is the number of epochs that all
        seeds of the trial have trained so far."""
        self._steps = step
        self._trial.report(value, step)
        return self._trial.should_prune()

    def catch_up(self, values: Sequence[float]) -> None:
        """Judge the epochs that have not been judged yet, because their run had already finished when the trial was resumed.
        `values` are the validation scores after all epochs so far."""
        for step in range(self._steps + 1, len(values) + 1):
            self.is_hopeless(step, values[step - 1])

    @property
    def system(self) -> dict[str, Any]:
        """The attributes that the pruner recorded in the trial."""
        return dict(self._study.get_trials(deepcopy=False)[-1].system_attrs)


class Pruning(Callback):
    """Stops a run if the pruner considers its trial hopeless.

    Args:
        judge: the judge of the trial.
        directory: the run's directory.
        before: the number of epochs of the trial's earlier runs.
    """

    def __init__(self, judge: Judge, directory: Path, before: int) -> None:
        super().__init__()
        self._judge, self._directory, self._before = judge, directory, before

    def on_fit_start(self, trainer: Trainer) -> None:
        # Judge the epochs that an interrupted process trained, because the run may have to stop after the last of them.
        for epoch, value in enumerate(recorded_scores(self._directory, trainer.progress.epoch), start=1):
            self._decide(trainer, epoch, value)

    def on_epoch_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        self._decide(trainer, trainer.progress.epoch, _known(metrics[f"val_{trainer.scores[0].name}"]))

    def _decide(self, trainer: Trainer, epoch: int, value: float) -> None:
        if self._judge.is_hopeless(self._before + epoch, value):
            trainer.stop(REASON)


def recorded_scores(directory: Path, epochs: int) -> list[float]:
    """The recorded primary validation scores of a run's first epochs, with NaN for scores that are not known."""
    records = map(json.loads, recorded_lines(directory / METRICS, epochs))
    return [_known(record[f"val_{scores_of(record)[0].name}"]) for record in records]


def _known(value: float | None) -> float:
    return math.nan if value is None or not math.isfinite(value) else value
