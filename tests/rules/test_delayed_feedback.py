"""Tests of f3: which errors are projected, relations to dfa and drtp, stored errors, and refused calls."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fa_bench
from fa_bench.errors import ConfigError, CoverageError, OptionError, StateError
from fa_bench.mechanisms.cut import sample_errors
from fa_bench.mechanisms.cut.sample_errors import SampleErrors
from fa_bench.metrics.meter import AlignmentMeter
from fa_bench.objectives.mse import MSE
from fa_bench.objectives.sigmoid_ce import SigmoidCE
from fa_bench.registry.registries import ALGORITHMS

from . import nets
from .helpers import array, arrays, assert_matches, collect, feedback_arrays
from .reference import describe, sgd_step
from .references import REFERENCES

DELAYED = (
    "delayed_loss",
    "delayed_error",
    "delayed_loss_softmax",
    "delayed_error_softmax",
    "delayed_loss_one_hot",
    "delayed_error_one_hot",
)
NET, SAMPLES = "mlp_tanh", 7
X, Y = nets.batch(NET, size=SAMPLES)
CUTS = nets.activation_cuts(nets.NETS[NET]())


def attached(name: str = "f3", **options: Any) -> tuple[nn.Module, Any]:
    model = nets.NETS[NET]()
    options = ({"samples": SAMPLES} if name == "f3" else {}) | options
    return model, fa_bench.attach(model, name, seed=0, sample_input=X, cuts=CUTS, **options)


def step(model: nn.Module, rule: Any, indices: Tensor, y: Tensor = Y, **scale: float) -> dict[str, Tensor | None]:
    """The gradients of one pass on the samples with these indices."""
    model.zero_grad(set_to_none=True)
    logits = model(X[indices])
    rule.backward(F.cross_entropy(logits, y[indices]), logits, y[indices], indices=indices, **scale)
    return collect(model)


def numbers(gradients: dict[str, Tensor | None]) -> dict[str, np.ndarray]:
    return {name: array(gradient) for name, gradient in gradients.items() if gradient is not None}


ALL = torch.arange(SAMPLES)


def orders(epochs: int) -> list[Tensor]:
    """The shuffled batches of all epochs; every epoch has batches of 3, 3 and 1 samples."""
    return [
        batch
        for epoch in range(epochs)
        for batch in torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch)).split(3)
    ]


# ------------------------------------------------------------------------------------------------ equations
@pytest.mark.parametrize("first_epoch", ["target", "current", "zero"])
@pytest.mark.parametrize("information", [*DELAYED, "current_error", "one_hot_target"])
def test_shuffled_epochs_equal_plain_loops(information: str, first_epoch: str) -> None:
    """The updates of three epochs equal those of plain loops.

    The rounding error of one pass is 1e-12 and grows by less than a factor of a thousand.
    """
    model, rule = attached(information=information, first_epoch=first_epoch)
    chain, feedback = describe(nets.NETS[NET]()), feedback_arrays(rule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    params, velocity, kept = arrays(model), {}, {}
    for indices in orders(3):
        options = {"information": information, "first_epoch": first_epoch, "kept": kept, "indices": indices.tolist()}
        wanted = REFERENCES["f3"](chain, params, feedback, array(X[indices]), Y[indices].numpy(), **options)
        assert_matches(step(model, rule, indices), wanted)
        optimizer.step()
        rule.step()
        sgd_step(params, velocity, wanted, lr=0.2, momentum=0.9, decay=0.0, nesterov=False)
        assert_matches(arrays(model), params)
    if information.startswith("delayed"):
        assert len(kept) == SAMPLES


def test_without_updates_matches_dfa_from_second_epoch() -> None:
    (model, rule), (other, dfa) = attached(), attached("dfa", b_init="pytorch")
    for number, indices in enumerate(orders(3)):
        got, wanted = step(model, rule, indices), numbers(step(other, dfa, indices))
        if number < 3:
            with pytest.raises(AssertionError, match="relative differences"):
                assert_matches(got, wanted)
        else:
            assert_matches(got, wanted)
        rule.step()


@pytest.mark.parametrize("information", ["delayed_loss", "delayed_error_softmax", "current_error"])
def test_first_epoch_current_matches_dfa(information: str) -> None:
    """The derivative of the cross-entropy is softmax(z) - y, so all three kinds of information equal the error of dfa."""
    (model, rule), (other, dfa) = attached(information=information, first_epoch="current"), attached("dfa", b_init="pytorch")
    assert_matches(step(model, rule, ALL), numbers(step(other, dfa, ALL)))


def test_one_hot_target_matches_drtp_with_negated_feedback() -> None:
    (model, rule), (other, drtp) = attached(information="one_hot_target"), attached("drtp", b_init="pytorch")
    (first, f3) = attached()  # with the default information, in the first epoch
    for tensors in drtp.feedback.values():
        tensors["B"].neg_()
    wanted = numbers(step(other, drtp, ALL))
    assert_matches(step(model, rule, ALL), wanted)
    assert_matches(step(first, f3, ALL), wanted)


def test_first_epoch_zero_trains_only_output_layer() -> None:
    model, rule = attached(first_epoch="zero")
    got = step(model, rule, ALL)
    last = list(got)[-2:]
    assert [name for name, gradient in got.items() if gradient is not None and gradient.any()] == last
    assert any(gradient is not None and gradient.any() for name, gradient in step(model, rule, ALL).items() if name not in last)


@pytest.mark.parametrize("init", ["identity", "identity_pm"])
def test_identity_feedback_delivers_delayed_errors(init: str) -> None:
    """With identity feedback, the error at a cut repeats the sample's earlier error, with alternating signs for identity_pm."""
    model, rule = attached(b_init=init)
    seen: list[Tensor] = []
    logits = model(X[[4, 2]])
    rule.backward(F.cross_entropy(logits, Y[[4, 2]]), logits, Y[[4, 2]], indices=torch.tensor([4, 2]))
    earlier = (logits.detach().softmax(1) - F.one_hot(Y[[4, 2]], logits.shape[1])).flip(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    handle = model.get_submodule(CUTS[0]).register_forward_hook(
        lambda module, args, output: output.register_hook(seen.append) and None, prepend=True
    )
    logits = model(X[[2, 4]])
    handle.remove()
    rule.backward(F.cross_entropy(logits, Y[[2, 4]]), logits, Y[[2, 4]], indices=torch.tensor([2, 4]))
    (error,) = seen
    classes = logits.shape[1]
    for column in range(error.shape[1]):
        sign = -1 if init == "identity_pm" and column // classes % 2 else 1
        torch.testing.assert_close(error[:, column], sign * earlier[:, column % classes] / 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("objective", "output"), [(SigmoidCE(), torch.sigmoid), (MSE(), lambda z: z)], ids=["sigmoid", "mse"])
def test_stored_errors_for_sigmoid_and_mse_objectives(objective: Any, output: Any) -> None:
    """For sigmoid_ce and mse, delayed_loss and delayed_error are the same.

    As in the published code of f3, the kinds with softmax apply it to the outputs, for example to those of the sigmoid.
    """
    onehot = F.one_hot(Y, 3).double()
    found = {}
    for information in DELAYED[:4]:
        model = nets.NETS[NET]()
        options = {"information": information, "samples": SAMPLES, "cuts": CUTS}
        rule = fa_bench.attach(model, "f3", sample_input=X, objective=objective, **options)
        logits = model(X)
        rule.backward(objective.loss(logits, Y), logits, Y, indices=ALL)
        found[information] = rule.state_dict()["errors"]
        z = logits.detach()
    o = output(z)
    torch.testing.assert_close(found["delayed_loss"], o - onehot, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found["delayed_error"], o - onehot, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found["delayed_error_softmax"], o.softmax(1) - onehot, rtol=1e-12, atol=1e-15)
    leaf = o.clone().requires_grad_(True)
    sum(objective.loss(leaf[n : n + 1].softmax(1), Y[n : n + 1]) for n in range(SAMPLES)).backward()
    torch.testing.assert_close(found["delayed_loss_softmax"], leaf.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("information", DELAYED)
def test_float_targets(information: str) -> None:
    """In a sample's first epoch, the error is the negative target. The one-hot kinds multiply this error by the target."""
    targets, model = torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(3)).double(), nets.NETS[NET]()
    rule = fa_bench.attach(
        model, "f3", sample_input=X, objective=MSE(), information=information, samples=SAMPLES, cuts=CUTS, b_init="identity"
    )
    seen: list[Tensor] = []
    model.get_submodule(CUTS[-1]).register_forward_hook(lambda module, args, output: seen.append(output) or None, prepend=True)
    logits = model(X)
    seen[0].retain_grad()
    rule.backward(MSE().loss(logits, targets), logits, targets, indices=ALL)
    times = targets if information.endswith("one_hot") else 1
    torch.testing.assert_close(seen[0].grad[:, :3], -targets * times / SAMPLES, rtol=1e-12, atol=0)


# ------------------------------------------------------------------------------------------------ stored errors
@pytest.mark.parametrize("information", ["delayed_loss", "delayed_error"])
def test_stored_errors_ignore_batch_size_and_loss_scale(information: str) -> None:
    """For the same batch and the same stored errors, multiplying the loss by 8 multiplies the gradients by 8."""
    (whole, rule), (parts, other) = attached(information=information), attached(information=information)
    step(whole, rule, ALL)
    for indices, scale in zip(ALL.split(2), (1.0, 0.25, 4.0, 3.0), strict=True):
        logits = parts(X[indices])
        other.backward(F.cross_entropy(logits, Y[indices]) * scale, logits, Y[indices], scale, indices=indices)
    torch.testing.assert_close(other.state_dict()["errors"], rule.state_dict()["errors"], rtol=1e-12, atol=1e-16)
    plain = numbers(step(whole, rule, ALL))
    parts.zero_grad()
    logits = parts(X)
    other.backward(F.cross_entropy(logits, Y) * 8, logits, Y, indices=ALL)
    assert_matches(collect(parts), {name: 8 * gradient for name, gradient in plain.items()})


def test_pass_updates_only_errors_of_its_samples() -> None:
    model, rule = attached()
    step(model, rule, torch.tensor([1, 5]))
    state = rule.state_dict()
    assert state["seen"].tolist() == [index in (1, 5) for index in range(SAMPLES)]
    assert not state["errors"][[0, 2, 3, 4, 6]].any() and state["errors"][[1, 5]].all()
    step(model, rule, torch.tensor([0, 6]))
    assert torch.equal(rule.state_dict()["errors"][[1, 5]], state["errors"][[1, 5]])
    assert not state["seen"][0] and not state["errors"][0].any(), "a later pass changed the returned state"


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_nonfinite_errors_are_not_stored(bad: float) -> None:
    """Samples whose new errors are not finite keep their earlier errors, if they have any.

    A gradient scaler likewise skips an update that is not finite.
    """
    model, rule = attached(information="delayed_error")
    step(model, rule, torch.tensor([0, 1]))
    before = rule.state_dict()
    inputs = X[[1, 2, 3]].clone()
    inputs[:2] = bad
    logits = model(inputs)
    rule.backward(F.cross_entropy(logits, Y[[1, 2, 3]]), logits, Y[[1, 2, 3]], 1.0, indices=torch.tensor([1, 2, 3]))
    after = rule.state_dict()
    assert after["seen"].tolist() == [True, True, False, True, False, False, False]
    assert torch.equal(after["errors"][:3], before["errors"][:3]) and after["errors"].isfinite().all()


def test_measuring_and_evaluation_do_not_store_errors() -> None:
    model, rule = attached()
    step(model, rule, ALL)
    before = rule.state_dict()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
        model(X)
    with rule.exact():
        F.cross_entropy(model(X), Y).backward()
    first = AlignmentMeter(rule, X[:3], Y[:3], ["delta_angle"], indices=ALL[:3]).measure()
    other = AlignmentMeter(rule, X[:3], Y[:3], ["delta_angle"], indices=ALL[3:6]).measure()
    assert first != other
    assert all(torch.equal(tensor, before[name]) for name, tensor in rule.state_dict().items())


def test_load_state_dict_restores_and_validates_errors() -> None:
    (model, rule), (twin, other) = attached(), attached()
    step(model, rule, ALL)
    other.load_state_dict(rule.state_dict())
    assert_matches(step(twin, other, ALL), numbers(step(model, rule, ALL)))
    with pytest.raises(StateError, match=r"errors of shape \(7, 3\); this rule stores errors of shape \(8, 3\)"):
        attached(samples=8)[1].load_state_dict(rule.state_dict())
    with pytest.raises(StateError, match="missing: seen"):
        other.load_state_dict({"errors": rule.state_dict()["errors"]})
    for options in ({"information": "current_error"}, {"information": "one_hot_target"}):
        assert attached(**options)[1].state_dict() == {}


def test_copied_model_stores_errors_separately() -> None:
    model, rule = attached()
    step(model, rule, ALL[:3])
    twin = copy.deepcopy(model)
    step(twin, fa_bench.attached_rule(twin), ALL[3:])
    assert rule.state_dict()["seen"].sum() == 3


def test_stored_errors_have_model_dtype_but_at_least_float32() -> None:
    for dtype, wanted in ((torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
        rule = fa_bench.attach(model, "f3", samples=2, cuts=["1"])
        assert rule.state_dict()["errors"].dtype == wanted
        logits = model(torch.ones(2, 4, dtype=dtype))
        rule.backward(F.cross_entropy(logits, torch.tensor([0, 1])), logits, torch.tensor([0, 1]), indices=torch.arange(2))
        assert rule.state_dict()["errors"].dtype == wanted


def test_stored_errors_follow_model_dtype() -> None:
    """After the model's dtype changes, errors are stored in the new precision (at least single), and earlier errors are kept."""
    model, rule = attached()  # in double precision
    step(model, rule, ALL)
    kept = rule.state_dict()["errors"]
    for dtype, wanted in ((torch.float32, torch.float32), (torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        model.to(dtype)
        for _ in range(2):
            logits = model(X.to(dtype))
            rule.backward(F.cross_entropy(logits, Y), logits, Y, indices=ALL)
        errors = rule.state_dict()["errors"]
        assert errors.dtype == wanted and rule.state_dict()["seen"].all()
        torch.testing.assert_close(errors.double(), kept, atol=0.02, rtol=0.02)  # the precision of bfloat16


def test_coverage_reports_memory_of_stored_errors() -> None:
    assert "most recent error of each of 7 training samples takes 175 B" in str(attached()[1].coverage)  # 7 (3 x 8 + 1)
    assert "training samples" not in str(attached(information="current_error")[1].coverage)


def test_rejects_stored_errors_exceeding_memory() -> None:
    with pytest.raises(ConfigError, match=r"the errors of \d+ training samples: needs .* of memory"):
        attached(samples=10**13)


# ------------------------------------------------------------------------------------------------ rejected calls
@pytest.mark.parametrize(
    ("indices", "error"),
    [
        (None, r"requires the indices of the batch's samples.*rule\.backward\(loss, logits, target, indices=indices\)"),
        (
            torch.arange(SAMPLES).view(-1, 1),
            r"have the shape \(7, 1\) and are torch.int64; this batch needs integers of shape \(7,\)",
        ),
        (torch.arange(3), r"have the shape \(3,\)"),
        (torch.arange(SAMPLES).double(), r"are torch.float64"),
        (torch.arange(SAMPLES) > 3, r"are torch.bool"),
        (torch.arange(1, SAMPLES + 1), r"index 7 is out of range: there are 7 training samples, numbered from 0 to 6"),
        (torch.arange(-1, SAMPLES - 1), r"index -1 is out of range"),
    ],
    ids=["none", "matrix", "few", "floats", "bools", "high", "low"],
)
def test_rejects_invalid_indices(indices: Tensor | None, error: str) -> None:
    model, rule = attached()
    logits = model(X)
    with pytest.raises(ValueError, match=f"rule 'f3'.*{error}"):
        rule.backward(F.cross_entropy(logits, Y), logits, Y, indices=indices)
    assert not rule.state_dict()["seen"].any()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_rejects_plain_loss_backward() -> None:
    model, _ = attached(first_epoch="zero")
    with pytest.raises(ValueError, match="requires the indices"):
        F.cross_entropy(model(X), Y).backward()


def test_delayed_errors_require_number_of_samples() -> None:
    """If the number of samples is missing, attach raises an error before it searches for cuts.

    The number of samples is not needed if errors are not delayed.
    """
    with pytest.raises(OptionError, match=r"samples: is required.*fa_bench\.attach\(model, 'f3', samples=len\(dataset\)\)"):
        fa_bench.attach(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), "f3")
    for information in ("current_error", "one_hot_target"):
        attached(samples=None, information=information)


def test_one_loss_of_two_passes_is_refused() -> None:
    model, rule = attached(first_epoch="zero")
    loss = F.cross_entropy(model(X), Y) + F.cross_entropy(model(X), Y)
    with pytest.raises(ValueError, match="the indices belong to one of them"):
        rule.backward(loss, indices=ALL, loss_scale=1.0)


def test_int32_indices() -> None:
    model, rule = attached()
    step(model, rule, ALL)
    twin, other = attached()
    logits = twin(X)
    other.backward(F.cross_entropy(logits, Y), logits, Y, indices=ALL.int())
    assert torch.equal(other.state_dict()["errors"], rule.state_dict()["errors"])


def test_labels_are_required_only_by_dependent_options() -> None:
    """Labels are needed for targets, including those of the first epoch, but not for the derivative of the loss."""
    for options, needed in (
        ({}, True),
        ({"first_epoch": "current"}, False),
        ({"first_epoch": "zero"}, False),
        ({"first_epoch": "zero", "information": "delayed_loss_one_hot"}, True),
        ({"first_epoch": "zero", "information": "delayed_error"}, True),
        ({"information": "current_error"}, False),
        ({"information": "one_hot_target"}, True),
    ):
        model, rule = attached(**options)
        loss = F.cross_entropy(model(X), Y)
        if needed:
            with pytest.raises(ValueError, match="requires labels"):
                rule.backward(loss, indices=ALL)
        else:
            rule.backward(loss, indices=ALL)


def test_outputs_with_positions_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    with pytest.raises(CoverageError, match=r"rule 'f3' needs outputs of shape \(N, C\), with one error per sample"):
        fa_bench.attach(model, "f3", sample_input=torch.zeros(2, 6, 4), cuts=["1"], samples=2)


def test_expect_samples_sets_and_checks_sample_count() -> None:
    rule = ALGORITHMS["f3"]()
    rule.expect_samples(5)
    assert rule.sample_count == 5
    _, rule = attached(samples=9)
    rule.expect_samples(9)
    assert rule.sample_count == 9
    with pytest.raises(OptionError, match="samples=9: there are 10 training samples; use null, or 10 or more"):
        rule.expect_samples(10)
    assert not attached(information="one_hot_target")[1].needs_indices and rule.needs_indices


def test_process_without_new_errors_joins_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a process without new errors skipped the exchange, the other processes would wait for it."""
    kept, calls = SampleErrors(3, 2, torch.zeros(())), []

    def gathered(everywhere: list[Any], own: Any) -> None:
        calls.append(list(own))
        everywhere[:] = [own, [(torch.tensor([2]), torch.ones(1, 2))]]

    monkeypatch.setattr(sample_errors, "process_count", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gathered)
    kept.exchange()
    assert calls == [[]] and kept.seen.tolist() == [False, False, True] and kept.errors[2].tolist() == [1, 1]
