"""The training loop agrees with one written by hand, and the best epoch is chosen correctly."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fa_bench
from fa_bench.callbacks.base import Callback
from fa_bench.config.job import RunOptions
from fa_bench.data.base import Splits
from fa_bench.data.synthetic import Synthetic
from fa_bench.mechanisms.rule import Rule
from fa_bench.metrics import evaluation
from fa_bench.metrics.meter import AlignmentMeter
from fa_bench.objectives.cross_entropy import CrossEntropy
from fa_bench.optim.optimizers import Optimizers
from fa_bench.optim.sgd import SGD
from fa_bench.runs import loop
from fa_bench.runs.callbacks import Alignment
from fa_bench.runs.divergence import Diverged, Divergence, first_nonfinite_output
from fa_bench.runs.execution import Execution
from fa_bench.runs.hashes import chained
from fa_bench.runs.loop import Progress, Trainer
from fa_bench.runs.parallel import World
from fa_bench.schedules.step import Step

F3 = ("f3", {"cuts": ["act"], "samples": 40})
BATCH, SEED, LR, GAMMA, DECAY, FIRST_DECAY, MOMENTUM = 16, 3, 0.1, 0.5, 0.02, 0.5, 0.8


def load() -> Splits:
    """Load 40 images for training, 4 for validation and 10 for testing. With a batch size of 16, the last training batch has 8
    images."""
    dataset = Synthetic(samples=44, validation=4, test_samples=10, classes=3, size=2, noise=0.4)
    return dataset.load(Path(), torch.device("cpu"))


def make_model(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    parts = {
        "flat": nn.Flatten(),
        "fc1": nn.Linear(4, 6),
        "bn": nn.BatchNorm1d(6),
        "act": nn.ReLU(),
        "drop": nn.Dropout(dropout),
        "fc2": nn.Linear(6, 3),
    }
    return nn.Sequential(OrderedDict(parts))


def trained(rule: Rule) -> list[Tensor]:
    """The weights and the learned feedback, each tensor once."""
    return list({id(tensor): tensor for tensor in [*rule.model.parameters(), *rule.feedback_parameters()]}.values())


def nothing(*arguments: Any) -> None:
    pass


def fit(
    rule: Rule,
    splits: Splits,
    epochs: int,
    drop_last: bool = False,
    probe_every: int = 0,
    on_probe: Any = nothing,
    on_step: Any = nothing,
    on_wait: Any = nothing,
    on_gradients: Any = nothing,
    callbacks_after: Iterable[Callback] = (),
    **more: Any,
) -> list[dict[str, Any]]:
    """Train with the package's loop, and return the metrics of every epoch."""
    options = SGD(
        lr=LR,
        momentum=MOMENTUM,
        weight_decay=DECAY,
        first_epoch_weight_decay=FIRST_DECAY,
        schedule=Step(step_size=1, gamma=GAMMA),
    )
    lines: list[dict[str, Any]] = []
    run = RunOptions(batch_size=BATCH, drop_last=drop_last, seed=SEED, epochs=epochs, **more)
    meter = AlignmentMeter(rule, *next(splits.test.batches(4)), indices=torch.arange(4))

    class Watch(Callback):
        def on_step_end(self, trainer: Trainer) -> None:
            on_step(trainer.progress)

        def on_evaluation_batch(self, trainer: Trainer) -> None:
            on_wait()

        def on_gradients(self, trainer: Trainer) -> None:
            on_gradients(trainer.progress.step)

        def on_epoch_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
            lines.append(metrics)

    Trainer(
        rule,
        Optimizers(options, rule, epochs),
        splits,
        run,
        [Divergence(), Alignment(meter, probe_every, on_probe), Watch(), *callbacks_after],
    ).fit()
    return lines


def indices_of(splits: Splits, x: Tensor) -> Tensor:
    """The indices of a batch's training samples, found by their pixels."""
    (samples, _) = next(splits.train.batches(len(splits.train)))
    return torch.stack([(samples == one).flatten(1).all(1).nonzero().squeeze() for one in x])


