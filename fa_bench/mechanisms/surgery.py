"""Attach a rule to a model, and look up the rule that is attached to a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fa_bench.errors import OptionError, truncate
from fa_bench.mechanisms.rule import Rule
from fa_bench.mechanisms.structure import RULE_ATTRIBUTE
from fa_bench.registry.registries import ALGORITHMS

if TYPE_CHECKING:
    from torch import nn

    from fa_bench.objectives.base import Objective


def attach(
    model: nn.Module,
    rule: str | Rule,
    *,
    seed: int = 0,
    sample_input: Any = None,
    objective: str | Objective = "cross_entropy",
    **options: Any,
) -> Rule:
    """Attach a learning rule to a model, in place.

    Args:
        model: any module; rules can cover its linear, convolutional, attention, recurrent and bilinear layers. Move the model to
            its device first.
        rule: a rule's name, such as ``"kp"``, or a rule object that is not attached yet.
        seed: seed of the feedback; each tensor has its own seed, derived from (seed, layer or cut, name). The global random state
            is left unchanged.
        sample_input: one input batch (N, ...); needed by rules that depend on the order of the layers, such as those that cut the
            graph, unless the first layer is fully connected.
        objective: the name of the objective that the model is trained with, such as ``"mse"``, or an objective with options; for
            rules that compute errors or local losses from the labels.
        **options: the rule's options, if `rule` is a name.

    Returns:
        The rule; see `fa_bench.mechanisms.rule.Rule`.

    Raises:
        ConfigError: for an unknown rule or objective; suggests the nearest name.
        OptionError: for an unknown option or an invalid value, or if `rule` is neither a name nor a rule object.
        CoverageError: if the rule would cover nothing, leave weights uncovered, or find no cut points, or if the model is
            wrapped, compiled or already has a rule.

    Examples:
        >>> import torch, fa_bench
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> rule = fa_bench.attach(model, "kp", seed=0, b_lr_scale=0.5)
        >>> sorted(rule.feedback)
        ['0', '2']
        >>> fa_bench.attach(torch.nn.Linear(4, 2), "usff")
        Traceback (most recent call last):
            ...
        fa_bench.errors.ConfigError: algorithm=usff: no such algorithm; did you mean 'usf'? (available: ...
    """
    if isinstance(rule, str):
        cls = ALGORITHMS[rule]
        if "rule" in options or "name" in options:
            raise OptionError("name", f"pass the rule once: attach(model, '{rule}')")
        rule = cls.from_mapping(options)
    elif not isinstance(rule, Rule):
        shown = truncate(repr(rule), 100)
        hint = f"; did you mean {rule.__name__}()?" if isinstance(rule, type) and issubclass(rule, Rule) else ""
        raise OptionError("rule", f"={shown} is neither the name of a rule nor a rule object{hint}")
    elif options:
        raise OptionError(next(iter(options)), f"a rule object already has its options; pass them to {type(rule).__name__}")
    return rule.attach(model, seed=seed, sample_input=sample_input, objective=objective)


def attached_rule(model: nn.Module) -> Rule | None:
    """The rule attached to a model, or None; a deep copy of an attached model has a copy of its rule.

    Examples:
        >>> import copy, torch, fa_bench
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        >>> rule = fa_bench.attach(model, "fa")
        >>> fa_bench.attached_rule(model) is rule
        True
        >>> fa_bench.attached_rule(copy.deepcopy(model)) is rule
        False
        >>> fa_bench.attached_rule(rule.detach()) is None
        True
    """
    return getattr(model, RULE_ATTRIBUTE, None)
