"""Tests of the initialisers of feedback and weights: bounds, standard deviations and shapes of the distributions."""

import copy
import math

import pytest
import torch
from torch import nn

import fa_bench
from fa_bench.errors import OptionError
from fa_bench.registry.options import as_plain, option_fields
from fa_bench.registry.registries import ALGORITHMS, ARCHITECTURES

# Maps each name to the standard deviation as a function of fan_in and fan_out, and to whether the distribution is uniform. A
# uniform distribution is bounded at sqrt(3) standard deviations.
DRAWS = {
    "xavier_uniform": (lambda i, o: math.sqrt(2 / (i + o)), True),
    "xavier_normal": (lambda i, o: math.sqrt(2 / (i + o)), False),
    "kaiming_uniform": (lambda i, o: math.sqrt(2 / i), True),
    "kaiming_normal_fan_out": (lambda i, o: math.sqrt(2 / o), False),
    "pytorch": (lambda i, o: 1 / math.sqrt(3 * i), True),
    "normal_fan_sum": (lambda i, o: 1 / math.sqrt(i + o), False),
    "normal_fan_out": (lambda i, o: 1 / math.sqrt(o), False),
    "uniform_one": (lambda i, o: 1 / math.sqrt(3), True),
}


def check(tensor: torch.Tensor, deviation: float, uniform: bool) -> None:
    """Check the standard deviation, the mean and the largest entry of a tensor.

    With 9 000 entries, the standard errors of the standard deviation and of the mean are about 0.75 % and 1 % of the deviation.

    About 24 of 9 000 normally distributed entries exceed 3 standard deviations.
    """
    assert tensor.numel() >= 9000
    assert tensor.std().item() == pytest.approx(deviation, rel=0.03)
    assert abs(tensor.mean().item()) < 0.05 * deviation
    furthest = tensor.abs().max().item() / deviation
    assert 0.97 * math.sqrt(3) < furthest <= math.sqrt(3) * (1 + 1e-6) if uniform else furthest > 3


@pytest.mark.parametrize("draw", DRAWS)
def test_edge_feedback_distribution(draw):
    """The fan-in and fan-out of the linear layer are 40 and 250, and those of the convolution include the area of its kernel."""
    model = nn.Sequential(nn.Conv2d(20, 40, (3, 5)), nn.Flatten(), nn.Linear(40, 250))
    rule = fa_bench.attach(model, "fa", seed=0, b_init=draw)
    deviation, uniform = DRAWS[draw]
    check(rule.feedback["2"]["B"], deviation(40, 250), uniform)
    if draw != "normal_fan_out":  # no source says whether the fan-out includes the kernel's area
        check(rule.feedback["0"]["B"], deviation(20 * 15, 40 * 15), uniform)


@pytest.mark.parametrize("draw", DRAWS)
def test_direct_feedback_distribution(draw):
    """B has the shape (classes, C H W), so fan_in is the size of the cut and fan_out the number of classes.

    The initialiser normal_fan_out therefore samples from N(0, 1/classes).
    """
    model = nn.Sequential(nn.Conv2d(1, 30, 3), nn.ReLU(), nn.Flatten(), nn.Linear(30 * 30, 10))
    rule = fa_bench.attach(model, "dfa", seed=0, b_init=draw, cuts=["1"], sample_input=torch.zeros(2, 1, 8, 7))
    deviation, uniform = DRAWS[draw]
    check(rule.feedback["1"]["B"], deviation(900, 10), uniform)


@pytest.mark.parametrize("draw", DRAWS)
def test_kernel_form_feedback_distribution(draw):
    """B has the shape (classes, inputs of the layer), so fan_in is the number of inputs and fan_out the number of classes."""
    model = nn.Sequential(nn.Linear(900, 5), nn.ReLU(), nn.Linear(5, 10))
    rule = fa_bench.attach(model, "dfa", seed=0, form="kernel", b_init=draw)
    deviation, uniform = DRAWS[draw]
    check(rule.feedback["0"]["B"], deviation(900, 10), uniform)


@pytest.mark.parametrize("draw", DRAWS)
def test_forward_alignment_weights_distribution(draw):
    """C has the shape of the weight, 250 x 40."""
    model = nn.Sequential(nn.Linear(40, 250), nn.ReLU(), nn.Linear(250, 3))
    rule = fa_bench.attach(model, "forward_alignment", seed=0, c_init=draw)
    deviation, uniform = DRAWS[draw]
    check(rule.feedback["0"]["C"], deviation(40, 250), uniform)


@pytest.mark.parametrize("name", ["brsf", "frsf"])
@pytest.mark.parametrize("draw", DRAWS)
def test_magnitudes_distribution(name, draw):
    """The magnitudes |M| are absolute values of samples from the distribution, so their mean square is its variance."""
    model = nn.Sequential(nn.Linear(40, 250))
    rule = fa_bench.attach(model, name, seed=0, m_init=draw)
    assert (rule.feedback["0"]["M"] >= 0).all()
    model(torch.zeros(2, 40))
    assert (rule.feedback["0"]["M"] >= 0).all()
    size = rule.effective_feedback("0").detach().square().mean().sqrt().item()
    assert size == pytest.approx(DRAWS[draw][0](40, 250), rel=0.03)


