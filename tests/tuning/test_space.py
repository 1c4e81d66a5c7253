"""Tests of the search space and of its trials: parsing, edges, suggestions of wider ranges, proposed values, and the best
trial."""

from __future__ import annotations

import shlex
from types import SimpleNamespace
from typing import Any

import optuna
import pytest

from fa_bench.errors import ConfigError
from fa_bench.objectives.scores import ACCURACY, Score
from fa_bench.registry.registries import ALGORITHMS, OPTIMIZERS
from fa_bench.tuning.options import TuneOptions, parse_override
from fa_bench.tuning.optuna_parts import SAMPLERS
from fa_bench.tuning.space import Dimension, declared, dimension
from fa_bench.tuning.store import Finished, RuleStudy
from fa_bench.tuning.trials import Outcome


def parsed(text: str) -> Dimension:
    override = parse_override(text)
    return dimension(override.key_or_group, override, "a test")


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("a=tag(log,interval(1e-3,1))", [1e-3, 0.05, 1], [9e-4, 1.1, 0, "x", None]),
        ("a=interval(-1,1)", [-1, 0, 0.5], [2, True]),
        ("a=int(interval(1,5))", [1, 5], [2.5, 6]),
        ("a=range(1,10,2)", [1, 3, 9], [2, 10, 11]),
        ("a=range(0.0,1.0,0.25)", [0, 0.25, 0.75], [0.3, 1.0]),
        ("a=0,1e-4,x,null,true", [0, 0.0, 1e-4, "x", None, True], [1e-3, "y", 1]),
        ("a=0,1e-4", [0, 1e-4], [1]),
    ],
)
def test_contains_matches_optuna_distribution(text: str, inside: list, outside: list) -> None:
    one = parsed(text)
    assert [value for value in [*inside, *outside] if one.contains(value)] == inside
    for value in inside:
        if not isinstance(value, float) or not one.choices:
            assert one.distribution._contains(one.distribution.to_internal_repr(value))
    again = parsed(f"a={one.text}")
    assert (again.text, again.distribution) == (one.text, one.distribution)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a=tag(log,interval(1e-3,1))", [1e-3, 10**-1.5, 1]),
        ("a=interval(-1,1)", [-1, 0, 1]),
        ("a=int(interval(1,5))", [1, 3, 5]),
        ("a=tag(log,int(interval(1,7)))", [1, 2, 7]),  # 0.5 to 7.5, so the middle is 1.94
        ("a=range(1,10,2)", [1, 5, 9]),
        ("a=range(0.0,1.0,0.25)", [0, 0.5, 0.75]),
        ("a=0,1e-4,x", [0, 1e-4, "x"]),
    ],
)
def test_at_covers_dimension_evenly(text: str, wanted: list) -> None:
    one = parsed(text)
    last = 1 - 2**-53  # the largest number that random() returns
    found = [one.at(0.0), one.at(0.5), one.at(last)]
    assert all(
        value == (other if isinstance(other, str) else pytest.approx(other)) for value, other in zip(found, wanted, strict=True)
    )
    values = [one.at((index + 0.5) / 1000) for index in range(1000)]
    assert all(map(one.contains, values))
    if one.choices or one.step or (isinstance(one.low, int) and not one.log):
        counts = {value: values.count(value) for value in values}
        assert max(counts.values()) - min(counts.values()) <= 1
    elif not isinstance(one.low, int):
        positions = [one.position(value) for value in values]
        assert positions == pytest.approx([(index + 0.5) / 1000 for index in range(1000)])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a=interval(1,1)", "two finite numbers"),
        ("a=interval(2,1)", "two finite numbers"),
        ("a=tag(log,interval(0,1))", "above 0"),
        ("a=tag(lin,interval(0,1))", "unknown tag lin"),
        ("a=tag(log,choice(1,2))", "interval(LOW,HIGH)"),
        ("a=tag(log,range(1,9,2))", "has no steps"),
        ("a=range(1,2)", "one value"),
        ("a=1,1", "twice"),
        ("a=[1],[2]", "choices must be"),
        ("a=glob(*)", "a=glob(*)"),
    ],
)
def test_invalid_dimensions_are_rejected(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(text)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value", "limits", "side", "wider"),
    [
        ("a=tag(log,interval(1e-3,1))", 0.9, {"above": 0}, "upper", "a=tag(log,interval(0.001,10.0))"),
        ("a=tag(log,interval(1e-3,1))", 1e-3, {"above": 0}, "lower", "a=tag(log,interval(0.0001,1.0))"),
        ("a=interval(0.2,0.6)", 0.59, {"maximum": 0.8}, "upper", "a=interval(0.2,0.8)"),
        ("a=interval(0,0.9)", 0.9, {"below": 1}, "upper", "a=interval(0.0,0.95)"),
        ("a=choice(0,1e-4,1e-3)", 1e-3, {"minimum": 0}, "upper", "a=0,0.0001,0.001,0.01"),
        ("a=choice(1,2,3)", 3, {}, "upper", "a=1,2,3,5"),
        ("a=range(1,10,3)", 7, {}, "upper", "a=range(1,16,3)"),
    ],
)
def test_edge_value_suggests_wider_range(text: str, value: float, limits: dict, side: str, wider: str) -> None:
    edge = parsed(text).edge(value, limits)
    assert edge is not None and edge[0] == side
    (typed,) = shlex.split(edge[1])
    assert typed == wider and parsed(typed).contains(value)


