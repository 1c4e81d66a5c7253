"""Check that the rules of a sweep or study fit its networks, on the meta device, before the first job starts."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch

from fa_bench.config.job import Job
from fa_bench.errors import ConfigError, CoverageError, OptionError
from fa_bench.registry.kinds import TOKENS

#: Time limit in seconds. If the time runs out before a config has been checked, a rule that does not fit raises an error only
#: when the job of that config runs.
MOST_SECONDS = 15.0


#: The shape of a sample and the number of outputs.
Shape = tuple[tuple[int, ...], int]


def check_fit(jobs: Iterable[Job], loaded: Shape | None = None) -> None:
    """Attach each rule to its network on the meta device, once per config, starting with one config for each pair of rule and
    architecture.

    The check raises only the errors listed below. A job raises all other errors when it runs.

    Args:
        jobs: the jobs.
        loaded: the shape of the data of all jobs, if the data have been loaded. Without it, jobs with datasets whose shape is
            known only from their files are skipped.

    Raises:
        CoverageError: if a rule cannot be attached to its network.
        OptionError, ConfigError: if an architecture refuses the shape of the data.
    """
    deadline = time.monotonic() + MOST_SECONDS
    first: dict[tuple[str, ...], tuple[Job, Shape]] = {}
    others: dict[tuple[str, ...], tuple[Job, Shape]] = {}
    for job in jobs:
        plain, shape = job.plain(), loaded or job.dataset.shape()
        if shape is not None:
            first.setdefault((job.algorithm.name, job.architecture.name), (job, shape))
            others.setdefault((str(plain["algorithm"]), str(plain["architecture"]), str(shape)), (job, shape))
    for job, shape in {id(job): (job, shape) for job, shape in (*first.values(), *others.values())}.values():
        if time.monotonic() > deadline:
            return
        _attach(job, shape)


def _attach(job: Job, shape: Shape) -> None:
    state, part = torch.get_rng_state(), "architecture"
    try:
        with torch.device("meta"):
            model = job.architecture.build(*shape)
        part = "algorithm"
        dtype = torch.int64 if job.dataset.inputs == TOKENS else torch.float32
        sample = torch.zeros(2, *shape[0], device="meta", dtype=dtype)
        rule = job.fresh_algorithm()
        rule.expect_samples(1)  # the number of samples is not known until the data are loaded
        rule.attach(model, seed=job.run.seed, sample_input=sample, initial_phase=False, objective=job.objective)
    except (CoverageError, OptionError, ConfigError) as error:
        # An option that `attach` refuses for the placeholder data may be valid for the job's real data.
        if part == "architecture" or isinstance(error, CoverageError):
            raise (error if isinstance(error, ConfigError) else error.with_prefix(part)) from None
    except KeyboardInterrupt:
        raise
    except BaseException:  # raised by a user's class; the job itself will report it
        return
    finally:
        torch.set_rng_state(state)