def evaluate_by_hand(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """The loss and accuracy of a copy of the model in evaluation mode."""
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()(x)
    return {"loss": F.cross_entropy(logits, y).item(), "accuracy": (logits.argmax(1) == y).float().mean().item()}


def fit_by_hand(rule: Rule, splits: Splits, epochs: int, drop_last: bool) -> list[dict[str, Any]]:
    """Train in the same way without the package's loop and optimizers, and return the metrics of every epoch."""
    optimizer = torch.optim.SGD(trained(rule), lr=LR, momentum=MOMENTUM, foreach=False)
    lines = []
    rule.model.train()
    for epoch in range(epochs):
        (group,) = optimizer.param_groups
        group["lr"], group["weight_decay"] = LR * GAMMA**epoch, DECAY if epoch else FIRST_DECAY
        losses, hits = [], []
        for x, y in splits.train.batches(BATCH, seed=SEED, epoch=epoch, drop_last=drop_last):
            optimizer.zero_grad()
            logits = rule.model(x)
            losses += F.cross_entropy(logits, y, reduction="none").tolist()
            hits += (logits.argmax(1) == y).tolist()
            rule.backward(F.cross_entropy(logits, y), logits, y, indices=indices_of(splits, x))
            optimizer.step()
            rule.step()
        line = {"lr": group["lr"], "train_loss": sum(losses) / len(losses), "train_accuracy": sum(hits) / len(hits)}
        for name, split in (("val", splits.validation), ("test", splits.test)):
            assert split is not None
            by_hand = evaluate_by_hand(rule.model, *next(split.batches(len(split))))
            line |= {f"{name}_{key}": value for key, value in by_hand.items()}
        lines.append(line)
    return lines


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bp", {}),
        ("kp", {}),
        ("pfa", {"density": 0.5, "ratio": 3.0}),
        ("wm", {"initial_steps": 0, "mirror_batch": 8}),
        ("drtp", {"cuts": ["act"]}),
        F3,
    ],
    ids=["bp", "kp", "pfa", "wm", "drtp", "f3"],
)
def test_loop_matches_handwritten_reference(name: str, options: dict[str, Any], drop_last: bool) -> None:
    """Both loops have the same first-epoch decay, schedule, order of calls, handling of a smaller last batch, and evaluation
    mode."""
    splits, epochs = load(), 3
    rules = [fa_bench.attach(make_model(), name, seed=1, **options) for _ in range(2)]
    rules[0].model.eval()  # the loop itself sets the mode
    got, want = fit(rules[0], splits, epochs, drop_last), fit_by_hand(rules[1], splits, epochs, drop_last)
    assert [line["step"] for line in got] == [2, 4, 6] if drop_last else [3, 6, 9]
    for line, expected in zip(got, want, strict=True):
        # In float32, the fused update causes rounding differences of 1e-7 per step, which normalisation amplifies over nine
        # steps.
        assert {key: line[key] for key in expected} == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(trained(rules[0]), trained(rules[1]), rtol=1e-4, atol=1e-5)
    # `trained` does not include the B of wm, which no optimizer updates.
    torch.testing.assert_close(rules[0].feedback, rules[1].feedback, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rules[0].model.state_dict(), rules[1].model.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), [("bp", {}), ("kp", {}), ("drtp", {"cuts": ["act"]}), F3])
