"""Tests of dfa, which computes the signal at each cut directly from the output error."""

import math
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fa_bench

from . import nets
from .helpers import REL, array, arrays, assert_bitwise, assert_matches, backward, bp_grads, collect, distance, rule_grads
from .reference import describe, gradients

FORMS = ("neuron", "kernel", "shared")


def attached(form: str = "neuron", net: str = "mlp_tanh", cuts=("act1", "act2"), **options):
    model, (x, _) = nets.NETS[net](), nets.batch(net)
    if form != "kernel":
        options["cuts"] = list(cuts)
    return model, fa_bench.attach(model, "dfa", seed=0, sample_input=x, form=form, **options)


def test_one_hidden_layer_matches_fa_with_same_feedback():
    x, y = nets.batch("one")
    direct, chained = nets.one_hidden(), nets.one_hidden()
    dfa = fa_bench.attach(direct, "dfa", seed=0, sample_input=x, cuts=["act1"])
    fa = fa_bench.attach(chained, "fa", seed=0)
    with torch.no_grad():
        fa.feedback["fc2"]["B"].copy_(dfa.feedback["act1"]["B"])
    want = {name: grad for name, grad in rule_grads(chained, fa, x, y).items()}
    assert_matches(rule_grads(direct, dfa, x, y), want, rel=1e-13)  # the same two products, possibly in a different order
    assert distance(want["fc1.weight"], bp_grads(nets.one_hidden(), x, y)["fc1.weight"]) > 1e-2


def test_last_cut_with_output_weight_as_feedback_matches_backprop():
    model, rule = attached()
    with torch.no_grad():
        rule.feedback["act2"]["B"].copy_(model.fc3.weight)
    x, y = nets.batch("mlp")
    got, exact = rule_grads(model, rule, x, y), bp_grads(nets.mlp(), x, y)
    assert distance(got["fc2.weight"], exact["fc2.weight"]) < REL
    assert distance(got["fc1.weight"], exact["fc1.weight"]) > 1e-2


@pytest.mark.parametrize("form", FORMS)
def test_gradients_do_not_depend_on_later_weights(form):
    """With backward unlocking, changing a later W does not change earlier gradients if delta_out is fixed.

    A loss that is linear in the logits keeps delta_out fixed.
    """
    x, _ = nets.batch("mlp")
    fixed = torch.randn(4, nets.CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def gradients(model, rule):
        model.zero_grad(set_to_none=True)
        logits = model(x)
        backward(rule, (logits * fixed).sum(), logits, torch.zeros(4, dtype=torch.long))
        return collect(model)

    model, rule = attached(form)
    before = gradients(model, rule)
    with torch.no_grad():
        model.fc3.weight.mul_(-3.0).add_(0.5)
    after = gradients(model, rule)
    assert_bitwise(after, before)
    with torch.no_grad():
        model.fc2.weight.mul_(-3.0).add_(0.5)
    last = gradients(model, rule)
    assert torch.equal(last["fc1.weight"], before["fc1.weight"]) and torch.equal(last["fc1.bias"], before["fc1.bias"])
    assert not torch.equal(last["fc3.weight"], before["fc3.weight"]), "the gradient of fc3 does not depend on its input"

    control = nets.mlp()
    edge = fa_bench.attach(control, "fa", seed=0)
    before = gradients(control, edge)
    with torch.no_grad():
        control.fc2.weight.mul_(-3.0).add_(0.5)
    assert not torch.equal(gradients(control, edge)["fc1.weight"], before["fc1.weight"]), (
        "not even the gradients of FA depend on later weights, so this test proves nothing"
    )


def test_feedback_affects_only_its_block():
    for cut, layer in {"act1": "fc1", "act2": "fc2"}.items():
        model, rule = attached()
        x, y = nets.batch("mlp")
        before = rule_grads(model, rule, x, y)
        with torch.no_grad():
            rule.feedback[cut]["B"].add_(1.0)
        after = rule_grads(model, rule, x, y)
        assert {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])} == {layer}


def test_feedback_shapes_and_keys():
    _, rule = attached(net="conv")
    assert {cut: tuple(t["B"].shape) for cut, t in rule.feedback.items()} == {"act1": (3, 48), "act2": (3, 72)}
    _, rule = attached("kernel", net="conv")
    want = {"conv1": (3, 2, 3, 3), "conv2": (3, 4, 3, 3), "fc1": (3, 72)}
    assert {layer: tuple(t["B"].shape) for layer, t in rule.feedback.items()} == want