@pytest.mark.parametrize(
    ("text", "value", "limits"),
    [
        ("a=tag(log,interval(1e-3,1))", 0.5, {}),
        ("a=tag(log,interval(1e-3,1))", 2e-3, {}),
        ("a=tag(log,interval(1e-3,1))", 5, {}),  # a default may lie outside the interval
        ("a=choice(0,1e-4,1e-3)", 0, {"minimum": 0}),  # nothing is below 0
        ("a=interval(0,1)", 1, {"maximum": 1}),
        ("a=choice(x,y)", "x", {}),
        ("a=choice(1,x)", 1, {}),
        ("a=choice(0,1e-4,1e-3)", 1e-4, {"minimum": 0}),
    ],
)
def test_other_values_have_no_edge(text: str, value: float, limits: dict) -> None:
    assert parsed(text).edge(value, limits) is None


def test_declared_spaces_are_valid_and_contain_defaults() -> None:
    found = 0
    for registry in (ALGORITHMS, OPTIMIZERS):
        for cls in registry.values():
            for key, one in declared("x", cls.search_space, cls.name).items():
                found += 1
                default = getattr(cls(), key.removeprefix("x."))
                assert one.contains(default), (cls, key)
                for value in one.extremes():
                    cls.from_mapping({key.removeprefix("x."): value})
    assert found > 6


def _study(rule: str, sampler: str, *texts: str, seed: int = 0, score: Score = ACCURACY) -> RuleStudy:
    """An empty study of a rule with the given space."""
    space = {one.key: one for one in map(parsed, texts)}
    plan: Any = SimpleNamespace(
        rule=rule,
        space=space,
        job=SimpleNamespace(scores=[score]),
        default={key: one.at(0.5) for key, one in space.items()},
    )
    return RuleStudy(plan, TuneOptions(sampler=sampler, study_seed=seed), optuna.storages.InMemoryStorage())


def _proposed(rule: str, sampler: str, count: int, *texts: str, seed: int = 0) -> list[dict]:
    """The values of a rule's trials, whose results depend on the rule."""
    study = _study(rule, sampler, *texts, seed=seed)
    for _ in range(count):
        trial, values = study.ask()
        study.tell(trial, values, Outcome("done", value=abs(values["lr"] - (0.1 if rule == "bp" else 0.9))))
    return [trial.values for trial in study.finished]


RATE, DECAY, SCALE = "lr=interval(0,1)", "decay=0,1e-4,1e-3", "scale=tag(log,interval(0.1,10))"


@pytest.mark.parametrize(("sampler", "shared"), [("random", 14), ("tpe", 10), ("gp", 10)])
def test_rules_share_random_values_of_common_dimensions(sampler: str, shared: int) -> None:
    """The rules share their first values, because a rule could otherwise win merely by luckier random learning rates. Later
    trials of tpe and gp depend on the rule's results."""
    bp, fa = (_proposed(rule, sampler, 14, *space) for rule, space in (("bp", [RATE, DECAY]), ("fa", [SCALE, DECAY, RATE])))
    common = [{key: values[key] for key in ("lr", "decay")} for values in fa]
    assert bp[:shared] == common[:shared]
    assert shared == 14 or not any(one == other for one, other in zip(bp[shared:], common[shared:], strict=True))
    assert len({values["lr"] for values in bp[:shared]}) == shared
    assert _proposed("bp", sampler, 5, RATE, DECAY, seed=1)[1:] != bp[1:5]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_rules_with_equal_spaces_and_results_get_equal_trials(sampler: str) -> None:
    if SAMPLERS[sampler].package:
        pytest.importorskip(SAMPLERS[sampler].package)
    one, other = (_proposed(rule, sampler, 13, RATE, SCALE) for rule in ("fa", "usf"))
    assert one == other


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_best_is_earliest_of_equal_completed_trials(higher_is_better: bool) -> None:
    """The choice is the same whether higher or lower scores are better."""
    sign = 1 if higher_is_better else -1
    outcomes = [
        Outcome("done", sign * 0.5),
        Outcome("done", sign * 0.75),
        Outcome("pruned", sign * 0.9),
        Outcome("diverged"),
        Outcome("done", sign * 0.75),
    ]
    study = RuleStudy.__new__(RuleStudy)
    study.score = Score("s", "s", higher_is_better=higher_is_better)
    study.finished = [Finished(number, {}, outcome) for number, outcome in enumerate(outcomes)]
    assert study.best is study.finished[1]
    assert study.worst == sign * 0.5, "expected the worst of the trials with a value"
    study.finished = study.finished[2:4]
    assert study.best is None
    study.finished, study.score = [], ACCURACY
    assert study.worst == 0


@pytest.mark.parametrize(
    ("score", "values", "best"),
    [
        (ACCURACY, [0.5, (41 / 48 + 39 / 48) / 2, (40 / 48 + 40 / 48) / 2, 0.1], 1),
        (ACCURACY, [0.5, 0.75, 0.75 + 1e-6], 2),
        (ACCURACY, [0.0, 0.0], 0),
        (Score("mse", "mean squared error", higher_is_better=False, unit=""), [0.4, 0.1 + 0.2, 0.3], 1),
    ],
)
def test_means_equal_up_to_rounding_are_tie(score: Score, values: list[float], best: int) -> None:
    study = _study("bp", "random", RATE, score=score)
    for value in values:
        trial, proposed = study.ask()
        study.tell(trial, proposed, Outcome("done", value=value))
    assert study.best is not None and study.best.number == best
