"""Tests of the named tensors of a rule, which histograms show."""

import torch
from torch.nn import functional as F

import fa_bench
from fa_bench.metrics.tensors import named_tensors
from tests.rules import nets


def test_named_tensors_are_live_tensors() -> None:
    model, (x, y) = nets.mlp(), nets.batch("mlp")
    rule = fa_bench.attach(model, "kp", seed=0)
    assert not [name for name in named_tensors(rule) if name.startswith("gradient/")]
    logits = model(x)
    rule.backward(F.cross_entropy(logits, y), logits, y)
    found = named_tensors(rule)
    assert set(found) == {
        name for layer in ("fc1", "fc2", "fc3") for name in (f"weight/{layer}", f"feedback/{layer}/B", f"gradient/{layer}")
    }
    assert found["weight/fc2"] is model.fc2.weight and found["feedback/fc2/B"] is model.fc2.feedback_B
    assert found["gradient/fc2"] is model.fc2.weight.grad and not torch.equal(found["gradient/fc2"], found["weight/fc2"])
