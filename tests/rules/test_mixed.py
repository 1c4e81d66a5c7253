"""Tests of mixed: a mixture of a single kind equals the corresponding rule, every layer uses its own mixture, and the fractions
predict the angles."""

import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fa_bench
from fa_bench.errors import CoverageError, OptionError
from fa_bench.metrics.angles import norm_ratio, weight_angle

from . import nets
from .helpers import array, arrays, assert_bitwise, assert_matches, backward, bp_grads, collect, distance, rule_grads
from .test_contract import LAYERS, one_layer_pass

ONE = {kind: {other: float(other == kind) for other in ("pfa", "fa", "kp")} for kind in ("pfa", "fa", "kp")}
THIRDS = {"pfa": 0.3, "fa": 0.3, "kp": 0.4, "ratio": 2.0}


# --- relations to the component rules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", ["mlp_bn", "conv", "conv_bn"])
@pytest.mark.parametrize("kind", ONE)
def test_single_kind_matches_its_rule(kind, net):
    """Given the same tensors, a mixture of one kind has the same weights and feedback as the rule of that kind after four steps
    of SGD with momentum and decay. For pfa, the two hops add rounding errors."""
    ratio = {"ratio": 3.0} if kind == "pfa" else {}
    models = [nets.NETS[net]() for _ in range(2)]
    mixed = fa_bench.attach(models[0], "mixed", seed=0, **ONE[kind], **ratio)
    alone = fa_bench.attach(models[1], kind, seed=1, **ratio)
    names = {"pfa": {"B": "B", "R": "R"}, "fa": {"F": "B"}, "kp": {"K": "B"}}[kind]
    with torch.no_grad():
        for path, tensors in mixed.feedback.items():
            assert set(tensors) == {*names, f"mask_{kind}"}, "there are tensors of another kind"
            for ours, theirs in names.items():
                alone.feedback[path][theirs].copy_(tensors[ours])
    optimizers = [
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        for model, rule in zip(models, (mixed, alone), strict=True)
    ]
    for step in range(4):
        batch = nets.batch(net, seed=step)
        for model, rule, optimizer in zip(models, (mixed, alone), optimizers, strict=True):
            optimizer.zero_grad()
            rule_grads(model, rule, *batch)
            optimizer.step()
            rule.step()
    assert_matches(arrays(models[0]), arrays(models[1]), rel=1e-11 if kind == "pfa" else 0)
    for path, tensors in mixed.feedback.items():
        for ours, theirs in names.items():
            assert distance(array(tensors[ours]), array(alone.feedback[path][theirs])) <= (1e-11 if kind == "pfa" else 0)


# torch warns once that an even kernel with padding='same' needs a padded copy of the input.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("layer", LAYERS)
def test_layer_errors_and_feedback_gradients_match_component_rules(layer):
    """The test runs one layer under mixed, fa and pfa with the same error at its output. The input error must equal that of FA
    with B = E, R must get PFA's gradient, and K must get a copy of W's gradient."""
    build, shape = LAYERS[layer]
    runs, effective = {}, torch.empty(0)
    for name, options in (("mixed", THIRDS), ("fa", {}), ("pfa", {"ratio": 2.0})):
        torch.manual_seed(0)
        model = nn.Sequential(OrderedDict(layer=build())).double()
        x = torch.randn(shape, dtype=torch.float64)
        rule = fa_bench.attach(model, name, seed=0, **options)
        if name == "fa":
            rule.feedback["layer"]["B"].copy_(effective)
        runs[name] = rule, *one_layer_pass(model, x, lambda loss, y, rule=rule: backward(rule, loss, y))
        if name == "mixed":
            effective = rule.effective_feedback("layer").clone()
    (mixed, y, got), (_, fa_y, want), (pfa, _, _) = runs.values()
    assert torch.equal(y, fa_y)
    assert_bitwise(got, want)
    tensors, theirs = mixed.feedback["layer"], pfa.feedback["layer"]
    assert torch.equal(tensors["B"], theirs["B"]) and torch.equal(tensors["R"], theirs["R"]), "B and R are not sampled as in pfa"
    assert distance(tensors["R"].grad, array(theirs["R"].grad)) < 1e-12
    assert torch.equal(tensors["K"].grad, got["layer.weight"])
    assert tensors["K"].grad.data_ptr() != mixed.model.layer.weight.grad.data_ptr()
    path = pfa.effective_feedback("layer")
    for mask, part in (("mask_pfa", path), ("mask_fa", tensors["F"]), ("mask_kp", tensors["K"])):
        chosen = tensors[mask].bool()
        assert distance(effective[chosen], array(part[chosen]), 1e-6) < 1e-12


