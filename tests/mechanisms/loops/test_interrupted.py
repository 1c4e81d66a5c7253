"""A step that is interrupted by Ctrl-C, or by another exception that is not an `Exception`, does not affect the next step."""

import copy
import functools
import pickle

import pytest
import torch
from torch.nn import functional as F

import fa_bench
from fa_bench.errors import CoverageError
from fa_bench.registry.registries import ALGORITHMS
from tests.mechanisms.loops.scripts import attached, data, state
from tests.rules.helpers import assert_bitwise


class Stopped(BaseException):
    """Stands for an exception that a watchdog or a task runner raises."""


def step(model, rule, optimizer):
    x, y = data()
    optimizer.zero_grad()
    logits = model(x)
    rule.backward(F.cross_entropy(logits, y), logits, y, indices=torch.arange(len(y)))
    optimizer.step()
    rule.step()


def interrupt(model, rule, at_call: int, error: type[BaseException], run) -> bool:
    """Call `run`, interrupt it in a call of the model's second module, and return whether that call was reached."""
    calls = 0

    def hook(*_):
        nonlocal calls
        calls += 1
        if calls == at_call:
            raise error

    handle = model[1].register_forward_pre_hook(hook)
    try:
        run()
    except error:
        return True
    finally:
        handle.remove()
    return False


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_step_after_interruption_is_bitwise_identical(name):
    model, rule = attached(name)
    expected_model, expected_rule = attached(name)
    for at_call, error in ((1, KeyboardInterrupt), (1, Stopped), (2, KeyboardInterrupt), (3, KeyboardInterrupt)):
        before, of_rule = state(model), copy.deepcopy(rule.state_dict())
        optimizers = [
            torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.01) for one in (model, expected_model)
        ]
        interrupted = interrupt(model, rule, at_call, error, functools.partial(step, model, rule, optimizers[0]))
        assert interrupted or at_call > 1
        # The interrupted step may already have sampled noise and indices, so the earlier state is loaded into both models.
        for one, of_one in ((model, rule), (expected_model, expected_rule)):
            one.load_state_dict(before)
            of_one.load_state_dict(copy.deepcopy(of_rule))
        step(model, rule, optimizers[0])
        step(expected_model, expected_rule, optimizers[1])
        assert_bitwise(state(model), state(expected_model))


@pytest.mark.parametrize("name", ["fa", "dfa", "pepita", "np_feedback"])
def test_evaluation_copy_and_detach_after_interruption(name):
    model, rule = attached(name)
    x = data()[0]
    model(x)  # a first pass is observed while it runs, and such a pass cannot be copied
    expected = copy.deepcopy(model)
    assert interrupt(model, rule, 1, KeyboardInterrupt, lambda: model(x))
    pickle.loads(pickle.dumps(rule._passes))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        assert_bitwise({"": model(x)}, {"": expected(x)})
        assert_bitwise({"": copied(x)}, {"": expected(x)})
    assert not rule._passes
    assert interrupt(model, rule, 1, KeyboardInterrupt, lambda: model(x))
    rule.detach()
    model(x).sum().backward()


def test_recursive_call_is_not_mistaken_for_interruption():
    """If a model calls itself, the outer pass is still running when the inner one begins, and must not count as interrupted."""

    class Net(torch.nn.Sequential):
        def forward(self, x, depth=1):
            return self[0](self(x, depth - 1)) if depth else super().forward(x)

    model = Net(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4))
    fa_bench.attach(model, "dfa", cuts=["1"], sample_input=(torch.ones(2, 4), 0))
    for _ in range(2):
        with pytest.raises(CoverageError, match="calls itself"):
            model(torch.ones(2, 4))
    model(torch.ones(2, 4), 0).sum().backward()