def test_micro_batches_are_weighted_by_size(name: str, options: dict[str, Any]) -> None:
    """A batch of 16 images is split into parts of 6, 5 and 5 images, and a batch of 8 into parts of 3, 3 and 2. Without
    normalisation, the parts train like the whole batch.

    In float32, the order of summation changes the results by 1e-7 per step.
    """
    found = []
    for accumulate in (1, 3):
        model = make_model()
        del model.bn
        rule = fa_bench.attach(model, name, seed=1, **options)
        lines = fit(rule, load(), 2, accumulate=accumulate, clip_norm=0.5)
        found.append((trained(rule), [[line[key] for key in ("step", "train_loss", "train_accuracy")] for line in lines]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("accumulate", "sizes"),
    [
        (1, [16, 16, 8]),
        (2, [8, 8, 8, 8, 4, 4]),
        (3, [6, 5, 5, 6, 5, 5, 3, 3, 2]),
        (12, 2 * [*4 * [2], *8 * [1]] + 8 * [1]),
    ],
)
def test_accumulate_is_limited_to_batch_size(accumulate: int, sizes: list[int]) -> None:
    seen: list[int] = []

    class Watch(Callback):
        def on_loss(self, trainer: Trainer, x: Tensor) -> None:
            seen.append(len(x))

    model = make_model()
    del model.bn
    fit(fa_bench.attach(model, "bp"), load(), 1, accumulate=accumulate, callbacks_after=[Watch()])
    assert seen == sizes


def test_rule_steps_after_the_optimizer() -> None:
    """The entries that pfa's mask removes from R are zero again after every update."""
    rule = fa_bench.attach(make_model(), "pfa", seed=1, density=0.5)
    removed = {layer: tensors["R"] == 0 for layer, tensors in rule.feedback.items()}
    seen = []

    def look(progress: Progress) -> None:
        seen.append(progress.step)
        assert not any(rule.feedback[layer]["R"][mask].any() for layer, mask in removed.items())

    fit(rule, load(), 1, on_step=look)
    assert seen == [1, 2, 3] and all(mask.any() for mask in removed.values())


@pytest.mark.parametrize("name", ["bp", "kp", "dfa"])
def test_measuring_angles_changes_no_number(name: str) -> None:
    """Measuring does not change results, even with dropout, because measurements do not use torch's generator."""
    found = []
    for every in (0, 1):
        rule = fa_bench.attach(make_model(0.5), name, seed=1, **({"cuts": ["act"]} if name == "dfa" else {}))
        torch.manual_seed(5)
        lines = fit(rule, load(), 2, probe_every=every)
        kept = [{key: value for key, value in line.items() if key not in ("angles", "seconds")} for line in lines]
        found.append((kept, rule.model.state_dict()))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=0)


def test_best_epoch_is_first_with_best_validation_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter([(0.5, 0.1), (0.7, 0.2), (0.7, 0.9), (0.6, 0.8)])
    splits, progress = load(), []

    def evaluate(model: nn.Module, objective: Any, split: Any, *arguments: Any) -> dict[str, float]:
        if split is splits.validation:
            evaluate.now = next(accuracies)
        return {"loss": 1.0, "accuracy": evaluate.now[0 if split is splits.validation else 1]}

    monkeypatch.setattr(loop, "evaluate", evaluate)
    fit(fa_bench.attach(make_model(), "bp"), splits, 4, on_step=lambda present: progress.append(present))
    assert (progress[-1].best_epoch, progress[-1].best_val, progress[-1].test_at_best) == (2, 0.7, 0.2)


def test_nonfinite_score_is_never_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """An overflow, for example, makes a perplexity infinite or NaN. An epoch with such a score must neither be the best one nor
    prevent later epochs from becoming the best."""
    of_epochs = iter([float("nan"), float("-inf"), 0.5, float("inf"), 0.4])
    splits, progress, now = load(), [], [0.0]

    def evaluate(model: nn.Module, objective: Any, split: Any, *arguments: Any) -> dict[str, float]:
        if split is splits.validation:
            now[0] = next(of_epochs)
        return {"loss": 1.0, "accuracy": now[0]}

    monkeypatch.setattr(loop, "evaluate", evaluate)
    fit(fa_bench.attach(make_model(), "bp"), splits, 5, on_step=lambda present: progress.append(present))
    assert (progress[-1].best_epoch, progress[-1].best_val, progress[-1].test_at_best) == (3, 0.5, 0.5)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_evaluation_uses_training_precision(precision: str, dtype: torch.dtype) -> None:
    """Only evaluations run without gradients, which is how the test recognises them."""
    model, seen = make_model(), set()
    rule = fa_bench.attach(model, "bp")
    model.fc2.register_forward_hook(lambda module, args, output: None if torch.is_grad_enabled() else seen.add(output.dtype))
    fit(rule, load(), 1, precision=precision)
    assert seen == {dtype}


def test_epoch_records_angles_only_if_measured() -> None:
    """An epoch has three steps. Angles are measured at steps 5, 10 and 15, in epochs 2, 4 and 5, and always in the last epoch."""
    lines = fit(fa_bench.attach(make_model(), "bp"), load(), 6, probe_every=5)
    assert [line["angles"] is not None for line in lines] == [False, True, False, True, True, True]


