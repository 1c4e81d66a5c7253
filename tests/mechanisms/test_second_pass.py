"""Additional passes of an attached model see the same state as the first pass and leave no traces."""

import dataclasses
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fa_bench
from fa_bench.errors import StateError
from fa_bench.mechanisms.second_pass import Draws, again
from fa_bench.rules.dfa import DFA


@dataclasses.dataclass(eq=False)
class Repeating(DFA):
    """An unregistered rule that runs additional passes in the backward pass and stores their outputs."""

    name = "repeating"
    repeats = True
    wanted: ClassVar[list[Any]] = []

    def broadcast(self, delta, target):
        assert self.first_pass is not None
        self.seen = [again(self.model, self.mode, self.first_pass, **changes) for changes in self.wanted]
        return delta


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(0.5), nn.ReLU(), nn.Linear(9, 4))


def repeated(*wanted, model=None, x=None, before=lambda: None, context=None):
    """Return the outputs of the first pass, the outputs of the additional passes, the model, and its input."""
    model = model or net()
    rule = Repeating(cuts=["3"]).attach(model)
    Repeating.wanted = list(wanted)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)) if x is None else x
    with context or torch.enable_grad():
        logits = model(x)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    loss = F.cross_entropy(logits.float(), torch.arange(8) % 4)
    before()
    state = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    return logits, rule.seen, model, x


def test_repeated_pass_reuses_dropout_masks_and_statistics():
    logits, (first, second), _, _ = repeated({}, {}, before=lambda: torch.rand(3))
    assert torch.equal(first, logits) and torch.equal(second, logits)


def test_repeated_pass_reuses_keyword_arguments():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x, scale=1.0):
            return scale * self.net(x)

    model = Scaled()
    rule = Repeating(cuts=["net.3"]).attach(model)
    Repeating.wanted = [{}]
    for call in (lambda x: model(x, scale=2.0), lambda x: model(x=x, scale=3.0)):
        logits = call(torch.randn(8, 6))
        F.cross_entropy(logits, torch.arange(8) % 4).backward()
        assert torch.equal(rule.seen[0], logits)


def test_batch_norm_uses_statistics_of_new_batch():
    other = torch.randn(8, 6, generator=torch.Generator().manual_seed(5)) * 3
    _, (seen,), model, _ = repeated({"args": (other,)})
    hidden = model.get_submodule("0")(other)
    assert not torch.allclose(seen, again_in_eval(model, other))
    normalised = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt()
    captured = []
    model.get_submodule("1").register_forward_hook(lambda module, args, output: captured.append(output))
    model.train()
    model(other)
    assert torch.allclose(captured[0], normalised, atol=1e-6)


def again_in_eval(model, x):
    model.eval()
    with torch.no_grad():
        return model(x)


def test_module_in_eval_mode_uses_running_statistics():
    model = net()
    model.get_submodule("1").eval()
    logits, (seen,), _, _ = repeated({}, model=model)
    assert torch.equal(seen, logits)


def test_changed_inputs_and_outputs_affect_only_later_modules():
    logits, (at_input, at_output, none), model, x = repeated(
        {"inputs": {"4": torch.zeros_like}}, {"outputs": {"0": torch.ones_like}}, {"outputs": {"0": lambda _: None}}
    )
    readout = model.get_submodule("4")
    assert isinstance(readout, nn.Linear) and readout.bias is not None
    assert torch.equal(at_input, readout.bias.expand_as(at_input))
    assert torch.allclose(at_output, readout.bias.expand_as(at_output))  # the normalisation maps constant values to zero
    assert torch.equal(none, logits)
    with torch.no_grad():
        model(x)
    assert not readout._forward_pre_hooks and len(model.get_submodule("0")._forward_hooks) == 0  # no hook is left behind


def test_repeated_pass_uses_autocast_of_first_pass():
    logits, (seen,), _, _ = repeated({}, context=torch.autocast("cpu", dtype=torch.bfloat16))
    assert logits.dtype == seen.dtype == torch.bfloat16
    assert torch.equal(seen, logits)


def test_rejects_input_changed_in_place():
    x = torch.randn(8, 6)
    with pytest.raises(StateError, match=r"an input of shape \(8, 6\) was changed in place after the forward pass; pass a copy"):
        repeated({}, x=x, before=lambda: x.add_(1))


