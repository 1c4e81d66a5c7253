"""Tests of the common properties of local_error, predsim and dgl, and of local_error's own losses."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fa_bench
from fa_bench.mechanisms.cut.local import _seeded, pooled_size
from fa_bench.mechanisms.cut.positions import require_labels
from fa_bench.metrics.meter import measurement_mode
from fa_bench.objectives.cross_entropy import CrossEntropy

from . import nets
from .helpers import REL, array, arrays, assert_bitwise, assert_matches, distance, feedback_arrays, rule_grads
from .reference import describe
from .references import REFERENCES
from .registered import MODELS, registered, trained_grads

LOCAL = ("local_error", "predsim", "dgl")


@pytest.mark.parametrize("name", LOCAL)
def test_auxiliary_layers_are_parameters_but_not_submodules(name):
    net, rule, x, y = registered("conv2", name)
    plain = MODELS["conv2"]().build((1, 8, 8), 3)
    assert [key for key, _ in net.named_modules()] == [key for key, _ in plain.named_modules()]
    weights = {id(tensor) for tensor in rule.weight_parameters()}
    assert [key for key, p in net.named_parameters() if id(p) in weights] == [key for key, _ in plain.named_parameters()]
    assert bool(rule.feedback_parameters()) == (name != "local_error")
    ids = {id(tensor) for tensor in rule.feedback_parameters()}
    shown = {id(tensor) for tensors in rule.feedback.values() for tensor in tensors.values()}
    assert ids <= shown and len(ids) == len(rule.feedback_parameters()) and not ids & weights
    assert ids | weights == {id(p) for p in net.parameters()}
    rule_grads(net, rule, x, y)
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in rule.feedback_parameters() if tensor.dim() > 1)


@pytest.mark.parametrize("name", ["predsim", "dgl"])
def test_state_round_trips_through_weights_only_load(name, tmp_path):
    net, rule, x, y = registered("conv2", name)
    rule_grads(net, rule, x, y)
    with torch.no_grad():
        for tensor in rule.feedback_parameters():
            tensor.add_(tensor.grad)
    torch.save({"model": net.state_dict(), "rule": rule.state_dict()}, tmp_path / "state.pt")
    other, fresh, _, _ = registered("conv2", name, seed=1)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    kept = fresh.feedback_parameters()
    other.load_state_dict(state["model"])
    fresh.load_state_dict(state["rule"])
    for mine, theirs in zip(fresh.feedback_parameters(), rule.feedback_parameters(), strict=True):
        assert torch.equal(mine, theirs)
    # Optimizers keep references to these tensors.
    assert [id(tensor) for tensor in kept] == [id(tensor) for tensor in fresh.feedback_parameters()]
    for tensor in rule.feedback_parameters():
        tensor.grad = None
    assert_bitwise(rule_grads(other, fresh, x, y), rule_grads(net, rule, x, y))
    assert_bitwise(trained_grads(fresh), trained_grads(rule))


@pytest.mark.parametrize("name", LOCAL)
def test_auxiliary_layers_follow_model_dtype_and_device(name):
    """Converting the model to another dtype or device must keep the auxiliary tensors, because an optimizer may refer to them.

    The other device is meta, on which tensors have no values.
    """
    net, rule, x, y = registered("conv2", name)
    held = rule.feedback_parameters()
    net.to(torch.float32)
    grads = rule_grads(net, rule, x.float(), y)
    assert all(grad.dtype == torch.float32 for grad in grads.values())
    assert [id(tensor) for tensor in rule.feedback_parameters()] == [id(tensor) for tensor in held]
    assert all(tensor.dtype == tensor.grad.dtype == torch.float32 for tensor in held)
    net.to("meta")
    assert all(tensor.device.type == "meta" for tensors in rule.feedback.values() for tensor in tensors.values())


@pytest.mark.parametrize("name", LOCAL)
def test_measuring_and_evaluation_have_no_side_effects(name):
    net, rule, x, y = registered("resnet20", name)
    rule_grads(net, rule, x, y)
    before = {key: None if grad is None else grad.clone() for key, grad in trained_grads(rule).items()}
    state = copy.deepcopy(rule.state_dict())
    with measurement_mode(rule):
        logits = net(x)
        rule.deliver(F.cross_entropy(logits, y), logits, y)
    net.eval()
    with torch.no_grad():
        net(x)
    assert_bitwise(trained_grads(rule), before)
    torch.testing.assert_close(rule.state_dict(), state, rtol=0, atol=0)
    assert not any("running" in key for tensors in state.values() for key in tensors)


@pytest.mark.parametrize("name", LOCAL)
@pytest.mark.parametrize("how", ["rule.backward", "loss.backward"])
def test_missing_labels_error_names_target_argument(name, how):
    net, rule, x, y = registered("mlp", name)
    logits = net(x)
    loss = F.cross_entropy(logits, y)
    with pytest.raises(ValueError, match=rf"{name}.*target"):
        loss.backward() if how == "loss.backward" else rule.backward(loss, logits)
    assert all(p.grad is None for p in net.parameters())


LABELLED = {"drtp": "mlp", "local_error": "mlp", "predsim": "mlp", "dgl": "mlp", "asfp_lc": "resnet20"}


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("label", [-100, -1, 3, 10**9])
def test_rejects_labels_out_of_range(name, label):
    """One of the tested labels is -100, which torch's cross-entropy ignores but a one-hot row cannot represent.

    Nothing learns before the error is raised.
    """
    net, rule, x, y = registered(LABELLED[name], name)
    y[2] = label
    logits = net(x)
    with pytest.raises(ValueError, match=rf"rule '{name}': label {label} is out of range: .* 3 classes, numbered from 0 to 2"):
        rule.backward(logits.square().sum(), logits, y)
    logits = net(x)
    with pytest.raises(ValueError, match=rf"label {label} is out of range"):  # even if no scale has to be inferred
        rule.backward(logits.square().sum(), logits, y, loss_scale=1.0)
    assert all(p.grad is None for p in [*net.parameters(), *rule.feedback_parameters()])
    y[2] = 2
    assert any(grad is not None and grad.any() for grad in rule_grads(net, rule, x, y).values())


@pytest.mark.parametrize(("name", "options"), [("dfa", {}), ("dkp", {}), ("drtp", {"error_sign": True}), ("bp", {})], ids=str)
def test_rules_without_labels_accept_ignored_labels(name, options):
    net, rule, x, y = registered("mlp", name, **options)
    logits = net(x)
    y[2] = -100
    rule.backward(F.cross_entropy(logits, y), logits, y)
    assert net.fc1.weight.grad.any()


@pytest.mark.parametrize("name", LABELLED)
def test_plain_backward_does_not_reuse_previous_labels(name):
    net, rule, x, y = registered(LABELLED[name], name)
    rule_grads(net, rule, x, y)
    with pytest.raises(ValueError, match="requires labels"):
        F.cross_entropy(net(x), y).backward()


def test_labels_on_accelerator_are_not_read():
    """Labels on an accelerator are not read, because a step would have to wait for them.

    Meta tensors stand in for an accelerator, because their values cannot be read.
    """
    require_labels("fa", torch.empty(6, dtype=torch.long, device="meta"), (6, 3), CrossEntropy())
    with pytest.raises(ValueError, match="label 7 is out of range"):
        require_labels("fa", torch.tensor([7]), (1, 3), CrossEntropy())


def test_auxiliary_init_depends_on_cut_not_on_order():
    """The auxiliary layers of act2 are the same whether or not act1 has any."""
    both, one = (registered("mlp", "dgl", cuts=cuts)[1] for cuts in (["act1", "act2"], ["act2"]))
    assert_bitwise(both.feedback["act2"], one.feedback["act2"])
    assert not torch.equal(both.feedback["act1"]["out.weight"][:, :8], both.feedback["act2"]["out.weight"])


def test_rejects_cut_that_returns_tuple():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.pair, self.fc2 = nn.Linear(4, 3), Pair(), nn.Linear(3, 2)

        def forward(self, x):
            return self.fc2(self.pair(self.fc1(x))[0])

    x, net = torch.randn(2, 4), Net()
    with pytest.raises(ValueError, match=r"pair.*tuple"):
        fa_bench.attach(net, "local_error", seed=0, cuts=["pair"], sample_input=x)
        net(x)


@pytest.mark.parametrize("name", ["dfa", "predsim", "dgl"])
def test_layers_after_frozen_cut_still_learn(name):
    """The activation at the only cut needs no gradient, so the rule delivers no error. Only the layers after the cut learn."""
    model, (x, y) = nets.mlp(), nets.batch("mlp")
    rule = fa_bench.attach(model, name, seed=0, sample_input=x, cuts=["act1"], freeze_stem=True, allow_uncovered=True)
    grads = rule_grads(model, rule, x, y)
    assert grads["fc1.weight"] is None and grads["fc3.weight"].any() and grads["fc2.weight"].any()


# --- larger maps ---


def chain_with(*stages: tuple[str, nn.Module]) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(OrderedDict(stages)).double()


LARGE = {
    "deviations": lambda: chain_with(
        ("conv1", nn.Conv2d(2, 5, 3)),
        ("act1", nn.Tanh()),
        ("conv2", nn.Conv2d(5, 3, 3, stride=2)),
        ("act2", nn.Tanh()),
        ("flat", nn.Flatten()),
        ("fc", nn.Linear(48, 3)),
    ),
    "dead": lambda: chain_with(
        ("conv1", nn.Conv2d(2, 3, 3)),
        ("act1", nn.ReLU()),
        ("conv2", nn.Conv2d(3, 2, 3, stride=2)),
        ("act2", nn.ReLU()),
        ("flat", nn.Flatten()),
        ("fc", nn.Linear(32, 3)),
    ),
}


@pytest.mark.parametrize("net", LARGE)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("predsim", {"beta": 0.7}),
        ("predsim", {"loss": "sim"}),
        ("predsim", {"loss": "pred", "decoder_size": 40}),
        ("dgl", {}),
        ("dgl", {"auxiliary_net": "linear"}),
        ("local_error", {"features": 70}),
    ],
    ids=str,
)
def test_larger_maps_match_reference(name, options, net):
    """The maps have 9 x 10 and 4 x 4 pixels, and the larger ones are averaged with overlapping windows.

    Maps with 5, 3 and 2 channels cover both ways in which predsim compares maps.

    In one of the nets, one sample activates no unit of the first layer. For dgl, only the first activation is a cut, and its
    auxiliary net averages maps of 9 x 10 pixels to 3 x 3 and then to 2 x 2.
    """
    model = LARGE[net]()
    chain, params = describe(model), arrays(model)
    generator = torch.Generator().manual_seed(4)
    x, y = torch.randn(4, 2, 11, 12, generator=generator, dtype=torch.float64), torch.tensor([0, 2, 1, 2])
    if net == "dead":
        x[1] = 0.0
        with torch.no_grad():
            model.conv1.bias.fill_(-0.1)
        params = arrays(model)
    rule = fa_bench.attach(model, name, seed=0, sample_input=x, cuts=["act1", "act2"], **options)
    with torch.no_grad():
        for tensors in rule.feedback.values():
            if "decoder.out.weight" in tensors:
                tensors["decoder.out.weight"].normal_(generator=generator)  # the weight is zero at first, and so is the error
    want = REFERENCES[name](chain, params, feedback_arrays(rule), array(x), y.numpy(), **options)
    got = rule_grads(model, rule, x, y)
    learned = {key: grad for key, grad in trained_grads(rule).items() if grad is not None}
    assert_matches(got | learned, want)
    assert all(torch.isfinite(grad).all() for grad in (got | learned).values())


def test_accepts_one_to_three_spatial_dimensions():
    """Convolutions may have one or three spatial dimensions.

    Maps with more than three spatial dimensions are refused with an error that names the cut.
    """
    x1, x3, y = torch.randn(4, 2, 9), torch.randn(4, 1, 5, 4, 6), torch.tensor([0, 1, 2, 1])
    for x, conv, width in ((x1, nn.Conv1d(2, 5, 3), 35), (x3, nn.Conv3d(1, 5, 3), 120)):
        for name in LOCAL:
            model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(width, 6), nn.ReLU(), nn.Linear(6, 3))
            rule = fa_bench.attach(model, name, seed=0, cuts=["1"], sample_input=x, allow_uncovered=True)
            assert torch.isfinite(rule_grads(model, rule, x, y)["0.weight"]).all()
            rule.detach()
    model = nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (1, 2, 1, 2, 1)), nn.Flatten(), nn.Linear(4, 5), nn.Linear(5, 2))
    for name in ("predsim", "dgl"):
        with pytest.raises(fa_bench.errors.CoverageError, match=r"cut '1'.*1 to 3"):
            fa_bench.attach(model, name, seed=0, cuts=["1"], allow_uncovered=True)


# --- local errors ---


def test_local_error_matches_closed_form():
    """The error (softmax(a Mᵀ) - y) M / N reaches the first weight through the derivative of its activation.

    M is fixed, and `rule.feedback` returns the live tensor.
    """
    model, (x, y) = nets.mlp(), nets.batch("mlp")
    rule = fa_bench.attach(model, "local_error", seed=0, sample_input=x, cuts=["act1", "act2"])
    m = rule.feedback["act1"]["M"]
    a = torch.tanh(x @ model.fc1.weight.T + model.fc1.bias).detach()

    def want():
        delta = ((a @ m.T).softmax(1) - F.one_hot(y, 3)) / len(y)
        return ((delta @ m) * (1 - a**2)).T @ x

    assert distance(rule_grads(model, rule, x, y)["fc1.weight"], array(want())) < REL
    with torch.no_grad():
        m.mul_(-3.0)
    assert distance(rule_grads(model, rule, x, y)["fc1.weight"], array(want())) < REL
    assert "act1.feedback_M" in model.state_dict() and not rule.feedback_parameters()


def test_features_option_limits_classifier_inputs():
    """A map of 4 x 8 x 8 is averaged to 4 x 4 x 4.

    M is Kaiming-uniform, with its input size as fan-in.
    """
    _, rule, _, _ = registered("conv2", "local_error", features=64)
    assert rule.feedback["act1"]["M"].shape == (3, 64) and rule.feedback["act3"]["M"].shape == (3, 6)
    bound = (6 / 64) ** 0.5
    # The largest of 192 uniform numbers is below 95 % of the bound with a probability of less than 1e-4.
    assert 0.95 * bound < rule.feedback["act1"]["M"].abs().max() <= bound


@pytest.mark.parametrize(
    ("shape", "limit", "want"),
    [
        ((16, 32, 32), 4096, (16, 16)),
        ((16, 32, 32), 16384, (32, 32)),
        ((512, 4, 4), 4096, (2, 4)),
        ((3, 7, 5), 40, (4, 3)),
        ((9, 2, 2), 8, (1, 1)),
        ((4, 9), 20, (5,)),
        ((2, 4, 4, 4), 70, (2, 4, 4)),
        ((5000,), 4096, ()),
    ],
)
def test_pooled_size(shape, limit, want):
    assert pooled_size(shape, limit) == want


def test_separate_feedback_shares_only_signs_with_classifier():
    _, rule, _, _ = registered("mlp", "local_error", separate=True)
    for tensors in rule.feedback.values():
        assert torch.equal(tensors["K"].sign(), tensors["M"].sign()) and not torch.equal(tensors["K"], tensors["M"])


def test_separate_feedback_magnitudes_have_distribution_of_m():
    """The largest of 4 000 magnitudes of K is within 1 % of the bound √(6/features).

    The magnitudes of K are independent of those of M.
    """
    model = nn.Sequential(nn.Linear(7, 1000), nn.Tanh(), nn.Linear(1000, 4))
    rule = fa_bench.attach(model, "local_error", seed=0, cuts=["1"], separate=True)
    m, k, bound = rule.feedback["1"]["M"], rule.feedback["1"]["K"], (6 / 1000) ** 0.5
    assert torch.equal(k.sign(), m.sign()) and 0.99 * bound < k.abs().max() <= bound
    assert abs(torch.corrcoef(torch.stack([k.abs().flatten(), m.abs().flatten()]))[0, 1].item()) < 0.1


@pytest.mark.parametrize("name", ["predsim", "dgl", "asfp_lc"])
@pytest.mark.parametrize("number", [0, 1])
def test_frozen_auxiliary_parameter_does_not_affect_other_gradients(name, number):
    model = "mlp" if name != "asfp_lc" else "resnet20"
    found = []
    for freezes in (False, True):
        net, rule, x, y = registered(model, name)
        own = [key for key, _ in net.named_parameters() if "auxiliary" in key]
        net.get_parameter(own[number]).requires_grad_(not freezes)
        rule_grads(net, rule, x, y)
        found.append({key: net.get_parameter(key).grad for key, _ in net.named_parameters() if key != own[number]})
        assert (net.get_parameter(own[number]).grad is None) == freezes
    assert_bitwise(*found)


def test_separate_feedback_magnitudes_differ_between_cuts():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    feedback = fa_bench.attach(model, "local_error", seed=0, cuts=["1", "3"], separate=True).feedback
    assert not torch.equal(feedback["1"]["K"].abs(), feedback["3"]["K"].abs())
    assert not torch.equal(feedback["1"]["M"].abs(), feedback["3"]["M"].abs())


def test_auxiliary_layers_are_sampled_on_cpu():
    """Numbers sampled on an accelerator would differ from those sampled on the CPU.

    The meta device, on which nothing is sampled, stands in for an accelerator.
    """
    before = torch.get_rng_state()
    with torch.device("meta"), _seeded(3):
        drawn = nn.Linear(4, 3).weight
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        assert torch.equal(drawn, nn.Linear(4, 3).weight)


@pytest.mark.parametrize("name", ["drtp", "local_error", "predsim", "dgl"])
def test_rejects_float_labels(name):
    """Labels with a floating-point dtype are refused, even if all of them are whole numbers."""
    model, (x, y) = nets.mlp(), nets.batch("mlp")
    rule = fa_bench.attach(model, name, seed=0, cuts=["act1"], sample_input=x, allow_uncovered=True)
    logits = model(x)
    with pytest.raises(ValueError, match=r"requires labels; .* with class indices"):
        rule.backward(F.cross_entropy(logits, y), logits, y.double())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["dgl", "asfp_lc"])
def test_module_list_attribute_blocks_is_not_block_declaration(name):
    """As in many transformers, `blocks` is a ModuleList, not a list of names."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 5), nn.Linear(5, 5)])
            self.head = nn.Linear(5, 3)

        def forward(self, x):
            for block in self.blocks:
                x = torch.tanh(block(x))
            return self.head(x)

    with pytest.raises(fa_bench.errors.CoverageError, match=f"rule '{name}' needs"):
        fa_bench.attach(Net(), name, sample_input=torch.zeros(2, 4))