@pytest.mark.parametrize("widths", [(5, 5), (6, 5), (5, 6)], ids=str)
def test_weight_pairs_compare_output_layer_with_last_cut(widths):
    """The B of the last cut has the shape of the output weight, and the B of an earlier cut may have the same shape."""
    first, last = widths
    model = nn.Sequential(nn.Linear(4, first), nn.ReLU(), nn.Linear(first, last), nn.ReLU(), nn.Linear(last, 3))
    rule = fa_bench.attach(model, "dfa", seed=0, cuts=["1", "3"])
    assert list(rule.weight_pairs()) == ["4"]
    feedback, weight = rule.weight_pairs()["4"]
    assert torch.equal(feedback, rule.feedback["3"]["B"]) and torch.equal(weight, model[4].weight)


def test_patterns_and_names_select_same_cuts():
    (one, by_name), (two, by_pattern) = attached(), attached(cuts=["act*"])
    assert set(by_name.feedback) == set(by_pattern.feedback) == {"act1", "act2"}
    x, y = nets.batch("mlp")
    assert_bitwise(rule_grads(one, by_name, x, y), rule_grads(two, by_pattern, x, y))


def test_layer_without_cut_is_rejected_or_gets_local_gradient():
    """Only act2 is a cut, so fc1's error passes through fc2's true weight.

    Attaching raises an error that names fc1. With allow_uncovered, fc1 learns from this error.
    """
    reason = r"fc1\.weight \(no cut point between this layer and the next\)"
    with pytest.raises(fa_bench.errors.CoverageError, match=reason):
        attached(cuts=("act2",))
    model, rule = attached(cuts=("act2",), allow_uncovered=True)
    (x, y), plain = nets.batch("mlp"), nets.mlp()
    got = rule_grads(model, rule, x, y)
    want = gradients(describe(plain), arrays(plain), array(x), y.numpy(), inject={"act2": array(rule.feedback["act2"]["B"])})
    assert_matches(got, want)


def test_cut_before_activation_omits_its_derivative():
    """If the cut is at a layer's output, the signal itself is that layer's error, without the derivative of the activation."""
    model, rule = attached(cuts=("fc1", "fc2"))
    x, y = nets.batch("mlp")
    got, plain = rule_grads(model, rule, x, y), nets.mlp()
    delta = torch.autograd.grad(F.cross_entropy(z := plain(x), y), z)[0]
    assert distance(got["fc1.weight"], array((delta @ rule.feedback["fc1"]["B"]).T @ x)) < REL


def test_shared_matrix_is_uniform_from_minus_one_to_one():
    """The 3 x 4000 entries nearly reach ±1; their mean and mean square are within 5 standard errors of 0 and 1/3."""
    model = nn.Sequential(nn.Linear(7, 4000), nn.Tanh(), nn.Linear(4000, 50), nn.Tanh(), nn.Linear(50, 3))
    x = torch.zeros(2, 7)
    rule = fa_bench.attach(model, "dfa", seed=0, form="shared", cuts=["1", "3"], sample_input=x)
    matrix = max((t["B"] for t in rule.feedback.values()), key=lambda b: b.shape[1])
    assert matrix.shape == (3, 4000)
    assert -1 <= matrix.min() < -0.99 and 0.99 < matrix.max() < 1
    assert matrix.mean().item() == pytest.approx(0, abs=0.027)
    assert matrix.square().mean().item() == pytest.approx(1 / 3, abs=0.014)


def test_normalise_divides_by_sqrt_of_widest_cut():
    """Both models sample the same matrix, so hidden gradients differ by a factor of √6, even at the cut with 5 features."""
    x, y = nets.batch("mlp")
    (one, raw), (two, scaled) = attached("shared", normalise=False), attached("shared")
    raw_grads, scaled_grads = rule_grads(one, raw, x, y), rule_grads(two, scaled, x, y)
    for name in ("fc1.weight", "fc2.weight"):
        assert distance(scaled_grads[name] * 6**0.5, raw_grads[name]) < REL


def test_cuts_use_leading_columns_of_shared_matrix():
    _, rule = attached("shared")
    small, large = sorted((tensors["B"] for tensors in rule.feedback.values()), key=lambda b: b.shape[1])
    assert small.shape == (3, 5) and large.shape == (3, 6)
    assert torch.equal(small, large[:, :5])


