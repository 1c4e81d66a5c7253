"""Tests of usf, brsf and frsf: signs follow the weights in every forward pass, and magnitudes are fixed (frsf) or resampled
(brsf)."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fa_bench
from fa_bench.utils.sampling import resample_magnitudes, seed_for

from . import nets
from .helpers import array, assert_bitwise, assert_matches, backward, bp_grads, collect, fa_surrogate, layer_names, rule_grads
from .references.classic import usf_scale

SIGN_RULES = ("usf", "brsf", "frsf")


def attached(rule: str, net: str = "conv", **options):
    model = nets.NETS[net]()
    return model, fa_bench.attach(model, rule, seed=0, **options)


@pytest.mark.parametrize("name", SIGN_RULES)
def test_weight_sign_flip_changes_exactly_one_feedback_entry(name):
    model, rule = attached(name)
    model(nets.batch("conv")[0])
    model.eval()  # in evaluation mode, brsf keeps its sample
    for layer in layer_names(model):
        before = rule.effective_feedback(layer).detach().clone()
        with torch.no_grad():
            model.get_submodule(layer).weight.view(-1)[3] *= -1
        model(nets.batch("conv")[0])
        after = rule.effective_feedback(layer).detach()
        assert (before != after).nonzero().shape[0] == 1
        assert after.reshape(-1)[3] == -before.reshape(-1)[3] != 0


@pytest.mark.parametrize("name", SIGN_RULES)
def test_sign_of_zero_is_zero(name):
    model, rule = attached(name)
    with torch.no_grad():
        model.fc1.weight[1, 4] = 0.0
        model.fc1.weight[2, 5] = -0.0
    model(nets.batch("conv")[0])
    effective = rule.effective_feedback("fc1")
    assert effective[1, 4] == 0 and effective[2, 5] == 0
    assert (effective != 0).sum() == effective.numel() - 2


@pytest.mark.parametrize("name", SIGN_RULES)
def test_feedback_signs_follow_current_weights(name):
    """After an update that flips signs, the feedback and the gradients of the next pass must use the new signs."""
    model, rule = attached(name)
    x, y = nets.batch("conv")
    rule_grads(model, rule, x, y)
    with torch.no_grad():
        for layer in layer_names(model):
            weight = model.get_submodule(layer).weight
            weight.copy_(-2 * weight.roll(1, 0))
    rule.step()
    got = rule_grads(model, rule, x, y)
    effective = {layer: rule.effective_feedback(layer).detach().clone() for layer in layer_names(model)}
    for layer, tensor in effective.items():
        assert torch.equal(tensor.sign(), model.get_submodule(layer).weight.sign())
    plain = nets.convnet()
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if key in plain.state_dict()})
    assert_matches(got, fa_surrogate(plain, effective, x, y))


@pytest.mark.parametrize("scale", ["xavier", "pytorch", "xiao", "none"])
def test_usf_scale(scale):
    model, rule = attached("usf", scale=scale)
    model(nets.batch("conv")[0])
    for layer in layer_names(model):
        shape = tuple(model.get_submodule(layer).weight.shape)
        # The tolerance covers one multiplication and one square root in float64.
        assert array(rule.effective_feedback(layer).abs()) == pytest.approx(usf_scale(shape, scale), rel=1e-14)


def test_usf_with_unit_weights_matches_backprop():
    """With a scale of 1 and weights of ±1, the feedback is B = sign(W) = W."""
    plain, (x, y) = nets.residual(dtype=torch.float32), nets.batch("residual", dtype=torch.float32)
    with torch.no_grad():
        for layer in layer_names(plain):
            plain.get_submodule(layer).weight.sign_()
    model = nets.residual(dtype=torch.float32)
    model.load_state_dict(plain.state_dict())
    rule = fa_bench.attach(model, "usf", seed=0, scale="none", sample_input=x)
    assert_bitwise(rule_grads(model, rule, x, y), bp_grads(plain, x, y))


def test_plain_last_is_last_executed_not_last_registered_layer():
    model, (x, _) = nets.residual(), nets.batch("residual")
    rule = fa_bench.attach(model, "usf", seed=0, plain_last=True, sample_input=x)
    plain = {name for name in layer_names(model) if torch.equal(rule.effective_feedback(name), model.get_submodule(name).weight)}
    assert plain == {"head"}


def test_usf_angle_to_uniform_weights_is_30_degrees():
    """The cosine between uniform weights and their signs is √3/2, and 40 000 samples give the angle to within 0.2 degrees.
    Magnitudes without signs would be at 90 degrees to the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 200))
    rule = fa_bench.attach(model, "usf", seed=0)
    model(torch.zeros(1, 200))
    cosine = torch.cosine_similarity(rule.effective_feedback("0").flatten(), model[0].weight.detach().flatten(), dim=0).item()
    assert math.degrees(math.acos(cosine)) == pytest.approx(30, abs=0.5)


