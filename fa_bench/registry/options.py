"""Options of a component, declared once: a dataclass whose fields carry type, default, range and help.

The same declaration is the Python signature, the Hydra schema (`fa_bench/config/job.py` registers its defaults), the check
of every value, and the text of ``fa-bench --help``.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, TypeVar, get_args, get_origin

from fa_bench.errors import OptionError, cut, names, nearest

T = TypeVar("T", bound="Options")


def option(
    default: Any,
    help: str,
    *,
    choices: Collection[str] | None = None,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
) -> Any:
    """Declare one option of a component.

    Args:
        default: its default; lists and nested options are copied for each instance.
        help: one sentence for ``--help``, units included.
        choices: the allowed strings, of every item of a list; a registry is looked up when a value is checked.
        minimum, above, maximum, below: the range (closed, open, closed, open), applied to every item of a list.
    """
    limits = {"minimum": minimum, "above": above, "maximum": maximum, "below": below}
    metadata = {"help": help, "choices": choices, "limits": {k: v for k, v in limits.items() if v is not None}}
    if isinstance(default, (list, dict)) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(eq=False)
class Options:
    """Base of every component: checks types, choices and ranges of its fields when it is made.

    Raises:
        OptionError: naming the option, the value and what is allowed.
    """

    name: ClassVar[str] = ""
    #: For components nested in others: those that `name` chooses among.
    kinds: ClassVar[Collection[str]] = ()

    def __post_init__(self) -> None:
        for field in option_fields(type(self)):
            value = _checked(field.name, getattr(self, field.name), _hints(type(self))[field.name], field.metadata)
            setattr(self, field.name, value)
        self.check()

    def check(self) -> None:
        """Override to check what concerns several options at once; raise OptionError."""

    def schema(self) -> dict[str, Any]:
        """What a config says of these options by default, where they are nested in another component's."""
        return as_plain(self)

    @classmethod
    def from_mapping(cls: type[T], values: Mapping[str, Any]) -> T:
        """Build from a plain mapping.

        Raises:
            OptionError: for an unknown name, with the nearest one, or a bad value.
        """
        allowed = [field.name for field in option_fields(cls)]
        for key in values:
            if key not in allowed:
                raise OptionError(cut(str(key), 100) or "''",
                                  f"unknown option of {cls.name or cls.__name__}{nearest(str(key), allowed)} "
                                  f"(options: {names(allowed) or 'none'})")
        return cls(**values)


def summary(cls: type) -> str:
    """The first paragraph of a component's docstring, in one line: what ``--help`` and the docs say of it."""
    return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())


def option_fields(cls: type[Options]) -> list[dataclasses.Field[Any]]:
    """The declared options of a component, base class first."""
    return [field for field in dataclasses.fields(cls) if field.init and "help" in field.metadata]


def defaults(cls: type[Options]) -> dict[str, Any]:
    """The plain default values, nested options as nested dicts: what Hydra composes with."""
    def plain(value: Any) -> Any:
        return value.schema() if isinstance(value, Options) else copy.deepcopy(value)

    options = cls()
    return {field.name: plain(getattr(options, field.name)) for field in option_fields(cls)}


def as_plain(options: Options) -> dict[str, Any]:
    """The options as plain containers; a registered component among them with its name."""
    def plain(value: Any) -> Any:
        named = {"name": value.name} if isinstance(value, Options) and value.name else {}
        return named | as_plain(value) if isinstance(value, Options) else copy.deepcopy(value)
    return {field.name: plain(getattr(options, field.name)) for field in option_fields(type(options))}


def type_name(hint: Any) -> str:
    """A type as a user would say it: ``a number``, ``true or false``, ``a list (a name each)`` ..."""
    if _is_union(hint):
        return " or ".join(type_name(arg) for arg in get_args(hint))
    if get_origin(hint) is list:
        return f"a list ({type_name(get_args(hint)[0])} each)"
    if isinstance(hint, type) and issubclass(hint, Options):
        return "a group of options"
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "a name", type(None): "null"}
    return plain.get(hint, str(hint))


