"""Tests of the memory accesses: the counts for the nets of the activation-sharing paper, the stored tensors, specs, and the
analysis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

import fa_bench
from fa_bench.analyses.memory_accesses import MemoryAccesses
from fa_bench.errors import ConfigError, CoverageError, FaBenchError
from fa_bench.mechanisms.trace import trace_model
from fa_bench.metrics.memory_traffic import Memory, memories
from fa_bench.registry.registries import ALGORITHMS, ANALYSES, ARCHITECTURES
from fa_bench.registry.specs import component, parse_spec
from fa_bench.rules.asap import ASAP

# The sizes (channels x height x width) of the maps of resnet18, by stage: the outputs of the stem and of both convolutions in
# every block.
MAPS = (64 * 32 * 32, 128 * 16 * 16, 256 * 8 * 8, 512 * 4 * 4)


def memory_of(net: nn.Module, shape: tuple[int, ...], rule: Any = None) -> Memory:
    memory = memories(net, shape, rule)[rule is not None]
    assert memory is not None
    return memory


def counted(name: str, k: int = 0, **options: Any) -> Memory:
    with torch.device("meta"):
        net = ARCHITECTURES[name](**options).build((3, 32, 32), 10)
    return memory_of(net, (3, 32, 32), ASAP(k=k) if k else None)


@pytest.mark.parametrize(
    ("name", "parameters", "bp", "two", "four", "totals"),
    [
        ("asap_alexnet", 6_289_438, 30_730, 22_538, 22_538, (26.74, 24.64, 24.64)),
        ("resnet18", 11_173_982, 557_578, 303_626, 180_746, (176.26, 111.25, 79.79)),
        ("resnet34", 21_282_142, 967_178, 508_426, 254_474, (311.44, 194.00, 128.99)),
    ],
)
def test_counts_match_paper_networks(name: str, parameters: int, bp: int, two: int, four: int, totals: tuple[float, ...]) -> None:
    """The parameters and stored activations were counted by hand from the layers; the totals of accesses for batches of 128 are
    in millions, rounded to two decimals."""
    counts = [counted(name, k) for k in (0, 2, 4)]
    assert [memory.parameters for memory in counts] == [parameters] * 3
    assert [memory.activations for memory in counts] == [bp, two, four]
    for memory, total in zip(counts, totals, strict=True):
        reads, writes = memory.accesses(128)
        assert reads == 2 * parameters + 128 * memory.activations and writes == parameters + 128 * memory.activations
        assert round((reads + writes) / 1e6, 2) == total


def test_stored_activations_of_resnet18() -> None:
    """Without sharing, all 17 maps, the pooled features and the logits are stored. With k = 2, the only stored maps are the
    blocks' inputs; with k = 4, they are the inputs of every other block."""
    inputs = [MAPS[0], MAPS[0], MAPS[0], MAPS[1], MAPS[1], MAPS[2], MAPS[2], MAPS[3]]
    assert counted("resnet18").activations == MAPS[0] + 4 * sum(MAPS) + 512 + 10
    assert counted("resnet18", 2).activations == sum(inputs) + 522
    assert counted("resnet18", 4).activations == sum(inputs[::2]) + 522


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("options", [{}, {"shortcuts": False}])
def test_counted_inputs_match_attached_rule(k: int, options: dict[str, Any]) -> None:
    """In the attached model, the stored inputs are those of fc and of the layers that provide an activation to others."""
    torch.manual_seed(0)
    net = ARCHITECTURES["resnet18"](width=1, blocks=[2, 2], **options).build((3, 8, 8), 3)
    x = torch.randn(2, 3, 8, 8)
    kept = ASAP(k=k).step_memory(net, trace_model(net, x)).inputs
    rule = fa_bench.attach(net, "asap", k=k, sample_input=x)
    pathways = {path: getattr(layer, "pathway", None) for path, layer in net.named_modules()}
    sources = {path for path, pathway in pathways.items() if getattr(pathway, "provides", None) is not None}
    assert set(kept) == sources | {"fc"} and not rule.coverage.uncovered


class Branches(nn.Module):
    """A net in which one map is averaged and is also the input of a convolution, and in which one pooling layer leaves its map
    unchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        gate = self.right(x.mean((2, 3))).relu_()
        x = nn.functional.adaptive_avg_pool2d(self.left(x), 8) * gate[:, :, None, None]
        return self.fc(nn.functional.avg_pool2d(x, 8).flatten(1))


def test_averaged_maps_are_counted_once() -> None:
    memory = memory_of(Branches(), (3, 8, 8))
    stem, gated = 4 * 64, 5 * 64
    assert memory.activations == stem + 4 + gated + 5 + 2 and memory.relus == stem + 5
    assert memory.parameters == 16 + 25 + 25 + 12


def test_max_pooled_map_replaces_input_of_pooling() -> None:
    """For conv2, the input of the second convolution, the pooled map, the hidden layer's outputs, and the logits are stored."""
    assert counted("conv2", channels=2, hidden=7).activations == 2 * 30 * 30 + 2 * 14 * 14 + 7 + 10