@pytest.mark.parametrize("name", ["brsf", "frsf"])
def test_magnitudes_are_xavier_uniform(name):
    """Over 40 000 samples, |M| stays within the bound and nearly reaches it, and its root mean square is within 3 % of the Xavier
    standard deviation."""
    model = nn.Sequential(nn.Linear(200, 200))
    rule = fa_bench.attach(model, name, seed=0)
    for _ in range(2):
        model(torch.zeros(1, 200))
        effective = rule.effective_feedback("0").detach()
        assert 0.97 * math.sqrt(6 / 400) < effective.abs().max() <= math.sqrt(6 / 400)
        assert effective.square().mean().sqrt().item() == pytest.approx(math.sqrt(2 / 400), rel=0.03)
        assert torch.equal(effective, rule.feedback["0"]["M"].abs() * model[0].weight.detach().sign())
    angle = torch.cosine_similarity(effective.flatten(), model[0].weight.detach().flatten(), dim=0).acos().rad2deg().item()
    assert angle == pytest.approx(math.degrees(math.acos(0.75)), abs=1)  # for independent uniforms, E|w|E|m| / E w^2 = 3/4


def test_replaced_magnitudes_are_used_by_absolute_value():
    """A replaced M is detected by its memory address together with its version counter, since neither is sufficient on its
    own."""
    model, rule = attached("frsf")
    model(nets.batch("conv")[0])
    model.eval()
    for layer in layer_names(model):
        before, old = rule.effective_feedback(layer).clone(), rule.feedback[layer]["M"]
        new = -old
        while new._version < old._version:
            new.add_(0.0)
        model.get_submodule(layer).feedback_M = new
        assert torch.equal(rule.effective_feedback(layer), before)


@pytest.mark.parametrize("name", ["brsf", "frsf"])
def test_negative_magnitudes_count_by_their_absolute_value(name):
    """The feedback is B = |M| sign(W), so negating M changes nothing."""
    model, rule = attached(name)
    x, y = nets.batch("conv")
    model(x)
    model.eval()
    before = {layer: rule.effective_feedback(layer).detach().clone() for layer in layer_names(model)}
    want = rule_grads(model, rule, x, y)
    with torch.no_grad():
        for tensors in rule.feedback.values():
            tensors["M"].neg_()
    assert_bitwise({layer: rule.effective_feedback(layer).detach() for layer in before}, before)
    assert_bitwise(rule_grads(model, rule, x, y), want)


def test_only_brsf_resamples_every_training_forward():
    for name, redraws in (("brsf", True), ("frsf", False)):
        model, rule = attached(name)
        x, _ = nets.batch("conv")
        draws = []
        for _ in range(3):
            model(x)
            draws.append({layer: rule.feedback[layer]["M"].clone() for layer in layer_names(model)})
        for layer in layer_names(model):
            for one, other in ((0, 1), (1, 2), (0, 2)):
                assert torch.equal(draws[one][layer], draws[other][layer]) != redraws
                assert not redraws or (draws[one][layer] != draws[other][layer]).any(), layer


def test_brsf_samples_once_per_recurrent_pass():
    """A recurrent layer runs at every time step but samples once per pass of the model. A recurrent layer called directly samples
    on every call."""
    model = nn.LSTM(3, 4, 2)
    rule = fa_bench.attach(model, "brsf", seed=0)
    layer, x = model.hh_l1, torch.randn(5, 2, 3)
    for number in (1, 2):
        model(x)
        assert layer.pathway.draws == number
    drawn = [layer(torch.randn(2, 4)) is not None and rule.feedback["hh_l1"]["M"].clone() for _ in range(2)]
    assert not torch.equal(*drawn)


def test_brsf_backward_uses_sample_of_its_forward():
    """A later training forward pass samples a new M, but a pending backward pass keeps the M of its own forward pass."""
    model, rule = attached("brsf")
    plain, (x, y), (other, _) = nets.convnet(), nets.batch("conv"), nets.batch("conv", seed=1)
    first = model(x)
    drawn = {layer: rule.effective_feedback(layer).detach().clone() for layer in layer_names(model)}
    second = model(other)
    drawn_later = {layer: rule.effective_feedback(layer).detach().clone() for layer in layer_names(model)}
    assert not any(torch.equal(drawn[layer], drawn_later[layer]) for layer in drawn)
    backward(rule, F.cross_entropy(first, y), first, y)
    assert_matches(collect(model), fa_surrogate(plain, drawn, x, y))
    model.zero_grad(set_to_none=True)
    backward(rule, F.cross_entropy(second, y), second, y)
    assert_matches(collect(model), fa_surrogate(plain, drawn_later, other, y))


@pytest.mark.parametrize("draw", ["xavier_uniform", "xavier_normal"])
def test_brsf_samples_are_reproducible_and_independent_of_global_rng(draw):
    """The same seed gives the same samples regardless of the state of the global generator. Sampling must not change the state of
    the global generator."""
    sequences = []
    for noise in (1, 7):
        model, rule = attached("brsf", m_init=draw)
        sequence = []
        for _ in range(3):
            torch.rand(noise)
            before = torch.get_rng_state()
            model(nets.batch("conv")[0])
            assert torch.equal(torch.get_rng_state(), before)
            sequence.append(rule.feedback["conv2"]["M"].clone())
        sequences.append(torch.stack(sequence))
    assert torch.equal(*sequences)


