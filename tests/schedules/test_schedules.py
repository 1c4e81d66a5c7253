"""Every schedule agrees with numbers worked out by hand or with torch's own schedule. Runs follow and resume their schedules."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from fa_bench.cli import main
from fa_bench.errors import OptionError
from fa_bench.registry.registries import SCHEDULES
from fa_bench.schedules.base import Schedule
from fa_bench.schedules.constant import Constant
from fa_bench.schedules.decay import Cosine, Linear
from fa_bench.schedules.one_cycle import OneCycle
from fa_bench.schedules.step import MultiStep, Step

TORCH = torch.optim.lr_scheduler


def rates(schedule: Schedule, total: int, lr: float = 1.0) -> list[float]:
    return [schedule.at(lr, done, total) for done in range(total)]


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        (Constant(), [1, 1, 1, 1, 1]),
        (Constant(warmup=3), [1 / 4, 2 / 4, 3 / 4, 1, 1]),
        (Step(step_size=2, gamma=0.5), [1, 1, 0.5, 0.5, 0.25]),
        (Step(step_size=2, gamma=0.5, warmup=3), [1 / 4, 2 / 4, 0.5 * 3 / 4, 0.5, 0.25]),
        (MultiStep(milestones=[1, 3], gamma=0.1), [1, 0.1, 0.1, 0.01, 0.01]),
        (MultiStep(milestones=[2, 2], gamma=0.1), [1, 1, 0.01, 0.01, 0.01]),
        (Linear(min_lr=0.5), [1, 0.9, 0.8, 0.7, 0.6]),
        (Linear(flat=0.5), [1, 1, 1, 0.8, 0.4]),
        (Linear(min_lr=0.5, flat=0.2), [1, 1, 0.875, 0.75, 0.625]),
        (Cosine(min_lr=0.2), [0.2 + 0.4 * (1 + math.cos(math.pi * t / 5)) for t in range(5)]),
    ],
)
def test_lr_matches_values_by_hand(schedule: Schedule, wanted: list[float]) -> None:
    assert rates(schedule, 5) == pytest.approx(wanted)
    assert rates(schedule, 5, lr=0.03) == pytest.approx([0.03 * rate for rate in wanted]) or "min_lr" in vars(schedule)


@pytest.mark.parametrize(
    ("schedule", "build"),
    [
        (Step(step_size=3, gamma=0.7), lambda o, n: TORCH.StepLR(o, 3, 0.7)),
        (MultiStep(milestones=[2, 5, 6], gamma=0.3), lambda o, n: TORCH.MultiStepLR(o, [2, 5, 6], 0.3)),
        (Cosine(min_lr=0.01), lambda o, n: TORCH.CosineAnnealingLR(o, n, 0.01)),
        (Linear(), lambda o, n: TORCH.LinearLR(o, 1.0, 0.0, n)),
        (
            OneCycle(rise=0.4, start=10, end=100),
            lambda o, n: TORCH.OneCycleLR(
                o, 0.2, total_steps=n, pct_start=0.4, div_factor=10, final_div_factor=100, cycle_momentum=False
            ),
        ),
    ],
    ids=lambda case: getattr(case, "name", ""),
)
def test_lr_matches_torch_schedulers(schedule: Schedule, build) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.2)
    theirs, seen = build(optimizer, 10), []
    for _ in range(10):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert rates(schedule, 10, lr=0.2) == pytest.approx(seen, rel=1e-9, abs=1e-12)


def test_shortened_scales_all_counts_of_schedule() -> None:
    """All counts are reduced to a tenth, but not below one. A schedule without warm-up does not gain one, and options that are
    fractions of the length of a run do not change."""
    length, total = (lambda number: max(round(number / 10), 1)), 10
    for schedule, wanted in [
        (Constant(warmup=30), Constant(warmup=3)),
        (Step(step_size=20, warmup=40), Step(step_size=2, warmup=4)),
        (MultiStep(milestones=[30, 60], warmup=3), MultiStep(milestones=[3, 6], warmup=1)),
        (MultiStep(milestones=[2, 60]), MultiStep(milestones=[1, 6])),
        (Cosine(warmup=20), Cosine(warmup=2)),
        (Linear(), Linear()),
        (OneCycle(rise=0.4), OneCycle(rise=0.4)),
    ]:
        assert rates(schedule.shortened(length), total) == rates(wanted, total)


def test_registered_schedules() -> None:
    assert set(SCHEDULES) == {"constant", "step", "multistep", "cosine", "linear", "one_cycle"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"name": "cosin"}, "name=cosin is not one of constant, cosine"),
        ({"name": "step"}, "step_size: is required"),
        ({"name": "multistep"}, "milestones: are required"),
        ({"name": "cosine", "step_size": 3}, "step_size: is not an option of schedule.name=cosine, but of step"),
        ({"milestones": [3]}, "milestones: is not an option of schedule.name=constant, but of multistep"),
        ({"name": "step", "step_sise": 3}, "step_sise: unknown option of a schedule; did you mean 'step_size'?"),
        ({"name": "one_cycle", "warmup": 2}, "warmup=2: one_cycle has its own warm-up"),
    ],
)
def test_invalid_option_errors(values: dict, said: str) -> None:
    with pytest.raises(OptionError) as refused:
        Schedule.from_mapping(values)
    assert str(refused.value).startswith(said)


RUN = [
    "dataset=synthetic",
    "dataset.samples=72",
    "dataset.validation=8",
    "dataset.test_samples=16",
    "architecture.widths=[8]",
    "batch_size=16",
    "threads=1",
    "optimizer.lr=0.1",
]


def lrs(directory: str) -> list[float]:
    return [json.loads(line)["lr"] for line in Path(directory, "metrics.jsonl").read_text().splitlines()]


def test_run_schedule_counts_epochs_or_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With four steps per epoch, a decay every six steps occurs once before the third epoch and twice before the fourth."""
    monkeypatch.chdir(tmp_path)
    schedule = ["optimizer.schedule.name=step", "optimizer.schedule.gamma=0.5", "epochs=4"]
    assert main([*RUN, *schedule, "optimizer.schedule.step_size=1", "hydra.run.dir=a"]) == 0
    assert lrs("a") == pytest.approx([0.1, 0.05, 0.025, 0.0125])
    assert main([*RUN, *schedule, "optimizer.schedule.step_size=6", "optimizer.schedule.per=step", "hydra.run.dir=b"]) == 0
    assert lrs("b") == pytest.approx([0.1, 0.1, 0.05, 0.025])