def test_feedback_equal_to_weight_matches_backprop():
    """The test sets F and K to W, and R to the pseudo-inverse of B times W, so that B R = W."""
    model, (x, y) = nets.mlp(), nets.batch("mlp")
    rule = fa_bench.attach(model, "mixed", seed=0, **THIRDS)
    other = rule_grads(model, rule, x, y)
    with torch.no_grad():
        for path, tensors in rule.feedback.items():
            weight = model.get_submodule(path).weight
            for name in ("F", "K"):
                tensors[name].copy_(weight)
            tensors["R"].copy_(torch.linalg.pinv(tensors["B"]) @ weight)
    want = bp_grads(nets.mlp(), x, y)
    assert_matches(rule_grads(model, rule, x, y), want)
    assert distance(other["fc1.weight"], want["fc1.weight"]) > 1e-2


# --- the mixture ---------------------------------------------------------------------------------------------------------------


def test_masks_partition_weights_by_given_fractions():
    """The layer has 15 000 weights, so the standard error of a fraction is at most 0.4 %."""
    model = nn.Sequential(nn.Linear(150, 100))
    tensors = fa_bench.attach(model, "mixed", seed=0, pfa=0.5, fa=0.2, kp=0.3, ratio=1.0).feedback["0"]
    masks = {kind: tensors[f"mask_{kind}"] for kind in ("pfa", "fa", "kp")}
    assert torch.equal(sum(masks.values()), torch.ones(100, 150))
    for kind, want in (("pfa", 0.5), ("fa", 0.2), ("kp", 0.3)):
        assert set(masks[kind].unique().tolist()) == {0.0, 1.0}
        assert masks[kind].mean().item() == pytest.approx(want, abs=0.015)
        assert masks[kind].mean(0).std().item() < 0.07, "the kinds are spread unevenly over the columns"


def test_only_r_and_k_learn_and_nothing_is_masked():
    model = nets.mlp()
    rule = fa_bench.attach(model, "mixed", seed=0, **THIRDS)
    before = {path: {name: tensor.clone() for name, tensor in tensors.items()} for path, tensors in rule.feedback.items()}
    assert len(rule.feedback_parameters()) == 6
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule_grads(model, rule, *nets.batch("mlp"))
    optimizer.step()
    rule.step()
    for path, tensors in rule.feedback.items():
        moved = {name for name, tensor in tensors.items() if not torch.equal(tensor, before[path][name])}
        assert moved == {"R", "K"}
        assert (tensors["K"] != before[path]["K"]).all(), "some entries of K did not learn"


def test_measuring_gives_feedback_no_gradient():
    model = nets.convnet()
    rule = fa_bench.attach(model, "mixed", seed=0, **THIRDS)
    rule.mode.freeze_random = True
    logits = model(nets.batch("conv")[0])
    rule.deliver(logits.square().sum(), logits, None)
    assert all(tensor.grad is None for tensor in rule.feedback_parameters())


