"""Tests that check when wm samples its noise and which layers it mirrors."""

import copy

import pytest
import torch
from torch import nn

import fa_bench
from fa_bench.errors import CoverageError, OptionError
from fa_bench.rules.wm import MirroredFeedback

from . import nets
from .helpers import arrays, assert_bitwise, assert_matches, feedback_tensors, rule_grads


def snapshot(rule):
    return {key: tensor.detach().clone() for key, tensor in feedback_tensors(rule).items()}


def attached(net="conv", seed=0, **options):
    x, _ = nets.batch(net)
    model = nets.NETS[net]()
    return model, fa_bench.attach(model, "wm", seed=seed, sample_input=x, **{"initial_steps": 0, "mirror_batch": 4} | options)


def test_initial_steps_match_mirror_steps():
    _, early = attached(initial_steps=5)
    _, late = attached(initial_steps=0, mirror_steps=5)
    untouched = snapshot(late)
    late.step()
    assert_bitwise(snapshot(early), snapshot(late))
    assert not torch.equal(untouched["fc1", "B"], snapshot(late)["fc1", "B"])
    assert {path: state["draws"] for path, state in early.state_dict().items()} == {"conv2": 5, "fc1": 5}


def test_zero_mirror_steps_match_fa():
    model, rule = attached(mirror_steps=0)
    before, batch = snapshot(rule), nets.batch("conv")
    got = rule_grads(model, rule, *batch)
    rule.step()
    assert_bitwise(snapshot(rule), before)
    twin = nets.convnet()
    assert_bitwise(got, rule_grads(twin, fa_bench.attach(twin, "fa", seed=0), *batch))


def test_forward_backward_and_frozen_steps_draw_no_noise():
    model, rule = attached()
    before = snapshot(rule), rule.state_dict()
    rule_grads(model, rule, *nets.batch("conv"))
    rule.mode.freeze_random = True
    rule.step()
    rule.mode.freeze_random = False
    with rule.exact():
        rule_grads(model, rule, *nets.batch("conv"))
    assert_bitwise(snapshot(rule), before[0])
    assert rule.state_dict() == before[1]


def test_noise_depends_only_on_seed_layer_and_number():
    model, _ = attached()
    again, _ = attached(initial_steps=3)
    other, _ = attached(seed=1)
    layers = [("conv2", 2), ("conv2", 1), ("fc1", 1)]

    def draws(net):
        return [
            net.get_submodule(layer).pathway.noise.sample(number, net.conv1.weight).flatten()[:50] for layer, number in layers
        ]

    for one, two, three in zip(draws(model), draws(again), draws(other), strict=True):
        assert torch.equal(one, two) and not torch.equal(one, three)
    assert len({tuple(draw.tolist()) for draw in draws(model)}) == 3


def test_resume_is_bitwise_identical():
    def train(model, rule, steps):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in steps:
            rule_grads(model, rule, *nets.batch("conv", seed=step))
            optimizer.step()
            rule.step()

    model, rule = attached(initial_steps=3)
    train(model, rule, range(2))
    saved = {key: value.clone() for key, value in model.state_dict().items()}, rule.state_dict()
    train(model, rule, range(2, 4))
    resumed, resumed_rule = attached(initial_steps=3)
    resumed.load_state_dict(saved[0])
    resumed_rule.load_state_dict(saved[1])
    train(resumed, resumed_rule, range(2, 4))
    assert_bitwise(dict(resumed.state_dict()), dict(model.state_dict()))
    forgetful, forgetful_rule = attached(initial_steps=3)
    forgetful.load_state_dict(saved[0])
    train(forgetful, forgetful_rule, range(2, 4))
    assert not torch.equal(forgetful.conv2.feedback_B, model.conv2.feedback_B), (
        "a run resumed without the number of draws continues like the original"
    )


def test_mirror_follows_model_dtype():
    model, rule = attached()
    rule.step()
    model.float()
    rule.step()
    assert all(tensor.dtype == torch.float32 for tensor in snapshot(rule).values())
    model, rule = attached()
    model.float()
    rule.step()
    model.double()
    twin = copy.deepcopy(model)
    for layer in twin.modules():  # as if no mirror step had run in single precision
        if isinstance(pathway := getattr(layer, "pathway", None), MirroredFeedback):
            pathway._scale = None
    rule.step()
    fa_bench.attached_rule(twin).step()
    for key, tensor in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], tensor, rtol=1e-13, atol=1e-13)


# --- mirrored layers -----------------------------------------------------------------------------------------------------------


def mirrored(rule) -> set[str]:
    before = snapshot(rule)
    rule.step()
    return {layer for (layer, name), tensor in snapshot(rule).items() if not torch.equal(tensor, before[layer, name])}


def test_first_and_excluded_layers_are_not_mirrored():
    x, _ = nets.batch("residual")
    rule = fa_bench.attach(nets.residual(), "wm", sample_input=x, initial_steps=0, mirror_batch=2, exclude=["b1"])
    assert mirrored(rule) == {"a1", "a2", "down", "head"}, "expected neither the stem, which runs first, nor the excluded layer"
    assert mirrored(attached("conv_bn")[1]) == {"conv2", "fc1", "fc2"}
    # Without a sample, the layers are assumed to run in the order of their definition.
    assert mirrored(fa_bench.attach(nets.mlp(), "wm", initial_steps=0)) == {"fc2", "fc3"}


def test_batch_norm_is_not_run():
    model, rule = attached("conv_bn")
    before = {key: value.clone() for key, value in model.state_dict().items() if ".running" in key or "batches" in key}
    parameters = arrays(model)
    rule.step()
    assert before and all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert_matches(arrays(model), parameters, rel=0)


def test_convolution_requires_sample_input():
    model = nets.convnet()
    with pytest.raises(CoverageError, match=r"sample_input.*conv1"):
        fa_bench.attach(model, "wm")
    assert type(model.conv1) is nn.Conv2d and not dict(model.named_buffers())
    behind = nn.Sequential(nn.Linear(4, 18), nn.Unflatten(1, (2, 3, 3)), nn.Conv2d(2, 3, 3), nn.Flatten())
    with pytest.raises(CoverageError, match="sample_input"):
        fa_bench.attach(behind, "wm")


@pytest.mark.parametrize(
    "wrong",
    [
        {"mirror_rate": 0.0},
        {"mirror_rate": 1.1},
        {"mirror_steps": -1},
        {"initial_steps": -1},
        {"mirror_batch": 0},
        {"sigma": 0.0},
        {"noise": "laplace"},
        {"activation": "gelu"},
        {"b_init": "ones"},
    ],
    ids=str,
)
def test_wrong_values_are_refused(wrong):
    with pytest.raises(OptionError, match=next(iter(wrong))):
        fa_bench.attach(nets.mlp(), "wm", **wrong)


def test_loaded_state_skips_completed_initial_steps():
    _, rule = attached(initial_steps=3)
    saved = rule.state_dict()
    for asked, left in ((3, 0), (5, 2), (2, 0)):
        _, other = attached(initial_steps=asked)
        other.load_state_dict(saved)
        assert other.initial_steps_left == left == len(list(other.initial_phase()))
