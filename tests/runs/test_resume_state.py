"""A checkpoint restores all state that affects results: random generators, optimizers, schedules, progress and the rule."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fa_bench
from fa_bench.callbacks.base import Callback
from fa_bench.cli import main
from fa_bench.errors import RunDirectoryError
from fa_bench.mechanisms.rule import Rule
from fa_bench.optim.adam import Adam
from fa_bench.optim.optimizers import Optimizers
from fa_bench.optim.sgd import SGD
from fa_bench.report import figures
from fa_bench.runs import checkpoint
from fa_bench.runs.checkpoint import Expected
from fa_bench.runs.hashes import state_hash
from fa_bench.runs.loop import Progress
from fa_bench.schedules.decay import Cosine
from fa_bench.schedules.step import Step
from fa_bench.utils.files import METRICS, RESULT

from .test_survival import LAST, RUN, at_step, recorded

Patch = pytest.MonkeyPatch
#: The net has dropout and normalisation; the images are the smallest that it accepts and form four batches per epoch.
DROPOUT = [
    "dataset=synthetic",
    "dataset.samples=16",
    "dataset.test_samples=4",
    "dataset.size=63",
    "dataset.validation=0",
    "epochs=2",
    "batch_size=4",
    "probe_size=4",
    "architecture=dkp_alexnet",
    "architecture.width=1",
    "architecture.hidden=6",
]


@pytest.fixture(autouse=True, scope="module")
def nothing_old_to_collect() -> Iterator[None]:
    """Exclude older objects from the garbage collection at the end of each run, which would otherwise take most of a small run's
    time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "metrics_of", lambda runs: {})


@pytest.mark.parametrize(("rule", "step"), [("kp", 3), ("dfa", 4), ("kp", 5)])  # within an epoch, at its end, in the last one
def test_run_with_dropout_resumes_bitwise_identically(rule: str, step: int, monkeypatch: Patch) -> None:
    """Dropout masks are sampled from torch's global generator, and equal those of an uninterrupted run."""
    command = [*DROPOUT, f"algorithm={rule}"]
    assert main([*command, "hydra.run.dir=whole"]) == 0
    at_step(step, lambda: signal.raise_signal(signal.SIGTERM), monkeypatch)
    assert main([*command, "hydra.run.dir=run"]) == 143
    assert main([*command, "hydra.run.dir=run", "resume=true"]) == 0
    assert recorded("run") == recorded("whole")


# --- direct calls -----------------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Adds numbers from every global generator of the process."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Normal numbers come in pairs, and the generators of Python and numpy store the second one.
        return x + random.random() + random.gauss(0, 1) + np.random.rand() + np.random.standard_normal() + torch.rand(1)


def make(rule: str = "kp") -> tuple[Rule, Optimizers]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), Noisy(), nn.Linear(4, 3))
    cuts = (
        {"cuts": ["2"]}
        if rule
        in ("dkp", "predsim", "bp_deepsup", "fdfa", "grape", "forward_gradient", "ddtp_linear", "ldrl", "epc", "dfc", "f3")
        else {}
    )
    options = cuts | {"wm": {"initial_steps": 0, "mirror_batch": 4}, "f3": {"samples": 9}}.get(rule, {})
    attached = fa_bench.attach(model, rule, seed=0, sample_input=torch.ones(2, 5), **options)
    own = Adam(lr=0.02, schedule=Step(step_size=2))
    return attached, Optimizers(SGD(lr=0.1, momentum=0.9, schedule=Cosine()), attached, 6, own)