@pytest.mark.parametrize("net", ["mlp_tanh", "conv"])
def test_bfloat16_autocast_gradients_match_float32(net):
    """bfloat16 has 8 bits of precision, so all gradients, including those of learned feedback, lie within 5 % in norm of the
    float32 ones. All gradients are stored in float32."""
    model = nets.convnet(nn.Tanh, dtype=torch.float32) if net == "conv" else nets.mlp(dtype=torch.float32)
    x, y = nets.batch(net, dtype=torch.float32)
    rule = fa_bench.attach(model, "mixed", seed=0, **THIRDS)

    def gradients(autocast: bool):
        for tensor in model.parameters():
            tensor.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits = model(x)
            loss = F.cross_entropy(logits, y)
        backward(rule, loss, logits, y)
        learned = {f"learned {i}": tensor.grad.clone() for i, tensor in enumerate(rule.feedback_parameters())}
        return collect(model) | learned

    want = gradients(False)
    for key, grad in gradients(True).items():
        assert grad.dtype == torch.float32
        assert (grad - want[key]).norm() <= 0.05 * want[key].norm(), key


def test_component_init_and_ratio_options():
    model = nn.Sequential(nn.Linear(30, 20))
    inits = {"r_init": "uniform_one", "f_init": "copy_w", "k_init": "normal_fan_out"}
    rule = fa_bench.attach(model, "mixed", seed=0, pfa=0.4, fa=0.3, kp=0.3, ratio=2.5, **inits)
    tensors = rule.feedback["0"]
    assert tensors["B"].shape == (20, 50) and tensors["R"].shape == (50, 30)
    assert tensors["B"].abs().max().item() == pytest.approx(math.sqrt(3 / 50), rel=0.01)
    assert tensors["R"].abs().max().item() == pytest.approx(1, rel=0.01)
    assert torch.equal(tensors["F"], model[0].weight)
    assert tensors["K"].std().item() == pytest.approx(math.sqrt(1 / 20), rel=0.1)


def test_direct_feedback_excludes_pfa_part():
    model = nets.mlp()
    rule = fa_bench.attach(model, "mixed", seed=0, **THIRDS, exclude=["fc2"])
    tensors = rule.feedback["fc3"]
    want = tensors["mask_fa"] * tensors["F"] + tensors["mask_kp"] * tensors["K"]
    assert torch.equal(rule.direct_feedback("fc3"), want) and not torch.equal(rule.effective_feedback("fc3"), want)
    with pytest.raises(CoverageError, match="fc2"):
        rule.direct_feedback("fc2")
    with pytest.raises(CoverageError, match="did you mean 'fc3'"):
        rule.direct_feedback("fc33")


@pytest.mark.parametrize(
    "wrong",
    [
        {"pfa": 0.5},
        {"pfa": 0.5, "fa": 0.5, "kp": 0.1},
        {"pfa": 0.0, "fa": 0.0, "kp": 0.0},
        {"kp": 1.2},
        {"fa": -0.1},
        {"ratio": 0.0},
        {"f_init": "ones"},
        {"k_init": "ones"},
        {"r_init": "copy_w"},
    ],
    ids=str,
)
def test_wrong_values_are_refused(wrong):
    with pytest.raises(OptionError) as caught:
        fa_bench.attach(nets.mlp(), "mixed", **wrong)
    said = str(caught.value)
    assert next(iter(wrong)) in said
    if wrong.keys() <= {"pfa", "fa", "kp"} and all(0 <= value <= 1 for value in wrong.values()):
        assert all(word in said for word in ("pfa=", "fa=", "kp=", "sum to 1"))


# --- the angles that the fractions predict -------------------------------------------------------------------------------------


