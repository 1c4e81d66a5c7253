"""Tests that attach refuses what a rule cannot support, names the cause, and leaves the model unchanged."""

import re

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from torch import nn

import fa_bench
from fa_bench.errors import CoverageError
from fa_bench.mechanisms import compiled

from . import nets
from .helpers import EDGE_RULES, LOUD, layer_names


class OwnAttention(nn.MultiheadAttention):
    """A user-defined subclass of attention, which edge rules do not cover."""


class Attentive(nn.Module):
    """A model with an embedding and an `OwnAttention` layer."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.attn, self.head = nn.Embedding(9, 4), OwnAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, tokens):
        x = self.emb(tokens)
        return self.head(self.attn(x, x, x, need_weights=False)[0].mean(1))


TOKENS = torch.arange(6).reshape(2, 3)


def unchanged(model: nn.Module, plain: nn.Module) -> bool:
    same_types = [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return same_types and list(model.state_dict()) == list(plain.state_dict()) and not hooked


class Unused(nn.Module):
    """A model with a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.fc = nn.ReLU(), nn.Linear(3, 3)

    def forward(self, x):
        return self.act(x)


@pytest.mark.parametrize("options", [{}, {"freeze_stem": True}], ids=str)
@pytest.mark.parametrize("sample", [{}, {"sample_input": torch.zeros(2, 3)}], ids=["no sample", "sample"])
@pytest.mark.parametrize("name", [*EDGE_RULES, "asap", "dfa"])
def test_rejects_model_without_layers(name, sample, options):
    def build():
        return nn.Sequential(nn.Flatten(), nn.ReLU())

    model, cuts = build(), {"cuts": ["1"]} if name == "dfa" else {}
    with pytest.raises(CoverageError, match=r"covers no layer of this model: it has no nn\.Linear"):
        fa_bench.attach(model, name, seed=0, **sample, **cuts, **options)
    assert unchanged(model, build())


@pytest.mark.parametrize("name", ["fa", "dfa"])
def test_error_omits_inapplicable_causes(name):
    """The message mentions weights that are pruned or used outside their layers only if the model has any."""
    with pytest.raises(CoverageError) as refused:
        fa_bench.attach(nn.Sequential(nn.Flatten()), name, **({"cuts": ["0"]} if name == "dfa" else {}))
    assert str(refused.value).endswith("or bilinear module with plain weights")


@pytest.mark.parametrize("freeze_stem", [True, False])
@pytest.mark.parametrize("name", [*EDGE_RULES, "asap", "dfa"])
def test_rejects_model_whose_layers_do_not_run(name, freeze_stem):
    model, cuts = Unused(), {"cuts": ["act"]} if name == "dfa" else {}
    with pytest.raises(CoverageError, match="covers no layer of this model: none ran"):
        fa_bench.attach(model, name, seed=0, freeze_stem=freeze_stem, sample_input=torch.zeros(2, 3), **cuts)
    assert unchanged(model, Unused())


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (OwnAttention(4, 2), "the model (OwnAttention) is a user-defined subclass"),
        (nn.Sequential(OwnAttention(4, 2)), "'0' (OwnAttention) is a user-defined subclass"),
        (nn.Embedding(9, 4), "the model (Embedding) propagates no error"),
        (nn.Sequential(nn.Embedding(9, 4)), "'0' (Embedding) propagates no error"),
    ],
)
def test_error_names_unsupported_layer_and_reason(model, says):
    with pytest.raises(CoverageError, match=re.escape(says)):
        fa_bench.attach(model, "fa", seed=0)