def train(rule: Rule, optimizers: Optimizers, epochs: range) -> list[float]:
    losses = []
    for epoch in epochs:
        generator = torch.Generator().manual_seed(epoch)
        x, y = torch.randn(6, 5, generator=generator), torch.arange(6) % 3
        optimizers.begin_epoch(epoch)
        optimizers.zero_grad()
        logits = rule.model(x)
        loss = F.cross_entropy(logits, y)
        rule.backward(loss, logits, y, indices=torch.randperm(9, generator=generator)[:6])
        optimizers.step()
        rule.step()
        losses.append(loss.item())
    return losses


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture
def generators() -> Iterator[None]:
    """Restore the states of the process's generators after the test."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


@pytest.mark.parametrize(
    "rule",
    [
        "kp",
        "brsf",
        "wm",
        "pfa",
        "ldfa",
        "information_alignment",
        "dkp",
        "predsim",
        "np_feedback",
        "weight_perturbation",
        "bp_deepsup",
        "fdfa",
        "grape",
        "forward_gradient",
        "ddtp_linear",
        "ldrl",
        "epc",
        "dfc",
        "f3",
    ],
)
def test_loaded_checkpoint_continues_bitwise_identically(rule: str, generators: None) -> None:
    """After loading, losses, weights, running statistics, feedback and both optimizers are bitwise those of uninterrupted
    training."""
    last, before = Path("a/last.pt"), Path("a/previous.pt")
    seed_all(1)
    whole, optimizers = make(rule)
    train(whole, optimizers, range(3))
    checkpoint.save(last, before, "hash", "data", Progress(epoch=3), whole, optimizers)
    losses = train(whole, optimizers, range(3, 6))
    seed_all(2)
    other, fresh = make(rule)
    assert checkpoint.load([last], Expected("hash", "data", 9, 0), other, fresh, warn=pytest.fail).epoch == 3
    assert train(other, fresh, range(3, 6)) == losses
    assert state_hash(other.model.state_dict()) == state_hash(whole.model.state_dict())
    assert state_hash([other.feedback, other.state_dict()]) == state_hash([whole.feedback, whole.state_dict()])
    assert state_hash(fresh.state_dict()) == state_hash(optimizers.state_dict())


def test_every_global_generator_is_restored(generators: None) -> None:
    """The restored state includes the second number of a pair of normal random numbers."""

    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.standard_normal(), np.random.rand(), torch.rand(1).item()]

    seed_all(3)
    random.gauss(0, 1)
    np.random.standard_normal()
    rule, optimizers = make()
    checkpoint.save(Path("a/last.pt"), Path("a/previous.pt"), "hash", "data", Progress(), rule, optimizers)
    want = draw()
    seed_all(4)
    assert draw() != want
    checkpoint.load([Path("a/last.pt")], Expected("hash", "data", 9, 0), rule, optimizers, warn=pytest.fail)
    assert draw() == want


def test_every_field_of_the_progress_is_restored() -> None:
    progress = Progress(
        epoch=2,
        batch=3,
        step=11,
        seconds=4.5,
        compile_seconds=1.5,
        energy_wh=0.75,
        loss_sum=torch.tensor(6.25),
        sums={"correct": torch.tensor(7)},
        samples=24,
        probed=10,
        measurements=3,
        angles={"weight_angle": {"fc1": 30.0}},
        batches_hash="0123456789abcdef",
        best_epoch=1,
        best_val=0.5,
        test_at_best=0.25,
        diverged={"epoch": 2, "step": 9, "layer": "fc1", "message": "m"},
        stopped={"reason": "r", "callback": "c"},
    )
    fields = [field.name for field in dataclasses.fields(Progress)]
    plain = vars(Progress())
    assert [name for name in fields if vars(progress)[name] == plain[name]] == [], "give every field a non-default value"
    rule, optimizers = make()
    checkpoint.save(Path("a/last.pt"), Path("a/previous.pt"), "hash", "data", progress, rule, optimizers)
    loaded = checkpoint.load([Path("a/last.pt")], Expected("hash", "data", 9, 4), rule, optimizers, warn=pytest.fail)
    assert {name: getattr(loaded, name) for name in fields} == vars(progress)


def test_checkpoint_of_another_config_or_format_is_refused(monkeypatch: Patch) -> None:
    """A checkpoint that cannot be used is reported, and the next one is used if it exists."""
    rule, optimizers = make()
    paths = [Path("a/last.pt"), Path("a/previous.pt")]
    checkpoint.save(paths[1], Path("a/older.pt"), "mine", "data", Progress(epoch=1), rule, optimizers)
    for version, config, fault in ((checkpoint.VERSION, "other", "another config"), (checkpoint.VERSION + 1, "mine", "format")):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "VERSION", version)
            checkpoint.save(paths[0], Path("a/older.pt"), config, "data", Progress(epoch=2), rule, optimizers)
        warnings: list[str] = []
        assert checkpoint.load(paths, Expected("mine", "data", 9, 0), rule, optimizers, warnings.append).epoch == 1
        assert len(warnings) == 1 and fault in warnings[0] and str(paths[0]) in warnings[0]
        with pytest.raises(RunDirectoryError, match=fault):
            checkpoint.load(paths[:1], Expected("mine", "data", 9, 0), rule, optimizers, warn=pytest.fail)


def test_training_time_accumulates_over_resumes(monkeypatch: Patch) -> None:
    at_step(5, lambda: signal.raise_signal(signal.SIGTERM), monkeypatch)
    assert main(RUN) == 143
    state = torch.load(LAST, weights_only=True)
    state["progress"]["seconds"] += 1000.0
    torch.save(state, LAST)
    assert main([*RUN, "resume=true"]) == 0
    lines = [json.loads(line) for line in Path("run", METRICS).read_text().splitlines()]
    assert lines[0]["seconds"] < 1000 < lines[1]["seconds"] < lines[2]["seconds"]
    assert json.loads(Path("run", RESULT).read_text())["seconds"] == lines[2]["seconds"]


@pytest.mark.parametrize("links", [True, False])
def test_previous_checkpoint_is_retained(links: bool, monkeypatch: Patch) -> None:
    """The previous checkpoint is kept, even on file systems without links."""

    def refuse(*paths: Path) -> None:
        raise OSError("no links here")

    if not links:
        monkeypatch.setattr(checkpoint.os, "link", refuse)
    rule, optimizers = make()
    last, before = Path("a/last.pt"), Path("a/previous.pt")
    for epoch in (1, 2, 3):
        checkpoint.save(last, before, "hash", "data", Progress(epoch=epoch), rule, optimizers)
        kept = {path: checkpoint.read(path, "hash", "cpu")["progress"]["epoch"] for path in (last, before) if path.exists()}
        assert kept == ({last: 1} if epoch == 1 else {last: epoch, before: epoch - 1})
    assert sorted(path.name for path in Path("a").iterdir()) == ["last.pt", "previous.pt"]


@pytest.mark.parametrize(
    ("epoch", "batch", "step", "fits"),
    [
        (2, 3, 11, True),
        (9, 0, 36, True),
        (9, 1, 37, False),
        (2, 3, 12, False),
        (3, 0, 11, False),
        (2, 4, 12, True),
        (2, 5, 13, False),
        (10, 0, 40, False),
    ],
)
def test_inconsistent_progress_is_rejected(epoch: int, batch: int, step: int, fits: bool) -> None:
    """A run has nine epochs of four batches. No batch may follow the last epoch, and the step must agree with the epoch and the
    batch."""
    rule, optimizers = make()
    progress = Progress(epoch=epoch, batch=batch, step=step, loss_sum=torch.tensor(1.0), samples=8)
    checkpoint.save(Path("a/last.pt"), Path("a/previous.pt"), "hash", "data", progress, rule, optimizers)

    def load() -> Progress:
        return checkpoint.load([Path("a/last.pt")], Expected("hash", "data", 9, 4), rule, optimizers, warn=pytest.fail)

    if fits:
        assert load().step == step
    else:
        with pytest.raises(RunDirectoryError, match="not a checkpoint of this run"):
            load()


DIVERGED, STOPPED = {"epoch": 1, "step": 2, "layer": None, "message": "m"}, {"reason": "r", "callback": None}
ODD = [float("nan"), float("inf"), -float("inf")]
NUMBERS, NO_NUMBERS = [None, 0, 0.5, 1, -3.5, 1e9], ["x", True]
SUMS = {"accepted": [torch.tensor(1.0), torch.tensor(3)], "refused": [torch.zeros(1), 1.0, None]}
#: Accepted and refused values of each field in epoch 3 of 9, after 3 of its 4 batches, if all other fields are correct.
FIELDS: dict[str, dict[str, list[Any]]] = {
    "samples": {"accepted": [0, 8, 10**9, torch.tensor(8)], "refused": [-1, 1.0, True, None, torch.zeros(1)]},
    "probed": {"accepted": [None, 0, 11], "refused": [12, -1, 3.0, True]},
    "best_epoch": {"accepted": [None, 1, 2], "refused": [3, -1, 1.0, True]},
    "seconds": {"accepted": [0, 0.0, 7, 1e9], "refused": [-0.1, float("inf"), float("nan"), True, "1", None]},
    "best_val": {"accepted": NUMBERS, "refused": [*NO_NUMBERS, *ODD]},
    "test_at_best": {"accepted": [*NUMBERS, *ODD], "refused": NO_NUMBERS},
    "loss_sum": SUMS,
    "sums": {
        "accepted": [{}, {"correct": torch.tensor(3)}, {"target_sums": torch.zeros(2)}],
        "refused": [None, [], {"correct": 3}],
    },
    "angles": {
        "accepted": [None, {}, {"a": {}}, {"a": {"b": 1.0, "c": float("nan")}, "d": {"b": 2.0}}],
        "refused": [[], {"a": 1.0}, {"a": {"b": 1}}, {"a": {"b": 1.0, "c": "x"}}, {"a": {"b": 1.0}, "d": None}],
    },
    "diverged": {
        "accepted": [None, DIVERGED, DIVERGED | {"layer": "fc"}],
        "refused": [
            {},
            [],
            DIVERGED | {"more": 1},
            {"reason": "r"},
            *(DIVERGED | {key: 1.5} for key in DIVERGED),
            DIVERGED | {"message": None},
        ],
    },
    "stopped": {
        "accepted": [None, STOPPED, STOPPED | {"callback": "c"}],
        "refused": [{}, {"reason": "r"}, STOPPED | {"more": 1}, *(STOPPED | {key: 1.5} for key in STOPPED)],
    },
    "batches_hash": {
        "accepted": ["", "0123456789abcdef"],
        "refused": [None, "0123456789abcde", "0123456789abcdeg", "0123456789abcdef0", "0123456789ABCDEF", "\n"],
    },
}


@pytest.mark.parametrize("field", FIELDS)
def test_all_progress_fields_are_validated(field: str) -> None:
    """The extreme values that a run can save are checked, too."""
    rule, optimizers = make()
    last, expected = Path("a/last.pt"), Expected("hash", "data", 9, 4)
    base = Progress(epoch=2, batch=3, step=11, loss_sum=torch.tensor(1.0), samples=8)

    def load(value: Any, base: Progress = base) -> Progress:
        progress = dataclasses.replace(base, **{field: value})
        checkpoint.save(last, Path("a/previous.pt"), "hash", "data", progress, rule, optimizers)
        return checkpoint.load([last], expected, rule, optimizers, warn=pytest.fail)

    for value in FIELDS[field]["accepted"]:
        load(value)
    for value in FIELDS[field]["refused"]:
        with pytest.raises(RunDirectoryError, match=rf"not a checkpoint of this run \(ValueError: {field}="):
            load(value)
    if field == "loss_sum":
        assert getattr(load(None, Progress(epoch=2, step=8)), field) is None, "before the first batch, there is no sum of losses"


def test_callbacks_without_stored_state_are_reset() -> None:
    rule = fa_bench.attach(nn.Sequential(nn.Linear(4, 3)), "bp")
    optimizers = Optimizers(SGD(lr=0.1), rule, epochs=1)

    class Own(Callback):
        def __init__(self, name: str, state: dict[str, Any]) -> None:
            self.name, self.state = name, state

        def state_dict(self) -> dict[str, Any]:
            return self.state

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.state = state

    state = checkpoint.capture(Progress(), rule, optimizers, [Own("counts", {"n": 3}), Own("empty", {})])
    loaded = [Own("counts", {}), Own("empty", {"n": 1}), Own("new", {"n": 2})]
    checkpoint.restore(state, rule, optimizers, loaded)
    assert [callback.state for callback in loaded] == [{"n": 3}, {}, {}]


def test_rule_state_is_restored_after_model_state() -> None:
    """As `Rule.load_state_dict` documents, the rule's state is loaded after the model's state."""
    rule = fa_bench.attach(nn.Sequential(nn.Linear(4, 3)), "bp")
    optimizers, weight = Optimizers(SGD(lr=0.1), rule, epochs=1), rule.model.get_parameter("0.weight")
    state = copy.deepcopy(checkpoint.capture(Progress(), rule, optimizers))
    with torch.no_grad():
        weight.add_(1)
    seen: list[torch.Tensor] = []
    rule.load_state_dict = lambda _: seen.append(weight.detach().clone())  # type: ignore[method-assign]
    checkpoint.restore(state, rule, optimizers)
    assert torch.equal(seen[0], state["model"]["0.weight"])