@pytest.mark.parametrize("name", ["kp", "dfa"])
def test_zeros_init(name):
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    rule = fa_bench.attach(model, name, seed=0, b_init="zeros", **({"cuts": ["1"]} if name == "dfa" else {}))
    assert all(not tensors["B"].any() for tensors in rule.feedback.values())


# --- feedback with few values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("init", "values"), [("trinomial", (-1, 0, 1)), ("binomial", (0, 1))])
def test_discrete_init_values_are_equally_likely(init, values):
    """The tolerance for the fractions of 18 000 entries is at least eight standard errors."""
    model = nn.Sequential(nn.Linear(4, 900), nn.ReLU(), nn.Linear(900, 20))
    feedback = [fa_bench.attach(copy.deepcopy(model), "dfa", seed=seed, b_init=init, cuts=["1"]).feedback for seed in (0, 0, 1)]
    one, same, other = (tensors["1"]["B"] for tensors in feedback)
    assert torch.equal(one, same) and not torch.equal(one, other)
    found, counts = one.unique(return_counts=True)
    assert found.tolist() == list(values)
    assert (counts / one.numel()).tolist() == pytest.approx([1 / len(values)] * len(values), abs=0.03 / len(values) * 3)


@pytest.mark.parametrize(("init", "signs"), [("identity", (1, 1, 1, 1)), ("identity_pm", (1, -1, 1, -1))])
@pytest.mark.parametrize("width", [2, 3, 11, 12])
def test_identity_init_tiles_identity_matrices(init, signs, width):
    """The last identity matrix is truncated at the width of the layer."""
    model = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))
    got = fa_bench.attach(model, "dfa", b_init=init, cuts=["1"]).feedback["1"]["B"]
    want = torch.cat([sign * torch.eye(3) for sign in signs], 1)[:, :width]
    assert torch.equal(got, want)


def test_identity_init_of_kernel_treats_taps_as_columns():
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 3))
    got = fa_bench.attach(model, "fa", b_init="identity_pm").feedback["0"]["B"]
    assert torch.equal(got.flatten(1), torch.cat([torch.eye(3), -torch.eye(3), torch.eye(3)], 1)[:, :8])


@pytest.mark.parametrize("name", ["trinomial", "binomial", "identity", "identity_pm"])
def test_weights_and_magnitudes_reject_discrete_inits(name):
    """Discrete initialisers are refused for weights, magnitudes, and the decoders of bp_deepsup."""
    for make in (
        lambda: ARCHITECTURES["mlp"](init=name),
        lambda: fa_bench.attach(nn.Sequential(nn.Linear(4, 3)), "brsf", m_init=name),
        lambda: fa_bench.attach(nn.Sequential(nn.Linear(4, 3)), "bp_deepsup", decoder_init=name),
    ):
        with pytest.raises(OptionError, match=f"init={name}"):
            make()


# --- weights -------------------------------------------------------------------------------------------------------------------

# Maps each name to a function of torch that initialises a weight in the same way.
TORCHS = {
    "xavier_uniform": nn.init.xavier_uniform_,
    "kaiming_uniform": lambda weight: nn.init.kaiming_uniform_(weight, nonlinearity="relu"),
    "kaiming_normal": lambda weight: nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu"),
    "kaiming_normal_fan_out": lambda weight: nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu"),
    "pytorch": lambda weight: weight,
}
NETS = {
    "mlp": ({"widths": [7, 3]}, (1, 5, 6)),
    "conv2": ({"channels": 3, "hidden": 5}, (3, 9, 9)),
    "asap_alexnet": ({"width": 3, "hidden": 6}, (3, 16, 16)),
    "resnet18": ({"width": 3, "blocks": [1, 1]}, (3, 8, 8)),
}


def built(net, **options):
    torch.manual_seed(3)
    return ARCHITECTURES[net](**NETS[net][0], **options).build(NETS[net][1], 4)


def layers_of(model):
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("init", TORCHS)
def test_weights_match_torch_initialisers(net, init):
    """The weights are bitwise identical to those from torch's functions, applied in order after torch's own initialisation.

    Except with init=pytorch, biases are zero.
    """
    torch.manual_seed(3)
    want = ARCHITECTURES[net](**NETS[net][0]).make(NETS[net][1], 4)
    for layer in layers_of(want).values():
        TORCHS[init](layer.weight)
        if init != "pytorch" and layer.bias is not None:
            nn.init.zeros_(layer.bias)
    got = built(net, init=init)
    assert all(torch.equal(got.state_dict()[key], tensor) for key, tensor in want.state_dict().items())