@pytest.mark.parametrize(
    ("name", "options", "bound"),
    [
        ("dfa", {}, math.sqrt(6 / 4003)),
        ("dfa", {"form": "kernel"}, math.sqrt(6 / 4003)),
        ("dfa", {"form": "shared"}, 1.0),
        ("drtp", {}, math.sqrt(6 / 4000)),
        ("drtp", {"error_sign": True}, math.sqrt(6 / 4000)),
    ],
    ids=str,
)
def test_density_is_fraction_of_nonzero_entries(name, options, bound):
    """With 12 000 entries, the fraction has a standard error of 0.0042, and the tolerance is about 5 standard errors.

    A mask does not rescale the remaining entries.
    """
    model = nn.Sequential(nn.Linear(7, 4000), nn.Tanh(), nn.Linear(4000, 3))
    where = {} if options.get("form") == "kernel" else {"cuts": ["1"]}
    rule = fa_bench.attach(model, name, seed=0, density=0.3, sample_input=torch.zeros(2, 7), **where, **options)
    b = rule.feedback["1" if where else "2"]["B"]
    assert b.shape == (3, 4000)
    assert (b != 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert 0.97 * bound < b.abs().max().item() <= bound


@pytest.mark.parametrize("form", FORMS)
def test_inplace_activation_after_cut(form):
    """If an in-place ReLU overwrites the output of a cut at BatchNorm, the gradients equal those with a plain ReLU."""
    x, y = nets.batch("conv")
    cuts = {} if form == "kernel" else {"cuts": ["bn1", "bn2", "bn3"]}
    grads = []
    for activation in (nets.inplace_relu, nn.ReLU):
        model = nets.convnet(activation, batch_norm=True)
        rule = fa_bench.attach(model, "dfa", seed=0, sample_input=x, form=form, **cuts)
        grads.append(rule_grads(model, rule, x, y))
    assert_bitwise(*grads)


KERNELS = {
    "conv1d": (lambda: nn.Conv1d(4, 5, 3, stride=2, padding=1), (4, 8)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), groups=2), (4, 6, 7)),
    "conv2d-dilated": (lambda: nn.Conv2d(4, 5, 3, dilation=2, padding=1), (4, 6, 7)),
    "conv2d-same": (lambda: nn.Conv2d(4, 5, (2, 3), padding="same"), (4, 6, 7)),
    "conv2d-circular": (lambda: nn.Conv2d(4, 5, 3, padding=2, padding_mode="circular"), (4, 6, 7)),
    "conv3d": (lambda: nn.Conv3d(4, 2, 2, stride=2), (4, 5, 4, 6)),
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
}


# torch warns once that an even kernel with padding='same' needs a padded copy of the input.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("layer", KERNELS)
def test_kernel_form_matches_layer_geometry(layer):
    """The error at a layer's input is the input gradient of a similar layer with weight B, one output per class and no groups."""
    build, shape = KERNELS[layer]
    torch.manual_seed(0)
    x, y = torch.randn(2, *shape, dtype=torch.float64), torch.tensor([2, 0])
    middle = build()
    width = middle(x[:1].float()).numel()
    first = nn.Linear(shape[-1], shape[-1])  # its bias gradient sums the error over all dimensions but the last
    model = nn.Sequential(first, middle, nn.Flatten(), nn.Linear(width, 3)).double()
    logits = model(x)
    delta = torch.autograd.grad(F.cross_entropy(logits, y), logits)[0]
    inside = first(x).detach().requires_grad_()
    rule = fa_bench.attach(model, "dfa", seed=0, form="kernel", sample_input=x)
    feedback = rule.feedback["1"]["B"]
    if layer == "linear":
        direct = (inside * (delta @ feedback).reshape(2, *[1] * (inside.dim() - 2), -1)).sum()
    else:
        options = {name: getattr(middle, name) for name in ("stride", "padding", "dilation", "padding_mode")}
        twin = type(middle)(4, 3, middle.kernel_size, bias=False, **options).double()
        with torch.no_grad():
            twin.weight.copy_(feedback)
        direct = torch.einsum("nc...,nc->", twin(inside), delta)
    error = torch.autograd.grad(direct, inside)[0]
    got = rule_grads(model, rule, x, y)
    assert distance(got["0.bias"], error.sum(tuple(range(error.dim() - 1)))) < REL
    assert distance(got["0.weight"], torch.einsum("...o,...i->oi", error, x)) < REL


def test_kernel_form_rejects_transposed_convolution():
    stages = [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 5, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(495, 3)]
    model, (x, _) = nn.Sequential(*stages).double(), nets.batch("conv")
    with pytest.raises(fa_bench.errors.CoverageError, match="form=kernel does not support the transposed convolution '2'"):
        fa_bench.attach(model, "dfa", seed=0, form="kernel", sample_input=x)