@pytest.mark.parametrize("name", SIGN_RULES)
def test_density_mask_is_constant_over_forwards(name):
    model = nn.Sequential(nn.Linear(100, 200))
    rule = fa_bench.attach(model, name, seed=0, density=0.3)
    masks = [rule.effective_feedback("0").detach() != 0]  # the mask applies even before any forward pass
    for _ in range(2):
        model(torch.zeros(1, 100))
        masks.append(rule.effective_feedback("0").detach() != 0)
    assert torch.equal(masks[1], masks[2])
    assert torch.equal(masks[0], masks[1]), "the mask does not apply before the first training forward pass"
    assert masks[0].float().mean().item() == pytest.approx(0.3, abs=0.02)  # six standard errors for 20 000 samples
    kept = rule.effective_feedback("0").detach()[masks[0]]
    assert torch.equal(kept.sign(), model[0].weight.detach()[masks[0]].sign())
    if name == "usf":
        assert array(kept.abs()) == pytest.approx(usf_scale((200, 100), "xavier"), rel=1e-6)  # float32


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("name", SIGN_RULES)
def test_masked_entries_carry_no_error(name, kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False) if kind == "linear" else nn.Conv2d(6, 5, 1, bias=False))
    rule = fa_bench.attach(model, name, seed=0, density=0.3)
    x = torch.randn(2, 6, *([] if kind == "linear" else [1, 1]), requires_grad=True)
    y = model(x)
    g = torch.randn_like(y)
    y.backward(g)
    feedback = rule.effective_feedback("0").flatten(1)
    assert (feedback == 0).any() and feedback.any()
    torch.testing.assert_close(x.grad.flatten(1), g.flatten(1) @ feedback)


@pytest.mark.parametrize("name", SIGN_RULES)
def test_tiny_weights_keep_their_signs_under_float16_autocast(name):
    """A weight of 1e-9 rounds to 0 in float16, but the feedback must have the sign of the original weight."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    rule = fa_bench.attach(model, name, seed=0)
    with torch.no_grad():
        model[0].weight.copy_(1e-9 * torch.tensor([[1.0, -1, 1, -1], [1, 1, -1, -1], [-1, 1, 1, -1]]))
    x = torch.ones(1, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.float16):
        y = model(x)
    y.backward(torch.tensor([[1.0, 2.0, 4.0]]).half())
    want = torch.tensor([[1.0, 2.0, 4.0]]) @ rule.effective_feedback("0")
    assert want.any() and torch.allclose(x.grad, want, rtol=5e-3, atol=1e-3)


def test_pending_sample_does_not_overwrite_loaded_state():
    """The first layer's sample is computed only when it is read. If a state is loaded while a sample is pending, that sample must
    not overwrite the loaded magnitudes."""
    (model, rule), (x, y) = attached("brsf"), nets.batch("conv")
    rule_grads(model, rule, x, y)
    saved = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for _ in range(2):
        model(x)
    model.load_state_dict(saved)
    assert_bitwise(
        {path: tensors["M"] for path, tensors in rule.feedback.items()},
        {path: saved[f"{path}.feedback_M"] for path in layer_names(model)},
    )


@pytest.mark.parametrize(("name", "shown"), [("usf", "B"), ("brsf", "M"), ("frsf", "M")])
def test_feedback_lists_one_tensor_per_layer(name, shown):
    """usf stores no feedback tensor, so `feedback` reports the matrix that currently propagates the error."""
    model, rule = attached(name)
    assert {path: set(tensors) for path, tensors in rule.feedback.items()} == {path: {shown} for path in layer_names(model)}
    if name == "usf":
        assert all(torch.equal(tensors["B"], rule.effective_feedback(path)) for path, tensors in rule.feedback.items())
        assert not [key for key in model.state_dict() if "feedback" in key]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(3, 5, 4),
        nn.Conv2d(3, 5, (2, 4)),
        nn.Conv3d(3, 5, (2, 1, 2)),
        nn.Linear(3, 5),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_xiao_scale_differs_for_convolutions_and_linear_layers(layer):
    """Xiao's scale is √(2/fan_out) for convolutions and 1/√fan_in for linear layers."""
    rule = fa_bench.attach(nn.Sequential(layer), "usf", scale="xiao")
    want = 1 / math.sqrt(3) if isinstance(layer, nn.Linear) else math.sqrt(2 / (5 * math.prod(layer.kernel_size)))
    assert rule.effective_feedback("0").abs().unique().tolist() == pytest.approx([want])
    rule.detach()


def test_brsf_sample_depends_only_on_layer_seed_and_number():
    """A run that is resumed, or repeated with another version of fa_bench, must use the same magnitudes."""
    model, rule = attached("brsf")
    x, _ = nets.batch("conv")
    for _ in range(3):
        model(x)
    for path, layer in list(rule._layers.items())[1:]:
        expected = torch.empty_like(layer.weight)
        resample_magnitudes(expected, rule.m_init, seed_for(seed_for(0, path, "M"), 3))
        assert torch.equal(rule.feedback[path]["M"], expected)