@pytest.mark.parametrize("name", EDGE_RULES)
@pytest.mark.parametrize("sample", [False, True])
def test_rejects_uncovered_weights_unless_allowed(name, sample):
    model = Attentive()
    options = {"sample_input": TOKENS} if sample else {}
    with pytest.raises(fa_bench.errors.CoverageError) as caught:
        fa_bench.attach(model, name, seed=0, **options)
    message = str(caught.value)
    assert "emb" not in message and "attn" in message and "allow_uncovered" in message
    assert "in_proj" in message and "out_proj" in message
    assert unchanged(model, Attentive()), "the refusal changed the model"
    rule = fa_bench.attach(model, name, seed=0, allow_uncovered=True, **options)
    assert set(rule.feedback) <= {"head"}
    report = str(rule.coverage)
    assert all(word in report for word in ("head", "emb", "attn"))
    loss = model(TOKENS).square().sum()
    rule.backward(loss, model(TOKENS), torch.zeros(2, dtype=torch.long))
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["fa", "dfa", "predsim"])
def test_freeze_stem_requires_sample_input(name):
    def build():
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))

    model = build()
    with pytest.raises(fa_bench.errors.CoverageError, match="sample_input"):
        fa_bench.attach(model, name, seed=0, freeze_stem=True, **({} if name == "fa" else {"cuts": ["1"]}))
    assert unchanged(model, build())


