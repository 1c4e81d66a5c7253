"""Forward passes that must change nothing, copies, checkpoints, exact backpropagation and the way back to the plain model."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fa_bench

from . import nets
from .helpers import (
    EDGE_RULES,
    QUICK,
    REL,
    STORED,
    assert_bitwise,
    assert_matches,
    backward,
    bp_grads,
    collect,
    feedback_tensors,
    rule_grads,
)
from .references import TRAITS

VARIANTS = {name: (name, QUICK.get(name, {})) for name in ("bp", "frozen", "bp_fc", *EDGE_RULES)}
VARIANTS |= {f"dfa-{form}": ("dfa", {"form": form}) for form in ("neuron", "kernel", "shared")}
NET = "conv_bn"


def start(variant: str, *, seed: int = 0, net: str = NET, dtype=torch.float64):
    name, options = VARIANTS[variant]
    model, (x, y) = nets.NETS[net](dtype=dtype), nets.batch(net, dtype=dtype)
    if name == "dfa" and options["form"] != "kernel":
        options = options | {"cuts": nets.activation_cuts(model)}
    return model, fa_bench.attach(model, name, seed=seed, sample_input=x, **options), x, y


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("between", ["train", "eval", "no_grad"])
def test_forward_between_changes_nothing(variant, between):
    """A forward of another size between a forward and its backward, brsf's new draw included."""
    model, rule, x, y = start(variant)
    twin, twin_rule, _, _ = start(variant)
    want = rule_grads(twin, twin_rule, x, y)
    logits = model(x)
    other = nets.batch(NET, seed=9, size=6)[0]
    if between == "train":
        model(other)
    elif between == "eval":
        model.eval()
        model(other)
        model.train()
    else:
        with torch.no_grad():
            model(other)
    backward(rule, F.cross_entropy(logits, y), logits, y)
    assert_bitwise(collect(model), want)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_forwards_then_both_backwards(variant, order):
    """Each backward belongs to its own forward, in either order; without BatchNorm evaluation mode keeps brsf's draw fixed."""
    model, rule, _, _ = start(variant, net="conv")
    model.eval()
    batches = [nets.batch("conv", seed=seed, size=4 + seed) for seed in (0, 1)]
    want = [rule_grads(model, rule, x, y) for x, y in batches]
    passes = [(model(x), y) for x, y in batches]
    for index in order:
        model.zero_grad(set_to_none=True)
        logits, y = passes[index]
        backward(rule, F.cross_entropy(logits, y), logits, y)
        assert_bitwise(collect(model), want[index])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("grad", [False, True])
def test_evaluation_changes_no_buffer(variant, grad):
    model, rule, x, y = start(variant)
    rule_grads(model, rule, x, y)
    model.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    feedback = {key: value.detach().clone() for key, value in feedback_tensors(rule).items()}
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            model(x)
    assert_bitwise(dict(model.state_dict()), before)
    assert_bitwise({key: value.detach() for key, value in feedback_tensors(rule).items()}, feedback)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if VARIANTS[v][0] not in TRAITS["redrawn"]])
def test_training_forward_and_backward_change_no_feedback(variant):
    model, rule, x, y = start(variant)
    before = {key: value.detach().clone() for key, value in feedback_tensors(rule).items()}
    rule_grads(model, rule, x, y)
    rule.step()
    assert_bitwise({key: value.detach() for key, value in feedback_tensors(rule).items()}, before)


@pytest.mark.parametrize("variant", ["bp", *EDGE_RULES])
def test_copied_model_of_an_edge_rule_is_independent(variant):
    """A deepcopy carries its own feedback: equal gradients at first, unmoved by what happens to the original."""
    model, rule, x, y = start(variant)
    model.eval()
    twin = copy.deepcopy(model)
    want = rule_grads(model, rule, x, y)

    def twin_grads():
        twin.zero_grad(set_to_none=True)
        F.cross_entropy(twin(x), y).backward()
        return collect(twin)

    assert_bitwise(twin_grads(), want)
    ours, theirs = ({tensor.data_ptr() for tensor in net.state_dict().values()} for net in (model, twin))
    assert not ours & theirs
    with torch.no_grad():
        for tensor in feedback_tensors(rule).values():
            tensor.mul_(-2.0)
    if STORED.get(variant, "M") != "M":  # of M only the sizes matter
        assert not torch.equal(rule_grads(model, rule, x, y)["conv1.weight"], want["conv1.weight"])
    assert_bitwise(twin_grads(), want)


@pytest.mark.parametrize("variant", VARIANTS)
def test_model_and_rule_copied_together(variant):
    model, rule, x, y = start(variant)
    model.eval()
    twin, twin_rule = copy.deepcopy((model, rule))
    want = rule_grads(model, rule, x, y)
    model.zero_grad(set_to_none=True)
    assert_bitwise(rule_grads(twin, twin_rule, x, y), want)
    assert all(p.grad is None for p in model.parameters()), "the copied rule worked on the original model"
    with torch.no_grad():
        for tensor in feedback_tensors(rule).values():
            tensor.mul_(-2.0)
    assert_bitwise(rule_grads(twin, twin_rule, x, y), want)


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpoint_restores_weights_and_feedback(variant):
    model, rule, x, y = start(variant, seed=0)
    rule_grads(model, rule, x, y)
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    fresh, fresh_rule, _, _ = start(variant, seed=1)
    stored = VARIANTS[variant][0] in STORED
    ours, theirs = ({k: v.detach() for k, v in feedback_tensors(r).items()} for r in (rule, fresh_rule))
    assert not stored or any(not torch.equal(ours[key], theirs[key]) for key in ours)
    fresh.load_state_dict(saved, strict=True)
    for net in (model, fresh):
        net.eval()
    if stored:
        for key, tensor in ours.items():
            same_shape = [value for value in saved.values() if value.shape == tensor.shape]
            assert any(torch.equal(value, tensor) for value in same_shape), f"{key} is not saved"
        assert_bitwise({k: v.detach() for k, v in feedback_tensors(fresh_rule).items()}, ours)
    assert_bitwise(rule_grads(fresh, fresh_rule, x, y), rule_grads(model, rule, x, y))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("how", ["loss.backward", "rule.backward"])