def train(**options):
    """The rule after training a 40-64-64-10 network from scratch on a linear teacher's labels. Weight decay is large at first, as
    in PFA's published runs, and small later."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    rule = fa_bench.attach(model, "mixed", seed=0, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(512, 40, generator=generator)
    y = (x @ torch.randn(40, 10, generator=generator)).argmax(1)
    for step in range(240):
        optimizer.param_groups[0]["weight_decay"] = 0.03 if step < 120 else 0.001
        chosen = torch.randint(512, (64,), generator=generator)
        optimizer.zero_grad()
        logits = model(x[chosen])
        backward(rule, F.cross_entropy(logits, y[chosen]), logits, y[chosen])
        optimizer.step()
        rule.step()
    assert (model(x).argmax(1) == y).float().mean() > 0.9, "the network did not learn the labels"
    return rule


def predicted(rule, path, shares=None) -> tuple[float, float]:
    """The angles of E and of its direct part, as predicted by the formulas in the rule's docstring from the fractions or from
    each kind's share of ‖W‖²."""
    tensors, weight = rule.feedback[path], rule.model.get_submodule(path).weight.detach()
    fractions = {kind: getattr(rule, kind) for kind in ("pfa", "fa", "kp")} if shares is None else shares
    p, f, k = fractions.values()
    r = rho = 0.0
    if f:
        chosen = tensors["mask_fa"].bool()
        r = norm_ratio(tensors["F"][chosen], weight[chosen])
        rho = math.cos(math.radians(weight_angle(tensors["F"][chosen], weight[chosen])))
    whole = (p + k + f * rho * r) / math.sqrt(p * (1 + 1 / rule.ratio) + k + f * r**2)
    direct = (k + f * rho * r) / math.sqrt(k + f * r**2)
    return math.degrees(math.acos(whole)), math.degrees(math.acos(direct))


def measured(rule, path) -> tuple[float, float]:
    weight = rule.model.get_submodule(path).weight.detach()
    return weight_angle(rule.effective_feedback(path), weight), weight_angle(rule.direct_feedback(path), weight)


@pytest.mark.parametrize("fractions", [(0.3, 0.4, 0.3), (0.5, 0.0, 0.5), (0.69, 0.2, 0.11)])
def test_weight_angles_match_prediction_from_fractions(fractions):
    """The fractions predict the angles in the hidden layers to within 3.5 degrees.

    During training, W comes to favour the accurate kinds slightly, and in masks of a few thousand entries, the fractions vary by
    1 to 2 %. The shares of ‖W‖² predict the angles to within 1 degree, and the remaining difference is due to variation in PFA's
    own angle.
    """
    rule = train(**dict(zip(("pfa", "fa", "kp"), fractions, strict=True)))
    for path in ("0", "2"):
        weight = rule.model.get_submodule(path).weight.detach()
        energy = {
            kind: (rule.feedback[path].get(f"mask_{kind}", torch.zeros(())) * weight.square()).sum() / weight.square().sum()
            for kind in ("pfa", "fa", "kp")
        }
        shares = {kind: value.item() for kind, value in energy.items()}
        assert np.allclose(measured(rule, path), predicted(rule, path), atol=3.5, rtol=0)
        assert np.allclose(measured(rule, path), predicted(rule, path, shares), atol=1.0, rtol=0)
        for kind, angle in (("pfa", math.degrees(math.atan(math.sqrt(0.1)))), ("kp", 0.0)):
            chosen = rule.feedback[path][f"mask_{kind}"].bool()
            own = weight_angle(rule.effective_feedback(path)[chosen], weight[chosen])
            assert own == pytest.approx(angle, abs=2), f"the synapses of {kind} are not aligned as expected"


@pytest.mark.parametrize(
    ("fractions", "path", "which"),
    [((0.83, 0.14, 0.03), "2", 1), ((0.69, 0.2, 0.11), "0", 1), ((0.1, 0.81, 0.09), "0", 0)],
    ids=["direct synapses of a layer that carries errors", "direct synapses by the default", "all synapses"],
)
def test_fractions_reproduce_78_degree_weight_angle(fractions, path, which):
    """Given suitable fractions, the angle over the direct synapses, or over all synapses, is 78 degrees as in the brain."""
    rule = train(**dict(zip(("pfa", "fa", "kp"), fractions, strict=True)))
    assert measured(rule, path)[which] == pytest.approx(78, abs=2)
    if which:
        assert measured(rule, path)[0] < 45, "the error as a whole is no longer propagated accurately"


def test_fractions_may_be_rounded():
    """Thirds written with seven digits are accepted, but a sum that is off by a thousandth is refused."""
    fa_bench.attach(nets.mlp(), "mixed", pfa=0.3333333, fa=0.3333333, kp=0.3333333)
    with pytest.raises(OptionError, match=r"sum to 0\.999"):
        fa_bench.attach(nets.mlp(), "mixed", pfa=0.333, fa=0.333, kp=0.333)
