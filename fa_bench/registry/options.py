"""The options of a component, which are declared once as the fields of a dataclass with a type, a default, a help text and, if
needed, a range.

The same declaration provides the Python signature, the Hydra schema (`fa_bench/config/job.py` registers its defaults), the
validation of every value, and the text of ``fa-bench --help``.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import math
import operator
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, TypeVar, get_args, get_origin

from fa_bench.errors import ComponentError, OptionError, format_value, names, nearest, truncate

T = TypeVar("T", bound="Options")


def option(
    default: Any,
    help: str,
    *,
    choices: Collection[str | bool] | None = None,
    with_options: bool = False,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    identifying: bool = True,
) -> Any:
    """Declare one option of a component.

    Args:
        default: the default value; a list, a dict or nested options are copied for each instance.
        help: one sentence for ``--help``, with units.
        choices: the allowed values, such as names; for a list, the allowed items. A registry is not loaded until its names
            are needed.
        with_options: whether components in a list may have options, in the form ``NAME:OPTION=VALUE``.
        minimum: the smallest allowed value; for a list, the smallest allowed item.
        above: exclusive lower bound.
        maximum: the largest allowed value.
        below: exclusive upper bound.
        identifying: whether the default is part of a run's identity; False for an option added to a component with existing runs,
            so that their hashes stay the same.

    Examples:
        >>> import dataclasses, fa_bench
        >>> @dataclasses.dataclass(eq=False)
        ... class Line(fa_bench.Schedule):
        ...     slope: float = fa_bench.option(1.0, "slope per epoch", minimum=0)
        >>> Line(slope=2).slope
        2.0
        >>> Line(slope=-1)
        Traceback (most recent call last):
            ...
        fa_bench.errors.OptionError: slope=-1.0 is out of range (allowed: >= 0)
    """
    limits = {"minimum": minimum, "above": above, "maximum": maximum, "below": below}
    metadata = {
        "help": help,
        "choices": choices,
        "with_options": with_options,
        "identifying": identifying,
        "limits": {k: v for k, v in limits.items() if v is not None},
    }
    if isinstance(default, (list, dict)) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(eq=False)
class Options:
    """Base class of all components, which checks the types, choices and ranges of the fields when a component is created.

    Raises:
        OptionError: for an invalid value; the message names the option, the value and the allowed values.
    """

    name: ClassVar[str] = ""
    #: The allowed names if this component is nested in another one.
    kinds: ClassVar[Collection[str]] = ()
    #: Option -> the values that fa-bench-tune searches by default, in command-line syntax, such as ``choice(0,1e-4)``.
    search_space: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        for field in option_fields(type(self)):
            value = _checked(field.name, getattr(self, field.name), _hints(type(self))[field.name], field.metadata)
            setattr(self, field.name, value)
        self.check()

    def check(self) -> None:
        """Override this to check combinations of options; raise OptionError if they are invalid."""

    def schema(self) -> dict[str, Any]:
        """The values of these options as they appear in the schema of the enclosing component."""
        return as_plain(self)

    @classmethod
    def from_mapping(cls: type[T], values: Mapping[str, Any]) -> T:
        """Create a component from a plain mapping.

        Raises:
            OptionError: for an unknown name (with the nearest one) or an invalid value.
            ComponentError: if the class declares options but is not a dataclass.
        """
        allowed = [field.name for field in option_fields(cls)]
        for key in values:
            if key not in allowed:
                raise OptionError(
                    truncate(str(key), 100) or "''",
                    f"unknown option of {cls.name or cls.__name__}{nearest(str(key), allowed)} "
                    f"(options: {names(allowed) or 'none'})",
                )
        return cls(**values)


def summary(cls: type) -> str:
    """The first paragraph of a component's docstring, as one line, for ``--help`` and the docs."""
    return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())


@functools.cache
def require_dataclass(cls: type[Options]) -> None:
    """Require that the options that a class declares are fields of a dataclass.

    The check cannot run when the class is registered, because the dataclass decorator may be applied afterwards.

    Raises:
        ComponentError: if the class, or a base class, declares options but was not decorated.
    """
    for each in cls.__mro__:
        # The dataclass decorator would have removed such fields or replaced them with their default values.
        if declared := [name for name, value in vars(each).items() if isinstance(value, dataclasses.Field)]:
            raise ComponentError(
                f"class {each.__qualname__} ({each.__module__}) declares options ({names(declared)}) but is not a dataclass; "
                "write @dataclasses.dataclass(eq=False) on the line above it"
            )


def option_fields(cls: type[Options]) -> list[dataclasses.Field[Any]]:
    """The declared options of a component, with those of its base classes first.

    Raises:
        ComponentError: if the class declares options but is not a dataclass.
    """
    require_dataclass(cls)
    return [field for field in dataclasses.fields(cls) if field.init and "help" in field.metadata]


def defaults(cls: type[Options]) -> dict[str, Any]:
    """The plain default values for Hydra's schema, with nested options as nested dicts."""

    def plain(value: Any) -> Any:
        return value.schema() if isinstance(value, Options) else copy.deepcopy(value)

    options = cls()
    return {field.name: plain(getattr(options, field.name)) for field in option_fields(cls)}


