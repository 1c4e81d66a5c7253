"""The parts of a run, such as optimizers, models, the state of the process and hashes, are tested separately."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fa_bench
from fa_bench.config.job import Job, RunOptions
from fa_bench.config.labels import duration
from fa_bench.data.synthetic import Synthetic
from fa_bench.errors import OptionError
from fa_bench.models.conv2 import Conv2
from fa_bench.models.mlp import MLP
from fa_bench.models.resnet import ResNet20
from fa_bench.objectives.cross_entropy import CrossEntropy
from fa_bench.optim.adam import Adam
from fa_bench.optim.optimizers import Optimizers
from fa_bench.optim.sgd import SGD
from fa_bench.rules.bp import BP
from fa_bench.runs import callbacks, hashes
from fa_bench.runs.assembly import prepare
from fa_bench.runs.hashes import chained, state_hash, weights_hash
from fa_bench.runs.loop import Progress
from fa_bench.runs.parallel import World
from fa_bench.runs.record import peak_memory
from fa_bench.schedules.base import Schedule
from fa_bench.schedules.constant import Constant
from fa_bench.schedules.decay import Cosine
from fa_bench.schedules.step import MultiStep, Step
from fa_bench.utils.files import atomic, dump_json
from fa_bench.utils.process import isolated, random_state, restore_random_state


def test_first_epoch_weight_decay() -> None:
    rule = fa_bench.attach(nn.Sequential(nn.Linear(3, 2)), "kp")
    optimizers = Optimizers(SGD(lr=0.1, weight_decay=0.01, first_epoch_weight_decay=0.5), rule, epochs=3)
    seen = []
    for epoch in range(3):
        optimizers.begin_epoch(epoch)
        seen.append({group["weight_decay"] for group in optimizers.optimizers[0].param_groups})
        optimizers.step()
    assert seen == [{0.5}, {0.01}, {0.01}]


def test_weights_and_learned_feedback_share_one_group() -> None:
    rule = fa_bench.attach(nn.Sequential(nn.Linear(3, 2)), "kp")
    groups = Optimizers(SGD(), rule, 1).optimizers[0].param_groups
    assert len(groups) == 1 and len(groups[0]["params"]) == 3


def test_learning_rate_scale_and_feedback_optimizer() -> None:
    scaled = Optimizers(SGD(lr=0.2), fa_bench.attach(nn.Sequential(nn.Linear(3, 2)), "kp", b_lr_scale=0.5), 1)
    assert [group["lr"] for group in scaled.optimizers[0].param_groups] == [0.2, 0.1]
    own = Optimizers(SGD(), fa_bench.attach(nn.Sequential(nn.Linear(3, 2)), "kp"), 1, Adam(lr=0.3))
    assert [type(o).__name__ for o in own.optimizers] == ["SGD", "Adam"]
    assert [tuple(p.shape) for p in own.optimizers[1].param_groups[0]["params"]] == [(2, 3)]


def settings_by_epoch(optimizers: Optimizers, epochs: int) -> list[list[tuple[float, float]]]:
    """The (learning rate, decay) of every group in every epoch."""
    seen = []
    for epoch in range(epochs):
        optimizers.begin_epoch(epoch)
        seen.append([(group["lr"], group["weight_decay"]) for one in optimizers.optimizers for group in one.param_groups])
        optimizers.step()
    return seen


def test_weight_decay_and_schedules_of_weights_and_feedback() -> None:
    """Feedback with its own learning rate has the weights' schedule and decay. Feedback with its own optimizer has the schedule
    and decay of that optimizer."""
    slow, fast = (Step(step_size=size, gamma=0.5) for size in (2, 1))
    of_weights = SGD(lr=0.2, weight_decay=0.01, first_epoch_weight_decay=0.5, schedule=slow)
    scaled = fa_bench.attach(nn.Sequential(nn.Linear(3, 2)), "kp", b_lr_scale=0.5)
    assert settings_by_epoch(Optimizers(of_weights, scaled, 3), 3) == [
        [(0.2, 0.5), (0.1, 0.5)],
        [(0.2, 0.01), (0.1, 0.01)],
        [(0.1, 0.01), (0.05, 0.01)],
    ]
    of_feedback = Adam(lr=0.4, weight_decay=0.02, first_epoch_weight_decay=0.7, schedule=fast)
    own = fa_bench.attach(nn.Sequential(nn.Linear(3, 2)), "kp")
    assert settings_by_epoch(Optimizers(of_weights, own, 3, of_feedback), 3) == [
        [(0.2, 0.5), (0.4, 0.7)],
        [(0.2, 0.01), (0.2, 0.02)],
        [(0.1, 0.01), (0.1, 0.02)],
    ]
    plain = fa_bench.attach(nn.Sequential(nn.Linear(3, 2)), "kp")
    alone = Optimizers(SGD(weight_decay=0.03), plain, 2, of_feedback)
    assert [decay for ((_, decay), _) in settings_by_epoch(alone, 2)] == [0.03, 0.03], "the feedback's decay was used"


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(), [1, 1, 1, 1]),
        (Step(step_size=2, gamma=0.5), [1, 1, 0.5, 0.5]),
        (MultiStep(milestones=[1, 3], gamma=0.1), [1, 0.1, 0.1, 0.01]),
        (Cosine(min_lr=0.2), [0.2 + 0.4 * (1 + math.cos(math.pi * t / 4)) for t in range(4)]),
    ],
)
def test_schedules(schedule: Schedule, expected: list[float]) -> None:
    optimizers = Optimizers(SGD(lr=1.0, schedule=schedule), fa_bench.attach(nn.Sequential(nn.Linear(3, 2)), "bp"), epochs=4)
    seen = []
    for epoch in range(4):
        optimizers.begin_epoch(epoch)
        seen.append(optimizers.lr)
    assert seen == pytest.approx(expected)


def test_kolen_pollack_difference_follows_recursion() -> None:
    """With momentum m and coupled decay λ, the difference D = W - B follows v' = m v + λ D and D' = D - lr v', which do not
    contain gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    rule = fa_bench.attach(model, "kp", seed=1)
    optimizers = Optimizers(SGD(lr=0.1, momentum=0.9, weight_decay=0.05), rule, 1)
    difference = model[2].weight.detach() - rule.feedback["2"]["B"]
    velocity = torch.zeros_like(difference)
    for _ in range(20):
        x, y = torch.randn(8, 6).double(), torch.randint(3, (8,))
        logits = model(x)
        optimizers.zero_grad()
        rule.backward(nn.functional.cross_entropy(logits, y), logits, y)
        optimizers.step()
        velocity = 0.9 * velocity + 0.05 * difference
        difference = difference - 0.1 * velocity
    got = model[2].weight.detach() - rule.feedback["2"]["B"]
    torch.testing.assert_close(got, difference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("model", "shape", "parameters"),
    [
        (MLP(), (1, 28, 28), 669_706),  # 784-512-512-10 with biases
        (ResNet20(), (3, 32, 32), 269_722),  # 0.27 million (He et al.)
        (Conv2(), (3, 32, 32), 896 + 9248 + 2 * 64 + 6272 * 128 + 128 + 256 + 1290),
        (Conv2(), (1, 28, 28), 320 + 9248 + 2 * 64 + 6272 * 128 + 128 + 256 + 1290),
    ],
)
def test_models_have_published_sizes_and_all_cut_points(model, shape, parameters: int) -> None:
    net = model.build(shape, 10)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert net(torch.randn(2, *shape)).shape == (2, 10)
    rule = fa_bench.attach(net, "dfa", sample_input=torch.randn(2, *shape))
    assert not rule.coverage.uncovered
    # Every hidden activation is a cut point, so there is one cut before each layer except the first.
    assert len(rule.feedback) == len(rule.coverage.covered) - 1


def test_weight_initialisation() -> None:
    net = MLP(init="xavier_uniform", widths=[300]).build((1, 10, 10), 10)
    bound = math.sqrt(6 / 400)
    assert 0.98 * bound < net.fc1.weight.abs().max() <= bound and not net.fc1.bias.any()


def test_failed_atomic_write_keeps_old_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(RuntimeError), atomic(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_dump_json_replaces_nonfinite_numbers_with_null() -> None:
    assert json.loads(dump_json({"a": [float("nan"), 1.5], "b": float("inf")})) == {"a": [None, 1.5], "b": None}


def test_option_errors_describe_allowed_values() -> None:
    with pytest.raises(OptionError, match=r"schedule\.gamma=2\.0 is out of range"):
        SGD.from_mapping({"schedule": {"name": "step", "step_size": 1, "gamma": 2}})
    with pytest.raises(OptionError, match=r"nam: unknown option .* did you mean 'name'"):
        SGD.from_mapping({"schedule": {"nam": "step"}})
    with pytest.raises(OptionError, match=r"epochs=True is not a whole number"):
        RunOptions(epochs=True)
    with pytest.raises(OptionError, match=r"lr=True is not a number"):
        SGD(lr=True)


def test_residual_net_without_shortcuts() -> None:
    """Both nets have the same weights. If the last normalisation of a block returns zero, the block propagates its input only
    through a shortcut."""
    torch.manual_seed(0)
    nets = [ResNet20(width=4, blocks=1, shortcuts=shortcuts).build((1, 8, 8), 3) for shortcuts in (True, False)]
    nets[1].load_state_dict(nets[0].state_dict())
    x, changes = torch.randn(2, 1, 8, 8), []
    for net in nets:
        nn.init.zeros_(net.stages.layer2[0].bn2.weight)
        changes.append((net(x) - net(-x)).abs().max().item())
    assert changes[0] > 1e-3 and changes[1] == 0


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor cannot flush denormal numbers")
def test_run_flushes_denormals_and_restores_setting() -> None:
    """Denormal numbers, such as probabilities below 1e-38, would make arithmetic many times slower."""
    torch.set_flush_denormal(False)
    tiny = torch.full((8,), 1e-39)
    assert (tiny * 0.5 != 0).all()
    job = Job(RunOptions(device="cpu"), BP(), MLP(), Synthetic(), SGD(), None, CrossEntropy())
    try:
        with isolated():
            prepare(job)
            assert (tiny * 0.5 == 0).all()
        assert (tiny * 0.5 != 0).all(), "the setting was not restored after the run"
        torch.set_flush_denormal(True)
        with isolated():
            pass
        assert (tiny * 0.5 == 0).all()
    finally:
        torch.set_flush_denormal(False)


def process_state() -> dict[str, Any]:
    """The settings of the process that a run may change."""
    cudnn, hooks = torch.backends.cudnn, vars(nn.modules.module)
    return {
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "anomalies": torch.is_anomaly_enabled(),
        "products": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warns": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn": cudnn.benchmark,
        "cudnn's determinism": cudnn.deterministic,
        "cudnn's precision": cudnn.allow_tf32,
        "numpy": np.geterr(),
        "folder": os.getcwd(),
        "workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "forward hooks": [*hooks["_global_forward_hooks"]],
        "backward hooks": [*hooks["_global_backward_hooks"]],
        "torch's numbers": torch.get_rng_state().tolist(),
        "python's": random.getstate(),
        "numpy's": str(np.random.get_state(legacy=False)),
    }


@pytest.mark.parametrize("workspace", [None, ":16:8"])
def test_process_state_is_restored_after_failed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workspace: str | None
) -> None:
    """All settings that a run, its model or a plugin has changed are restored, because the next run of a sweep starts in the same
    process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if workspace:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", workspace)
    (tmp_path / "elsewhere").mkdir()
    before = process_state()
    with pytest.raises(KeyError), isolated():
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(before["threads"] + 1)
        torch.set_grad_enabled(False)
        torch.set_anomaly_enabled(True)
        torch.set_float32_matmul_precision("medium" if before["products"] != "medium" else "high")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = not before["cudnn"]
        torch.backends.cudnn.deterministic = not before["cudnn's determinism"]
        torch.backends.cudnn.allow_tf32 = not before["cudnn's precision"]
        np.seterr(divide="raise")
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        nn.modules.module.register_module_forward_hook(lambda *_: None)
        nn.modules.module.register_module_full_backward_hook(lambda *_: None)
        torch.rand(3), np.random.rand(3), random.random()
        os.chdir("elsewhere")
        now = process_state()
        assert [key for key in before if before[key] == now[key]] == []
        raise KeyError
    after = process_state()
    assert [key for key in before if before[key] != after[key]] == []


def test_deterministic_warn_only_is_restored_after_run() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with isolated():
            torch.use_deterministic_algorithms(True)
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("deterministic", [True, False])
def test_prepare_sets_process_state_independently_of_earlier_runs(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings do not depend on what an earlier run left in the process, and the same seed gives the same numbers."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    drawn = []
    with isolated():
        for left in (True, False):
            torch.use_deterministic_algorithms(left)
            torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = left
            torch.set_float32_matmul_precision("high" if left else "medium")
            torch.set_default_dtype(torch.float64 if left else torch.float32)
            options = RunOptions(device="cpu", threads=1, seed=5, deterministic=deterministic)
            job = Job(options, BP(), MLP(), Synthetic(), SGD(), None, CrossEntropy())
            assert prepare(job) == torch.device("cpu") and torch.get_num_threads() == 1
            assert torch.are_deterministic_algorithms_enabled() == deterministic != torch.backends.cudnn.benchmark
            assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == deterministic
            assert not torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "highest"
            drawn.append((torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), torch.get_default_dtype()))
    assert drawn[0] == drawn[1] and drawn[0][3] == torch.float32


def test_prepare_on_gpu_sets_cublas_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, cuBLAS's workspace is always set, even for a run that is not deterministic, because torch reads it only once.
    CUDA is initialised before its memory statistics are reset."""
    calls: list[str] = []
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "init", lambda: calls.append("init"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append(f"reset {device}"))
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", list)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    with isolated():
        job = Job(RunOptions(device="cuda"), BP(), MLP(), Synthetic(), SGD(), None, CrossEntropy())
        assert prepare(job) == torch.device("cuda")
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and calls == ["init", "reset cuda"]


def test_random_state_of_missing_cuda_device_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint written on a machine with two GPUs is resumed on one with a single GPU."""
    restored: list[tuple[int, list[int]]] = []
    state = {**random_state(), "cuda": [torch.tensor([1]), torch.tensor([2])]}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda new, device: restored.append((device, new.tolist())))
    restore_random_state(state)
    assert restored == [(0, [1])]


def test_random_state_includes_mps_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    older = {key: value for key, value in random_state().items() if key != "mps"}
    generator = torch.tensor([3, 1])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", generator.clone)
    monkeypatch.setattr(torch.mps, "set_rng_state", generator.copy_)
    state = random_state()
    generator.zero_()
    restore_random_state(state)
    assert generator.tolist() == [3, 1]
    restore_random_state(older)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    generator.zero_()
    restore_random_state(state)
    assert generator.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("minutes", "elapsed", "saves"),
    [
        (2.0, 119, False),
        (2.0, 121, True),
        (0.5, 31, True),
        (0.0, 1e6, False),
    ],
)
def test_checkpoint_minutes(minutes: float, elapsed: float, saves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With minutes=0, no checkpoint is saved between the ends of epochs."""
    saved: list[bool] = []
    keeping = callbacks.Checkpoints(lambda: saved.append(True), epochs=10, minutes=minutes)
    times = iter([1000.0, 1000.0 + elapsed, 1000.0 + elapsed])
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: next(times))
    keeping.on_fit_start(SimpleNamespace())  # type: ignore[arg-type]
    keeping.on_step_end(SimpleNamespace(world=World()))  # type: ignore[arg-type]
    assert bool(saved) == saves


def test_state_hash_distinguishes_bits_and_structure() -> None:
    zeros = torch.zeros(2, 3)
    nudged = zeros.clone()
    nudged.view(torch.int32)[1, 2] = 1  # the smallest denormal number, which a processor may flush to zero
    states = [
        {"a": zeros},
        {"b": zeros},
        {"a": zeros.view(3, 2)},
        {"a": zeros.view(6)},
        {"a": zeros.int()},
        {"a": nudged},
        {"a": -zeros},
        {"a": [zeros]},
        {"a": {"a": zeros}},
        {"a": zeros, "b": 1},
        {"a": zeros, "b": 1.0},
        {"a": zeros, "b": None},
        {},
        {"a": [1, 23]},
        {"a": [12, 3]},
        {"a": torch.zeros(0)},
    ]
    assert len({state_hash(state) for state in states}) == len(states)
    columns = torch.arange(6.0).view(3, 2)
    assert state_hash([columns.t()]) == state_hash((columns.t().contiguous(),)), "the memory layout changes the hash"
    one, two = torch.arange(3), torch.arange(3, 6)
    assert chained(chained("", one), two) not in (chained(chained("", two), one), chained("", two), chained("", one, two))
    assert chained("", one, two) != chained("", two, one)


def test_weights_hash_excludes_only_local_loss_networks() -> None:
    def hashes(name: str) -> tuple[str, str]:
        torch.manual_seed(0)
        model = MLP(widths=[4, 4], batch_norm=True).build((1, 2, 2), 3)
        rule = fa_bench.attach(model, name, seed=0, sample_input=torch.zeros(2, 1, 2, 2))
        before = weights_hash(model)
        with torch.no_grad():
            for tensor in rule.feedback_parameters() or [model.bn1.running_mean]:
                tensor.add_(1)
        return before, weights_hash(model)

    (bp, other), (local, after), (kp, moved) = (hashes(name) for name in ("bp", "predsim", "kp"))
    assert bp == local == after and len({bp, other, kp, moved}) == 4


