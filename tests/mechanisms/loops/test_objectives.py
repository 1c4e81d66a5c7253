"""Rules that use the labels learn from the objective with which they were attached."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fa_bench
from fa_bench.errors import ConfigError, OptionError
from fa_bench.objectives.cross_entropy import CrossEntropy
from fa_bench.objectives.mse import MSE
from fa_bench.objectives.sigmoid_ce import SigmoidCE
from fa_bench.rules.epc import EPC


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3


@pytest.mark.parametrize("objective", [MSE(), SigmoidCE(), CrossEntropy(label_smoothing=0.2)], ids=lambda one: one.name)
@pytest.mark.parametrize("name", ["drtp", "local_error"])
def test_accumulated_objective_gradients_match_whole_batch(name, objective):
    """The factor by which a loss was scaled is inferred for every objective, not only for the cross-entropy."""
    x, y = batch()
    gradients = []
    for parts in (1, 2):
        net = model().double()
        rule = fa_bench.attach(net, name, cuts=["1", "3"], objective=objective)
        for part_x, part_y in zip(x.double().chunk(parts), y.chunk(parts), strict=True):
            outputs = net(part_x)
            rule.backward(objective.loss(outputs, part_y) / parts, outputs, part_y)
        gradients.append([parameter.grad for parameter in net.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("objective", ["mse", "sigmoid_ce"])
def test_local_error_uses_objective_as_local_loss(objective):
    """The hidden layers of local_error learn from the loss of a linear classifier, which is written out here."""
    x, y = batch()
    net = model()
    rule = fa_bench.attach(net, "local_error", cuts=["1", "3"], objective=objective)
    outputs = net(x)
    rule.backward(rule.objective.loss(outputs, y), outputs, y)
    plain = model()
    hidden = plain[1](plain[0](x))
    rule.objective.loss(hidden @ rule.feedback["1"]["M"].t(), y).backward()
    torch.testing.assert_close(net[0].weight.grad, plain[0].weight.grad, rtol=1e-5, atol=1e-7)


#: Maps a rule with a trained classifier after a cut to its options and to the name of the classifier's last layer.
CLASSIFIERS = {
    "predsim": ({"loss": "pred"}, "decoder.out"),
    "dgl": ({"auxiliary_net": "linear"}, "out"),
    "asfp_lc": ({"match": "random", "freeze_stem": False}, "bn"),
}


@pytest.mark.parametrize("objective", [MSE(), SigmoidCE(), CrossEntropy(label_smoothing=0.6)], ids=lambda one: one.name)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_local_classifiers_learn_from_objective_with_options(name, objective):
    """The gradient of a bias b of the scores s is the batch mean of dL/ds, which is s - t, σ(s) - t or softmax(s) - q.

    Here t is the one-hot target, and q is the smoothed target.

    In double precision, sums of eight numbers are exact to about 1e-15.
    """
    x, y = batch()
    x, net, (options, last) = x.double(), model().double(), CLASSIFIERS[name]
    rule = fa_bench.attach(net, name, cuts=["1", "3"], sample_input=x, objective=objective, **options)
    outputs = net(x)
    rule.backward(objective.loss(outputs, y), outputs, y)
    tensors, hidden = rule.feedback["1"], torch.tanh(x @ net[0].weight.t() + net[0].bias).detach()
    if name == "asfp_lc":
        scores = hidden @ tensors["fc.weight"].t() + tensors["fc.bias"]
        scores = (scores - scores.mean(0)) / (scores.var(0, unbiased=False) + 1e-5).sqrt() * tensors["bn.weight"]
    else:
        scores = hidden @ tensors[f"{last}.weight"].t()
    scores, labels = scores + tensors[f"{last}.bias"], torch.eye(3, dtype=torch.float64)[y]
    errors = {
        "mse": scores - labels,
        "sigmoid_ce": scores.sigmoid() - labels,
        "cross_entropy": scores.softmax(1) - (0.4 * labels + 0.2),
    }[objective.name]
    torch.testing.assert_close(tensors[f"{last}.bias"].grad, errors.mean(0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        (nn.MSELoss(), "mse"),
        (nn.MSELoss, "mse"),
        (nn.functional.mse_loss, "mse"),
        (MSE, "mse"),
        (nn.CrossEntropyLoss(), "cross_entropy"),
        (nn.functional.cross_entropy, "cross_entropy"),
        (nn.BCEWithLogitsLoss(), "sigmoid_ce"),
        (lambda z, y: z, None),
        (0, None),
        ("", None),
    ],
    ids=["loss", "class of loss", "function", "class", "loss 2", "function 2", "loss 3", "lambda", "number", "empty"],
)
@pytest.mark.parametrize("how", ["attach", "Rule.attach"])
def test_invalid_objective_error_suggests_nearest_name(given, nearest, how):
    net = model()
    with pytest.raises((OptionError, ConfigError), match=r"objective=.*cross_entropy, mse, sigmoid_ce") as refused:
        if how == "attach":
            fa_bench.attach(net, "epc", cuts=["1"], objective=given)
        else:
            EPC(cuts=["1"]).attach(net, objective=given)
    assert ("did you mean" in str(refused.value)) == (nearest is not None)
    assert nearest is None or f"did you mean '{nearest}'?" in str(refused.value)
    fa_bench.attach(net, "epc", cuts=["1"], objective=nearest or "mse")  # the model is unchanged


def test_unknown_objective_name_error_suggests_nearest_name():
    with pytest.raises(ConfigError, match="objective=mze: no such objective; did you mean 'mse'"):
        fa_bench.attach(model(), "fa", objective="mze")
