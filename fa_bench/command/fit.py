"""Whether the rules of a sweep fit its networks: tried on tensors without memory, before the first job starts."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch

from fa_bench.config.job import Job
from fa_bench.errors import CoverageError

#: Seconds after which the configs that are left are not tried: what does not fit is then said by the job itself.
MOST_SECONDS = 15.0


def check_fit(jobs: Iterable[Job]) -> None:
    """Attach each rule to its network on the meta device, once a config, pairs of rule and architecture first.

    Only what the rule itself refuses counts: a network that cannot be built or run there is left to the job, and so is a dataset
    whose shape only its files tell.

    Raises:
        CoverageError: naming the rule, the architecture and what is missing.
    """
    until = time.monotonic() + MOST_SECONDS
    first: dict[tuple[str, ...], Job] = {}
    others: dict[tuple[str, ...], Job] = {}
    for job in jobs:
        plain, shape = job.plain(), job.dataset.shape()
        if shape is not None:
            first.setdefault((job.algorithm.name, job.architecture.name), job)
            others.setdefault((str(plain["algorithm"]), str(plain["architecture"]), str(shape)), job)
    for job in {id(job): job for job in (*first.values(), *others.values())}.values():
        if time.monotonic() > until:
            return
        _try(job)


def _try(job: Job) -> None:
    shape = job.dataset.shape()
    assert shape is not None
    state = torch.get_rng_state()
    try:
        with torch.device("meta"):
            model = job.architecture.build(*shape)
        sample = torch.zeros(2, *shape[0], device="meta")
        job.fresh_algorithm().attach(model, seed=job.run.seed, sample_input=sample, initial_phase=False)
    except CoverageError as error:
        raise error.with_prefix("algorithm") from None
    except KeyboardInterrupt:
        raise
    except BaseException:  # whatever a user's class raises: the job itself says it
        return
    finally:
        torch.set_rng_state(state)