def test_run_uses_default_per_of_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """one_cycle counts steps unless the config says epochs; the run has three epochs of four steps."""
    monkeypatch.chdir(tmp_path)
    for per, wanted in (("null", 4), ("epoch", 1)):
        schedule = OneCycle() if per == "null" else OneCycle(per=per)
        assert (
            main(
                [
                    *RUN,
                    "optimizer.schedule.name=one_cycle",
                    f"optimizer.schedule.per={per}",
                    "epochs=3",
                    f"hydra.run.dir=by-{per}",
                ]
            )
            == 0
        )
        assert lrs(f"by-{per}") == pytest.approx([schedule.at(0.1, wanted * epoch, wanted * 3) for epoch in range(3)])


def test_resume_within_schedule_is_bitwise_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fa_bench.runs.callbacks import StopOnSignal
    from fa_bench.utils.stopping import Interrupted

    monkeypatch.chdir(tmp_path)
    command = [*RUN, "algorithm=kp", "optimizer.schedule.name=one_cycle", "epochs=3"]
    assert main([*command, "hydra.run.dir=whole"]) == 0
    with monkeypatch.context() as patch:

        def stop(callback, trainer) -> None:
            if trainer.progress.step == 6:
                raise Interrupted(2)

        patch.setattr(StopOnSignal, "on_step_end", stop)
        assert main([*command, "hydra.run.dir=parts"]) == 130
    assert main([*command, "hydra.run.dir=parts"]) == 0
    results = [json.loads(Path(name, "result.json").read_text()) for name in ("whole", "parts")]
    assert all(results[0][key] == results[1][key] for key in ("weights_hash", "feedback_hash", "optimizer_hash"))


@pytest.mark.parametrize(
    ("schedule", "given"),
    [
        (Constant(), {}),
        (OneCycle(), {}),
        (OneCycle(per="epoch"), {"per": "epoch"}),
        (Step(step_size=3, warmup=2), {"step_size": 3, "warmup": 2}),
    ],
)
def test_schema_contains_only_non_default_options(schedule: Schedule, given: dict) -> None:
    """The config shows only options that were set, so naming another schedule selects that schedule's defaults."""
    assert {key: value for key, value in schedule.schema().items() if value is not None} == {"name": schedule.name} | given
