"""Tests of means over data-parallel processes."""

import pytest
import torch

from fa_bench.mechanisms import processes
from tests.mechanisms.loops.scripts import attached, sgd, state, steps
from tests.rules.helpers import assert_bitwise


@pytest.fixture
def two_equal_processes(monkeypatch):
    """Simulate another process with the same tensors, so that a sum is twice the local tensor."""
    monkeypatch.setattr(processes, "_is_distributed", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(2))


def test_average_of_equal_tensors_is_identity(two_equal_processes):
    tensor = torch.tensor([1.0, -3.0])
    processes.average(tensor)
    assert tensor.tolist() == [1.0, -3.0]


def test_forward_forward_on_equal_processes_matches_one_process(request):
    """A sum instead of the mean would change the penalty of `forward_forward` in the next step."""
    alone, alone_rule = attached("forward_forward")
    steps(alone, alone_rule, sgd(alone.parameters()), 3)
    request.getfixturevalue("two_equal_processes")
    together, rule = attached("forward_forward")
    steps(together, rule, sgd(together.parameters()), 3)
    assert_bitwise(state(together), state(alone))
