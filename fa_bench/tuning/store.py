"""One optuna study for each rule, which proposes the next trial and stores the finished trials on disk.

Only finished trials are stored. When a study is restarted, it repeats optuna's proposals from the first trial, with the same seed
and the stored results, and thus returns to its earlier state. If the process was killed during a trial, the study proposes the
values of that trial again, and the runs resume from their checkpoints. No trial can be counted twice or lost.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fa_bench.errors import FaBenchError, RunDirectoryError, describe_error
from fa_bench.tuning.options import TuneOptions
from fa_bench.tuning.optuna_parts import SAMPLERS, make_pruner, make_sampler
from fa_bench.tuning.plan import Plan, RulePlan
from fa_bench.tuning.pruning import Rivals
from fa_bench.tuning.trials import DIVERGED, FAILED, PRUNED, Outcome
from fa_bench.utils.files import output_errors
from fa_bench.utils.sampling import seed_for

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.storages.journal import JournalStorage
    from optuna.trial import FrozenTrial

JOURNAL = "study.journal"
#: Magnitude of the value assigned to a trial that diverged or failed, if the score has no worst value and no other trial has a
#: score.
HUGE = 1e6
#: The relative difference up to which two scores count as a tie.
_TIE = 1e-9


@dataclasses.dataclass(frozen=True)
class Finished:
    """A finished trial.

    Attributes:
        number: the number of the trial, from 0; trial 0 is the default config.
        values: the values of the rule's space, by key.
        outcome: how it ended.
    """

    number: int
    values: dict[str, Any]
    outcome: Outcome


class RuleStudy:
    """The trials of one rule.

    Args:
        plan: the rule.
        options: the options of the study.
        storage: the result of `open_journal`.

    Raises:
        RunDirectoryError: if the stored trials are not those that this study proposes.
    """

    def __init__(self, plan: RulePlan, options: TuneOptions, storage: JournalStorage) -> None:
        import optuna

        self.score = plan.job.scores[0]
        self.plan, self.finished, self._pruner = plan, list[Finished](), options.pruner
        self._seed, self._startup = options.study_seed, SAMPLERS[options.sampler].startup
        self._distributions = {key: one.distribution for key, one in plan.space.items()}
        self._study: Study = optuna.create_study(
            study_name=plan.rule,
            direction=plan.job.scores[0].direction,
            pruner=make_pruner(options.pruner),
            sampler=make_sampler(options.sampler, seed_for("tune", options.study_seed) % 2**32),
        )
        self._stored: Study = optuna.create_study(
            study_name=plan.rule, storage=storage, direction=self.score.direction, load_if_exists=True
        )
        for stored in self._stored.get_trials(deepcopy=False):
            self._repeat(stored)

    def ask(self) -> tuple[Trial, dict[str, Any]]:
        """The next trial, and its values by key."""
        default, number = self.plan.default, len(self.finished)
        distributions = self._distributions
        if number == 0:
            # Default values outside the search space are not passed to the sampler, because it could not have proposed them.
            distributions = {key: each for key, each in distributions.items() if self.plan.space[key].contains(default[key])}
            self._study.enqueue_trial({key: default[key] for key in distributions})
        elif self._startup is None or number < self._startup:
            # The random values depend only on the study's seed, the key and the trial's number, so a dimension that several rules
            # share gets the same values for all of these rules.
            numbers = {key: random.Random(seed_for("tune", self._seed, key, number)).random() for key in distributions}
            self._study.enqueue_trial({key: self.plan.space[key].at(u) for key, u in numbers.items()})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about experimental features
            trial = self._study.ask(fixed_distributions=distributions)
        assert trial.number == number
        return trial, {**default, **trial.params} if number == 0 else dict(trial.params)

    @property
    def rivals(self) -> Rivals:
        """The finished trials with which a pruner compares the next trial."""
        from optuna.trial import TrialState

        ended = (TrialState.COMPLETE, TrialState.PRUNED)
        return Rivals(self._pruner, self.plan.rule, self._study.get_trials(states=ended), self.score.direction)

    def tell(self, trial: Trial, values: Mapping[str, Any], outcome: Outcome) -> Finished:
        """Count a trial as finished, store it, and return it."""
        from optuna.trial import TrialState

        state = TrialState.PRUNED if outcome.state == PRUNED else TrialState.COMPLETE
        self._tell(trial, outcome)
        told = self._study.get_trials(deepcopy=False)[trial.number]
        stored = _frozen(told, state, {"values": dict(values), "outcome": dataclasses.asdict(outcome)})
        with output_errors(Path(JOURNAL)):
            self._stored.add_trial(stored)
        self.finished.append(Finished(trial.number, dict(values), outcome))
        return self.finished[-1]

    def _tell(self, trial: Trial, outcome: Outcome) -> None:
        from optuna.trial import TrialState

        for step, value in enumerate(outcome.reported, start=1):
            trial.report(value, step)
        for key, value in outcome.system.items():
            self._study._storage.set_trial_system_attr(trial._trial_id, key, value)
        if outcome.state == PRUNED:
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            self._study.tell(trial, self.worst if outcome.value is None else outcome.value)

    @property
    def worst(self) -> float:
        """The value assigned to a trial that diverged or failed: 0 for an accuracy. For any other score, it is the worst value of
        the finished trials, or an extreme one (see `HUGE`) if none of them has a value."""
        if self.score.worst is not None:
            return self.score.worst
        known = [trial.outcome.value for trial in self.finished if trial.outcome.value is not None]
        return min(known, key=self.score.merit, default=-self.score.merit(HUGE))

    def _repeat(self, stored: FrozenTrial) -> None:
        """Propose a stored trial again, and count it as finished.

        Raises:
            RunDirectoryError: if the stored trial is not the one that the study proposes.
        """
        trial, values = self.ask()
        attributes = stored.user_attrs
        if stored.params != trial.params or attributes.get("values") != json.loads(json.dumps(values)):
            raise RunDirectoryError(
                f"{JOURNAL}: trial {stored.number} of {self.plan.rule} has different values than this study "
                "proposes (the file was changed, or written on a machine that rounds differently); choose "
                "another name=NAME"
            )
        outcome = Outcome(**attributes["outcome"])
        self._tell(trial, outcome)
        self.finished.append(Finished(trial.number, values, outcome))

    @property
    def best(self) -> Finished | None:
        """The trial with the best validation score; in a tie, the earlier trial. None if all trials diverged, failed or were
        pruned."""
        usable = [trial for trial in self.finished if trial.outcome.state not in (DIVERGED, FAILED, PRUNED)]
        merits = [self.score.merit(trial.outcome.value or 0.0) for trial in usable]
        highest = max(merits, default=0.0)
        # Merits that differ only by rounding count as a tie.
        return next(
            (trial for trial, merit in zip(usable, merits, strict=True) if math.isclose(merit, highest, rel_tol=_TIE)), None
        )


def stored_studies(plan: Plan) -> list[RuleStudy]:
    """The studies of all rules, with their stored trials.

    Raises:
        RunDirectoryError: if the file with the trials is damaged, or contains trials that the studies do not propose.
    """
    try:
        storage = open_journal(plan.directory)
        return [RuleStudy(each, plan.options, storage) for each in plan.rules]
    except (FaBenchError, KeyboardInterrupt):
        raise
    except Exception as error:  # optuna raises many kinds of errors for odd content
        raise RunDirectoryError(
            f"{plan.directory / JOURNAL}: damaged, or not written by a study ({describe_error(error)}); choose another name=NAME"
        ) from None


def _frozen(told: FrozenTrial, state: Any, attributes: dict[str, Any]) -> FrozenTrial:
    from optuna.trial import create_trial

    return create_trial(
        state=state,
        value=told.value,
        params=told.params,
        distributions=told.distributions,
        user_attrs=attributes,
        system_attrs=told.system_attrs,
        intermediate_values=told.intermediate_values,
    )


def open_journal(directory: Path) -> JournalStorage:
    """The storage of a study. Only the process that holds the lock on the study's folder writes to the storage.

    If a full disk cut the last line short, that line is removed, and its trial runs again.
    """
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = directory / JOURNAL
    with output_errors(path), open(path, "ab+") as file:
        file.seek(0)
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
            os.fsync(file.fileno())
        if lines := content[: content.rfind(b"\n") + 1].splitlines():
            json.loads(lines[-1])  # optuna ignores a last line that is not JSON, but could not read lines appended to it
    return JournalStorage(JournalFileBackend(str(path), lock_obj=_NoLock()))  # type: ignore[arg-type]


class _NoLock:
    """Replaces optuna's lock, which a killed process would leave behind."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass
