"""Optimizers, models and the files of a run, each by itself."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import fa_bench
from fa_bench.config.job import Job, RunOptions
from fa_bench.data.synthetic import Synthetic
from fa_bench.errors import OptionError
from fa_bench.files import atomic, dump_json
from fa_bench.models.conv2 import Conv2
from fa_bench.models.mlp import MLP
from fa_bench.models.resnet20 import ResNet20
from fa_bench.objectives.cross_entropy import CrossEntropy
from fa_bench.optim.adam import Adam
from fa_bench.optim.optimizers import Optimizers
from fa_bench.optim.sgd import SGD
from fa_bench.process import isolated
from fa_bench.rules.bp import BP
from fa_bench.runs.train import prepare
from fa_bench.schedules.base import Schedule
from fa_bench.schedules.constant import Constant
from fa_bench.schedules.decay import Cosine
from fa_bench.schedules.step import MultiStep, Step


def test_decay_of_the_first_epoch() -> None:
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


def test_learning_rate_scale_and_optimizer_of_learned_feedback() -> None:
    scaled = Optimizers(SGD(lr=0.2), fa_bench.attach(nn.Sequential(nn.Linear(3, 2)), "kp", b_lr_scale=0.5), 1)
    assert [group["lr"] for group in scaled.optimizers[0].param_groups] == [0.2, 0.1]
    own = Optimizers(SGD(), fa_bench.attach(nn.Sequential(nn.Linear(3, 2)), "kp"), 1, Adam(lr=0.3))
    assert [type(o).__name__ for o in own.optimizers] == ["SGD", "Adam"]
    assert [tuple(p.shape) for p in own.optimizers[1].param_groups[0]["params"]] == [(2, 3)]


def settings_by_epoch(optimizers: Optimizers, epochs: int) -> list[list[tuple[float, float]]]:
    """(rate, decay) of every group in every epoch."""
    seen = []
    for epoch in range(epochs):
        optimizers.begin_epoch(epoch)
        seen.append([(group["lr"], group["weight_decay"]) for one in optimizers.optimizers for group in one.param_groups])
        optimizers.step()
    return seen


def test_decays_and_schedules_of_weights_and_learned_feedback() -> None:
    """With a rate of its own feedback has the weights' schedule and decay; with an optimizer of its own both are that one's."""
    slow, fast = (Step(step_size=size, gamma=0.5) for size in (2, 1))
    of_weights = SGD(lr=0.2, weight_decay=0.01, first_epoch_weight_decay=0.5, schedule=slow)
    scaled = fa_bench.attach(nn.Sequential(nn.Linear(3, 2)), "kp", b_lr_scale=0.5)
    assert settings_by_epoch(Optimizers(of_weights, scaled, 3), 3) == [
        [(0.2, 0.5), (0.1, 0.5)], [(0.2, 0.01), (0.1, 0.01)], [(0.1, 0.01), (0.05, 0.01)]]
    of_feedback = Adam(lr=0.4, weight_decay=0.02, first_epoch_weight_decay=0.7, schedule=fast)
    own = fa_bench.attach(nn.Sequential(nn.Linear(3, 2)), "kp")
    assert settings_by_epoch(Optimizers(of_weights, own, 3, of_feedback), 3) == [
        [(0.2, 0.5), (0.4, 0.7)], [(0.2, 0.01), (0.2, 0.02)], [(0.1, 0.01), (0.1, 0.02)]]
    plain = fa_bench.attach(nn.Sequential(nn.Linear(3, 2)), "kp")
    alone = Optimizers(SGD(weight_decay=0.03), plain, 2, of_feedback)
    assert [decay for ((_, decay), _) in settings_by_epoch(alone, 2)] == [0.03, 0.03], "the other's first epoch is its own"


@pytest.mark.parametrize(("schedule", "expected"), [
    (Constant(), [1, 1, 1, 1]),
    (Step(step_size=2, gamma=0.5), [1, 1, 0.5, 0.5]),
    (MultiStep(milestones=[1, 3], gamma=0.1), [1, 0.1, 0.1, 0.01]),
    (Cosine(min_lr=0.2), [0.2 + 0.4 * (1 + math.cos(math.pi * t / 4)) for t in range(4)]),
])
def test_schedules(schedule: Schedule, expected: list[float]) -> None:
    optimizers = Optimizers(SGD(lr=1.0, schedule=schedule), fa_bench.attach(nn.Sequential(nn.Linear(3, 2)), "bp"), epochs=4)
    seen = []
    for epoch in range(4):
        optimizers.begin_epoch(epoch)
        seen.append(optimizers.lr)
    assert seen == pytest.approx(expected)


def test_kolen_pollack_shrinks_the_difference_as_its_recursion_says() -> None:
    """SGD with momentum m and coupled decay λ: v' = m v + λ D, D' = D - lr v', free of gradients."""
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


