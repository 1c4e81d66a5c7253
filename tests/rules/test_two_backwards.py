"""Tests that a second backward pass accumulates into the existing gradients, as ``loss.backward()`` does."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fa_bench
from fa_bench.registry.registries import ALGORITHMS

from . import nets
from .helpers import QUICK, array, cut_options, distance, restore, state_of
from .registered import registered

SHARING = {"match": "random", "linear": "share", "freeze_stem": False}
OPTIONS = QUICK | {"asap": SHARING, "asfp": SHARING, "asfp_lc": SHARING | {"cuts": ["act1"]}, "dgl": {"cuts": ["act1"]}}
# The excluded rules sample feedback or noise in each pass.
FIXED = sorted(set(ALGORITHMS) - {"brsf", "ddtp_linear", "ldrl"})


def trained(rule) -> list[Tensor]:
    """Return the weights and the learned feedback without duplicates."""
    return list({id(tensor): tensor for tensor in [*rule.model.parameters(), *rule.feedback_parameters()]}.values())


def gradients(rule, batches, between=lambda: None) -> list[Tensor | None]:
    """The gradients after forward and backward passes on each of `batches` in turn, starting from cleared gradients."""
    for tensor in trained(rule):
        tensor.grad = None
    for x, y in batches:
        logits, indices = rule.model(x), torch.arange(len(y)) + 8 * (len(y) % 2)  # batches of 4 and 5 contain different samples
        rule.backward(F.cross_entropy(logits, y), logits, y, indices=indices)
        between()
    return [None if tensor.grad is None else tensor.grad.clone() for tensor in trained(rule)]


def assert_sums(rule, first, second) -> None:
    state = state_of(rule)
    both = gradients(rule, [first, second])
    restore(rule, state)
    parts = [gradients(rule, [batch]) for batch in (first, second)]
    assert [grad is None for grad in both] == [grad is None for grad in parts[0]]
    learned = {id(tensor) for tensor in rule.feedback_parameters()}
    with_gradient = {id(tensor) for tensor, grad in zip(trained(rule), both, strict=True) if grad is not None and grad.any()}
    assert bool(learned & with_gradient) == bool(learned)
    for got, one, two in zip(both, *parts, strict=True):
        # Both results come from the same float64 numbers, so they differ only by the rounding of the sum.
        assert got is None or distance(got, array(one + two), floor=1e-6) < 1e-12


@pytest.mark.parametrize("net", ["mlp_tanh", "conv_bn"])
@pytest.mark.parametrize("name", FIXED)
def test_two_backward_passes_add_up(name: str, net: str) -> None:
    """The gradients of two backward passes must add up for the weights, the learned feedback and the layers that local losses
    train."""
    model, (first, second) = nets.NETS[net](), (nets.batch(net, seed=seed, size=4 + seed) for seed in (0, 1))
    rule = fa_bench.attach(model, name, seed=0, sample_input=first[0], **cut_options(name, model, OPTIONS.get(name, {})))
    assert_sums(rule, first, second)


@pytest.mark.parametrize("name", ["predsim", "dgl", "asfp_lc"])
def test_two_backward_passes_add_up_in_residual_net(name: str) -> None:
    _, rule, x, y = registered("resnet20", name)
    assert_sums(rule, (x, y), (x.flip(0) * 0.7, y.roll(1)))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fa", {}),
        ("kp", {}),
        ("brsf", {}),
        ("usf", {}),
        ("pfa", {"ratio": 2}),
        ("asap", SHARING),
        ("asfp", SHARING),
        ("dfa", {}),
        ("dkp", {}),
        ("dkp", {"cuts": ["act1"], "error_at": "act2"}),
        ("dfa", {"form": "kernel"}),
    ],
    ids=str,
)
def test_retained_graph_supports_second_backward(name: str, options: dict[str, object]) -> None:
    """If autograd retains the graph, the data stored by the forward pass must still be available to a second backward pass."""
    model, (x, y) = nets.NETS["mlp_tanh"](), nets.batch("mlp_tanh", seed=0)
    rule = fa_bench.attach(model, name, seed=0, sample_input=x, **cut_options(name, model, options))
    loss = F.cross_entropy(model(x), y)
    loss.backward(retain_graph=True)
    once = [None if tensor.grad is None else tensor.grad.clone() for tensor in trained(rule)]
    loss.backward()
    assert any(grad is not None and grad.any() for grad in once)
    for tensor, grad in zip(trained(rule), once, strict=True):
        assert grad is None or torch.equal(tensor.grad, 2 * grad)


@pytest.mark.parametrize("name", ["kp", "predsim", "dgl", "asfp_lc", "dkp", "pfa"])
def test_next_backward_does_not_overwrite_returned_gradients(name: str) -> None:
    """The backward pass of the next batch must not overwrite a tensor that a caller took from ``.grad``."""
    net = "conv_bn"
    model, batches = nets.NETS[net](), [nets.batch(net, seed=seed) for seed in (0, 1)]
    options = cut_options(name, model, OPTIONS.get(name, {}))
    rule = fa_bench.attach(model, name, seed=0, sample_input=batches[0][0], **options)
    gradients(rule, batches[:1])
    held = [tensor.grad for tensor in rule.feedback_parameters()]
    copies = [grad.clone() for grad in held]
    for tensor in trained(rule):
        tensor.grad = None
    gradients(rule, batches[1:])
    assert held and all(torch.equal(grad, copy) for grad, copy in zip(held, copies, strict=True))


@pytest.mark.parametrize("net", ["mlp_tanh", "conv"])
def test_kp_autograd_gradients_do_not_share_memory(net: str) -> None:
    """The gradients of W and B are equal but must not share memory, so changing one leaves the other intact."""
    model, (x, y) = nets.NETS[net](), nets.batch(net)
    fa_bench.attach(model, "kp", seed=0, sample_input=x)
    layer = next(module for module in model.modules() if hasattr(module, "feedback_B"))
    of_weight, of_feedback = torch.autograd.grad(F.cross_entropy(model(x), y), [layer.weight, layer.feedback_B])
    assert torch.equal(of_weight, of_feedback) and of_weight.any()
    kept = of_feedback.clone()
    of_weight.zero_()
    assert torch.equal(of_feedback, kept)
