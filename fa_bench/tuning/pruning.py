"""Pruning: a trial that optuna's pruner finds worse than the others ends early."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fa_bench.callbacks.base import Callback
from fa_bench.runs.readers import recorded_lines
from fa_bench.tuning.optuna_parts import make_pruner
from fa_bench.utils.files import METRICS

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from fa_bench.runs.loop import Trainer

REASON = "pruned"


@dataclasses.dataclass(frozen=True)
class Rivals:
    """What a trial is compared with.

    Attributes:
        pruner: its name.
        rule: the name of the rule's study.
        trials: the finished trials of the rule.
    """

    pruner: str
    rule: str
    trials: Sequence[FrozenTrial]


class Judge:
    """Decides in one trial, on a copy of its study, so that it can do so in another process.

    Args:
        rivals: the trials before this one.
    """

    def __init__(self, rivals: Rivals) -> None:
        import optuna
        from optuna.trial import TrialState, create_trial

        study = optuna.create_study(study_name=rivals.rule, direction="maximize", pruner=make_pruner(rivals.pruner),
                                    sampler=optuna.samplers.RandomSampler())
        study.add_trials(rivals.trials)
        study.add_trial(create_trial(state=TrialState.RUNNING))
        self._study = study
        self._trial = optuna.trial.Trial(study, study.get_trials(deepcopy=False)[-1]._trial_id)

    def is_hopeless(self, step: int, accuracy: float) -> bool:
        """Whether the trial should end, with this validation accuracy after so many epochs of all its seeds together."""
        self._trial.report(accuracy, step)
        return self._trial.should_prune()

    @property
    def system(self) -> dict[str, Any]:
        """What the pruner recorded in the trial."""
        return dict(self._study.get_trials(deepcopy=False)[-1].system_attrs)


class Pruning(Callback):
    """Stops a run whose trial is hopeless.

    Args:
        judge: of the trial.
        directory: the run's.
        before: epochs of the trial's earlier runs.
    """

    def __init__(self, judge: Judge, directory: Path, before: int) -> None:
        super().__init__()
        self._judge, self._directory, self._before = judge, directory, before

    def on_fit_start(self, trainer: Trainer) -> None:
        # Epochs that an interrupted process trained; the last of them may have been the one to stop after.
        for epoch, accuracy in enumerate(accuracies(self._directory, trainer.progress.epoch), start=1):
            self._decide(trainer, epoch, accuracy)

    def on_epoch_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        self._decide(trainer, trainer.progress.epoch, metrics["val_accuracy"])

    def _decide(self, trainer: Trainer, epoch: int, accuracy: float) -> None:
        if self._judge.is_hopeless(self._before + epoch, accuracy):
            trainer.stop(REASON)


def accuracies(directory: Path, epochs: int) -> list[float]:
    """The validation accuracies of a run's first epochs, as recorded."""
    return [json.loads(line)["val_accuracy"] for line in recorded_lines(directory / METRICS, epochs)]
