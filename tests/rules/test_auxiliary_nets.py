"""Tests of dgl and asfp_lc with a batch of one sample, which BatchNorm in their auxiliary nets cannot normalise."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fa_bench
from fa_bench.mechanisms.cut.local import TOO_FEW, LocalRule
from fa_bench.models.mlp import MLP
from fa_bench.models.resnet import ResNet20

from .helpers import rule_grads


def convnet() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(3, 3, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(768, 5),
        nn.ReLU(),
        nn.Linear(5, 3),
    )
    model.blocks = ["1", "3", "6"]
    return model


#: None of these models contains a normalisation that fails for a batch of a single 16 x 16 image.
MODELS = {
    "mlp": lambda: MLP(widths=[6, 6, 6]).build((1, 16, 16), 3),
    "conv": convnet,
    "resnet20": lambda: ResNet20(width=2, blocks=1).build((1, 16, 16), 3),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("rule", "options", "says"),
    [
        ("dgl", {}, "auxiliary_net=linear"),
        ("dgl", {"auxiliary_net": "mlp"}, "auxiliary_net=linear"),
        ("asfp_lc", {"match": "random", "linear": "share"}, "drop the last incomplete one"),
    ],
)
def test_batch_of_one_error_names_net_and_fix(model, rule, options, says):
    net, x, y = MODELS[model](), torch.randn(4, 1, 16, 16), torch.tensor([0, 2, 1, 2])
    attached = fa_bench.attach(net, rule, seed=0, sample_input=x, **options)
    logits = net(x[:1])
    net_name = "auxiliary net" if rule == "dgl" else "local classifier"
    with pytest.raises(ValueError, match=rf"^rule '{rule}': the {net_name} at '[\w.]+' .*two samples.*{says}") as raised:
        attached.backward(F.cross_entropy(logits, y[:1]), logits, y[:1])
    assert str(raised.value).split("'")[3] in (attached if rule == "dgl" else attached._local).feedback
    assert TOO_FEW in str(raised.value), "the error lacks the text by which fa_bench.runs.batches recognises it"
    assert all(p.grad is None for p in [*net.parameters(), *attached.feedback_parameters()])
    assert any(grad is not None and grad.any() for grad in rule_grads(net, attached, x[:2], y[:2]).values())


@pytest.mark.parametrize("model", MODELS)
def test_linear_auxiliary_net_accepts_batch_of_one(model):
    net, x = MODELS[model](), torch.randn(2, 1, 16, 16)
    rule = fa_bench.attach(net, "dgl", seed=0, sample_input=x, auxiliary_net="linear")
    assert any(grad is not None and grad.any() for grad in rule_grads(net, rule, x[:1], torch.tensor([1])).values())


@pytest.mark.parametrize("rule", ["dgl", "asfp_lc"])
def test_other_auxiliary_net_errors_propagate_unchanged(rule):
    net, x = MODELS["mlp"](), torch.randn(4, 1, 16, 16)
    attached = fa_bench.attach(net, rule, seed=0, sample_input=x, **({"match": "random"} if rule == "asfp_lc" else {}))
    local = attached if rule == "dgl" else attached._local
    local.auxiliary_at("act2").register_forward_pre_hook(lambda module, args: (_ for _ in ()).throw(ValueError("mine")))
    with pytest.raises(ValueError, match=r"^mine$"):
        rule_grads(net, attached, x, torch.tensor([0, 1, 2, 0]))


class Two(nn.Module):
    """Two layers, either with one weight, or with names that differ only in whether words are separated by a dot."""

    def __init__(self, features: int, classes: int, is_tied: bool) -> None:
        super().__init__()
        self.a, self.a_b = nn.ModuleDict({"b": nn.Linear(features, classes)}), nn.Linear(features, classes)
        if is_tied:
            self.a_b.weight = self.a["b"].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a["b"](x) + self.a_b(x)


@dataclasses.dataclass(eq=False)
class OwnNet(LocalRule):
    is_tied: bool = False

    def auxiliary(self, cut, shape, classes):
        return Two(shape[0], classes, self.is_tied)

    def local_loss(self, cut, auxiliary, activation, target):
        return self.loss_of(auxiliary(activation), target)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("is_loaded", [False, True])
def test_tied_and_similarly_named_parameters_get_their_gradients(is_tied, is_loaded):
    model, x, y = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4), torch.randint(3, (6,))
    rule = fa_bench.attach(model, OwnNet(cuts=["1"], is_tied=is_tied))
    if is_loaded:
        model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
    parameters = list(rule.auxiliary_at("1").parameters())
    assert len(parameters) == len(rule.feedback_parameters()) == 4 - is_tied
    activation = model[0](x).detach().tanh()
    want = torch.autograd.grad(F.cross_entropy(rule.auxiliary_at("1")(activation), y), parameters)
    logits = model(x)
    rule.backward(F.cross_entropy(logits, y), logits, y)
    assert all(torch.equal(one.grad, gradient) for one, gradient in zip(parameters, want, strict=True))
    assert set(rule.detach().state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