def as_plain(options: Options) -> dict[str, Any]:
    """The options as plain containers. Nested components include their name."""

    def plain(value: Any) -> Any:
        named = {"name": value.name} if isinstance(value, Options) and value.name else {}
        return named | as_plain(value) if isinstance(value, Options) else copy.deepcopy(value)

    return {field.name: plain(getattr(options, field.name)) for field in option_fields(type(options))}


def identifying(options: Options) -> dict[str, Any]:
    """The options as in `as_plain`, except those that are left at a default value that is not part of a run's identity."""
    plain = as_plain(options)
    for field in option_fields(type(options)):
        value = getattr(options, field.name)
        if isinstance(value, Options):
            plain[field.name] = ({"name": value.name} if value.name else {}) | identifying(value)
        elif not field.metadata["identifying"] and value == field.default:
            del plain[field.name]
    return plain


def type_name(hint: Any) -> str:
    """The name of a type in messages for users: ``a number``, ``true or false``, ``a list of names`` ..."""
    if _is_union(hint):
        return " or ".join(type_name(arg) for arg in get_args(hint))
    if get_origin(hint) is list:
        plural = {int: "whole numbers", float: "numbers", str: "names"}
        return f"a list of {plural.get(get_args(hint)[0], 'values')}"
    if isinstance(hint, type) and issubclass(hint, Options):
        return "a group of options"
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "a name", type(None): "null"}
    return plain.get(hint, str(hint))


_hints = functools.cache(typing.get_type_hints)


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (typing.Union, types.UnionType)


_WRONG = object()
#: Integers of this magnitude or more are refused, because arithmetic with them could overflow 64 bits.
_LARGEST = 10**18
#: The symbol and the comparison of each kind of bound.
_BOUNDS = {
    "minimum": (">=", operator.ge),
    "above": (">", operator.gt),
    "maximum": ("<=", operator.le),
    "below": ("<", operator.lt),
}


def _convert(value: Any, hint: Any) -> Any:
    """The value converted to the annotated type, or _WRONG if it has another type. Integers can become floats, sequences can
    become lists, and mappings can become nested options; nothing else is converted."""
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
        raise error.with_prefix(name) from None
    choices, limits = metadata["choices"], metadata["limits"]
    allowed = names(map(format_value, choices)) if choices else ""
    if converted is _WRONG:
        shown = "null" if value is None else truncate(repr(value), 100)
        if any(get_origin(kind) is list for kind in (hint, *get_args(hint))):
            is_item = isinstance(value, str) and (choices is None or value in choices)
            wanted = f"a list (of {allowed})" if choices else type_name(hint)
            raise OptionError(name, f"={shown} is not {wanted}", f"=[{value}]" if is_item else "")
        wanted = f"one of {allowed}" if choices else type_name(hint)
        raise OptionError(name, f"={shown} is not {wanted}", _name_suggestion(value, hint))
    for item in converted if isinstance(converted, list) else [converted]:
        chosen = item.partition(":")[0] if metadata["with_options"] and isinstance(item, str) else item
        if choices is not None and item is not None and chosen not in choices:
            problem = f"is not one of {allowed}{nearest(str(chosen), map(format_value, choices))}"
            if not allowed:  # for example, callbacks, of which fa-bench itself has none
                problem = "does not exist, because none are registered; pass plugins=[MODULE] to include those of a module"
            raise OptionError(name, f"={truncate(str(item), 100)} {problem}")
        if isinstance(item, float) and not math.isfinite(item):
            raise OptionError(name, f"={item} is not a finite number")
        if isinstance(item, int) and abs(item) >= _LARGEST:
            raise OptionError(name, f"={truncate(repr(item), 100)} is out of range (allowed: whole numbers of at most 18 digits)")
        if isinstance(item, (int, float)) and not all(_BOUNDS[key][1](item, bound) for key, bound in limits.items()):
            raise OptionError(name, f"={item} is out of range (allowed: {_range_text(limits)})")
    return converted


def _name_suggestion(value: Any, hint: Any) -> str:
    """``.name=VALUE`` if the value of a nested component is the name of one of its kinds, and an empty string otherwise."""
    is_kind = isinstance(value, str) and isinstance(hint, type) and issubclass(hint, Options) and value in hint.kinds
    return f".name={value}" if is_kind else ""


def limits_text(field: dataclasses.Field[Any]) -> str:
    """The allowed values of an option as text, such as ``one of a, b`` or ``> 0 and <= 1``. The text is empty if only the type
    restricts the values."""
    choices, limits = field.metadata["choices"], field.metadata["limits"]
    return "; ".join(filter(None, [choices and f"one of {names(map(format_value, choices))}", _range_text(limits)]))


def _range_text(limits: Mapping[str, float]) -> str:
    return " and ".join(f"{_BOUNDS[key][0]} {bound:g}" for key, bound in limits.items())