def test_inplace_activation_after_cut_that_saves_its_output():
    """The derivative of tanh is computed from its output, which the ReLU after the cut overwrites.

    The cut must therefore preserve the output.
    """
    x, y = nets.batch("mlp")
    grads = []
    for activation in (nets.inplace_relu, nn.ReLU):
        model = nets.mlp()
        layers = [model.fc1, model.act1, activation(), model.fc2, model.act2, activation(), model.fc3]
        model = nn.Sequential(*layers)
        rule = fa_bench.attach(model, "dfa", seed=0, sample_input=x, cuts=["1", "4"])
        grads.append(rule_grads(model, rule, x, y))
    assert_bitwise(*grads)


def test_inplace_activation_at_cut():
    x, y = nets.batch("conv")
    grads = []
    for activation in (nets.inplace_relu, nn.ReLU):
        model = nets.convnet(activation, batch_norm=True)
        rule = fa_bench.attach(model, "dfa", seed=0, sample_input=x, cuts=["act1", "act2", "act3"])
        grads.append(rule_grads(model, rule, x, y))
    assert_bitwise(*grads)


def test_kernel_form_on_residual_network():
    """Each convolution's input gets the direct error, to which the identity shortcut adds the error from later layers."""
    plain, model, (x, y) = nets.residual(), nets.residual(), nets.batch("residual")
    rule = fa_bench.attach(model, "dfa", seed=0, form="kernel", sample_input=x)
    delta = torch.autograd.grad(F.cross_entropy(z := plain(x), y), z)[0].detach()
    extra = torch.zeros((), dtype=torch.float64)

    def direct(name, layer, value):
        nonlocal extra
        feedback, out = rule.feedback[name]["B"], layer(value.detach())
        if isinstance(layer, nn.Linear):
            signal = delta @ feedback
        else:
            everywhere = delta[:, :, None, None].expand(-1, -1, *out.shape[2:])
            signal = torch.nn.grad.conv2d_input(value.shape, feedback, everywhere, layer.stride, layer.padding)
        extra = extra + (value * signal).sum()
        return out

    class Direct(nn.Module):
        def __init__(self, name, layer):
            super().__init__()
            self.name, self.layer = name, layer

        def forward(self, value):
            return direct(self.name, self.layer, value)

    for name in list(rule.feedback):
        plain.set_submodule(name, Direct(name, plain.get_submodule(name)))
    loss = F.cross_entropy(plain(x), y)
    (loss + extra).backward()
    assert len(rule.feedback) == 6
    assert_matches(rule_grads(model, rule, x, y), {name.replace(".layer.", "."): grad for name, grad in collect(plain).items()})


def test_missing_or_unknown_cuts_error_names_option():
    x, _ = nets.batch("mlp")
    with pytest.raises(fa_bench.errors.CoverageError, match="cuts") as caught:
        fa_bench.attach(nets.mlp(), "dfa", seed=0, sample_input=x)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(ValueError, match="act9"):
        fa_bench.attach(nets.mlp(), "dfa", seed=0, sample_input=x, cuts=["act1", "act9"])


class Blocks(nn.Module):
    """A net with a ReLU that runs twice and a stage whose output is that of its last block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.act = nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Tanh()
        self.stage = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU()))
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.act(self.relu(self.stage(self.relu(self.conv(x))))).flatten(1))


@pytest.mark.parametrize("cuts", [["stage", "stage.1"], ["stage*"], ["stage.1.1", "stage.1"]])
def test_rejects_cuts_with_same_output(cuts):
    with pytest.raises(fa_bench.errors.CoverageError, match=r"'stage\.1\S*' has the same output as cut 'stage.*matches dots"):
        fa_bench.attach(Blocks(), "dfa", cuts=cuts, sample_input=torch.randn(2, 1, 4, 4))


def test_suggested_cuts_exclude_modules_that_run_repeatedly():
    with pytest.raises(fa_bench.errors.CoverageError, match="needs cut points") as caught:
        fa_bench.attach(Blocks(), "dfa", sample_input=torch.randn(2, 1, 4, 4))
    assert "relu" not in str(caught.value)
    rule = fa_bench.attach(Blocks(), "dfa", sample_input=torch.randn(2, 1, 4, 4), **caught.value.settings)
    assert not rule.coverage.uncovered


def test_module_with_two_names_is_one_cut():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(OrderedDict(fc=nn.Linear(4, 5), act=nn.ReLU()))
            self.act, self.head = self.body.act, nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.body(x))

    rule = fa_bench.attach(Named(), "dfa", sample_input=torch.zeros(2, 4), cuts=["*act"])
    assert list(rule.feedback) == ["body.act"]