def test_strict_counts_feedback_and_masks() -> None:
    plain, shared = counted("asap_alexnet", 0), counted("asap_alexnet", 2)
    convolutions, linear = 25 * (64 * 128 + 128 * 256), 4096 * 1024 + 1024 * 1024 + 1024 * 10
    assert (plain.feedback, plain.learned) == (0, 0)
    # The stem propagates no error to the image, and B of fully connected layers is fixed.
    assert (shared.feedback, shared.learned) == (convolutions + linear, convolutions)
    relus = 64 * 32 * 32 + 128 * 16 * 16 + 256 * 8 * 8 + 2 * 1024
    assert plain.relus == shared.relus == relus
    for memory in (plain, shared):
        reads, writes = memory.accesses(128)
        assert memory.accesses(128, strict=True) == (reads + memory.feedback + 4 * relus, writes + memory.learned + 4 * relus)
    with torch.device("meta"):
        net = ARCHITECTURES["asap_alexnet"]().build((3, 32, 32), 10)
    # With transport, fully connected layers keep their fixed B unless they share activations.
    transport = memory_of(net, (3, 32, 32), ASAP(transport=True))
    assert (transport.feedback, transport.learned) == (linear, 0)
    assert memory_of(net, (3, 32, 32), ASAP(transport=True, linear="share")).feedback == 0


def test_counting_does_not_change_model_and_rejects_like_rule() -> None:
    net = ARCHITECTURES["conv2"](channels=2, hidden=3).build((1, 8, 8), 3)
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    memory_of(net, (1, 8, 8))
    assert net.training and all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    with pytest.raises(CoverageError, match="nothing to share"):
        memory_of(net, (1, 8, 8), ASAP())


# ------------------------------------------------------------------------------------------------ specs
def test_parse_spec() -> None:
    assert parse_spec("mlp") == ("mlp", {})
    assert parse_spec("resnet18:width=8,blocks=[1,2],shortcuts=false,init=pytorch") == (
        "resnet18",
        {"width": 8, "blocks": [1, 2], "shortcuts": False, "init": "pytorch"},
    )
    assert component(ARCHITECTURES, "mlp:widths=[3],batch_norm=true").widths == [3]  # type: ignore[attr-defined]
    assert component(ALGORITHMS, "asap:k=4").k == 4  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("resnet19", r"architecture=resnet19: no such architecture; did you mean 'resnet1?8'"),
        ("resnet18:widht=3", r"resnet18\.widht: unknown option .* did you mean 'width'"),
        ("resnet18:width=0", r"resnet18\.width=0 is out of range"),
        ("resnet18:width", r"resnet18:width: 'width' is not OPTION=VALUE"),
        ("resnet18:blocks=[1", r"resnet18:blocks=\[1: the options cannot be read"),
        ("shortcuts=false", r"shortcuts=false: write NAME:OPTION=VALUE.*quote"),
    ],
)
def test_invalid_spec_error_is_one_line(spec: str, said: str) -> None:
    with pytest.raises(FaBenchError, match=said) as caught:
        component(ARCHITECTURES, spec)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ the analysis
def test_analysis_writes_table_and_figure(tmp_path: Path) -> None:
    analysis = ANALYSES["memory_accesses"].from_mapping(
        {"architectures": ["asap_alexnet:hidden=16,width=4", "conv2", "resnet18:width=4,blocks=[1,1]"], "batch": [1, 16]}
    )
    table, csv, png = analysis.write(tmp_path / "one")
    read = pd.read_csv(csv)
    assert list(read["rule"]) == ["bp", "asap k=2"] * 2 + ["bp"] * 2 + ["bp", "asap k=2", "asap k=4"] * 2
    assert list(table["batch"].unique()) == [1, 16] and list(read["architecture"].unique()) == analysis.architectures  # type: ignore[attr-defined]
    bp = table[table["rule"] == "bp"].set_index(["architecture", "batch"])
    for row in table.itertuples():
        assert row.total == row.reads + row.writes == 3 * row.parameters + 2 * row.batch * row.activations
        assert row.ratio == row.total / bp.loc[(row.architecture, row.batch), "total"] <= 1
    again = analysis.write(tmp_path / "two")
    assert again[1].read_bytes() == csv.read_bytes() and again[2].read_bytes() == png.read_bytes()
    assert png.read_bytes()[:4] == b"\x89PNG"


def test_strict_option_and_ranges() -> None:
    def total(strict: bool) -> int:
        return MemoryAccesses(architectures=["resnet18:width=2"], k=[2], batch=[1], strict=strict).table()["total"].iloc[1]

    assert total(True) > total(False)
    for options, said in ({"input_shape": [3, 32]}, "input_shape"), ({"architectures": []}, "architectures"), ({"k": [1]}, "k=1"):
        with pytest.raises(FaBenchError, match=said):
            MemoryAccesses(**options)
    with pytest.raises(ConfigError, match="resnet18"):
        MemoryAccesses(architectures=["resnet17"]).table()


def test_all_relu_variants_are_counted() -> None:
    """ReLU, LeakyReLU and ReLU6 are counted, in place or not. A hyperbolic tangent is not counted, because one bit does not
    determine its derivative."""
    activations = [nn.ReLU(), nn.LeakyReLU(), nn.ReLU6(), nn.ReLU(inplace=True), nn.Tanh()]
    net = nn.Sequential(*[part for activation in activations for part in (nn.Linear(6, 6), activation)], nn.Linear(6, 2))
    assert memory_of(net, (6,)).relus == 4 * 6


def test_relu_masks_are_packed_into_32_bit_words() -> None:
    for relus, batch, numbers in ((1, 1, 1), (32, 1, 1), (33, 1, 2), (11, 3, 2), (0, 5, 0)):
        assert Memory(0, 0, relus=relus).accesses(batch, strict=True) == (numbers, numbers)