def test_each_backward_pass_repeats_its_own_forward_pass():
    model = net()
    rule = Repeating(cuts=["3"]).attach(model)
    Repeating.wanted = [{}]
    xs = [torch.randn(8, 6, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    logits = [model(x) for x in xs]
    for output in logits:
        F.cross_entropy(output, torch.arange(8) % 4).backward()
        assert torch.equal(rule.seen[0], output)
    assert rule.first_pass is None


def test_other_rules_store_no_first_pass():
    model = net()
    rule = fa_bench.attach(model, "dfa", cuts=["3"])
    model(torch.randn(8, 6))
    assert rule.first_pass is None


def test_draws_depend_on_seed_number_and_name():
    like = torch.empty(50, dtype=torch.float64)

    def drawn(seed=1, number=0, name="a"):
        draws = Draws(seed)
        draws.number = number
        return draws.normal(name, like)

    first = drawn()
    assert torch.equal(first, drawn()) and first.dtype == torch.float64
    assert all(not torch.equal(first, other) for other in (drawn(seed=2), drawn(number=1), drawn(name="b")))
    draws = Draws(9)
    draws.load_state(Draws(1).state() | {"number": 1})
    assert torch.equal(draws.normal("a", like), drawn(number=1))
    assert draws.state() == {"seed": 1, "number": 1}


def test_shifts_are_integers_from_one_to_bound() -> None:
    assert set(Draws(1).shifts("a", 200, 4).tolist()) == {1, 2, 3}


def test_ranks_sample_different_noise_unless_shared(monkeypatch):
    like = torch.empty(50)
    before, shared = Draws(1).normal("a", like), Draws(1).normal("a", like, is_shared=True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert not torch.equal(Draws(1).normal("a", like), before)
    assert torch.equal(Draws(1).normal("a", like, is_shared=True), shared)


def test_rejects_weights_changed_after_forward() -> None:
    model = net()
    rule = Repeating(cuts=["3"]).attach(model)
    Repeating.wanted = [{}]
    logits = model(torch.randn(8, 6))
    with torch.no_grad():
        model.get_submodule("4").bias.add_(1)  # type: ignore[operator]
    with pytest.raises(StateError, match=r"'4\.bias' was changed after the forward pass"):
        F.cross_entropy(logits, torch.arange(8) % 4).backward()
    assert rule.model is model


def test_repeated_pass_uses_training_mode_of_first_pass() -> None:
    model = net()
    logits, (seen,), _, _ = repeated({}, model=model, before=model.eval)
    assert torch.equal(seen, logits) and not any(module.training for module in model.modules())


def test_precise_pass_disables_autocast_and_uses_changed_weights() -> None:
    """Autocast caches casts of weights. With this cache, a repeated pass would use the values from before a rule changed the
    weights."""
    model = net()
    weight = model.get_submodule("4").weight

    class Changing(Repeating):
        def broadcast(self, delta, target):
            assert self.first_pass is not None
            kept = weight.detach().clone()  # type: ignore[operator]
            self.seen = []
            for precise in (False, True):
                weight.data.copy_(kept * 3)  # type: ignore[operator]
                changed = again(self.model, self.mode, self.first_pass, precise=precise)
                weight.data.copy_(kept)  # type: ignore[operator]
                self.seen.append((changed, again(self.model, self.mode, self.first_pass, precise=precise)))
            return delta

    rule = Changing(cuts=["3"]).attach(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(torch.randn(8, 6))
        F.cross_entropy(logits, torch.arange(8) % 4).backward()
    for (changed, same), dtype in zip(rule.seen, (torch.bfloat16, torch.float32), strict=True):
        assert changed.dtype == same.dtype == dtype and not torch.allclose(changed, same)


class Counting(nn.Module):
    """Counts its calls, in evaluation mode as well, and keeps the counts that it sees."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        self.seen.append(self.count.item())
        return x


def test_check_at_attach_does_not_affect_buffers_of_first_pass():
    model = nn.Sequential(nn.Linear(4, 3), Counting(), nn.Tanh(), nn.Linear(3, 2))
    rule = fa_bench.attach(model, "forward_gradient", sample_input=torch.randn(2, 4), cuts=["2"])
    model.eval()
    model[1].seen.clear()
    logits, y = model(torch.randn(2, 4)), torch.tensor([0, 1])
    rule.backward(F.cross_entropy(logits, y), logits, y)
    assert model[1].seen == [1, 1] and model[1].count == 1