def test_remaining_time_of_grid_is_estimated_after_first_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Epoch 3 of 5 takes ten seconds; two epochs of this run and four epochs of the other runs remain. The estimate is logged
    only once."""
    said: list[str] = []
    now = [1000.0]
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(callbacks.log, "info", lambda text, *values: said.append(text % values))
    display = callbacks.Display("kp", later_epochs=4)
    trainer: Any = SimpleNamespace(
        progress=Progress(epoch=2),
        options=RunOptions(epochs=5),
        splits=SimpleNamespace(train=SimpleNamespace(steps=lambda *_: 1)),
    )
    display.on_fit_start(trainer)
    now[0] = 1010.0
    for trainer.progress.epoch in (3, 4):
        display.on_epoch_end(trainer, {"val_accuracy": None, "train_loss": 1.0, "test_accuracy": 0.5})
    display.close()
    assert said == [f"kp: {duration(10)} per epoch; about {duration(60)} remaining"]


def test_peak_memory_is_in_bytes() -> None:
    """A process that has imported torch uses a few hundred megabytes."""
    found = peak_memory(torch.device("cpu"))
    assert found is None or 5e7 < found < 1e12


def test_code_hash_covers_only_training_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs keep their hash if only the code of reports or analyses changes. The hash includes the contents and paths of all other
    source files."""

    def hashed(**files: str) -> str:
        for name, text in files.items():
            path = tmp_path / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return hashes._package_hash.__wrapped__()

    monkeypatch.setattr(hashes, "__file__", str(tmp_path / "runs" / "hashes.py"))
    before = hashed(runs__hashes="a = 1", rules__report="b = 1", report__tables="c = 1", analyses__one="d = 1")
    assert hashed(report__tables="c = 2", report__more="e = 1", analyses__one="d = 2") == before
    found = [before, hashed(rules__report="b = 2"), hashed(runs__hashes="a = 2"), hashed(top="f = 1"), hashed(rules__more="")]
    assert len(set(found)) == len(found)
    (tmp_path / "rules" / "more.py").rename(tmp_path / "rules" / "moved.py")
    assert hashed() not in found
