"""Predict the cost of a training step, which is recorded in the run's result."""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor

from fa_bench.config.job import Job
from fa_bench.data.splits import Splits
from fa_bench.errors import OptionError
from fa_bench.mechanisms.rule import Rule
from fa_bench.metrics.cost import Cost, step_costs
from fa_bench.objectives.base import Objective
from fa_bench.optim.optimizers import Optimizers
from fa_bench.runs.logs import log
from fa_bench.utils.process import random_state, restore_random_state

#: The predictions that this process has made. They are reused, because runs of a sweep that differ only in their seeds have the
#: same cost.
_KNOWN: dict[Any, dict[str, Any]] = {}


def rule_for(job: Job, splits: Splits) -> Rule:
    """A new rule for a job, prepared for the number of training samples.

    Raises:
        OptionError: if an option of the rule does not fit the data.
    """
    rule = job.fresh_algorithm()
    try:
        rule.expect_samples(len(splits.train))
    except OptionError as error:
        raise error.with_prefix("algorithm") from None
    return rule


def step_costs_of(job: Job, rule: Rule, splits: Splits) -> tuple[Cost, Cost]:
    """The costs of a training step of a job, with its rule and with backpropagation.

    Args:
        job: the job as it is trained, see `fa_bench.config.scale.scaled`.
        rule: a rule attached to a model on the CPU that will not be trained; see `fa_bench.metrics.cost.step_costs`.
        splits: the job's data.
    """
    batch = min(job.run.batch_size, len(splits.train))
    return step_costs(
        rule,
        splits.input_shape,
        len(splits.classes),
        batch,
        splits.inputs,
        splits.targets,
        lambda: Optimizers(job.optimizer, rule, job.run.epochs, job.feedback_optimizer),
        job.run.accumulate,
    )


def predicted_cost(job: Job, splits: Splits, sample: Tensor, objective: Objective) -> dict[str, Any] | None:
    """The cost of a training step for a run's result, as {quantity: number}, with the cost of backpropagation under the key
    ``bp``.

    The cost is counted with a separate model and rule, in single precision on the CPU, so that the run is not affected. Returns
    None if the step fails; an error that also affects the run is raised in training.

    Args:
        job: the job as it is trained, see `fa_bench.config.scale.scaled`.
        splits: the job's data.
        sample: two inputs from the data.
        objective: the objective of the run.
    """
    plain = job.plain() | {"output": objective.output}
    key = (
        type(job.algorithm),
        type(job.architecture),
        type(objective),
        splits.input_shape,
        len(splits.classes),
        splits.inputs,
        splits.targets,
        len(splits.train),
        json.dumps({name: plain.get(name) for name in _PARTS}, sort_keys=True, default=str),
    )
    if key not in _KNOWN:
        state = random_state()
        try:
            model = job.architecture.build(splits.input_shape, len(splits.classes))
            rule = rule_for(job, splits)
            rule.attach(model, seed=job.run.seed, sample_input=sample.cpu(), initial_phase=False, objective=objective)
            own, reference = step_costs_of(job, rule, splits)
            _KNOWN[key] = {"batch": min(job.run.batch_size, len(splits.train)), **own.record(), "bp": reference.record()}
        except Exception as error:  # a plugin may raise anything
            log.debug("cost of a step not predicted: %s", error)
            return None
        finally:
            restore_random_state(state)
    return _KNOWN[key]


#: The keys of a config on which the cost of a step depends.
_PARTS = (
    "algorithm",
    "architecture",
    "objective",
    "optimizer",
    "feedback_optimizer",
    "batch_size",
    "accumulate",
    "plugins",
    "output",
)
