"""Putting a rule into a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fa_bench.config.registries import ALGORITHMS
from fa_bench.errors import OptionError
from fa_bench.mechanisms.coverage import RULE_ATTRIBUTE
from fa_bench.mechanisms.rule import Rule

if TYPE_CHECKING:
    from torch import nn


def attach(
    model: nn.Module, rule: str | Rule, *, seed: int = 0, sample_input: Any = None, **options: Any
) -> Rule:
    """Put a learning rule into a model, in place.

    Args:
        model: any module: its Linear, Conv and ConvTranspose layers are covered. Move it to its device first, so that an
            optimizer is given the feedback tensors that stay.
        rule: a rule's name, such as ``"kp"``, or a rule object that is in no model yet.
        seed: seed of the feedback tensors; drawn by (seed, layer, name), the global random state is not touched.
        sample_input: one input batch (N, ...); needed by rules that cut the graph, unless the first layer is linear.
        **options: the rule's options, where `rule` is a name.

    Returns:
        The rule; see `fa_bench.mechanisms.rule.Rule` for what it does.

    Raises:
        ConfigError: for an unknown rule, with the nearest name.
        OptionError: for an unknown or bad option.
        CoverageError: where the rule would cover nothing, leave weights uncovered unasked, find no cut points, or meet a
            model that is wrapped, compiled or has a rule already.
    """
    if isinstance(rule, str):
        cls = ALGORITHMS[rule]
        if "rule" in options or "name" in options:
            raise OptionError("name", f"give the rule once: attach(model, '{rule}')")
        rule = cls.from_mapping(options)
    elif options:
        raise OptionError(next(iter(options)), f"a rule object has its options already; give them to {type(rule).__name__}")
    return rule.attach(model, seed=seed, sample_input=sample_input)


def attached_rule(model: nn.Module) -> Rule | None:
    """The rule in a model, or None; a deep copy of an attached model has a copy of its rule."""
    return getattr(model, RULE_ATTRIBUTE, None)
