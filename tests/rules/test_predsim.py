"""predsim: the similarity, what each loss holds, and the output layer's share."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fa_bench
from fa_bench.rules.predsim import similarity

from . import nets
from .helpers import array, backward, distance, rule_grads
from .references.local import similarity_loss
from .registered import registered


@pytest.mark.parametrize("shape", [(5,), (5, 3, 4), (3, 3, 4), (5, 1, 6)], ids=str)
def test_similarity_reference_against_finite_differences(shape):
    """The reference's own gradients: central differences of its loss, h = 1e-6, error of order h² and 1e-16/h = 1e-10."""
    rng = np.random.default_rng(0)
    a, y = rng.normal(size=(4, *shape)), np.array([0, 1, 1, 2])
    weight = rng.normal(size=(shape[0], shape[0], 3, 3) if len(shape) == 3 else (shape[0], shape[0]))
    _, at_a, at_weight = similarity_loss(a, weight, y, 3)
    for array_, gradient in ((a, at_a), (weight, at_weight)):
        for index in [tuple(rng.integers(size) for size in array_.shape) for _ in range(4)]:
            kept = array_[index]
            losses = []
            for moved in (kept + 1e-6, kept - 1e-6):
                array_[index] = moved
                losses.append(similarity_loss(a, weight, y, 3)[0])
            array_[index] = kept
            assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(gradient[index], abs=1e-8)


def test_similarity_of_labels():
    """1 for the same class, -1/(C-1) for another."""
    got = similarity(F.one_hot(torch.tensor([0, 2, 0]), 5).double())
    assert torch.allclose(got, torch.tensor([[1, -0.25, 1], [-0.25, 1, -0.25], [1, -0.25, 1]], dtype=torch.float64))


@pytest.mark.parametrize(("loss", "held"), [
    ("predsim", {"decoder.out.weight", "decoder.out.bias", "similarity.weight"}),
    ("pred", {"decoder.out.weight", "decoder.out.bias"}), ("sim", {"similarity.weight"}),
])
def test_predsim_holds_what_its_loss_needs(loss, held):
    _, rule, _, _ = registered("conv2", "predsim", loss=loss)
    tensors = rule.feedback["act1"]
    assert set(tensors) == held
    if "similarity.weight" in held:
        assert tensors["similarity.weight"].shape == (4, 4, 3, 3)
        assert rule.feedback["act3"]["similarity.weight"].shape == (6, 6)
    if loss != "sim":
        assert not tensors["decoder.out.weight"].any() and tensors["decoder.out.bias"].any()


@pytest.mark.parametrize(("loss", "share"), [("predsim", 0.25), ("pred", 1.0), ("sim", 1.0)])
def test_error_of_the_output_layer(loss, share):
    """(1-β) of the true one with predsim, for the weight and the bias; probes see the true error at the logits."""
    model, (x, y) = nets.mlp(), nets.batch("mlp")
    rule = fa_bench.attach(model, "predsim", seed=0, sample_input=x, cuts=["act1", "act2"], loss=loss, beta=0.75)
    got, seen = rule_grads(model, rule, x, y), []
    with rule.exact():
        exact = rule_grads(model, rule, x, y)
    for key in ("fc3.weight", "fc3.bias"):
        assert distance(got[key], array(share * exact[key])) < 1e-15
    logits = model(x)
    logits.register_hook(seen.append)
    backward(rule, F.cross_entropy(logits, y), logits, y)
    assert distance(seen[0], array((logits.softmax(1) - F.one_hot(y, 3)) / 4)) < 1e-14