_HINTS: dict[type, dict[str, Any]] = {}


def _hints(cls: type) -> dict[str, Any]:
    if cls not in _HINTS:
        _HINTS[cls] = typing.get_type_hints(cls)
    return _HINTS[cls]


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (typing.Union, types.UnionType)


_WRONG = object()
#: Whole numbers as large do not fit into 64 bits with room for arithmetic.
_LARGEST = 10**18


def _convert(value: Any, hint: Any) -> Any:
    """The value as the hinted type, or _WRONG. Whole numbers pass as numbers; nothing else is converted."""
    if _is_union(hint):
        for arg in get_args(hint):
            if (converted := _convert(value, arg)) is not _WRONG:
                return converted
        return _WRONG
    if get_origin(hint) is list:
        if isinstance(value, str) or not isinstance(value, Sequence):
            return _WRONG
        items = [_convert(item, get_args(hint)[0]) for item in value]
        return _WRONG if any(item is _WRONG for item in items) else items
    if isinstance(hint, type) and issubclass(hint, Options):
        return hint.from_mapping(value) if isinstance(value, Mapping) else value if isinstance(value, hint) else _WRONG
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.inf
    if hint is int and isinstance(value, bool):
        return _WRONG
    return value if isinstance(value, hint) else _WRONG


def _checked(name: str, value: Any, hint: Any, metadata: Mapping[str, Any]) -> Any:
    try:
        converted = _convert(value, hint)
    except OptionError as error:
        raise error.under(name) from None
    choices, limits = metadata["choices"], metadata["limits"]
    if converted is _WRONG:
        if choices and get_origin(hint) is list:
            wanted = f"=[{value}]" if value in choices else ""
            raise OptionError(name, f"={cut(repr(value), 100)} is not a list (of {names(choices)})", wanted)
        raise OptionError(name, f"={cut(repr(value), 100)} is not {f'one of {names(choices)}' if choices else type_name(hint)}",
                          _chosen_within(value, hint))
    for item in converted if isinstance(converted, list) else [converted]:
        if choices is not None and item is not None and item not in choices:
            raise OptionError(name, f"={cut(str(item), 100)} is not one of {names(choices)}{nearest(str(item), choices)}")
        if isinstance(item, float) and not math.isfinite(item):
            raise OptionError(name, f"={item} is not a finite number")
        if isinstance(item, int) and abs(item) >= _LARGEST:
            raise OptionError(name, f"={cut(repr(item), 100)} is out of range (allowed: whole numbers of at most 18 digits)")
        if limits and isinstance(item, (int, float)) and not _within(item, limits):
            raise OptionError(name, f"={item} is out of range (allowed: {range_text(limits)})")
    return converted


def _chosen_within(value: Any, hint: Any) -> str:
    """Where a nested component was given the name of one of its kinds: its key ``name`` with that."""
    known = isinstance(value, str) and isinstance(hint, type) and issubclass(hint, Options) and value in hint.kinds
    return f".name={value}" if known else ""


def _within(value: float, limits: Mapping[str, float]) -> bool:
    low, above = limits.get("minimum"), limits.get("above")
    high, below = limits.get("maximum"), limits.get("below")
    return (value == value and (low is None or value >= low) and (above is None or value > above)
            and (high is None or value <= high) and (below is None or value < below))


def limits_text(field: dataclasses.Field[Any]) -> str:
    """What an option's values are limited to, ``one of a, b`` or ``> 0 and <= 1``; empty where its type says it all."""
    choices, limits = field.metadata["choices"], field.metadata["limits"]
    return "; ".join(filter(None, [choices and f"one of {names(choices)}", limits and range_text(limits)]))


def value_text(value: Any) -> str:
    """A value as one would write it in YAML."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def range_text(limits: Mapping[str, float]) -> str:
    """A range as text, for example ``> 0 and <= 1``."""
    signs = {"minimum": ">=", "above": ">", "maximum": "<=", "below": "<"}
    return " and ".join(f"{signs[key]} {bound:g}" for key, bound in limits.items())
