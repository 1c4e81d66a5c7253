"""In common training loops, learned feedback is handled like any other parameter."""

import copy
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fa_bench
from fa_bench.errors import StateError
from fa_bench.metrics.angles import weight_angle
from tests.rules.helpers import assert_bitwise

from .scripts import LEARNED, attached, data, net, sgd, state, steps

LEFT_OUT = r"the weights were updated, but the learned feedback '[\w.]+' was not.*Create the optimizer after attach"
REPLACED = r"learned feedback '[\w.]+' was replaced after the optimizer was created.*Create a new optimizer"


@pytest.mark.parametrize("name", LEARNED)
def test_learned_feedback_and_weights_are_separate_parameters(name):
    model, rule = attached(name)
    feedback, weights = rule.feedback_parameters(), rule.weight_parameters()
    assert feedback and all(isinstance(tensor, nn.Parameter) and tensor.requires_grad for tensor in feedback)
    assert {*map(id, feedback)} | {*map(id, weights)} == {*map(id, model.parameters())}
    assert [p.shape for p in weights] == [p.shape for p in net().parameters()]
    assert {*dict(model.named_parameters())} <= {*model.state_dict()}


@pytest.mark.parametrize("name", ["fa", "usf", "frsf", "brsf", "wm", "dfa", "drtp", "local_error", "forward_alignment", "bp"])
def test_fixed_feedback_is_not_a_parameter(name):
    model, rule = attached(name)
    assert rule.feedback_parameters() == [] and len(list(model.parameters())) == 6


@pytest.mark.parametrize("name", LEARNED)
def test_model_zero_grad_includes_feedback(name):
    one, two = attached(name), attached(name)
    steps(*one, sgd(one[0].parameters()), 4)
    steps(*two, sgd(two[0].parameters()), 4, zero_grad=two[0].zero_grad)
    assert_bitwise(state(two[0]), state(one[0]))


def test_gradient_clipping_scales_weights_and_feedback_equally():
    """With kp, only the weight decay changes W - B, so the angles converge to 0 although gradients are clipped in every step."""
    model, rule = attached("kp")
    steps(
        model,
        rule,
        sgd(model.parameters(), weight_decay=0.02),
        1500,
        before_step=lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.05),
    )
    for feedback, weight in rule.weight_pairs().values():
        assert weight_angle(feedback, weight) < 1e-3


# Rules that need labels, the scale of the loss, or a call of `rule.step()`, which makes the columns of ldfa's B orthonormal.
CALLED = ("predsim", "bp_deepsup", "dgl", "asfp_lc", "ldfa", "activation_alignment")


@pytest.mark.filterwarnings("ignore:.*without rule.step")  # grape asks for the call
@pytest.mark.parametrize("name", [name for name in LEARNED if name not in CALLED])
def test_plain_backward_without_rule_step_trains_feedback(name):
    one, two = attached(name), attached(name)
    steps(*one, sgd(one[0].parameters()), 4)
    steps(*two, sgd(two[0].parameters()), 4, plain_backward=True, rule_step=False)
    assert_bitwise(state(two[0]), state(one[0]))


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("kind", ["loop", "foreach", "fused", "adam", "adamw fused", "rprop"])
def test_optimizer_created_before_attach_raises_at_first_update(name, kind):
    model = net()
    made = {"adam": torch.optim.Adam, "rprop": torch.optim.Rprop}.get(kind) or (
        torch.optim.AdamW if kind.startswith("adamw") else torch.optim.SGD
    )
    settings = {"loop": {"foreach": False}, "foreach": {"foreach": True}}.get(kind, {"fused": True} if "fused" in kind else {})
    optimizer = made(model.parameters(), lr=0.1, **settings)
    rule = fa_bench.attach(model, name, seed=0)
    with pytest.raises(StateError, match=LEFT_OUT):
        steps(model, rule, optimizer, 1)


@pytest.mark.parametrize("name", LEARNED)
def test_old_optimizer_without_rule_step_raises_at_next_backward(name):
    model = net()
    optimizer = sgd(model.parameters())
    rule = fa_bench.attach(model, name, seed=0)
    with pytest.raises(StateError, match=LEFT_OUT):
        steps(model, rule, optimizer, 2, rule_step=False)


def by_hand(model, collected, data_attribute=False):
    """A substitute for an optimizer, with a hand-written update of the parameters that are in `collected` when it is called."""

    @torch.no_grad()
    def step():
        for parameter in collected:
            if data_attribute:
                parameter.data -= 0.1 * parameter.grad
            else:
                parameter -= 0.1 * parameter.grad

    return SimpleNamespace(zero_grad=model.zero_grad, step=step)


