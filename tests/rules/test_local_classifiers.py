"""Tests of asfp_lc: the layers of the classifiers at the ends of blocks, and the classifiers' parameters in the model."""

import math

import pytest
import torch
from torch import nn

import fa_bench
from fa_bench.metrics.meter import AlignmentMeter

from .registered import registered

#: Sizes of maps. A map that is smaller than the target size of the averaging is not enlarged.
SIZES = [(1, 8), (4, 1), (8, 8)]


def chain(size: tuple[int, int], **options):
    model = nn.Sequential(
        *[part for n in range(3) for part in (nn.Conv2d(1 if n == 0 else 5, 5, 3, padding=1), nn.ReLU())],
        nn.Flatten(),
        nn.Linear(5 * math.prod(size), 3),
    )
    model.blocks = ["1", "3", "5"]
    x = torch.randn(4, 1, *size, generator=torch.Generator().manual_seed(0))
    return model, fa_bench.attach(model, "asfp_lc", seed=0, sample_input=x, match="random", **options), x


@pytest.mark.parametrize("pool", [1, 2, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_maps_are_pooled_to_target_size_but_never_enlarged(size, pool):
    _, rule, _ = chain(size, pool=pool)
    features = 5 * math.prod(min(length, pool) for length in size)
    for cut in ("1", "3"):
        tensors = rule.feedback[cut]
        assert tensors["fc.weight"].shape == tensors["B"].shape == (3, features)
        assert set(tensors) == {"B", "fc.weight", "fc.bias", "bn.weight", "bn.bias"}


@pytest.mark.parametrize(("options", "bound"), [({}, 1.0), ({"linear_b_init": "pytorch"}, 1 / math.sqrt(5 * 9))], ids=str)
def test_linear_b_init_applies_to_classifier_feedback(options, bound):
    """The largest of 135 uniform numbers is below nine tenths of the bound with a probability of less than one in a million."""
    _, rule, _ = chain((8, 8), pool=3, **options)
    b = rule.feedback["1"]["B"]
    assert 0.9 * bound < b.abs().max() <= bound and (b < 0).any() and (b > 0).any()
    assert all(b is not tensor for tensor in rule.feedback_parameters()), "B is learned, but should be fixed"


def test_classifiers_have_no_running_statistics():
    """A classifier runs only in training and uses the statistics of the batch."""
    model, rule, _ = chain((8, 8))
    assert not [key for key in model.state_dict() if "running" in key or "num_batches" in key]
    assert "depends on the batch" in str(rule.coverage)


def test_cuts_option_defines_block_ends():
    _, rule, _, _ = registered("mlp", "asfp_lc", match="random", cuts=["act2"])
    assert [cut for cut, tensors in rule.feedback.items() if "fc.weight" in tensors] == ["act2"]


def test_delta_angles_are_measured_at_error_delivery_points():
    """The angle is measured at the block's end for the last layer of a block, and at the next layer's input for all other layers.

    The stem is fixed and has no angle.
    """
    model = nn.Sequential(*[part for _ in range(4) for part in (nn.Linear(6, 6), nn.Tanh())], nn.Linear(6, 3))
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    rule = fa_bench.attach(model, "asfp_lc", seed=0, sample_input=x, cuts=["3"])
    probe = AlignmentMeter(rule, x, torch.tensor([0, 1, 2, 0]))
    assert probe.points == {"0": ("2", "input"), "2": ("3", "output"), "4": ("6", "input"), "6": ("8", "input")}
    found = probe.measure()["delta_angle"]
    assert set(found) == {"2", "4", "6", "8"} and found["2"] > 1 and found["8"] == 0
