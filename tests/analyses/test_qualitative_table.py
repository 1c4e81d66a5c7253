"""Tests of the qualitative_table analysis: each measurement is checked on rules with a known result, and each mark at its
threshold."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest
import torch

import fa_bench
from fa_bench.analyses.qualitative_table import PROPERTIES, PUBLISHED, QualitativeTable, direct_angles, transport
from fa_bench.metrics.angles import weight_angle
from fa_bench.metrics.meter import AlignmentMeter
from fa_bench.models.mlp import MLP
from fa_bench.runs.assembly import Parts


def parts_of(rule: str, **options) -> Parts:
    torch.manual_seed(0)
    model = MLP(widths=[12, 7]).build((1, 3, 5), 4)
    x = torch.randn(6, 1, 3, 5)
    attached = fa_bench.attach(model, rule, sample_input=x, **options)
    meter: Any = AlignmentMeter(attached, x, torch.arange(6) % 4)
    nothing: Any = None
    return Parts(nothing, attached, nothing, meter, nothing, [], nothing, "")


@pytest.mark.parametrize(
    ("rule", "options", "sign", "magnitude"),
    [
        ("bp", {}, 1, 1),
        ("usf", {}, 1, 0),
        ("frsf", {}, 1, 0),
        ("fa", {}, 0, 0),
        ("dfa", {}, 0, 0),
        ("kp", {}, 0, 0),
        ("pfa", {}, 0, 0),
        ("wm", {"initial_steps": 3}, 0, 0),
        ("fa", {"exclude": ["fc2"]}, 1, 1),
    ],
)
def test_measured_transport_of_known_rules(rule: str, options: dict, sign: float, magnitude: float) -> None:
    parts = parts_of(rule, **options)
    before = {name: value.clone() for name, value in parts.rule.model.state_dict().items()}
    found = transport(parts.rule)
    assert found["sign"] == sign and found["magnitude"] == pytest.approx(magnitude)
    assert (found["phase"] > 1e-3) == (rule == "wm")
    assert all(torch.equal(value, before[name]) for name, value in parts.rule.model.state_dict().items())


def test_direct_feedback_angles() -> None:
    assert direct_angles(parts_of("bp")) == [0, 0] and direct_angles(parts_of("kp", b_init="copy_w")) == [0, 0]
    assert direct_angles(parts_of("pfa")) == [], "pfa has no direct synapses: its feedback passes through other neurons"
    parts = parts_of("dfa")
    weight = parts.rule.model.get_submodule("fc3").weight.detach()
    assert direct_angles(parts) == [pytest.approx(weight_angle(parts.rule.feedback["act2"]["B"], weight))]
    fixed = parts_of("fa")
    pairs = [(fixed.rule.feedback[path]["B"], fixed.rule.model.get_submodule(path).weight.detach()) for path in ("fc2", "fc3")]
    assert direct_angles(fixed) == pytest.approx([weight_angle(*pair) for pair in pairs])


@pytest.mark.parametrize(
    ("changes", "marks"),
    [
        ({}, ("yes", "yes", "yes", "yes", "yes", "yes")),
        ({"sign": 0.5, "phase": 0.01}, ("no", "yes", "no", "yes", "yes", "yes")),
        ({"magnitude": 1.0, "direct": 10.0}, ("yes", "no", "yes", "no", "yes", "yes")),
        ({"direct": 60.0, "path": 60.0, "accuracy": 80.0}, ("yes", "yes", "yes", "reduced", "no", "no")),
        ({"direct": 80.0, "path": math.nan, "accuracy": 92.0}, ("yes", "yes", "yes", "yes", "no", "between")),
    ],
)
def test_marks_at_the_thresholds(changes: dict, marks: tuple[str, ...]) -> None:
    found = {"sign": 0.0, "magnitude": 0.0, "phase": 0.0, "direct": math.nan, "path": 20.0, "accuracy": 94.5} | changes
    judged = QualitativeTable().judge(found, {"bp": 95.0, "fa": 90.0, "dfa": 88.0})
    assert tuple(mark for mark, _, _ in judged) == marks


def test_table_compares_measured_with_published() -> None:
    """A published "unclear" counts as a disagreement. For a rule that the published table lacks, `agrees` is missing."""
    analysis = QualitativeTable(
        rules=["bp", "usf", "frsf"],
        architecture="mlp:widths=[8]",
        epochs=1,
        seeds=1,
        dataset="synthetic:samples=80,test_samples=16",
    )
    table = analysis.table()
    assert len(table) == 3 * len(PROPERTIES) and all(len(marks) == len(PROPERTIES) for marks in PUBLISHED.values())
    marks = table.set_index(["rule", "property"])
    assert marks.loc["bp", "agrees"].all() and marks.loc[("bp", "BP-level performance"), "value"] == 0
    assert not marks.loc[("usf", "no separate feedback phase"), "agrees"]
    assert marks.loc[("usf", "no explicit symmetry after training"), "measured"] == "reduced"
    assert marks.loc["frsf", "agrees"].isna().all() and pd.api.types.is_float_dtype(table["value"])