@pytest.mark.parametrize("data_attribute", [False, True])
@pytest.mark.parametrize("name", ["kp", "pfa", "dkp", "predsim"])
def test_manual_update_without_feedback_raises(name, data_attribute):
    model = net()
    collected = list(model.parameters())
    rule = fa_bench.attach(model, name, seed=0)

    optimizer = by_hand(model, collected, data_attribute)
    with pytest.raises(StateError, match=LEFT_OUT):
        steps(model, rule, optimizer, 1)
    collected[:] = model.parameters()  # it works if the parameters are collected after attach
    steps(model, rule, optimizer, 2)


@pytest.mark.parametrize("name", ["kp", "dkp"])
def test_manual_update_may_omit_feedback_with_zero_lr(name):
    model = net()
    collected = list(model.parameters())
    rule = fa_bench.attach(model, name, seed=0, b_lr_scale=0)
    before = [tensor.detach().clone() for tensor in (*collected, *rule.feedback_parameters())]

    steps(model, rule, by_hand(model, collected), 2)
    moved = [not torch.equal(one, other) for one, other in zip((*collected, *rule.feedback_parameters()), before, strict=True)]
    assert moved == [True] * len(collected) + [False] * len(rule.feedback_parameters())


def test_suggested_optimizer_fixes_work():
    for mend in ("group", "new", "fixed"):
        model = net()
        optimizer = sgd(model.parameters())
        rule = fa_bench.attach(model, "kp", seed=0)
        with pytest.raises(StateError):
            steps(model, rule, optimizer, 1)
        if mend == "group":
            optimizer.add_param_group({"params": rule.feedback_parameters()})
        elif mend == "new":
            optimizer = sgd(model.parameters())
        else:
            for tensor in rule.feedback_parameters():
                tensor.requires_grad_(False)
        before = [tensor.detach().clone() for tensor in rule.feedback_parameters()]
        steps(model, rule, optimizer, 3)
        moved = [not torch.equal(old, tensor) for old, tensor in zip(before, rule.feedback_parameters(), strict=True)]
        assert all(moved) if mend != "fixed" else not any(moved)


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("trained_before", [0, 3])
@pytest.mark.parametrize("fused", [False, True])
def test_tensors_replaced_after_optimizer_creation_raise(name, trained_before, fused):
    model, rule = attached(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    steps(model, rule, optimizer, trained_before)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with pytest.raises(StateError, match=REPLACED):
        steps(model, rule, optimizer, 2)
    steps(model, rule, torch.optim.SGD(model.parameters(), lr=0.1, fused=fused), 3)


@pytest.mark.parametrize("name", ["kp", "pfa", "dkp", "predsim", "dfc"])
def test_replaced_tensors_raise_without_rule_step(name):
    """Replaced tensors are noticed in the backward pass, no matter how the rule computes its gradients."""
    model, rule = attached(name)
    optimizer = sgd(model.parameters())
    steps(model, rule, optimizer, 3, rule_step=False)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with pytest.raises(StateError, match=REPLACED):
        steps(model, rule, optimizer, 3, rule_step=False)


@pytest.mark.parametrize("name", LEARNED)
def test_assigned_state_with_new_optimizer_continues_identically(name):
    one, two = attached(name), attached(name)
    steps(*one, sgd(one[0].parameters(), momentum=0.0), 2)
    two[0].load_state_dict(state(one[0]), assign=True)
    two[1].load_state_dict(one[1].state_dict())
    for model, rule in (one, two):
        steps(model, rule, sgd(model.parameters()), 3)
    assert_bitwise(state(two[0]), state(one[0]))


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("convert", ["double", "to"])
def test_dtype_conversion_after_optimizer_creation(name, convert):
    """Converting the model after creating the optimizer gives the same result as converting it first. The model is converted
    before the optimizer has a state, because torch would not convert this state."""
    one, two = attached(name, torch.float32), attached(name, torch.float32)
    optimizer = sgd(one[0].parameters())
    two[0].double()
    one[0].double() if convert == "double" else one[0].to(torch.float64)
    steps(*one, optimizer, 3)
    steps(*two, sgd(two[0].parameters()), 3)
    assert_bitwise(state(one[0]), state(two[0]))


def together(model, optimizers):
    """Combine several optimizers so that they can be used like one."""

    def step():
        for optimizer in optimizers:
            optimizer.step()

    return SimpleNamespace(zero_grad=model.zero_grad, step=step)


@pytest.mark.filterwarnings("ignore:.*without rule.step")  # grape and ldfa ask for the call
@pytest.mark.parametrize("name", LEARNED)
def test_valid_training_loops_raise_no_error(name):
    """A learning rate of 0 during warm-up, separate optimizers, gradient accumulation, weights changed by hand, and skipped
    updates cause neither a warning nor an error."""
    model, rule = attached(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for settings in ({"fused": True}, {"foreach": True}):
            steps(model, rule, sgd(model.parameters(), lr=0.0, weight_decay=0.0, **settings), 3)
    model, rule = attached(name)
    optimizers = [sgd(rule.weight_parameters(), fused=True), sgd(rule.feedback_parameters(), lr=0.01)]
    steps(model, rule, together(model, optimizers), 3)
    model, rule = attached(name)
    with torch.no_grad():  # between two backward passes, as in finite differences
        for _ in range(3):
            for parameter in rule.weight_parameters():
                parameter.mul_(1.01)
            with torch.enable_grad():
                steps(model, rule, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1), 1, rule_step=False)

    class Skips(torch.optim.SGD):
        def step(self, closure=None):
            """Skip the update, as a gradient scaler does if the gradients are not finite."""

    model, rule = attached(name)
    steps(model, rule, Skips(model.parameters(), lr=0.1), 4)
    steps(model, rule, sgd(model.parameters()), 2)


@pytest.mark.parametrize("is_first", [False, True])
@pytest.mark.parametrize("name", LEARNED)
def test_trained_feedback_can_move_to_separate_optimizer(name, is_first):
    """After the first step of the weights' new optimizer, it is not yet known whether another optimizer trains the feedback."""
    model, rule = attached(name)
    steps(model, rule, sgd(model.parameters()), 3)
    optimizers = [sgd(rule.weight_parameters()), sgd(rule.feedback_parameters())]
    if is_first:
        optimizers.reverse()
    steps(model, rule, together(model, optimizers), 3)


@pytest.mark.parametrize("name", LEARNED)
def test_manual_update_with_zero_lr_does_not_raise(name):
    """An update with a learning rate of zero writes to every tensor, but changes no value."""
    model, rule = attached(name)

    class ByHand:
        zero_grad = staticmethod(model.zero_grad)

        @staticmethod
        @torch.no_grad()
        def step():
            for parameter in model.parameters():
                parameter -= 0.0 * parameter.grad

    steps(model, rule, ByHand, 2)


@pytest.mark.parametrize("name", LEARNED)
def test_skipped_nonfinite_update_does_not_raise(name):
    """An infinite loss, weights changed by hand, and a step without an optimizer do not show that the optimizer lacks the
    feedback."""
    model, rule = attached(name)
    x, y = data()
    logits = model(x)
    rule.backward(math.inf * F.cross_entropy(logits, y), logits, y, loss_scale=math.inf)
    with torch.no_grad():
        for parameter in rule.weight_parameters():
            parameter.mul_(1.01)
    rule.step()
    steps(model, rule, sgd(model.parameters()), 2)


@pytest.mark.parametrize("name", LEARNED)
def test_averaged_model_and_lr_scheduler_include_feedback(name):
    model, rule = attached(name)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer = sgd(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    want = state(model)
    for _ in range(3):
        steps(model, rule, optimizer, 1)
        averaged.update_parameters(model)
        schedule.step()
        # The first update of an AveragedModel copies the model.
        now = state(model)
        want = now if averaged.n_averaged == 1 else {key: 0.5 * want[key] + 0.5 * now[key] for key in want}
    got = {key: value for key, value in averaged.module.state_dict().items()}
    for key, _ in model.named_parameters():
        torch.testing.assert_close(got[key], want[key], rtol=1e-12, atol=0)


def test_feedback_is_frozen_and_unfrozen_with_weight():
    """A frozen layer and its feedback get no gradient, which is not an error. If the weight is unfrozen, the error says that the
    feedback must be unfrozen, too."""
    model = net()
    model[0].requires_grad_(False)
    rule = fa_bench.attach(model, "kp", seed=0)
    assert not rule.feedback["0"]["B"].requires_grad
    steps(model, rule, sgd(model.parameters()), 2)
    model[0].weight.requires_grad_(True)
    with pytest.raises(StateError, match=r"'0\.feedback_B' was frozen by attach.*unfreeze it, too"):
        steps(model, rule, sgd(model.parameters()), 1)
    rule.feedback["0"]["B"].requires_grad_(True)
    before = rule.feedback["0"]["B"].detach().clone()
    steps(model, rule, sgd(model.parameters()), 2)
    assert not torch.equal(rule.feedback["0"]["B"], before)


@pytest.mark.parametrize("name", ["dkp", "predsim", "dgl"])
def test_cut_feedback_is_frozen_with_preceding_layer(name):
    """Feedback at a cut after a frozen layer does not learn, even if the model's input requires a gradient. If the layer is
    unfrozen, the error says that the feedback must be unfrozen, too."""
    model, x = net(), data()[0]
    model[0].requires_grad_(False)
    rule = fa_bench.attach(model, name, seed=0, **({"b_lr_scale": 1.0} if name == "dkp" else {}))
    resting = [key for key, tensor in rule.feedback["1"].items() if not tensor.requires_grad]
    assert resting
    steps(model, rule, sgd(p for p in model.parameters() if p.requires_grad), 2)
    model(x.requires_grad_(True))
    model[0].requires_grad_(True)
    for learned in [one for one in rule.learned_feedback() if one.path == "1"]:
        with pytest.raises(StateError, match=rf"'{learned.name}' was frozen by attach.*unfreeze it, too"):
            model(x)
        learned.tensor.requires_grad_(True)
    for tensor in rule.feedback_parameters():
        tensor.requires_grad_(True)
    steps(model, rule, sgd(model.parameters()), 2)


@pytest.mark.parametrize(("name", "key"), [("kp", "0"), ("dkp", "1"), ("predsim", "1")])
def test_unfrozen_feedback_can_be_frozen_again(name, key):
    """The feedback was frozen by `attach`, then trained together with its layer, and is now frozen by the user."""
    model = net()
    model[0].requires_grad_(False)
    rule = fa_bench.attach(model, name, seed=0, **({"b_lr_scale": 1.0} if name == "dkp" else {}))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    steps(model, rule, sgd(model.parameters()), 2)
    for tensor in rule.feedback[key].values():
        tensor.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in rule.feedback[key].items()}
    steps(model, rule, sgd(p for p in model.parameters() if p.requires_grad), 2)
    assert before and all(torch.equal(tensor, before[name]) for name, tensor in rule.feedback[key].items())


def convolutional():
    torch.manual_seed(1)
    model = nn.Sequential(
        *[part for width in (1, 4, 4) for part in (nn.Conv1d(width, 4, 3, padding=1), nn.ReLU())], nn.Flatten(), nn.Linear(32, 3)
    ).double()
    model.cut_points = model.blocks = ["1", "3", "5"]
    return model


@pytest.mark.parametrize("name", LEARNED)
def test_optimizer_without_convolution_feedback_raises(name):
    """The optimizer has the feedback of the fully connected layer, but not that of the convolutions."""
    model, (x, y) = convolutional(), data()
    own = {"freeze_stem": False} if name in ("asap", "asfp", "asfp_lc") else {}
    rule = fa_bench.attach(model, name, seed=0, sample_input=x.unsqueeze(1), **own)
    fully = {id(p) for p in model[7].parameters()}
    optimizer = sgd([*rule.weight_parameters(), *(p for p in rule.feedback_parameters() if id(p) in fully)])
    with pytest.raises(StateError, match=LEFT_OUT):
        for _ in range(2):
            optimizer.zero_grad()
            logits = model(x.unsqueeze(1))
            rule.backward(F.cross_entropy(logits, y), logits, y)
            optimizer.step()
            rule.step()


def test_manual_update_without_replaced_feedback_raises():
    """The parameters that were trained before the replacement are no longer in the model, and only the weights are updated
    now."""
    model, rule = attached("kp")
    tensors = list(model.parameters())

    class ByHand:
        zero_grad = staticmethod(model.zero_grad)

        @staticmethod
        def step():
            with torch.no_grad():
                for tensor in tensors:
                    tensor.sub_(tensor.grad, alpha=0.1)

    steps(model, rule, ByHand, 2)
    model.load_state_dict(state(model), assign=True)
    tensors[:] = rule.weight_parameters()
    with pytest.raises(StateError, match=LEFT_OUT):
        steps(model, rule, ByHand, 1)


@pytest.mark.parametrize("name", ["dkp", "predsim", "dgl"])
def test_optimizer_without_feedback_raises_with_frozen_output_layer(name):
    """If the output layer is frozen, the update of a hidden layer shows that the feedback was left out."""
    model = net()
    model[4].requires_grad_(False)
    optimizer = sgd(p for p in model.parameters() if p.requires_grad)
    rule = fa_bench.attach(model, name, seed=0, **({"b_lr_scale": 1.0} if name == "dkp" else {}))
    with pytest.raises(StateError, match=LEFT_OUT):
        steps(model, rule, optimizer, 1)


@pytest.mark.parametrize("name", LEARNED)
def test_update_after_rule_step_raises_at_next_step(name):
    model, (x, y) = net(), data()
    optimizer = sgd(model.parameters())
    rule = fa_bench.attach(model, name, seed=0)
    logits = model(x)
    rule.backward(F.cross_entropy(logits, y), logits, y)
    rule.step()  # nothing has been updated yet
    optimizer.step()
    with pytest.raises(StateError, match=LEFT_OUT):
        rule.step()
