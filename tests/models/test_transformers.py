"""Tests of transformers, residual MLPs and recurrent nets: tokens, causality, dropout, errors in a residual stream, and wrong
options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fa_bench
from fa_bench.errors import ConfigError, OptionError
from fa_bench.models.nets.transformer import Block
from fa_bench.registry.kinds import CLASSES, FEATURES, IMAGES, POSITIONS, TOKENS, VALUES
from fa_bench.registry.registries import ARCHITECTURES

from . import by_hand
from .by_hand import ByHand

VOCABULARY, LENGTH = 11, 6
POST = {"norm": "post", "positions": "sinusoidal", "activation": "relu"}
#: Maps a case to the architecture, its options, the net written by hand, and its arguments.
TEXT: dict[str, tuple[str, dict[str, Any], Callable[..., Tensor], dict[str, Any]]] = {
    "decoder": ("decoder", {"width": 12, "dropout": 0.0}, by_hand.decoder, {"depth": 4, "heads": 4}),
    "decoder, norm=post": (
        "decoder",
        {"width": 6, "depth": 2, "heads": 3, "dropout": 0.0, **POST},
        by_hand.decoder,
        {"depth": 2, "heads": 3, "activation": "relu", "post": True, "sinusoidal": True},
    ),
    **{
        f"lstm, cell={cell}": ("lstm", {"width": 5, "layers": 2, "cell": cell}, by_hand.recurrent, {"cell": cell, "layers": 2})
        for cell in ("lstm", "gru", "rnn")
    },
}


def build(name: str, shape: tuple[int, ...] = (LENGTH,), classes: int = VOCABULARY, **options: Any) -> nn.Module:
    """Build a net in float64 whose LayerNorms have random gains and biases."""
    torch.manual_seed(0)
    net = ARCHITECTURES[name](**options).build(shape, classes).double()
    for module in net.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return net


def tokens(samples: int = 3, length: int = LENGTH) -> Tensor:
    return torch.randint(VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", TEXT)
def test_token_logits_match_reference(case: str) -> None:
    """The tolerance covers the rounding of float64 or, for sinusoidal positions, of float32."""
    name, options, reference, arguments = TEXT[case]
    net, x = build(name, **options), tokens()
    logits, expected = net(x), reference(ByHand(net), x, **arguments)
    assert logits.shape == (3, LENGTH, VOCABULARY) and logits.std() > 0.01
    torch.testing.assert_close(logits.detach(), expected, rtol=0, atol=1e-6 if options.get("positions") else 1e-12)


@pytest.mark.parametrize("options", [{}, POST], ids=["pre", "post"])
def test_decoder_dropout_matches_reference(options: dict[str, Any]) -> None:
    """The net written by hand samples the same masks in the same order."""
    net, x = build("decoder", width=8, depth=2, dropout=0.4, **options), tokens()
    torch.manual_seed(5)
    logits = net(x).detach()
    torch.manual_seed(5)
    expected = by_hand.decoder(ByHand(net), x, 2, 4, options.get("activation", "gelu"), bool(options), bool(options), dropout=0.4)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
    assert not torch.equal(net(x), logits)
    net.eval()
    assert torch.equal(net(x), net(x))


@pytest.mark.parametrize("post_norm", [False, True])
def test_block_matches_torch_encoder_layer(post_norm: bool) -> None:
    """The tolerance covers the rounding of float64."""
    torch.manual_seed(0)
    theirs = nn.TransformerEncoderLayer(8, 2, 20, 0.0, "gelu", batch_first=True, norm_first=not post_norm).double()
    ours, x = Block(8, 2, 20, "gelu", causal=True, post_norm=post_norm).double(), torch.randn(3, 5, 8, dtype=torch.float64)
    state = theirs.state_dict()
    for kind in ("weight", "bias"):
        parts = state.pop(f"self_attn.in_proj_{kind}").chunk(3)
        state |= {f"attn.{name}.{kind}": part for name, part in zip("qkv", parts, strict=True)}
    names = {"self_attn.out_proj": "attn.out", "linear": "fc"}
    ours.load_state_dict(
        {
            key.replace("self_attn.out_proj", names["self_attn.out_proj"]).replace("linear", names["linear"]): value
            for key, value in state.items()
        }
    )
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x, src_mask=mask, is_causal=True), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", TEXT)
def test_logits_are_causal(case: str) -> None:
    name, options, *_ = TEXT[case]
    net, x = build(name, **options).eval(), tokens(1)
    logits = net(x)
    for place in range(LENGTH):
        other = x.clone()
        other[0, place] = (x[0, place] + 1) % VOCABULARY
        differs = (net(other) - logits).abs().amax((0, 2)) > 1e-9
        assert differs.tolist() == [later >= place for later in range(LENGTH)]


@pytest.mark.parametrize("case", TEXT)
def test_accepts_shorter_sequences(case: str) -> None:
    """The logits of a shorter sequence equal the first logits of the whole sequence, up to rounding in float64."""
    name, options, *_ = TEXT[case]
    net, x = build(name, **options), tokens()
    torch.testing.assert_close(net(x[:, :4]), net(x)[:, :4], rtol=0, atol=1e-12)


def test_rejects_sequences_longer_than_context() -> None:
    net = build("decoder", width=8, context=9)
    assert net(tokens(2, 9)).shape == (2, 9, VOCABULARY)
    others = [build("decoder", width=8), build("decoder", width=8, **POST)]
    for model, limit in ((net, 9), *((other, LENGTH) for other in others)):
        with pytest.raises(ValueError, match=f"{limit + 1} tokens is longer than the context of the model, {limit}"):
            model(tokens(2, limit + 1))


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        # LightOn's net has an embedding and a head of 32,000 tokens. Each of its six blocks has 4 d² + 2 d f weights with biases,
        # and two LayerNorms.
        (
            {"depth": 6, "width": 512, "heads": 8, **POST},
            32000 * 512 + 6 * (4 * 513 * 512 + 513 * 2048 + 2049 * 512 + 4 * 512) + 513 * 32000,
        ),
        ({}, (32000 + 128) * 128 + 4 * (4 * 129 * 128 + 129 * 512 + 513 * 128 + 4 * 128) + 256 + 129 * 32000),
        (
            {"context": 300, "positions": "learned", "depth": 1},
            (32000 + 300) * 128 + 4 * 129 * 128 + 129 * 512 + 513 * 128 + 4 * 128 + 256 + 129 * 32000,
        ),
    ],
)
def test_decoder_parameter_counts(options: dict[str, Any], parameters: int) -> None:
    with torch.device("meta"):
        net = ARCHITECTURES["decoder"](**options).build((128,), 32000)
        assert net(torch.zeros(2, 128, dtype=torch.int64)).shape == (2, 128, 32000)
    assert sum(p.numel() for p in net.parameters()) == parameters


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        *((net, rule) for net in ("decoder", "decoder, norm=post", "vit_mini") for rule in ("bp", "fa", "kp", "usf", "pfa")),
        *((f"lstm, cell={cell}", rule) for cell in ("lstm", "gru", "rnn") for rule in ("bp", "fa", "kp", "usf", "pfa")),
        ("decoder", "dfa"),
        ("decoder, norm=post", "dfa"),
        ("vit_mini", "dfa"),
        ("lstm, cell=lstm", "dfa"),
    ],
)
def test_rules_train_every_weight(architecture: str, name: str) -> None:
    if architecture == "vit_mini":
        net = build("vit_mini", (3, 8, 8), 3, width=8, blocks=2)
        x, y = torch.randn(6, 3, 8, 8).double(), torch.tensor([0, 1, 2] * 2)
    else:
        kind, options, *_ = TEXT[architecture]
        net, x, y = build(kind, **options), tokens(), tokens().roll(1, 1)
    within = {"within": "block"} if name == "dfa" else {}
    rule = fa_bench.attach(net, name, seed=0, sample_input=x, **within)
    assert not rule.coverage.uncovered and bool(within) == ("within blocks" in rule.coverage.transport)
    covered = {"decoder": 25, "decoder, norm=post": 13, "vit_mini": 14}
    assert name == "bp" or len(rule.coverage.covered) == covered.get(architecture, 5)
    before = {key: p.detach().clone() for key, p in net.named_parameters()}
    optimizer = torch.optim.SGD(rule.parameter_groups(lr=0.1))
    for _ in range(2):
        optimizer.zero_grad()
        logits = net(x)
        rule.backward(nn.functional.cross_entropy(logits.flatten(0, -2), y.flatten()), logits, y)
        optimizer.step()
        rule.step()
    now = dict(net.named_parameters())
    assert all(torch.isfinite(p).all() for p in now.values())
    # A bias of the keys adds the same number to all scores of a query, which the softmax ignores.
    still = [key for key, p in before.items() if torch.equal(p, now[key]) and not key.endswith("attn.k.bias")]
    assert not still, f"{still} did not learn"


#: Maps an architecture and a cut to the modules whose weights learn only from the cut's error.
CUTS: dict[str, dict[str, list[str]]] = {
    "residual_mlp": {
        "embed": ["embed"],
        "layers.0.act": ["layers.0.fc1"],
        "layers.0": ["layers.0.fc2"],
        "layers.1.act": ["layers.1.fc1"],
        "final_norm": ["layers.1.fc2", "final_norm"],
    },
    "vit_mini": {
        "embed": ["embed", "embed.patches"],
        "layers.0.attn.q": ["layers.0.attn.q"],
        "layers.0.attn": ["layers.0.attn.out"],
        "layers.0": ["layers.0.fc2"],
        "layers.1.attn.k": ["layers.1.attn.k"],
        "layers.1.attn.v": ["layers.1.attn.v"],
        "layers.1.act": ["layers.1.fc1"],
        "final_norm": ["layers.1.fc2", "final_norm"],
    },
}


@pytest.mark.parametrize(("architecture", "cut"), [(name, cut) for name, cuts in CUTS.items() for cut in cuts])
def test_no_error_passes_cut_of_residual_stream(architecture: str, cut: str) -> None:
    """If the feedback of all other cuts is zero, the gradients of a cut's layers are bitwise unchanged, and other layers get
    none.

    The error does not pass a cut through the identity path. LayerNorms within blocks learn through the weight of the layer after
    them.
    """

    def gradients(others: bool) -> dict[str, Tensor]:
        net = build(architecture, (3, 8, 8), 3, width=8, blocks=2)
        rule = fa_bench.attach(net, "dfa", seed=0, sample_input=torch.zeros(2, 3, 8, 8).double())
        assert not rule.coverage.uncovered
        for path, tensors in rule.feedback.items():
            if path != cut and not others:
                tensors["B"].zero_()
        x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
        y, logits = torch.tensor([0, 1, 2] * 2), net(x)
        rule.backward(nn.functional.cross_entropy(logits, y), logits, y)
        return {key: p.grad for key, p in net.named_parameters() if p.grad is not None}

    everything, alone = gradients(True), gradients(False)
    for key, gradient in everything.items():
        module = key.rpartition(".")[0]
        if module in (*CUTS[architecture][cut], "head"):
            assert gradient.any() and torch.equal(alone[key], gradient), key
        elif ".norm" not in module:
            assert not alone[key].any(), key


@pytest.mark.parametrize(
    ("name", "options", "shape", "message"),
    [
        ("decoder", {"heads": 6}, (5,), "heads=6 does not divide width=128; did you mean heads=4?"),
        ("vit_mini", {"width": 30}, (3, 8, 8), "heads=4 does not divide width=30; did you mean heads=3?"),
        ("vit_mini", {"width": 3}, (3, 8, 8), "heads=4 does not divide width=3; did you mean heads=3?"),
        ("vit_mini", {"patch": 5}, (3, 10, 12), "patch=5 does not divide 10x12 images into whole patches"),
        ("decoder", {"context": 4}, (5,), "context=4 is shorter than the data's sequences of 5 tokens"),
        (
            "decoder",
            {"width": 7, "heads": 7, "positions": "sinusoidal"},
            (5,),
            "width=7 is odd: positions=sinusoidal requires an even width",
        ),
        ("lstm", {"dropout": 0.5}, (5,), "dropout=0.5 needs layers=2 or more: it acts between recurrent layers"),
        ("lstm", {"cell": "elman"}, (5,), "cell=elman is not one of lstm, gru, rnn"),
        ("vgg", {"depth": 11}, (3, 32, 32), "depth=11 is not one of 5, 7, 9, 16"),
        (
            "resnet_cifar_small",
            {"depth": 33},
            (3, 8, 8),
            "depth=33 is not of the form 6n + 2 (such as 20, 32, 44, 56 or 110); did you mean depth=32?",
        ),
    ],
)
def test_invalid_option_errors(name: str, options: dict[str, Any], shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(OptionError) as error:
        ARCHITECTURES[name](**options).build(shape, 3)
    assert str(error.value) == message


def test_vgg_rejects_too_small_images() -> None:
    with pytest.raises(ConfigError, match="28x28 images are too small for act6 of this VGG-7; enlarge them"):
        ARCHITECTURES["vgg"](depth=7, width=1).build((1, 28, 28), 10)


def test_lstm_dropout_is_active_only_in_training() -> None:
    net, x = build("lstm", width=8, layers=2, dropout=0.5), tokens()
    assert not torch.equal(net(x), net(x))
    assert torch.equal(net.eval()(x), net(x))


def test_resnet20_matches_resnet_cifar_small_of_depth_20() -> None:
    states = []
    for name in ("resnet20", "resnet_cifar_small"):
        torch.manual_seed(0)
        options = {"depth": 20} if name == "resnet_cifar_small" else {}
        states.append(ARCHITECTURES[name](width=4, **options).build((3, 8, 8), 3).state_dict())
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_supported_tasks_of_architectures() -> None:
    images = {(IMAGES, CLASSES), (IMAGES, VALUES)}
    vectors, text = {(FEATURES, CLASSES), (FEATURES, VALUES)}, {(TOKENS, POSITIONS)}
    made_for = {"residual_mlp": images | vectors, "mlp": images | vectors, "decoder": text, "lstm": images | text}
    for name, cls in ARCHITECTURES.items():
        if cls.__module__.startswith("fa_bench."):
            assert set(cls.tasks) == made_for.get(name, images), name


def test_residual_mlp_accepts_feature_vectors() -> None:
    assert build("residual_mlp", (7,), 3, width=4)(torch.zeros(2, 7).double()).shape == (2, 3)