def test_exact_is_backpropagation_and_ends_with_its_block(variant, how):
    model, rule, x, y = start(variant, dtype=torch.float32)
    plain = nets.NETS[NET](dtype=torch.float32)
    model.zero_grad(set_to_none=True)
    with rule.exact():
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        if how == "loss.backward":
            loss.backward()
        else:
            backward(rule, loss, logits, y)
    got, want = collect(model), bp_grads(plain, x, y)
    learns = {key for key, grad in rule_grads(model, rule, x, y).items() if grad is not None}
    if variant in ("frozen", "bp_fc"):  # what is frozen may or may not get its exact gradient; what it gets must be exact
        assert {key for key, grad in got.items() if grad is not None} >= learns
        want = {key: grad if got[key] is not None else None for key, grad in want.items()}
    assert_bitwise(got, want)
    after = rule_grads(model, rule, x, y)
    twin, twin_rule, _, _ = start(variant, dtype=torch.float32)
    if variant == "brsf":  # another draw: only that it is no longer exact
        assert not torch.equal(after["conv1.weight"], want["conv1.weight"])
    else:
        assert_bitwise(after, rule_grads(twin, twin_rule, x, y))


def test_exact_ends_after_an_error_too():
    model, rule, x, y = start("fa")
    want = rule_grads(model, rule, x, y)
    with pytest.raises(KeyError), rule.exact():
        raise KeyError
    assert_bitwise(rule_grads(model, rule, x, y), want)


@pytest.mark.parametrize("variant", VARIANTS)
def test_exact_leaves_a_pending_rule_pass_alone(variant):
    """Measuring on the side (a delta angle) between a training forward and its backward."""
    model, rule, x, y = start(variant, net="conv")
    twin, twin_rule, _, _ = start(variant, net="conv")
    want = rule_grads(twin, twin_rule, x, y)
    logits = model(x)
    with rule.exact():
        model(x)
    backward(rule, F.cross_entropy(logits, y), logits, y)
    assert_bitwise(collect(model), want)


@pytest.mark.parametrize("variant", VARIANTS)
def test_detach_gives_the_plain_model_back(variant):
    plain = nets.NETS[NET]()
    model, rule, x, y = start(variant)
    rule_grads(model, rule, x, y)
    rule.detach()
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    ours, theirs = ([(name, p.requires_grad) for name, p in net.named_parameters()] for net in (model, plain))
    assert ours == theirs
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and not module._backward_hooks
    model.zero_grad(set_to_none=True)
    F.cross_entropy(model(x), y).backward()
    assert_bitwise(collect(model), bp_grads(plain, x, y))
    assert copy.deepcopy(model).state_dict().keys() == plain.state_dict().keys()


def test_rules_one_after_the_other_on_one_model():
    """Detach leaves nothing that the next rule could trip over; the same seed gives the first rule's gradients again."""
    x, y = nets.batch("conv")
    model, results = nets.convnet(), []
    for name in ("fa", "kp", "dfa", "fa"):
        options = {"cuts": ["act1", "act2"]} if name == "dfa" else {}
        rule = fa_bench.attach(model, name, seed=0, sample_input=x, **options)
        results.append(rule_grads(model, rule, x, y))
        rule.detach()
    assert_bitwise(results[3], results[0])
    assert not torch.equal(results[2]["conv1.weight"], results[0]["conv1.weight"])


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.startswith("dfa")])
def test_direct_rules_under_bfloat16_autocast(variant):
    """bf16 keeps 8 bits: gradients within 5 % in norm of the float32 ones (tanh: no mask can flip), far from BP's."""
    name, options = VARIANTS[variant]
    model, (x, y) = nets.convnet(nn.Tanh, dtype=torch.float32), nets.batch("conv", dtype=torch.float32)
    if variant != "dfa-kernel":
        options = options | {"cuts": ["act1", "act2"]}
    rule = fa_bench.attach(model, name, seed=0, sample_input=x, **options)
    want = rule_grads(model, rule, x, y)
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
        loss = F.cross_entropy(logits, y)
    backward(rule, loss, logits, y)
    exact = bp_grads(nets.convnet(nn.Tanh, dtype=torch.float32), x, y)
    for key, grad in collect(model).items():
        assert grad.dtype == torch.float32
        assert (grad - want[key]).norm() <= 0.05 * want[key].norm(), key
    assert (exact["conv1.weight"] - want["conv1.weight"]).norm() > 0.3 * want["conv1.weight"].norm()


def test_rule_object_works_like_its_name():
    """attach takes a name or a rule object."""
    x, y = nets.batch("mlp")
    by_name, by_object = nets.mlp(), nets.mlp()
    one = fa_bench.attach(by_name, "fa", seed=0)
    two = fa_bench.attach(by_object, type(one)(), seed=0)
    assert_matches(rule_grads(by_object, two, x, y), rule_grads(by_name, one, x, y), rel=REL)