def test_batches_hash_covers_first_batch_of_each_epoch() -> None:
    splits, seen = load(), []
    fit(fa_bench.attach(make_model(), "bp"), splits, 2, on_step=lambda progress: seen.append(progress.batches_hash))
    want = [""]
    for epoch in range(2):
        want.append(chained(want[-1], *next(splits.train.batches(BATCH, seed=SEED, epoch=epoch))))
    assert seen == [want[1]] * 3 + [want[2]] * 3


def test_begin_step_receives_global_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are counted from the start of the run, so dropout does not repeat itself in another epoch."""
    seen = []
    monkeypatch.setattr(World, "begin_step", lambda world, seed, step: seen.append((seed, step)))
    fit(fa_bench.attach(make_model(), "bp"), load(), 2)
    assert seen == [(SEED, step) for step in range(6)]


@pytest.mark.parametrize("is_external", [False, True])
def test_first_stop_request_wins(is_external: bool) -> None:
    class Twice(Callback):
        def on_epoch_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
            trainer.stop("first")
            trainer.stop("second")

    rule, callback = fa_bench.attach(make_model(), "bp"), Twice()
    run = RunOptions(batch_size=BATCH, epochs=3)
    external = [callback] if is_external else []
    trainer = Trainer(rule, Optimizers(SGD(lr=LR), rule, 3), load(), run, [callback], external=external)
    trainer.fit()
    assert trainer.stop_request is not None and trainer.stop_request["reason"] == "first"
    assert trainer.progress.epoch == 1 and (trainer.progress.stopped is None) == is_external


@pytest.mark.parametrize(("drop_last", "steps"), [(False, 12), (True, 8)])
def test_compilation_decision_uses_steps_of_whole_run(drop_last: bool, steps: int) -> None:
    given = []

    class Judged(Execution):
        def forward(self, function: Any, model: nn.Module, steps: int, processes: int = 1, repeats: bool = False) -> Any:
            given.append((steps, processes, repeats))
            return super().forward(function, model, steps, processes, repeats)

    rule, run = fa_bench.attach(make_model(), "fdfa", cuts=["act"]), RunOptions(batch_size=BATCH, epochs=4, drop_last=drop_last)
    Trainer(rule, Optimizers(SGD(lr=LR), rule, 4), load(), run, execution=Judged(run, torch.device("cpu")))
    assert given == [(steps, 1, True)]


def test_gradient_callbacks_run_before_clipping() -> None:
    rule, seen = fa_bench.attach(make_model(), "fa"), []
    weight: Any = rule.model.get_submodule("fc1").weight
    fit(rule, load(), 1, clip_norm=1e-6, on_gradients=lambda step: seen.append(weight.grad.norm().item()))
    assert len(seen) == 3 and min(seen) > 1e-4


def test_begin_epoch_receives_zero_based_epoch() -> None:
    rule, epochs = fa_bench.attach(make_model(), "fa"), []
    rule.begin_epoch = epochs.append  # type: ignore[method-assign]
    fit(rule, load(), 2)
    assert epochs == [0, 1]


def test_gradient_callbacks_run_before_update() -> None:
    rule = fa_bench.attach(make_model(), "kp", seed=1)
    weight = rule.model.fc1.weight
    seen, after = [], {0: weight.detach().clone()}

    def look(step: int) -> None:
        seen.append(step)
        assert torch.equal(weight, after[step]) and all(tensor.grad is not None for tensor in trained(rule))

    fit(rule, load(), 2, on_step=lambda progress: after.update({progress.step: weight.detach().clone()}), on_gradients=look)
    assert seen == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("kind", ["weight", "feedback"])
def test_nonfinite_tensor_after_last_step_is_divergence(kind: str) -> None:
    """The last step makes a number infinite, which no later loss can reveal."""
    rule = fa_bench.attach(make_model(), "kp", seed=1)
    tensor = rule.model.fc2.weight if kind == "weight" else rule.feedback["fc2"]["B"]

    def spoil(progress: Progress) -> None:
        if progress.step == 3:
            tensor.data[0, 0] = float("inf")

    with pytest.raises(Diverged) as caught:
        fit(rule, load(), 1, on_step=spoil)
    assert (caught.value.epoch, caught.value.step) == (1, 3)
    assert caught.value.layer is not None and caught.value.layer.startswith("fc2.")


def test_nonfinite_search_does_not_change_model() -> None:
    model = make_model(0.5)
    with torch.no_grad():
        model.fc1.bias[0] = float("nan")
    x = torch.ones(3, 1, 2, 2)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert first_nonfinite_output(model, x) == "fc1" and first_nonfinite_output(make_model(), x) is None
    assert model.training and model.bn.training and not model.fc1._forward_hooks
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0, equal_nan=True)
    assert model.eval() is model and first_nonfinite_output(model, x) == "fc1" and not model.training


def test_evaluation_averages_over_images_and_not_over_batches() -> None:
    """The 600 images form a batch of 512 and one of 88, whose losses differ."""
    model = make_model().eval()
    split = Synthetic(samples=10, test_samples=600, classes=3, size=2).load(Path(), torch.device("cpu")).test
    split.labels[512:] = 0
    x, y = next(split.batches(600))
    # The tolerance covers float32 sums of 600 numbers in a different order.
    assert loop.evaluate(model, CrossEntropy(), split, BATCH) == pytest.approx(evaluate_by_hand(model, x, y), rel=1e-5)
    assert not model.training and loop.evaluate(model.train(), CrossEntropy(), split, BATCH) and model.training


def test_angles_are_measured_once_per_step() -> None:
    """An epoch has three batches. The angles after the last batch are those at the end, which are not measured twice."""
    for every, steps in ((3, [0, 3, 6]), (2, [0, 2, 4, 6]), (4, [0, 4, 6]), (0, [6])):
        measured: list[int] = []
        fit(
            fa_bench.attach(make_model(), "fa", seed=0),
            load(),
            2,
            probe_every=every,
            on_probe=lambda step, _, measured=measured: measured.append(step),
        )
        assert measured == steps


def test_evaluation_calls_on_wait_before_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ten test images form three batches of at most four. With batches of 16, a training epoch evaluates one batch for
    validation and one for testing."""
    monkeypatch.setattr(evaluation, "EVALUATION_BATCH", 1)
    waits: list[None] = []
    evaluated = loop.evaluate(make_model(), CrossEntropy(), load().test, 4, lambda: waits.append(None))
    assert len(waits) == 3 and evaluated == loop.evaluate(make_model(), CrossEntropy(), load().test, 4)
    waits.clear()
    fit(fa_bench.attach(make_model(), "bp"), load(), 1, on_wait=lambda: waits.append(None))
    assert len(waits) == 2, "expected one batch for validation and one for testing"


