"""Models may behave differently in training. attach sees only an evaluation pass, so the first training pass is checked, too."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fa_bench
from fa_bench.errors import CoverageError

from .scripts import data, sgd, steps

X, Y = data(8)
EDGE = ("fa", "kp", "pfa", "usf", "brsf", "asap")
CUT = ("dfa", "dkp", "drtp", "local_error", "predsim")


class Net(nn.Module):
    """A net of widths 8-16-16-3; in training, `extra` changes the hidden activation."""

    def __init__(self, extra=None):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.act, self.b, self.act2 = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()
        self.c = nn.Linear(16, 3)
        self.extra, self.cut_points = extra, ["act", "act2"]
        self.double()

    def forward(self, x):
        h = self.act2(self.b(self.act(self.a(x))))
        if self.training and self.extra is not None:
            h = self.extra(self, x, h)
        return self.c(h)


def attach(model, name):
    options = {"b_lr_scale": 1.0} if name == "dkp" else {}
    return fa_bench.attach(model, name, **options)


def train(model, rule, number=1):
    steps(model, rule, sgd(p for p in model.parameters() if p.requires_grad), number)


@pytest.mark.parametrize("name", (*EDGE, *CUT))
def test_rejects_weight_used_outside_layer_only_in_training(name):
    model = Net(lambda net, x, h: F.linear(h, net.b.weight.t()))
    rule = attach(model, name)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        with pytest.raises(CoverageError, match=r"b\.weight \(used outside its layer"):
            train(model, rule)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    model.extra = None
    train(model, rule, 2)


@pytest.mark.parametrize("name", (*EDGE, *CUT))
def test_second_pass_is_checked_if_first_failed(name):
    def fails(net, x, h):
        with torch.no_grad():
            net.b(h)
        raise ArithmeticError("the model's own")

    model = Net(fails)
    attach(model, name)
    with pytest.raises(ArithmeticError, match="the model's own"):
        model(X)
    model.extra = lambda net, x, h: F.linear(h, net.b.weight.t())
    with pytest.raises(CoverageError, match=r"b\.weight \(used outside its layer"):
        model(X)


@pytest.mark.parametrize("name", CUT)
def test_rejects_cut_run_twice_in_training(name):
    model = Net(lambda net, x, h: h + net.act2(net.b(net.act(net.a(x + 0.1)))))
    rule = attach(model, name)
    with pytest.raises(CoverageError, match=r"cut 'act' ran twice in a training pass"):
        train(model, rule)


@pytest.mark.parametrize("name", CUT)
def test_cut_skipped_in_training_warns_once(name):
    class Skips(Net):
        def forward(self, x):
            h = self.b(self.act(self.a(x)))
            return self.c(F.relu(h) if self.training else self.act2(h))

    model = Skips()
    rule = attach(model, name)
    with pytest.warns(UserWarning, match=r"cut 'act2' did not run in a training pass") as caught:
        train(model, rule, 2)
    assert len([one for one in caught if "did not run" in str(one.message)]) == 1


@pytest.mark.parametrize("name", (*EDGE, *CUT, "forward_alignment", "dgl"))
def test_accepts_extra_pass_under_no_grad(name):
    """In self-distillation, for example, the same layers compute a target. A target that is computed without gradients does not
    change the gradients."""

    def distils(net, x, h):
        with torch.no_grad():
            target = net.act2(net.b(net.act(net.a(x + 0.1))))
        return h + 0 * target

    found = []
    for extra in (None, distils):
        model = Net(extra)
        model.blocks = ["act"]
        rule = attach(model, name)
        logits = model(X)
        rule.backward(F.cross_entropy(logits, Y), logits, Y)
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["asap", "asfp"])
def test_activation_of_earlier_pass_is_not_shared(name):
    class Drops(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.layers = nn.Linear(8, 16), nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
            self.out, self.skipped = nn.Linear(16, 3), set()
            self.double()

        def forward(self, x):
            x = F.relu(self.stem(x))
            for number, layer in enumerate(self.layers):
                if number not in self.skipped:
                    x = x + F.relu(layer(x))
            return self.out(x)

    model = Drops()
    rule = fa_bench.attach(model, name, sample_input=X[:2])
    train(model, rule, 2)
    model.skipped = {0}
    with pytest.raises(CoverageError, match=r"the input of 'layers\.0', which did not run before"):
        train(model, rule)
    with pytest.raises(CoverageError, match="did not run before"):  # only a submodule runs, after a pass of the whole model
        model.skipped = set()
        model(X)
        model.layers[1](torch.zeros(2, 16).double())


@pytest.mark.parametrize("name", EDGE)
def test_first_pass_runs_once_on_user_input(name):
    """The first pass is not repeated on the same arguments, because a model may change or consume them."""

    class Consumes(Net):
        def forward(self, batch):
            return super().forward(batch.pop("x").sub_(1.0))

    model, plain = Consumes(), Consumes()
    model.a = plain.a = nn.Linear(8, 16).double()
    rule = fa_bench.attach(model, name, **({"sample_input": ({"x": X[:2].clone()},)} if name == "asap" else {}))
    got = model({"x": X.clone()})
    with torch.no_grad():
        assert torch.allclose(got, plain({"x": X.clone()}))
    rule.backward(F.cross_entropy(got, Y), got, Y)


@pytest.mark.parametrize("name", CUT)
def test_accepts_extra_outputs_only_in_training(name):
    class Auxiliary(Net):
        def forward(self, x):
            h = self.act2(self.b(self.act(self.a(x))))
            return (self.c(h), h.mean(1), h.square().mean()) if self.training else self.c(h)

    model = Auxiliary()
    rule = fa_bench.attach(model, name, output=0, **({"b_lr_scale": 1.0} if name == "dkp" else {}))
    logits, _, penalty = model(X)
    rule.backward(F.cross_entropy(logits, Y) + 0 * penalty, logits, Y, loss_scale=1.0)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", CUT)
def test_other_input_size_error_suggests_sample_input(name):
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(4, 3))
    rule = fa_bench.attach(model, name, cuts=["1"], sample_input=torch.zeros(2, 1, 8))
    logits = model(torch.randn(4, 1, 10))
    labels = torch.tensor([0, 1, 2, 1])
    with pytest.raises(CoverageError, match="sample_input of the same size"):
        rule.backward(F.cross_entropy(logits, labels), logits, labels)


@pytest.mark.parametrize("name", ["drtp", "local_error", "predsim"])
def test_losses_other_than_plain_mean_require_loss_scale(name):
    """If samples are ignored, weighted or masked, the error says that the loss is not a plain mean, and which argument to
    pass."""
    model = Net()
    rule = attach(model, name)
    logits = model(X)
    mask = torch.arange(8) < 5
    weights = torch.tensor([1.0, 2.0, 3.0]).double()
    for loss in (
        F.cross_entropy(logits, Y, ignore_index=int(Y[0])),
        F.cross_entropy(logits, Y, weight=weights),
        F.cross_entropy(logits[mask], Y[mask]),
    ):
        with pytest.raises(ValueError, match="loss_scale"):
            rule.backward(loss, logits, Y)
    assert all(p.grad is None for p in [model.a.weight, model.b.weight])
    other = model(X + 1)
    logits = model(X)
    with pytest.raises(ValueError, match="two forward passes"):
        rule.backward(F.cross_entropy(logits, Y) + F.cross_entropy(other, Y), logits, Y, loss_scale=1.0)


@pytest.mark.parametrize("name", ["dfa", "drtp"])
def test_cut_without_gradients_raises_but_skipped_cut_warns(name):
    """Each pass is checked separately: a cut that runs without gradients is refused, and one that does not run causes
    a warning."""

    class Sometimes(Net):
        how = ""

        def forward(self, x):
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.how != "blind"):
                h = self.a(x) if self.how == "missed" else self.act(self.a(x))
            return self.c(self.act2(self.b(h)))

    model = Sometimes()
    fa_bench.attach(model, name, seed=0, sample_input=X, cuts=["act", "act2"])
    model.how = "blind"
    with pytest.raises(CoverageError, match="'a' ran without gradients"):
        model(X)
    model.how = "missed"
    with pytest.warns(UserWarning, match="cut 'act' did not run in a training pass"):
        model(X)


@pytest.mark.parametrize("name", ["fa", "dfa", "dgl", "asfp_lc", "forward_alignment"])
def test_rejected_pass_does_not_affect_next_pass(name):
    class Blind(Net):
        blind = False

        def forward(self, x):
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.blind):
                h = self.act(self.a(x))
            return self.c(self.act2(self.b(h)))

    options = {"match": "random", "freeze_stem": False, "cuts": ["act", "act2"]} if name == "asfp_lc" else {}
    model, other = Blind(), Blind()
    model.blocks = other.blocks = ["act", "act2"]
    rule, whole = (fa_bench.attach(one, name, seed=0, sample_input=X, **options) for one in (model, other))
    model.blind = True
    with pytest.raises(CoverageError, match="'a' ran without gradients"):
        model(X)
    assert not rule.mode.training, "the refused pass still counts as running"
    model.blind = False
    for one, its in ((model, rule), (other, whole)):
        train(one, its, 2)
    assert all(torch.equal(mine, its) for mine, its in zip(model.parameters(), other.parameters(), strict=True))
    model.blind = True
    with pytest.raises(CoverageError, match="'a' ran without gradients"):  # earlier passes with gradients do not count
        model(X)


@pytest.mark.parametrize("name", ["fa", "asap", "dfa"])
def test_attach_does_not_modify_sample_containers(name):
    """The model removes entries from its arguments, but the sample that was passed to attach is not changed."""

    class Takes(Net):
        def forward(self, parts, more):
            return super().forward(parts.pop() + more.pop("x"))

    x = X[:2].clone()
    sample = {"parts": [x, x], "more": {"x": x}}
    options = {"match": "random", "linear": "share"} if name == "asap" else {}
    fa_bench.attach(Takes(), name, sample_input=sample, **options)
    assert len(sample["parts"]) == 2 and list(sample["more"]) == ["x"]


@pytest.mark.parametrize("name", EDGE)
def test_no_hooks_remain_after_recursive_first_pass(name):
    """The pass is observed only once, even if the model calls itself; torch's hooks and modes are then restored."""

    class Again(Net):
        def forward(self, x, again=True):
            y = super().forward(x)
            return y + self(x / 2, again=False) if self.training and again else y

    model = Again()
    fa_bench.attach(model, name, sample_input=X[:2])
    modes = torch._C._len_torch_function_stack()
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    model(X)
    assert torch._C._len_torch_function_stack() == modes
    assert [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()] == hooks


@pytest.mark.parametrize("name", ["dfa", "dkp"])
def test_rejects_loss_of_other_model_after_plain_backward(name):
    model = Net()
    rule = attach(model, name)
    F.cross_entropy(model(X), Y).backward()
    with pytest.raises(ValueError, match="was not computed by a training forward pass of the attached model"):
        rule.backward(F.cross_entropy(Net()(X), Y))


def test_other_errors_of_auxiliary_layers_are_raised_for_any_size(monkeypatch):
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(4, 3))
    rule = fa_bench.attach(model, "local_error", cuts=["1"], sample_input=torch.zeros(2, 1, 8))

    def fails(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(type(rule), "local_loss", fails)
    logits, labels = model(torch.randn(4, 1, 10)), torch.tensor([0, 1, 2, 1])
    with pytest.raises(torch.OutOfMemoryError):
        rule.backward(F.cross_entropy(logits, labels), logits, labels)
