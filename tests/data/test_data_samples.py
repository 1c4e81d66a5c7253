"""The option `dataset.samples` sets how many training samples remain, with the classes in proportion. The other splits keep their
samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fa_bench.config.job import Job
from fa_bench.data.splits import stratified
from fa_bench.data.synthetic import Synthetic
from fa_bench.data.tabular import Tabular
from fa_bench.data.text import Text
from fa_bench.errors import OptionError
from fa_bench.registry.registries import DATASETS

CPU = torch.device("cpu")


def load(name: str = "digits", at_most: tuple[int, int] | None = None, **options: Any) -> Any:
    return DATASETS[name].from_mapping(options).load(Path(), CPU, at_most)


@pytest.mark.parametrize(("samples", "count"), [(100, 100), (0.25, 323), (1293, 1293)])
def test_samples_preserve_class_proportions_and_other_splits(samples: float, count: int) -> None:
    everything, few = load(), load(samples=samples)
    assert len(everything.train) == 1293 and len(few.train) == count
    before, after = (split.train.labels.bincount() for split in (everything, few))
    assert (after - before * count / len(everything.train)).abs().max() < 1
    for name in ("validation", "test"):
        assert torch.equal(getattr(few, name).images, getattr(everything, name).images)
    assert few.data_hash == everything.data_hash


def test_selection_depends_only_on_samples_seed() -> None:
    images = [load(samples=50, **options).train.images for options in ({}, {}, {"samples_seed": 1})]
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


def test_stratified_uses_largest_remainders() -> None:
    labels = torch.tensor([0] * 7 + [1] * 2 + [2])
    assert labels[stratified(labels, 4, 0)].tolist() == [0, 0, 0, 1]
    assert stratified(labels, 10, 3).tolist() == list(range(10))
    many = torch.arange(300).repeat_interleave(2)
    assert many[stratified(many, 300, 0)].tolist() == list(range(300))


def test_samples_scale_with_trials_and_excess_is_rejected() -> None:
    assert len(load(at_most=(200, 20), samples=0.5).train) == 90
    assert len(load(at_most=(200, 20), samples=1293).train) == 180
    with pytest.raises(OptionError, match=r"dataset\.samples=1294: there are only 1293 training images"):
        load(samples=1294)
    with pytest.raises(OptionError, match="neither a fraction below 1 nor a whole number"):
        load(samples=2.5)


def test_tabular_and_text_support_samples() -> None:
    assert len(load("tabular", samples=30).train) == 30 and len(Text(samples=10).load(Path(), CPU).train) == 10
    few = Tabular(samples=30).load(Path(), CPU).train
    assert torch.allclose(few.inputs.mean(0), torch.zeros(10), atol=1e-5), "not scaled with the selected samples' statistics"


def test_synthetic_uses_own_samples_option() -> None:
    """In `synthetic`, the option `samples` is the number of generated training images, and there is no `samples_seed`."""
    splits = Synthetic(samples=64, validation=0).load(Path(), CPU)
    assert len(splits.train) == 64 and DATASETS["synthetic"]().samples == 2048
    with pytest.raises(OptionError, match="samples_seed"):
        DATASETS["synthetic"].from_mapping({"samples_seed": 1})


def test_identity_includes_samples_only_if_set(compose: Any) -> None:
    plain, few, seeded = (
        compose(*overrides) for overrides in ([], ["dataset.samples=100"], ["dataset.samples=100", "dataset.samples_seed=1"])
    )
    assert "samples" not in plain.identity()["dataset"] and plain.plain()["dataset"]["samples"] is None
    assert few.identity()["dataset"]["samples"] == 100 and "output" not in plain.identity()["objective"]
    assert len({job.config_hash for job in (plain, few, seeded)}) == 3


@pytest.fixture
def compose() -> Any:
    from fa_bench import cli  # noqa: F401  registers the shipped configs
    from fa_bench.command.compose import Composer
    from fa_bench.config.job import register_schemas

    def make(*overrides: str) -> Job:
        register_schemas()
        composer = Composer("config", None, list(overrides))
        [(job, _)] = composer.check(composer.expand(False), directories=False)
        return job

    return make