@pytest.mark.parametrize(("model", "shape", "parameters"), [
    (MLP(), (1, 28, 28), 669_706),  # 784-512-512-10 with biases
    (ResNet20(), (3, 32, 32), 269_722),  # He et al.: 0.27 M
    (Conv2(), (3, 32, 32), 896 + 9248 + 2 * 64 + 6272 * 128 + 128 + 256 + 1290),
    (Conv2(), (1, 28, 28), 320 + 9248 + 2 * 64 + 6272 * 128 + 128 + 256 + 1290),
])
def test_models_have_the_published_sizes_and_name_their_cuts(model, shape, parameters: int) -> None:
    net = model.build(shape, 10)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert net(torch.randn(2, *shape)).shape == (2, 10)
    rule = fa_bench.attach(net, "dfa", sample_input=torch.randn(2, *shape))
    assert not rule.coverage.uncovered
    # Every hidden activation is cut: one in front of each layer but the first.
    assert len(rule.feedback) == len(rule.coverage.covered) - 1


def test_initialiser_of_weights() -> None:
    net = MLP(init="xavier_uniform", widths=[300]).build((1, 10, 10), 10)
    bound = math.sqrt(6 / 400)
    assert 0.98 * bound < net.fc1.weight.abs().max() <= bound and not net.fc1.bias.any()


def test_atomic_write_keeps_the_old_file_when_it_fails(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(RuntimeError), atomic(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_json_has_no_nan() -> None:
    assert json.loads(dump_json({"a": [float("nan"), 1.5], "b": float("inf")})) == {"a": [None, 1.5], "b": None}


def test_options_name_what_is_allowed() -> None:
    with pytest.raises(OptionError, match=r"schedule\.gamma=2\.0 is out of range"):
        SGD.from_mapping({"schedule": {"name": "step", "step_size": 1, "gamma": 2}})
    with pytest.raises(OptionError, match=r"nam: unknown option .* did you mean 'name'"):
        SGD.from_mapping({"schedule": {"nam": "step"}})


def test_residual_net_without_shortcuts() -> None:
    """The same weights; a block whose last normalisation gives zero passes its input on only where it has a shortcut."""
    torch.manual_seed(0)
    nets = [ResNet20(width=4, blocks=1, shortcuts=shortcuts).build((1, 8, 8), 3) for shortcuts in (True, False)]
    nets[1].load_state_dict(nets[0].state_dict())
    x, changes = torch.randn(2, 1, 8, 8), []
    for net in nets:
        nn.init.zeros_(net.stages.layer2[0].bn2.weight)
        changes.append((net(x) - net(-x)).abs().max().item())
    assert changes[0] > 1e-3 and changes[1] == 0


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor cannot flush")
def test_a_run_computes_without_denormal_numbers() -> None:
    """Probabilities below 1e-38 would cost many times the arithmetic of zeros."""
    torch.set_flush_denormal(False)
    tiny = torch.full((8,), 1e-39)
    assert (tiny * 0.5 != 0).all()
    job = Job(RunOptions(device="cpu"), BP(), MLP(), Synthetic(), SGD(), None, CrossEntropy())
    try:
        with isolated():
            prepare(job)
            assert (tiny * 0.5 == 0).all()
        assert (tiny * 0.5 != 0).all(), "as it was before the run"
        torch.set_flush_denormal(True)
        with isolated():
            pass
        assert (tiny * 0.5 == 0).all()
    finally:
        torch.set_flush_denormal(False)