def test_nonfinite_weight_is_reported_before_feedback() -> None:
    for spoiled, named in ((("fc1", "fc2"), "fc1.weight"), (("fc2",), "fc2.weight")):
        rule = fa_bench.attach(make_model(), "kp", seed=1)

        def spoil(progress: Progress, rule: Rule = rule, spoiled: tuple[str, ...] = spoiled) -> None:
            for layer in spoiled:
                rule.model.get_submodule(layer).weight.data[0, 0] = float("nan")
            rule.feedback["fc1"]["B"].data[0, 0] = float("inf")

        with pytest.raises(Diverged, match=rf"first in {named}") as caught:
            fit(rule, load(), 1, on_step=spoil)
        assert caught.value.layer == named


def test_test_at_best_ignores_other_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test accuracies of other epochs make no difference."""
    of_epochs = iter([(0.5, 0.9), (0.7, 0.2), (0.6, 0.8)])
    splits, progress, now = load(), [], [(0.0, 0.0)]

    def evaluate(model: nn.Module, objective: Any, split: Any, *arguments: Any) -> dict[str, float]:
        if split is splits.validation:
            now[0] = next(of_epochs)
        return {"loss": 1.0, "accuracy": now[0][split is splits.test]}

    monkeypatch.setattr(loop, "evaluate", evaluate)
    fit(fa_bench.attach(make_model(), "bp"), splits, 3, on_step=lambda present: progress.append(present))
    assert (progress[-1].best_epoch, progress[-1].best_val, progress[-1].test_at_best) == (2, 0.7, 0.2)