def test_kaiming_normal_is_alias_of_kaiming_normal_fan_out():
    old, new = (ARCHITECTURES["mlp"](init=name) for name in ("kaiming_normal", "kaiming_normal_fan_out"))
    assert as_plain(old) == as_plain(new)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(
    ("init", "linear_init"),
    [
        ("pytorch", "kaiming_uniform"),
        ("pytorch", "uniform_one"),
        ("xavier_uniform", "pytorch"),
        ("kaiming_normal", "zeros"),
    ],
)
def test_linear_init_applies_only_to_linear_layers(net, init, linear_init):
    """The linear weights have the bound of their own distribution, and convolution weights have that of `init`.

    Layers with the initialiser pytorch have the weights and biases that torch itself samples. All other biases are zero.
    """
    model, plain = layers_of(built(net, init=init, linear_init=linear_init)), layers_of(built(net))
    for path, layer in model.items():
        name = linear_init if isinstance(layer, nn.Linear) else init
        if name == "pytorch":
            assert torch.equal(layer.weight, plain[path].weight)
            assert layer.bias is None or torch.equal(layer.bias, plain[path].bias)
            continue
        assert layer.bias is None or not layer.bias.any()
        if name != "kaiming_normal":
            fan_in, fan_out = layer.weight[0].numel(), layer.weight[:, 0].numel()
            bound = {
                "kaiming_uniform": math.sqrt(6 / fan_in),
                "xavier_uniform": math.sqrt(6 / (fan_in + fan_out)),
                "uniform_one": 1.0,
                "zeros": 0.0,
            }[name]
            largest = layer.weight.abs().max().item()
            # The largest of at least 12 uniform numbers is below half the bound with a probability of at most 1/4000.
            assert bound / 2 <= largest <= bound * (1 + 1e-6), path
    assert any(isinstance(layer, nn.Linear) for layer in model.values())


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(
    ("init", "linear_init", "output_init"),
    [("xavier_uniform", None, "zeros"), ("pytorch", "uniform_one", "zeros"), ("zeros", "zeros", "pytorch")],
)
def test_output_init_applies_only_to_output_layer(net, init, linear_init, output_init):
    model = layers_of(built(net, init=init, linear_init=linear_init, output_init=output_init))
    others, plain = layers_of(built(net, init=init, linear_init=linear_init)), layers_of(built(net))
    *hidden, last = model
    if output_init == "zeros":
        assert not model[last].weight.any() and not model[last].bias.any() and others[last].weight.any()
    else:
        assert torch.equal(model[last].weight, plain[last].weight) and torch.equal(model[last].bias, plain[last].bias)
    for path in hidden:
        assert torch.equal(model[path].weight, others[path].weight), path


def test_linear_init_defaults_to_init():
    for init in ("pytorch", "xavier_uniform", "lecun_uniform"):
        one, two = built("conv2", init=init), built("conv2", init=init, linear_init=init)
        if init == "pytorch":
            assert all(torch.equal(two.state_dict()[key], tensor) for key, tensor in one.state_dict().items())
        assert torch.equal(one.conv2.weight, two.conv2.weight) and torch.equal(one.fc1.weight, two.fc1.weight)


def test_kp_linear_b_init():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(400, 50))
    rule = fa_bench.attach(model, "kp", seed=0, b_init="copy_w", linear_b_init="uniform_one")
    linear = rule.feedback["2"]["B"]
    assert torch.equal(rule.feedback["0"]["B"], model[0].weight) and 0.99 < linear.abs().max() <= 1
    rule.detach()
    plain = fa_bench.attach(model, "kp", seed=0, b_init="uniform_one")
    assert torch.equal(plain.feedback["2"]["B"], linear)


#: The rules with `b_init`, except asap, asfp and asfp_lc, whose fully connected layers use a different initialiser.
WITH_B_INIT = sorted(
    name
    for name, rule in ALGORITHMS.items()
    if "b_init" in {field.name for field in option_fields(rule)} and name not in ("asap", "asfp", "asfp_lc")
)
CASES = [*((name, {"samples": 8} if name == "f3" else {}) for name in WITH_B_INIT), ("dfc", {"feedback_weights": "fixed"})]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_b_init_affects_feedback_of_every_rule(name: str, options: dict) -> None:
    """Every B has different values under two different initialisers."""

    def drawn(**chosen: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
        model.cut_points = model.blocks = ["1", "3"]
        rule = fa_bench.attach(model, name, seed=0, **options, **chosen)
        return [tensors["B"].clone() for tensors in rule.feedback.values() if "B" in tensors]

    one, same, other = drawn(), drawn(b_init=ALGORITHMS[name]().b_init), drawn(b_init="kaiming_normal_fan_out")
    assert one and len(one) == len(other)
    for first, second, third in zip(one, same, other, strict=True):
        assert torch.equal(first, second)
        assert not torch.equal(first, third)