def test_rejects_subclassed_layers():
    """Only the exact built-in types are replaced, so a subclass with its own forward method must be named in the error."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Doubled(4, 3))
    with pytest.raises(fa_bench.errors.CoverageError, match="2"):
        fa_bench.attach(model, "fa", seed=0)


def test_coverage_lists_all_layers():
    model = nets.convnet(batch_norm=True)
    rule = fa_bench.attach(model, "fa", seed=0)
    report = str(rule.coverage)
    assert all(name in report for name in layer_names(nets.convnet(batch_norm=True)))


def test_coverage_table_lists_uncovered_weights_last():
    rule = fa_bench.attach(Attentive(), "kp", seed=0, allow_uncovered=True, freeze_stem=True, sample_input=TOKENS)
    first, heads, head, *rest = str(rule.coverage).splitlines()
    assert first == "kp covers 1 layer, 2 weights not covered"
    assert heads.split() == ["layer", "type", "weight", "its", "error"] and len(rest) == 6
    assert re.split("  +", head.strip()) == ["head", "Linear", "3x4 frozen", "passes through learned B"]
    assert rest[0].split() == ["propagates", "no", "error", "where"] and rest[1].split()[0] == "emb.weight"
    assert rest[2].split() == ["not", "covered", "why"] and rest[3].split()[0] == "attn.in_proj_weight"


@pytest.mark.parametrize("name", ["bp", "fa", "kp"])
def test_compiled_model_is_refused(name):
    with pytest.raises(LOUD, match=r"(?i)compile"):
        fa_bench.attach(torch.compile(nets.mlp()), name, seed=0)


@pytest.mark.parametrize("part", ["", "fc2"])
def test_model_compiled_in_place_is_refused(part):
    model = nets.mlp()
    model.get_submodule(part).compile(backend="eager")
    with pytest.raises(CoverageError, match=(f"the model's part '{part}'" if part else "the model") + " is compiled"):
        fa_bench.attach(model, "fa", seed=0)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_rejects_compiling_with_older_torch(fullgraph, monkeypatch):
    monkeypatch.setattr(compiled, "COMPILING_TORCH", (99, 0))
    torch._dynamo.reset()
    x, _ = nets.batch("mlp")
    model = nets.mlp()
    fa_bench.attach(model, "fa", seed=0)
    error = torch._dynamo.exc.Unsupported if fullgraph else CoverageError
    message = r"requires a later version of torch" if fullgraph else r"rule 'fa': .* torch 99\.0 or later, .* do not compile"
    with pytest.raises(error, match=message):
        torch.compile(model, backend="eager", fullgraph=fullgraph)(x)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["bp", "fa", "kp"])
def test_distributed_wrapper_is_refused(name):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nets.mlp())
        with pytest.raises(LOUD, match=r"(?i)DistributedDataParallel|DDP"):
            fa_bench.attach(model, name, seed=0)
    finally:
        dist.destroy_process_group()


def test_rejects_compiled_submodule():
    model = nets.mlp()
    model.fc2 = torch.compile(model.fc2)
    with pytest.raises(LOUD, match=r"(?i)compile|fc2"):
        fa_bench.attach(model, "fa", seed=0)


@pytest.mark.parametrize(
    ("rule", "wrong", "nearest"),
    [
        ("fa", {"densty": 0.5}, "density"),
        ("fa", {"b_int": "copy_w"}, "b_init"),
        ("usf", {"scal": "xiao"}, "scale"),
        ("kp", {"b_lr_scal": 0.1}, "b_lr_scale"),
        ("dfa", {"cut": ["act1"]}, "cuts"),
        ("brsf", {"m_int": "xavier_uniform"}, "m_init"),
        ("dkp", {"b_lr_scal": 0.1}, "b_lr_scale"),
        ("drtp", {"error_sing": True}, "error_sign"),
        ("local_error", {"feature": 10}, "features"),
        ("predsim", {"decoder_sise": 10}, "decoder_size"),
        ("dgl", {"auxilary_net": "mlp"}, "auxiliary_net"),
    ],
)
def test_unknown_option_suggests_nearest_name(rule, wrong, nearest):
    model = nets.mlp()
    with pytest.raises(LOUD) as caught:
        fa_bench.attach(model, rule, seed=0, sample_input=nets.batch("mlp")[0], **wrong)
    assert next(iter(wrong)) in str(caught.value) and nearest in str(caught.value)
    assert unchanged(model, nets.mlp())


@pytest.mark.parametrize(("wrong", "nearest"), [("kpp", "kp"), ("frozn", "frozen"), ("FA", "fa"), ("WM", "wm"), ("usff", "usf")])
def test_unknown_rule_suggests_nearest_name(wrong, nearest):
    with pytest.raises(LOUD) as caught:
        fa_bench.attach(nets.mlp(), wrong, seed=0)
    assert f"did you mean '{nearest}'?" in str(caught.value)


@pytest.mark.parametrize(
    ("rule", "options", "says"),
    [
        ("usf", {"scale": "xaver"}, "xavier"),
        ("dfa", {"form": "neurons", "cuts": ["act1", "act2"]}, "neuron"),
        ("fa", {"b_init": "xavier_unifrm"}, "xavier_uniform"),
        ("fa", {"density": 1.5}, "density"),
        ("fa", {"density": -0.1}, "density"),
        ("fa", {"density": "half"}, "density"),
        ("kp", {"b_lr_scale": -1.0}, "b_lr_scale"),
        ("usf", {"plain_last": "sometimes"}, "plain_last"),
        ("dkp", {"b_lr_scale": -0.1}, "b_lr_scale"),
        ("drtp", {"scale": 0.0}, "scale"),
        ("pfa", {"ratio": 0.0}, "ratio"),
        ("pfa_o", {"ratio": 0.0}, "ratio"),
        ("local_error", {"features": 0}, "features"),
        ("predsim", {"beta": 1.5}, "beta"),
        ("predsim", {"loss": "predism"}, "predsim"),
        ("dgl", {"auxiliary_net": "mlp-sr"}, "mlp_sr"),
    ],
)
def test_invalid_value_error_names_allowed_values(rule, options, says):
    model = nets.mlp()
    with pytest.raises(LOUD, match=says):
        fa_bench.attach(model, rule, seed=0, sample_input=nets.batch("mlp")[0], **options)
    assert unchanged(model, nets.mlp())


def test_rejects_second_rule_on_attached_model():
    """Two rules on one model would both replace its layers. After detach, a second rule can be attached."""
    model = nets.mlp()
    rule = fa_bench.attach(model, "fa", seed=0)
    with pytest.raises(LOUD, match=r"the model already has the rule 'fa'; call its detach\(\) first"):
        fa_bench.attach(model, "kp", seed=0)
    rule.detach()
    fa_bench.attach(model, "kp", seed=0)


def test_attach_rejects_cuts_after_output_and_flat_outputs():
    flat = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh())
    x = nets.batch("mlp", dtype=torch.float32)[0]
    with pytest.raises(ValueError, match="cut '3' is after the output layer '2'; cut hidden layers only"):
        fa_bench.attach(flat, "dfa", cuts=["1", "3"], sample_input=x)
    with pytest.raises(ValueError, match=r"needs outputs of shape \(N, C\), .*; this model returns \(12,\)"):
        fa_bench.attach(nn.Sequential(*flat, nn.Flatten(0)), "dfa", cuts=["1"], sample_input=x)
    assert not list(flat.buffers())
