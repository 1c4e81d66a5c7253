"""Every option that an error suggests works as written, both as a keyword of attach and on the command line."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import fa_bench
from fa_bench.cli import main
from fa_bench.errors import CoverageError
from fa_bench.mechanisms.cut.cut_points import patterns
from tests.mechanisms.loops.chain import COVERS_BLOCKS, CUT_RULES, gradients

FLAT, IMAGES = torch.linspace(-1, 1, 96).reshape(12, 8), torch.linspace(-1, 1, 12 * 3 * 32 * 32).reshape(12, 3, 32, 32)
Y = torch.arange(12) % 3
SHARING = ("asap", "asfp", "asfp_lc")
#: Options without which attaching would fail for another reason.
NEEDED: dict[str, dict[str, Any]] = {"asfp_lc": {"linear": "share", "match": "random"}, "f3": {"samples": 16}}


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return make()


def mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in zip((8, *widths), (*widths, 3), strict=True):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convnet() -> nn.Module:
    """A net with two convolutions and two fully connected layers."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 16),
        nn.ReLU(),
        nn.Linear(16, 3),
    )


class TwoHeads(nn.Module):
    """Returns two outputs in a dictionary; the loss is computed from the first."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.one, self.two = mlp(16, 16, 16)[:-1], nn.Linear(16, 3), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(x)
        return {"one": self.one(h), "two": self.two(h)}


class OwnLSTM(nn.LSTM):
    """A user-defined subclass of `nn.LSTM`, whose weights most rules do not cover."""


class Recurrent(nn.Module):
    """A user-defined LSTM before four linear layers, without declared cut points."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.body = OwnLSTM(8, 8, batch_first=True), mlp(16, 16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.lstm(x.unsqueeze(1))[0].mean(1))


#: Maps a name to a function that creates the model, and to the model's input.
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (lambda: mlp(16, 16, 16), FLAT),
    "convnet": (convnet, IMAGES),
    "two heads": (TwoHeads, FLAT),
    "recurrent": (Recurrent, FLAT),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=3), IMAGES),
    "squeezenet": (lambda: torchvision.models.squeezenet1_1(num_classes=3), IMAGES),
}


def refusal(model: nn.Module, name: str, **options: Any) -> CoverageError:
    with pytest.raises(CoverageError) as refused:
        fa_bench.attach(model, name, **options)
    return refused.value


def as_keywords(error: CoverageError) -> dict[str, Any]:
    """The keywords that a reader of the message would type: every name=value in it."""
    written = re.findall(r"\b(cuts|allow_uncovered|output|linear|match|within|loss)=(\[[^\]]*\]|'[^']*'|True)", str(error))
    assert dict(written).keys() == error.settings.keys(), str(error)
    return {option: eval(value) for option, value in written}


def as_overrides(text: str) -> list[str]:
    """The overrides that a reader of the command's message would type, in the form in which the shell passes them on."""
    return shlex.split(" ".join(option + value for option, value in re.findall(r"(algorithm\.\w+=)('[^']*'|\w+)", text)))


def attached_as_suggested(make: Callable[[], nn.Module], x: Tensor, name: str, **options: Any) -> Any:
    """Follow suggestions until the rule is attached; then one backward pass must compute the gradients of all weights."""
    for _ in range(3):
        error = refusal(seeded(make), name, sample_input=x[:2], **options)
        suggested = as_keywords(error)
        assert suggested, f"no suggestion: {error}"
        assert suggested == error.settings
        options |= suggested
        model = seeded(make)
        try:
            rule = fa_bench.attach(model, name, sample_input=x[:2], **options)
        except CoverageError:
            continue
        out = model(x)
        logits = out["one"] if isinstance(out, dict) else out
        rule.backward(F.cross_entropy(logits, Y), logits, Y, indices=torch.arange(len(Y)))
        learning = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
        assert not {key for key in learning - set(gradients(model)) if not key.startswith("two.")}
        return rule
    raise AssertionError("three suggestions were not enough")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in CUT_RULES for kind in ("mlp", "convnet", "two heads", "recurrent")),
        *((name, "resnet18") for name in ("dfa", "dgl")),
        *((name, "squeezenet") for name in ("drtp", "predsim", "asfp_lc")),
    ],
)
def test_suggested_cuts_work(name: str, kind: str) -> None:
    make, x = MODELS[kind]
    rule = attached_as_suggested(make, x, name, **NEEDED.get(name, {}))
    assert rule.cuts and (rule.output == "one") == (kind == "two heads")


@pytest.mark.parametrize("kind", ["mlp", "two heads", "recurrent"])
@pytest.mark.parametrize("name", CUT_RULES)
def test_first_suggestion_is_complete_and_model_is_unchanged(name: str, kind: str) -> None:
    """The suggestion was tested on a copy, so the model is unchanged, and following the suggestion once is enough."""
    make, x = MODELS[kind]
    options = NEEDED.get(name, {})
    model, plain = seeded(make), seeded(make)
    error = refusal(model, name, sample_input=x[:2], **options)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert model.state_dict().keys() == plain.state_dict().keys() and fa_bench.attached_rule(model) is None
    fa_bench.attach(model, name, sample_input=x[:2], **options, **error.settings)
    if kind == "mlp":  # the suggested cuts are activations
        assert error.settings["cuts"] == (["1", "3"] if name in (*COVERS_BLOCKS, "asfp_lc") else ["1", "3", "5"])


@pytest.mark.parametrize("name", CUT_RULES)
def test_unusable_cuts_are_not_suggested(name: str) -> None:
    """The outputs have four axes of positions, one more than supported, so no cuts would work."""
    options = NEEDED.get(name, {})
    error = refusal(seeded(lambda: mlp(16, 16, 16)), name, sample_input=torch.zeros(2, 5, 1, 1, 1, 8), **options)
    assert error.settings == {} and "cuts=" not in str(error)


@pytest.mark.parametrize("name", CUT_RULES)
def test_no_suggestion_without_sample_input(name: str) -> None:
    error = refusal(seeded(convnet), name, **({"samples": 16} if name == "f3" else {}))
    assert error.settings == {}
    assert ("needs sample_input" if name == "asfp_lc" else "receive the error, or set model.") in str(error)


@pytest.mark.parametrize("name", CUT_RULES)
def test_suggested_output_works(name: str) -> None:
    options = {"samples": 16} if name == "f3" else {}
    cuts = ["body.1", "body.3", "body.5"][: 2 if name in ("dgl", "asfp_lc") else 3]
    error = refusal(seeded(TwoHeads), name, cuts=cuts, **options)
    assert as_keywords(error) == {"output": "one"}
    assert as_overrides(str(error.with_prefix("algorithm"))) == ["algorithm.output=one"]
    fa_bench.attach(seeded(TwoHeads), name, cuts=["body.1", "body.3"], output="one", allow_uncovered=True, **options)


@pytest.mark.parametrize("name", SHARING)
def test_suggested_linear_and_match_work(name: str) -> None:
    """The first model has only one convolution that can share its activation, which is too few. The second model has widths that
    are not multiples of each other."""
    cuts = {"cuts": ["1"]} if name == "asfp_lc" else {}
    rule = attached_as_suggested(convnet, IMAGES, name, **cuts)
    assert rule.linear == "share"
    rule = attached_as_suggested(lambda: mlp(8, 5, 6), FLAT, name, **cuts)
    assert rule.match == "random"


@pytest.mark.parametrize("layers", [2, 6], ids=["names", "true"])
@pytest.mark.parametrize("name", ["fa", "kp", "dfa", "predsim", "forward_alignment"])
def test_suggested_allow_uncovered_works(name: str, layers: int) -> None:
    """Up to four weights are suggested by name; for more, allow_uncovered=True is suggested. Weights that were allowed before
    stay allowed."""

    class Stacked(Recurrent):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = OwnLSTM(8, 8, num_layers=layers // 2, batch_first=True)

    cuts = {"cuts": ["body.1", "body.3", "body.5"]} if name in CUT_RULES else {}
    rule = attached_as_suggested(Stacked, FLAT, name, **cuts)
    assert (rule.allow_uncovered is True) == (layers == 6) and len(rule.coverage.uncovered) == layers
    error = refusal(seeded(Recurrent), name, sample_input=FLAT[:2], allow_uncovered=["*_ih_*"], **cuts)
    assert as_keywords(error) == {"allow_uncovered": ["*_ih_*", "lstm.weight_hh_l0"]}


# ------------------------------------------------------------------------------------------------ the command line
SMALL = [
    "scale=smoke",
    "dataset=synthetic",
    "dataset.samples=32",
    "batch_size=8",
    "threads=1",
    "device=cpu",
    "probe_every=0",
    "probe_size=4",
    "hydra.run.dir=run",
]
TORCHVISION = ["architecture=torchvision", "architecture.model=resnet18", "dataset.channels=3", "dataset.size=32"]


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (["algorithm=dfa", *TORCHVISION], {"cuts"}),
        (["algorithm=dgl", *TORCHVISION], {"cuts"}),
        (["algorithm=dfa", *TORCHVISION, "algorithm.cuts=[layer3]"], {"allow_uncovered"}),
        (
            ["algorithm=drtp", "architecture=mlp", "architecture.widths=[6,6,6]", "algorithm.cuts=[act1,act3]"],
            {"allow_uncovered"},
        ),
        (["algorithm=asap", "architecture=conv2"], {"linear"}),
        (["algorithm=asfp", "architecture=mlp", "architecture.widths=[8,5,6]"], {"match"}),
    ],
    ids=["cuts", "cuts of blocks", "all uncovered", "some uncovered", "linear", "match"],
)
def test_command_line_suggestions_work(
    command: list[str], options: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*command, *SMALL]) != 0
    said = capsys.readouterr().err
    suggested = as_overrides(said)
    assert {override.split("=")[0] for override in suggested} == {f"algorithm.{option}" for option in options}, said
    assert main([*command, *SMALL, *suggested]) == 0
    assert (tmp_path / "run" / "result.json").exists()


def test_patterns_match_only_chosen_modules() -> None:
    """Up to six names are written out. If there are more than six names, patterns are used, but no pattern matches any other
    module."""
    chosen = ["stem.relu", *(f"layer{stage}.{block}.relu" for stage in (1, 2, 3) for block in (0, 1))]
    paths = [*chosen, "head.relu", "layer1.0.conv", "layer1", "layer1.0"]
    written = patterns(chosen, paths)
    assert {path for path in paths if any(fnmatch(path, one) for one in written)} == set(chosen) and len(written) == 3
    assert patterns(chosen, chosen) == ["*relu"]
    assert patterns(chosen[:6], paths) == chosen[:6]


@pytest.mark.parametrize("name", ["dfa", "local_error", "dgl"])
def test_no_suggestion_without_hidden_layer(name):
    with pytest.raises(CoverageError, match=r"Sequential declares none; set cuts to .*the error, or set model\.") as refused:
        fa_bench.attach(nn.Sequential(nn.Flatten(), nn.Linear(8, 3)), name, sample_input=torch.zeros(2, 8))
    assert refused.value.settings == {}
